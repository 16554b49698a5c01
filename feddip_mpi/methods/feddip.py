"""FedDIP (Long et al., ICDM 2023): dynamic pruning with error feedback, and a penalty that grows with the rounds."""

from __future__ import annotations

from dataclasses import replace

from feddip_mpi.local import LocalRule
from feddip_mpi.methods.base import Method


class FedDIP(Method):
    """The method of docs/method.md; its variants are keys of the configuration."""

    summary = "prunes by magnitude, pruned weights keep moving and come back, a penalty grows with the rounds"
    penalised = True
    regrows = True
    confined = False

    def local_rule(self) -> LocalRule:
        return replace(super().local_rule(), feedback=self.config.feedback)

    def memory(self) -> str:
        return self.config.server_memory
