"""FedAvg (McMahan et al., AISTATS 2017): the dense yardstick."""

from __future__ import annotations

from feddip_mpi.methods.base import Method


class FedAvg(Method):
    """Every weight is kept and travels."""

    summary = "averages dense models"
    masking = "none"
    confined = False

    def memory(self, round: int) -> str:
        return "on"
