"""A random mask with Erdos-Renyi-Kernel densities that stays as it is: what pruning must beat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from feddip_mpi.methods.base import Method


class StaticERK(Method):
    """One random mask of the final sparsity from the seed (densities: Evci et al. 2020, RigL)."""

    summary = "trains inside a random ERK mask that stays fixed"
    masking = "fixed"

    def start(self, weights: Tensor, opened: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return weights, self.first_mask("erk", weights[: self.layout.prunable], opened)
