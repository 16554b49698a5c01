"""PruneTrain (Lym et al., SC 2019): group lasso while training, and channels that it has emptied are removed."""

from __future__ import annotations

from math import log, prod

import torch
from torch import Tensor, nn

from feddip_mpi import masks
from feddip_mpi.errors import InputError
from feddip_mpi.local import LocalHook
from feddip_mpi.methods import channels
from feddip_mpi.methods.base import Method, Seen
from feddip_mpi.models import work
from feddip_mpi.settings import Config
from feddip_mpi.vector import BoundModel, Layout, flatten


class PruneTrain(Method):
    """Structured: what is removed is a whole channel, in the layer that makes it and in the one that takes it."""

    summary = "group lasso over channels; whole channels are removed, the network becomes smaller"

    def __init__(self, config: Config, model: nn.Module, layout: Layout, input_shape: tuple[int, ...]) -> None:
        super().__init__(config, model, layout, input_shape)
        self._shapes = layout.prunable_shapes
        self.links = channels.chain(model, input_shape, layout.prunable_names)
        if not self.links:
            raise InputError(
                "method: prunetrain removes channels between two prunable layers, and this model has one such layer; "
                "take another method or model"
            )
        used = work.uses(model, input_shape, layout.prunable_names)
        self._uses = [used[name] for name in layout.prunable_names]
        (last,) = set(range(len(self._shapes))) - {link.producer for link in self.links}
        lasso = group_lasso(flatten(model, layout), self._shapes, self.links)
        self.strength = strength(config.prunetrain.ratio, log(self._shapes[last][0]), lasso)

    @classmethod
    def first_sparsity(cls, config: Config) -> float:
        return 0.0

    @classmethod
    def ends_at_final(cls, config: Config) -> bool:
        return config.prunetrain.cut == "sparsity"

    @classmethod
    def counts_are_known(cls, config: Config) -> bool:
        return False

    def opening(self) -> None:
        return None

    def hook(self, bound: BoundModel) -> LocalHook:
        return _GroupLasso(self.strength, self._shapes, self.links)

    def cut(self, seen: Seen) -> Tensor:
        kept = channels.kept_channels(seen.old.mask, self._shapes, self.links)
        rule = self.config.prunetrain
        if rule.cut == "threshold":
            left = above(seen.value, kept, self._shapes, self.links, rule.threshold)
        else:
            target = masks.kept_count(self.layout.prunable, seen.plan.sparsity)
            left = fewest_lost(seen.value, kept, self._shapes, self.links, target)
        return channels.mask_of(left, self._shapes, self.links)

    def facts(self, mask: Tensor) -> dict[str, object]:
        """Channels, parameters and multiplications per image of the smaller network."""
        kept = channels.kept_channels(mask, self._shapes, self.links)
        removed = sum(int((~left).sum()) for left in kept)
        by_layer = [int(part.sum()) for part in mask.split(list(self.layout.prunable_sizes))]
        names, trained = self.layout.prunable_names, set(self.layout.names[: self.layout.parameter_tensors])

        def of_each_channel(link: channels.Link) -> int:
            """Parameters of one channel that are no weights of the two layers."""
            bias = f"{names[link.producer].removesuffix('weight')}bias"
            return len(trained & {bias, *(f"{norm}.{name}" for norm in link.norms for name in ("weight", "bias"))})

        gone = sum(int((~left).sum()) * of_each_channel(link) for link, left in zip(self.links, kept, strict=True))
        return {
            "channels_removed": removed,
            "channels": {
                names[link.producer]: [int(left.sum()), link.channels]
                for link, left in zip(self.links, kept, strict=True)
            },
            "parameters_left": sum(by_layer) + (self.layout.parameters - self.layout.prunable) - gone,
            "parameters": self.layout.parameters,
            "multiplications_left": sum(u * count for u, count in zip(self._uses, by_layer, strict=True)),
            "multiplications": sum(u * prod(s) for u, s in zip(self._uses, self._shapes, strict=True)),
        }


def strength(ratio: float, loss: float, lasso: float) -> float:
    """lambda such that lambda * lasso is `ratio` of loss + lambda * lasso (PruneTrain's rule, at the first step)."""
    return ratio / (1 - ratio) * loss / lasso


def group_lasso(vector: Tensor, shapes: tuple[tuple[int, ...], ...], links: tuple[channels.Link, ...]) -> float:
    """Sum of ||group||_2 over what makes and what takes each channel."""
    total = 0.0
    for link in links:
        made, taken = channels.groups(vector, shapes, link)
        total += float(made.norm(dim=1).sum()) + float(taken.norm(dim=(0, 2)).sum())
    return total


def above(
    vector: Tensor, kept: list[Tensor], shapes: tuple[tuple[int, ...], ...], links: tuple[channels.Link, ...],
    threshold: float,
) -> list[Tensor]:  # fmt: skip
    """The kept channels with a weight of at least `threshold` on one side or the other; in each layer one at least."""
    out = []
    for link, left in zip(links, kept, strict=True):
        made, taken = channels.groups(vector, shapes, link)
        largest = torch.maximum(made.abs().amax(dim=1), taken.abs().amax(dim=(0, 2))).masked_fill(~left, -1.0)
        out.append((largest >= threshold) | (torch.arange(link.channels, device=largest.device) == largest.argmax()))
    return out


def fewest_lost(
    vector: Tensor, kept: list[Tensor], shapes: tuple[tuple[int, ...], ...], links: tuple[channels.Link, ...],
    target: int,
) -> list[Tensor]:  # fmt: skip
    """Remove channels, the least important one first, until at most `target` weights are left.

    A channel is as important as the lesser of the root mean squares of what makes it and of what takes it (among the
    kept weights): either being zero, the channel does nothing. Each layer keeps one channel at least. Ties go by the
    order of layers, then channels.
    """
    left = [k.clone() for k in kept]
    counts = [int(k.sum()) for k in left]
    order = []
    for place, (link, k) in enumerate(zip(links, left, strict=True)):
        made, taken = channels.groups(vector, shapes, link)
        rms = torch.minimum(_rms(made, (1,)), _rms(taken, (0, 2))).tolist()
        order += [(rms[channel], place, channel) for channel in k.nonzero().squeeze(1).tolist()]
    for _, place, channel in sorted(order):
        if channels.weights_left(counts, shapes, links) <= target:
            break
        if counts[place] > 1:
            left[place][channel] = False
            counts[place] -= 1
    return left


def _rms(group: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Root mean square over the weights that are not zero, as pruned ones are."""
    squares, count = group.double().square().sum(dim=dims), (group != 0).sum(dim=dims).clamp(min=1)
    return (squares / count).sqrt()


class _GroupLasso(LocalHook):
    """Adds lambda * w_G / ||w_G|| for every group, 0 where the norm is 0."""

    def __init__(self, strength: float, shapes: tuple[tuple[int, ...], ...], links: tuple[channels.Link, ...]) -> None:
        self._strength, self._shapes, self._links = strength, shapes, links

    def gradient(self, gradient: Tensor, weights: Tensor, active: Tensor, kept: Tensor, batch: int) -> None:
        for link in self._links:
            for grown, values, dims in zip(
                channels.groups(gradient, self._shapes, link), channels.groups(active, self._shapes, link),
                ((1,), (0, 2)), strict=True,
            ):  # fmt: skip
                norm = torch.linalg.vector_norm(values, dim=dims, keepdim=True)
                grown.addcmul_(values, torch.where(norm > 0, self._strength / norm, torch.zeros_like(norm)))
