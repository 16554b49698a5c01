"""FedDST (Bibikar et al., AAAI 2022): clients drop and grow weights, the server merges their masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from feddip_mpi import masks
from feddip_mpi.codec import Upload
from feddip_mpi.local import LocalHook
from feddip_mpi.methods.base import Seen
from feddip_mpi.methods.exchanging import Exchanging, exchangeable
from feddip_mpi.schedules import RoundPlan
from feddip_mpi.server import Server
from feddip_mpi.settings import Config
from feddip_mpi.vector import BoundModel


class FedDST(Exchanging):
    """Sparse from the start with ERK densities; masks move in rounds that update the mask."""

    summary = "starts from a random ERK mask, clients drop by magnitude and grow by gradient, the server merges"

    @classmethod
    def first_share(cls, config: Config) -> float:
        return config.feddst.drop

    def hook(self, bound: BoundModel) -> LocalHook:
        return _Exchange(self.config, self.layout.prunable_sizes)

    @classmethod
    def extras(cls, config: Config, plan: RoundPlan, upload: Upload) -> tuple[Upload, ...]:
        """Each client's mask, a bit for every coordinate that travels."""
        return (replace(upload, values="bit"),) if plan.update_mask else ()

    def paid(self, srv: Server, memories: Mapping[str, Tensor], extras: Sequence[Tensor], since: int) -> Tensor | None:
        """Nor what is owed to weights that the client has just dropped: it has no part in their mean."""
        paid = super().paid(srv, memories, extras, since)
        return paid if paid is None or not extras else paid & (extras[0] > 0)

    def merge(self, seen: Seen) -> Tensor:
        """Each weight is the mean over the clients that kept it: v <- W + (v - W) / sum_k p_k m_k, 0 where none did.

        The others send a zero update, whose code costs the mean no accuracy.
        """
        if not seen.plan.update_mask:
            return seen.value
        votes, value = seen.extras[0], seen.value.clone()
        prunable, before = value[: votes.numel()], seen.weights[: votes.numel()]
        mean = before + (prunable - before) / votes.clamp(min=1e-30)
        prunable.copy_(torch.where(votes > 0, mean, torch.zeros_like(votes)))
        return value

    def cut(self, seen: Seen) -> Tensor:
        """The largest of each layer, as many as it had, among the weights that a client kept."""
        votes = seen.extras[0]
        magnitude = seen.value[: votes.numel()].abs().masked_fill_(votes <= 0, -1.0)
        return self.largest_of_each_layer(magnitude, seen.old.mask)


def exchanged(weights: Tensor, gradient: Tensor, kept: Tensor, sizes: Sequence[int], share: float) -> Tensor:
    """A client's new mask: in each layer the smallest kept weights leave, as many with the largest gradients enter.

    Args:
        weights, gradient: float32 [P].
        kept: bool [P].
        sizes: of the layers.
        share: of each layer's kept weights, rounded down; never more than stand outside.

    Returns:
        bool [P], as many kept in each layer as before.
    """
    layers = []
    for w, g, m in zip(weights.split(list(sizes)), gradient.split(list(sizes)), kept.split(list(sizes)), strict=True):
        count = int(m.sum())
        moved = exchangeable(share, count, m.numel())
        stay = masks.select_largest(w.abs().masked_fill(~m, -1.0), count - moved)
        enter = masks.select_largest(g.abs().masked_fill(m, -1.0), moved)
        layers.append(stay | enter)
    return torch.cat(layers)


class _Exchange(LocalHook):
    """Exchanges a client's weights once, part of the way through its batches."""

    def __init__(self, config: Config, sizes: Sequence[int]) -> None:
        self._config, self._sizes = config, sizes
        self._updates, self._share, self._at = False, 0.0, 0
        self._received: Tensor | None = None

    def begin_round(self, round: int, updates_mask: bool) -> None:
        self._updates = updates_mask
        self._share = FedDST.exchanged_share(self._config, round)

    def begin(self, weights: Tensor, kept: Tensor, batches: int) -> None:
        self._at = int(self._config.feddst.after * batches)
        self._received = weights[: kept.numel()].clone() if self._updates else None

    def gradient(self, gradient: Tensor, weights: Tensor, active: Tensor, kept: Tensor, batch: int) -> None:
        if not self._updates or batch != self._at:
            return
        size = kept.numel()
        new = exchanged(weights[:size], gradient[:size], kept > 0, self._sizes, self._share)
        kept.copy_(new)
        weights[:size].mul_(kept)

    def end(self, weights: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        # An update that was put off may come when nothing is exchanged any more; the server asks for the masks all the same.
        if self._received is None:
            return ()
        prunable = weights[: kept.numel()]
        prunable.copy_(torch.where(kept > 0, prunable, self._received))  # what was dropped sends no update
        self._received = None
        return (kept.clone(),)
