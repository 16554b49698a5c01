"""The step that every rank repeats: aggregate, renew the mask, prune. Pure tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from feddip_mpi import masks
from feddip_mpi.aggregate import Aggregate
from feddip_mpi.schedules import RoundPlan
from feddip_mpi.support import Support


@dataclass(frozen=True)
class Server:
    """The replicated server.

    Attributes:
        round: finished rounds.
        weights: W, float32 [n], the dense memory.
        support: of the mask [P]; derived once for each mask.
    """

    round: int
    weights: Tensor
    support: Support

    @classmethod
    def of(cls, round: int, weights: Tensor, mask: Tensor) -> Server:
        """A server from its mask bool [P]."""
        return cls(round, weights, Support.of(mask))

    @property
    def mask(self) -> Tensor:
        return self.support.mask


@dataclass(frozen=True)
class StepReport:
    """What the server step measured.

    Attributes:
        update_norm: ||sum_k p_k q_k||.
        pruning_error: ||v - m*v||^2 / ||v||^2 over the prunable weights, with the new mask (FedDIP's theorem).
        grown, pruned: weights that entered and left the mask.
    """

    update_norm: float
    pruning_error: float
    grown: int
    pruned: int


def pruned(weights: Tensor, mask: Tensor) -> Tensor:
    """m*v: a copy of float32 [n] with exact positive zeros where the mask bool [P] is False."""
    out = weights.clone()
    out[: mask.numel()].masked_fill_(~mask, 0.0)
    return out


def step(
    server: Server,
    combined: Aggregate,
    plan: RoundPlan,
    memory: str,
    merge: Callable[[Tensor], Tensor] | None = None,
    cut: Callable[[], Tensor | None] | None = None,
    select: Callable[[Tensor, int], Tensor] = masks.select_largest,
) -> tuple[Server, StepReport]:
    """One server step of docs/method.md.

    Args:
        server: state before the round.
        combined: sum_k p_k q_k.
        plan: asks for a new mask or not.
        memory: "on" keeps the pruned mass in W, "off" keeps the pruned model only, "published" cuts the new mask
            from the already pruned model, so that masks nest and nothing can grow back.
        merge: what a method makes of v [n], W + the sum.
        cut: the new mask bool [P] of a method; where it gives none, or there is none, `new_mask`.
        select: the mask bool [P] of (|v| [P], -1 where a weight may not be kept; how many are kept).
    """
    size, support = server.mask.numel(), server.support
    value = server.weights.clone()
    combined.add_to(value)
    if merge is not None:
        value = merge(value)
    if memory == "published":
        value = pruned(value, server.mask)
    if plan.update_mask:
        magnitude = value[:size].abs()
        if memory == "published":
            magnitude.masked_fill_(~server.mask, -1.0)  # a kept weight of 0 still goes before every pruned one
        chosen = cut() if cut is not None else None
        support = Support.of(new_mask(magnitude, server.support, plan, select) if chosen is None else chosen)
    mask = support.mask
    report = StepReport(
        update_norm=combined.norm(),
        pruning_error=_pruning_error(value[:size], mask),
        grown=int((mask & ~server.mask).sum()) if plan.update_mask else 0,
        pruned=int((server.mask & ~mask).sum()) if plan.update_mask else 0,
    )
    if memory != "on":
        value = value.clone() if merge is not None else value  # a method may remember the value that it saw
        value[:size].masked_fill_(~mask, 0.0)
    return replace(server, round=plan.round + 1, weights=value, support=support), report


def new_mask(magnitude: Tensor, old: Support, plan: RoundPlan, select: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The (1 - s_t) share that `select` takes by |v|, exact.

    A mask never grows in size: a run extended by `resume --set rounds=N` does not undo the pruning it has reached.
    """
    keep = min(masks.kept_count(old.size, plan.sparsity), old.count)
    return select(magnitude, keep)


def _pruning_error(value: Tensor, mask: Tensor) -> float:
    total = float(torch.linalg.vector_norm(value)) ** 2
    return float(torch.linalg.vector_norm(value.masked_fill(mask, 0.0))) ** 2 / total if total > 0 else 0.0
