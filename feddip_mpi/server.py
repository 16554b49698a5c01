"""The step that every rank repeats: aggregate, renew the mask, prune. Pure tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from feddip_mpi import masks
from feddip_mpi.schedules import RoundPlan


@dataclass(frozen=True)
class Server:
    """The replicated server.

    Attributes:
        round: finished rounds.
        weights: W, float32 [n], the dense memory.
        mask: bool [P].
    """

    round: int
    weights: Tensor
    mask: Tensor


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


def aggregate(updates: Iterable[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """sum_k p_k q_k in float32, added up in the order given: client order, so the rank count cannot matter."""
    total = torch.zeros_like(like)
    for weight, update in updates:
        total.add_(update, alpha=weight)
    return total


def step(server: Server, combined: Tensor, plan: RoundPlan, memory: str) -> tuple[Server, StepReport]:
    """One server step of docs/method.md.

    Args:
        server: state before the round.
        combined: float32 [n], sum_k p_k q_k.
        plan: asks for a new mask or not.
        memory: "on" keeps the pruned mass in W, "off" keeps the pruned model only, "published" cuts the new mask
            from the already pruned model, so that masks nest and nothing can grow back.
    """
    size = server.mask.numel()
    value = server.weights + combined
    if memory == "published":
        value = pruned(value, server.mask)
    magnitude = value[:size].abs()
    if memory == "published":
        magnitude.masked_fill_(~server.mask, -1.0)  # a kept weight of 0 still goes before every pruned one
    mask = new_mask(magnitude, server.mask, plan) if plan.update_mask else server.mask
    weights = value if memory == "on" else pruned(value, mask)
    report = StepReport(
        update_norm=float(torch.linalg.vector_norm(combined)),
        pruning_error=_pruning_error(value[:size], mask),
        grown=int((mask & ~server.mask).sum()),
        pruned=int((server.mask & ~mask).sum()),
    )
    return replace(server, round=plan.round + 1, weights=weights, mask=mask), report


def new_mask(magnitude: Tensor, old: Tensor, plan: RoundPlan) -> Tensor:
    """The (1 - s_t) share with the largest |v|, global across layers, exact, ties by index.

    A mask never grows in size: a run extended by `resume --set rounds=N` does not undo the pruning it has reached.
    """
    keep = min(masks.kept_count(old.numel(), plan.sparsity), int(old.sum()))
    return masks.select_largest(magnitude, keep)


def _pruning_error(value: Tensor, mask: Tensor) -> float:
    total = float(value.square().sum())
    return float(value[~mask].square().sum()) / total if total > 0 else 0.0
