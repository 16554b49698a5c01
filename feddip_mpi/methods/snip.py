"""SNIP (Lee et al., ICLR 2019) in a federation: one mask from the saliency at initialisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from feddip_mpi.methods.base import Method, Opening
from feddip_mpi.schedules import participants


class Snip(Method):
    """Keeps the largest |w * sum_k p_k g_k| over the first round's participants, once and for all."""

    summary = "one mask from |mean gradient x weight| of the first participants at initialisation"
    masking = "fixed"

    def opening(self) -> Opening:
        return self.saliency_opening(participants(self.config, 0), before_sum=False)

    def start(self, weights: Tensor, opened: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return weights, self.first_mask("snip", weights[: self.layout.prunable], opened)
