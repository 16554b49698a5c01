"""PruneFL (Jiang et al., TNNLS 2022): keeps what lowers the loss most for the time that it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from feddip_mpi import masks, server
from feddip_mpi.codec import Upload
from feddip_mpi.local import LocalHook, LocalTrainer
from feddip_mpi.methods.base import Method, Opening, Seen, untrained_at_the_end
from feddip_mpi.models import work
from feddip_mpi.schedules import RoundPlan
from feddip_mpi.settings import Config
from feddip_mpi.streams import stream
from feddip_mpi.vector import BoundModel, Layout

_BEFORE = 1 << 30  # rounds before the federation: their random streams are no round's


class PruneFL(Method):
    """One client prunes first; then the server reconfigures from aggregated squared gradients."""

    summary = "keeps the largest squared gradients per time cost; weights that come back start at zero"
    returns = True
    any_residual = False

    def __init__(self, config: Config, model: nn.Module, layout: Layout, input_shape: tuple[int, ...]) -> None:
        super().__init__(config, model, layout, input_shape)
        used = work.uses(model, input_shape, layout.prunable_names)
        # As in the paper's own table of times, the first layer's computing is never saved, so none of it is a weight's.
        counted = [0, *(used[name] for name in layout.prunable_names[1:])]
        self._costs = costs(counted, layout.prunable_sizes, config.prunefl.computing)

    @classmethod
    def first_sparsity(cls, config: Config) -> float:
        return config.sparsity.initial if config.prunefl.first_rounds else super().first_sparsity(config)

    @classmethod
    def ends_at_final(cls, config: Config) -> bool:
        return config.prunefl.size == "sparsity"

    @classmethod
    def counts_are_known(cls, config: Config) -> bool:
        return config.prunefl.size == "sparsity"

    def caution(self) -> str | None:
        return untrained_at_the_end(self.config)

    def opening(self) -> Opening | None:
        c = self.config
        if not c.prunefl.first_rounds:
            return super().opening()
        client = int(stream(c.seed, "the first client").integers(c.clients))
        return Opening((client,), (self.layout.size, self.layout.prunable), self._prune_alone)

    def _prune_alone(
        self, trainer: LocalTrainer, weights: Tensor, samples: np.ndarray, client: int, give_up: Callable[[], bool]
    ) -> Sequence[Tensor]:
        """Local rounds, each followed by a cut; returns the update [n] and the scores [P] before the last cut."""
        c, count = self.config, self.config.prunefl.first_rounds
        mask = torch.ones(self.layout.prunable, dtype=torch.bool, device=weights.device)
        current, scores = weights, torch.zeros(0)
        assert trainer.hook is not None
        trainer.hook.begin_round(0, updates_mask=True)
        for r in range(count):
            result = trainer.train(current, mask, samples, c.learning_rate, 0.0, _BEFORE + r, client, give_up)
            current, scores = current + result.update, result.extras[0]
            if r + 1 < count:
                mask = self._chosen(current, scores, mask, c.sparsity.initial * (r + 1) / count, 0)
                current = server.pruned(current, mask)
        return [current - weights, scores]

    def start(self, weights: Tensor, opened: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The model and the mask of the client that pruned alone."""
        if not self.config.prunefl.first_rounds:
            return super().start(weights, opened)
        trained = weights + opened[0]
        # Outside the client's last mask both parts of the sum are the same number: exactly zero.
        left = trained[: self.layout.prunable] != 0
        return trained, self._chosen(trained, opened[1], left, self.config.sparsity.initial, 0)

    def begin(self, weights: Tensor, opened: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        # What one client has trained is not rescaled.
        return self.start(weights, opened) if self.config.prunefl.first_rounds else super().begin(weights, opened)

    def hook(self, bound: BoundModel) -> LocalHook:
        return _SquaredGradients(self.layout.prunable, bound.vector.device)

    @classmethod
    def extras(cls, config: Config, plan: RoundPlan, upload: Upload) -> tuple[Upload, ...]:
        """Squared gradients of all weights, in rounds that update the mask."""
        return (Upload("fp32", dense=True),) if plan.update_mask else ()

    def cut(self, seen: Seen) -> Tensor:
        return self._chosen(seen.value, seen.extras[0], seen.old.mask, seen.plan.sparsity, seen.plan.round + 1)

    def _chosen(self, value: Tensor, scores: Tensor, old: Tensor, sparsity: float, finished: int) -> Tensor:
        rule, size = self.config.prunefl, self.layout.prunable
        keep = masks.kept_count(size, sparsity) if rule.size == "sparsity" else None
        if keep is not None:
            keep = min(keep, int(old.sum()))  # a mask never grows in size
        removable = rule.removable * 0.5 ** (finished / self.config.rounds)  # the authors' half-life is the whole run
        fixed = not_removable(value[:size], old, self.layout.prunable_sizes, removable, keep)
        per_time = scores.double() / self._costs.to(scores.device)
        if keep is not None:
            return fixed | masks.select_largest(per_time.masked_fill(fixed, -1.0), keep - int(fixed.sum()))
        return adaptive(scores, self._costs.to(scores.device), fixed, rule.overhead)


def costs(uses: Sequence[int], sizes: Sequence[int], computing: float) -> Tensor:
    """Time of each weight, float64 [P], in units of the dense model's: what sending takes, and what each use adds.

    Args:
        uses: multiplications per image with one weight of each layer (`models.work`).
        sizes: weights of each layer.
        computing: time of one use over that of sending a weight.
    """
    per_weight = [1 + computing * used for used in uses]
    total = sum(cost * size for cost, size in zip(per_weight, sizes, strict=True))
    return torch.cat(
        [torch.full((size,), cost / total, dtype=torch.float64) for size, cost in zip(sizes, per_weight, strict=True)]
    )


def not_removable(value: Tensor, old: Tensor, sizes: Sequence[int], removable: float, keep: int | None) -> Tensor:
    """bool [P]: each layer's largest kept weights, which stay whatever their gradients say.

    All but the share `removable`, rounded down; fewer where the whole mask is to shrink to `keep` weights.
    """
    shrink = 1.0 if keep is None else min(1.0, keep / max(1, int(old.sum())))

    def protected(count: int) -> int:
        return count - int(removable * count) if shrink == 1.0 else int(shrink * (1 - removable) * count)

    layers = zip(value.abs().split(list(sizes)), old.split(list(sizes)), strict=True)
    return torch.cat([masks.select_largest(v.masked_fill(~m, -1.0), protected(int(m.sum()))) for v, m in layers])


def adaptive(scores: Tensor, costs: Tensor, fixed: Tensor, overhead: float) -> Tensor:
    """The mask that maximises sum of scores over time: PruneFL's greedy rule.

    Weights join in descending order of score / cost while that is above the ratio of what has joined so far.

    Args:
        scores: float32 [P], squared gradients.
        costs: float64 [P].
        fixed: bool [P], joined from the start.
        overhead: time that no choice saves, in the unit of `costs`.
    """
    place = scores.device
    # On the CPU: sums of this kind have no deterministic form on a GPU.
    gain, costs, fixed = scores.double().cpu(), costs.cpu(), fixed.cpu()
    order = torch.argsort(torch.where(fixed, -1.0, gain / costs), descending=True, stable=True)
    order = order[: int((~fixed).sum())]
    gains = gain[fixed].sum() + torch.cat([gain.new_zeros(1), gain[order].cumsum(0)])
    times = overhead + costs[fixed].sum() + torch.cat([costs.new_zeros(1), costs[order].cumsum(0)])
    pays = gain[order] * times[:-1] > gains[:-1] * costs[order]
    joined = int(pays.to(torch.int8).cumprod(0).sum())
    out = fixed.clone()
    out[order[:joined]] = True
    return out.to(place)


class _SquaredGradients(LocalHook):
    """The mean of g^2 over a client's batches, for all coordinates, in rounds that ask for it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._sum = torch.zeros(size, device=device)
        self._wanted, self._weight = False, 1.0

    def begin_round(self, round: int, updates_mask: bool) -> None:
        self._wanted = updates_mask

    def begin(self, weights: Tensor, kept: Tensor, batches: int) -> None:
        self._sum.zero_()
        self._weight = 1 / batches

    def gradient(self, gradient: Tensor, weights: Tensor, active: Tensor, kept: Tensor, batch: int) -> None:
        if self._wanted:
            own = gradient[: self._sum.numel()]
            self._sum.addcmul_(own, own, value=self._weight)

    def end(self, weights: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        return (self._sum.clone(),) if self._wanted else ()
