"""Gradual magnitude pruning (Zhu & Gupta 2017) in a federation: no feedback, nothing grows back."""

from __future__ import annotations

from feddip_mpi.methods.base import Method


class Gradual(Method):
    """Masked training; at each mask update the server keeps the largest of the weights that are left: masks nest."""

    summary = "prunes by magnitude on a schedule, masks nest, nothing comes back"

    def memory(self, round: int) -> str:
        return "published"  # cuts from the already pruned model
