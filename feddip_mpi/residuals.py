"""What each client remembers of the part of its updates that it did not send (error feedback). Pure.

With `ef21` (Richtarik et al., NeurIPS 2021; partial participation: Fatkhullin et al., JMLR 2025) a client remembers a
reference h_k instead: what the server believes its update to be. It sends the compressed difference D_k - h_k, both
sides add what was sent to h_k, and the server's sum over ALL clients changes by the participants' differences only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from feddip_mpi.settings import UploadConfig
from feddip_mpi.support import Support


@dataclass(frozen=True)
class Residual:
    """One client's residual.

    Attributes:
        values: float32 [P], on the CPU or on the device that trains; with `ef21` the client's reference.
        round: t of the round in which the client last took part.
    """

    values: Tensor
    round: int


def recall(update: Tensor, residual: Residual | None, policy: UploadConfig, support: Support, round: int) -> None:
    """Add the old residual e_k to a client's update [n], in place, as it enters round `round`.

    `decay` shrinks it by `residual_decay` for every round the client was absent: stale residuals slow training
    under partial participation (Fed-EF, ICML 2023). `ef21` takes the reference off the support's coordinates.
    """
    if residual is None:
        return
    old = residual.values.to(update.device)
    if policy.residual == "ef21":
        support.add(update, -support.take(old))
        return
    factor = policy.residual_decay ** (round - residual.round - 1) if policy.residual == "decay" else 1.0
    update[: support.size].add_(old if factor == 1.0 else old * factor)


def remember(
    left: Tensor, sent: Tensor | None, old: Residual | None, policy: UploadConfig, support: Support, round: int
) -> Residual | None:
    """What the client keeps; None if nothing.

    Args:
        left: float32 [P], the part of update + old residual that did not travel. Not to be changed any more.
        sent: float32 [support.count], what the decoder returns for the support's coordinates; asked by `ef21` only.
        old: what it kept so far.
        policy, round: as in `recall`.
        support: of the coordinates that travelled without indices.
    """
    if policy.residual == "drop":
        return None
    kept = left
    if policy.residual == "in_mask_only":
        kept = torch.zeros_like(left)
        support.put(kept, support.take(left))
    elif policy.residual == "ef21":
        assert sent is not None
        kept = torch.zeros_like(left) if old is None else old.values.to(left.device, copy=True)
        support.add(kept, sent)
    if policy.residual_values == "bf16":
        # Rounded here and not in the store: a resumed run, whose residual comes from a checkpoint, must see the same.
        kept = kept.to(torch.bfloat16).to(torch.float32)
    return Residual(kept, round) if _any(kept) else None


def _any(values: Tensor) -> bool:
    """Whether a value of [P] is not 0: the first ones tell as a rule, and a pass for extremes is faster than `any`."""
    if not values.numel() or bool(values[:4096].any()):
        return bool(values.numel())
    low, high = torch.aminmax(values)
    return not (bool(low == 0) and bool(high == 0))  # what is not a number is something too
