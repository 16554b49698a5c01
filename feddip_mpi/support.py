"""The coordinates that travel without indices, because both sides know them: a mask with what is derived from it once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from feddip_mpi import masks


@dataclass(frozen=True)
class Support:
    """A mask over the prunable weights, ready for gathering and scattering.

    Attributes:
        mask: bool [P].
        positions: int64 [count], ascending; None where everything is kept.
        count: kept weights.
        digest: CRC-32 of the mask, to notice ranks whose masks differ.
    """

    mask: Tensor
    positions: Tensor | None
    count: int
    digest: int

    @classmethod
    def of(cls, mask: Tensor) -> Support:
        """Derive everything from a mask bool [P]."""
        positions = mask.nonzero().squeeze(1)
        count = positions.numel()
        return cls(mask, None if count == mask.numel() else positions, count, masks.digest(mask))

    @property
    def size(self) -> int:
        """P."""
        return self.mask.numel()

    def whole(self) -> Support:
        """The support of an upload that carries every prunable weight; its digest still is the mask's."""
        return self if self.positions is None else Support(self.mask, None, self.size, self.digest)

    def take(self, vector: Tensor) -> Tensor:
        """The kept values of `vector` [>= P], packed: [count]; a view where everything is kept."""
        return vector[: self.size] if self.positions is None else vector.index_select(0, self.positions)

    def put(self, vector: Tensor, packed: Tensor) -> None:
        """Write packed values [count] to their places in `vector` [>= P]."""
        if self.positions is None:
            vector[: self.size] = packed
        else:
            vector.index_copy_(0, self.positions, packed)

    def add(self, vector: Tensor, packed: Tensor) -> None:
        """Add packed values [count] at their places in `vector` [>= P]."""
        if self.positions is None:
            vector[: self.size].add_(packed)
        else:
            vector.index_add_(0, self.positions, packed)

    def rank(self, coordinate: int) -> int:
        """How many kept weights lie before `coordinate`."""
        if self.positions is None:
            return min(coordinate, self.size)
        return int(torch.searchsorted(self.positions, coordinate))

    def coordinate(self, rank: int) -> int:
        """The place of the `rank`-th kept weight; P where there are no more."""
        if rank >= self.count:
            return self.size
        return rank if self.positions is None else int(self.positions[rank])
