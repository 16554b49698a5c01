"""What each client remembers of the part of its updates that it did not send (error feedback). Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from feddip_mpi.config import UploadConfig


@dataclass(frozen=True)
class Residual:
    """One client's residual.

    Attributes:
        values: float32 [P] on the CPU.
        round: t of the round in which the client last took part.
    """

    values: Tensor
    round: int


def recall(residual: Residual | None, policy: UploadConfig, round: int) -> Tensor | None:
    """The old residual e_k as it enters round `round`; None where there is none.

    `decay` shrinks it by `residual_decay` for every round the client was absent: stale residuals slow training
    under partial participation (Fed-EF, ICML 2023).
    """
    if residual is None:
        return None
    if policy.residual != "decay":
        return residual.values
    return residual.values * policy.residual_decay ** (round - residual.round - 1)


def remember(left: Tensor, mask: Tensor, policy: UploadConfig, round: int) -> Residual | None:
    """What the client keeps of `left` float32 [P], the part that did not travel; None if nothing."""
    if policy.residual == "drop":
        return None
    kept = torch.where(mask, left, torch.zeros_like(left)) if policy.residual == "in_mask_only" else left
    kept = kept.cpu()
    return Residual(kept, round) if bool(kept.any()) else None
