"""FedRTS (Huang et al., NeurIPS 2025): each weight's chance to stay is a Beta distribution; masks are drawn from these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from feddip_mpi import masks
from feddip_mpi.codec import Upload
from feddip_mpi.local import LocalHook
from feddip_mpi.methods.base import Seen, untrained_at_the_end
from feddip_mpi.methods.exchanging import Exchanging, exchangeable
from feddip_mpi.schedules import RoundPlan, last_mask_update
from feddip_mpi.settings import Config
from feddip_mpi.streams import stream
from feddip_mpi.vector import BoundModel


class FedRTS(Exchanging):
    """Sparse from the start with ERK densities; the server draws masks by Thompson sampling."""

    summary = "starts from a random ERK mask; clients vote on weights, the server draws masks by Thompson sampling"
    names_only = True

    @classmethod
    def first_share(cls, config: Config) -> float:
        return config.fedrts.adjust

    def caution(self) -> str | None:
        return untrained_at_the_end(self.config)

    def first_memories(self, weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Nothing is known: Beta(1, 1) is the uniform distribution."""
        ones = torch.ones(self.layout.prunable, device=weights.device)
        return {"alpha": ones, "beta": ones.clone()}

    def hook(self, bound: BoundModel) -> LocalHook:
        return _Votes(self.config, self.layout.prunable_sizes, bound.vector.device)

    @classmethod
    def extras(cls, config: Config, plan: RoundPlan, upload: Upload) -> tuple[Upload, ...]:
        """Votes: a bit for every weight in the mask; those outside by their indices, in rounds that update the mask."""
        return (replace(upload, values="bit"),) if observed(config, plan.round, plan.update_mask) else ()

    def cut(self, seen: Seen) -> Tensor:
        """The largest samples of each layer, as many as it had."""
        alpha, beta = (x.double().cpu().numpy() for x in self._posterior(seen))
        # Drawn by numpy on the host: the same numbers on every rank, whatever its device.
        drawn = stream(self.config.seed, "thompson sampling", seen.plan.round).beta(alpha, beta)
        samples = torch.from_numpy(drawn).to(seen.value.device)
        return self.largest_of_each_layer(samples, seen.old.mask)

    def remember(self, seen: Seen, mask: Tensor) -> dict[str, Tensor]:
        if not observed(self.config, seen.plan.round, seen.plan.update_mask):
            return dict(seen.memories)
        alpha, beta = self._posterior(seen)
        return {"alpha": alpha, "beta": beta}

    def _posterior(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """alpha and beta float32 [P] after the round's votes."""
        rule, old = self.config.fedrts, seen.old.mask
        share = self.exchanged_share(self.config, seen.plan.round)
        own = core(seen.value[: old.numel()], old, self.layout.prunable_sizes, share)
        outcome = outcomes(seen.extras[0], own, old, rule.mix)
        # In other rounds nobody names what is outside the mask, and nothing is learnt of it.
        weight = rule.scale if seen.plan.update_mask else old * rule.scale
        return seen.memories["alpha"] + weight * outcome, seen.memories["beta"] + weight * (1 - outcome)


def observed(config: Config, t: int, update_mask: bool) -> bool:
    """Whether clients vote in round t."""
    last = last_mask_update(config.rounds, config.mask.freeze_after)
    return update_mask or (config.fedrts.observe == "all" and t + 1 <= last)


def _layers(
    values: Tensor, kept: Tensor, sizes: Sequence[int], share: float
) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Of each layer: |values|, mask, how many weights it keeps, how many of these may be exchanged."""
    for v, m in zip(values.abs().split(list(sizes)), kept.split(list(sizes)), strict=True):
        count = int(m.sum())
        yield v, m, count, exchangeable(share, count, m.numel())


def core(weights: Tensor, kept: Tensor, sizes: Sequence[int], share: float) -> Tensor:
    """bool [P]: each layer's largest kept weights, all but those that may be exchanged.

    Args:
        weights: float32 [P].
        kept: bool [P].
        sizes: of the layers.
        share: of each layer's kept weights, rounded down, that may be exchanged; never more than stand outside.
    """
    layers = _layers(weights, kept, sizes, share)
    return torch.cat([masks.select_largest(v.masked_fill(~m, -1.0), count - moved) for v, m, count, moved in layers])


def wanted(gradient: Tensor, kept: Tensor, sizes: Sequence[int], share: float) -> Tensor:
    """bool [P]: the weights outside the mask with each layer's largest gradients, as many as may be exchanged; see `core`."""
    layers = _layers(gradient, kept, sizes, share)
    return torch.cat([masks.select_largest(v.masked_fill(m, -1.0), moved) for v, m, _, moved in layers])


def outcomes(votes: Tensor, own: Tensor, kept: Tensor, mix: float) -> Tensor:
    """X float32 [P] in [0, 1]: what speaks for each weight.

    Args:
        votes: float32 [P], sum_k p_k of the clients' votes.
        own: bool [P], what the server would keep by the magnitudes of the average.
        kept: bool [P]; outside, the server has no gradient to judge by: 0.5.
        mix: share of the server's own judgement.
    """
    aggregated = torch.where(kept, own.to(votes.dtype), torch.full_like(votes, 0.5))
    return (mix * aggregated + (1 - mix) * votes).clamp_(0, 1)


class _Votes(LocalHook):
    """What a client would keep: its largest weights and, outside the mask, its largest gradients."""

    def __init__(self, config: Config, sizes: Sequence[int], device: torch.device) -> None:
        self._config, self._sizes = config, sizes
        self._sum = torch.zeros(sum(sizes), device=device)
        self._share, self._votes, self._wants, self._first = 0.0, False, False, 0

    def begin_round(self, round: int, updates_mask: bool) -> None:
        self._share = FedRTS.exchanged_share(self._config, round)
        self._votes, self._wants = observed(self._config, round, updates_mask), updates_mask

    def begin(self, weights: Tensor, kept: Tensor, batches: int) -> None:
        self._sum.zero_()
        self._first = batches - batches // self._config.local_epochs

    def gradient(self, gradient: Tensor, weights: Tensor, active: Tensor, kept: Tensor, batch: int) -> None:
        if self._wants and batch >= self._first:
            self._sum.add_(gradient[: self._sum.numel()])

    def end(self, weights: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        if not self._votes:
            return ()
        mask = kept > 0
        votes = core(weights[: mask.numel()], mask, self._sizes, self._share)
        if self._wants:
            votes |= wanted(self._sum, mask, self._sizes, self._share)
        return (votes.to(torch.float32),)
