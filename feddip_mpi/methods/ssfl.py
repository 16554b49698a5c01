"""SSFL (Ohib et al. 2024): one consensus mask from all clients' own saliencies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from feddip_mpi import masks
from feddip_mpi.methods.base import Method, Opening


class SSFL(Method):
    """Keeps the largest sum_k p_k |g_k * w| over ALL clients, p_k their share of the images, once and for all.

    SNIP as it is here averages gradients before it takes the absolute value, over one round's participants: gradients of
    clients that disagree cancel there, and do not here.
    """

    summary = "one mask from the mean of all clients' |gradient x weight| at initialisation"
    masking = "fixed"

    def opening(self) -> Opening:
        return self.saliency_opening(tuple(range(self.config.clients)), before_sum=True)

    def start(self, weights: Tensor, opened: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keep = masks.kept_count(self.layout.prunable, self.config.sparsity.final)
        return weights, masks.select_largest(opened[0], keep)
