"""FedProx (Li et al., MLSys 2020): FedAvg with a term that holds clients near the model they received."""

from __future__ import annotations

from dataclasses import replace

from feddip_mpi.local import LocalRule
from feddip_mpi.methods.fedavg import FedAvg


class FedProx(FedAvg):
    """Adds (proximal / 2) ||w - w_received||^2 to the local objective."""

    summary = "averages dense models whose training is held near the received one"

    def local_rule(self) -> LocalRule:
        return replace(super().local_rule(), proximal=self.config.proximal)
