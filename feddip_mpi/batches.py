"""A data split on the device, and the batches of one client's round as gathers from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from feddip_mpi.data import augment

# A client's images are normalised once a round where they take no more than this as float32.
_NORMALISED_BYTES = 2**26


@dataclass(frozen=True)
class DeviceData:
    """A data split on the device.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        mean, std: float32 [1, C, 1, 1] in units of one grey level (0..255).
        channels_last: whether batches lie in channels-last memory order; otherwise they are contiguous.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    channels_last: bool = False

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 or float [B, C, H, W] as normalised float32, in the memory order of `channels_last`."""
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        out = (images.to(torch.float32, memory_format=order) - self.mean) / self.std
        if self.channels_last and out.shape[1] == 1:
            # One channel lies the same way in both orders and torch would take it for the other one.
            _, _, height, width = out.shape
            out = out.as_strided(out.shape, (height * width, 1, width, 1))
        return out

    def batch(
        self, chosen: Tensor, offsets: Tensor | None = None, flips: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised images and labels at int64 `chosen` [B]; augmented by what `augment.draw` gives, if that is given."""
        images = self.images.index_select(0, chosen)
        if offsets is not None and flips is not None:
            images = augment.standard(images, offsets, flips)
        return self.normalised(images), self.labels.index_select(0, chosen)


class Batches:
    """The batches of one client's round as gathers on the device.

    Images that are not augmented are normalised once for the round, if the client has few enough, and not in each epoch.
    """

    def __init__(
        self,
        data: DeviceData,
        samples: Tensor,
        order: Tensor,
        bounds: list[tuple[int, int]],
        crops: tuple[Tensor, Tensor] | None,
        ready: bool = True,
    ) -> None:
        """Prepare.

        Args:
            data: the training split.
            samples: int64, the client's indices into it.
            order: int64, places in `samples`, all epochs in a row.
            bounds: where each batch begins and ends in `order`.
            crops: offsets and flips for each of `order` (`augment.draw`), or none.
            ready: normalise now what is not augmented, for `gathered`.
        """
        self._data, self._order, self._bounds, self._crops = data, samples.index_select(0, order), bounds, crops
        self._places, self._ready = order, None
        if ready and crops is None and 4 * samples.numel() * data.images[0].numel() <= _NORMALISED_BYTES:
            # Height, width, channels: a gather of these keeps either memory order.
            all_of_them = data.normalised(data.images.index_select(0, samples))
            self._ready = all_of_them.permute(0, 2, 3, 1) if data.channels_last else all_of_them

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.gathered(batch) for batch in range(len(self)))

    def places(self, batch: int) -> tuple[Tensor, ...]:
        """What `DeviceData.batch` makes a batch of: where its images are, and how they are cropped and flipped."""
        start, stop = self._bounds[batch]
        return tuple(each[start:stop] for each in (self._order, *(self._crops or ())))

    def gathered(self, batch: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch."""
        if self._ready is None:
            return self._data.batch(*self.places(batch))
        start, stop = self._bounds[batch]
        images = self._ready.index_select(0, self._places[start:stop])
        labels = self._data.labels.index_select(0, self._order[start:stop])
        return images.permute(0, 3, 1, 2) if self._data.channels_last else images, labels


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Where the batches of one epoch begin and end.

    A last batch of a single image joins the one before it: batch normalisation has no statistics of one image.
    """
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))
