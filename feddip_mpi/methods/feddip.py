"""FedDIP (Long et al., ICDM 2023): dynamic pruning with error feedback, and a penalty that grows with the rounds."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from feddip_mpi.local import LocalRule
from feddip_mpi.methods.base import Method
from feddip_mpi.schedules import RoundPlan
from feddip_mpi.server import Server
from feddip_mpi.settings import Config


class FedDIP(Method):
    """The method of docs/method.md; its variants are keys of the configuration."""

    summary = "prunes by magnitude, pruned weights keep moving and come back, a penalty grows with the rounds"
    penalised = True
    regrows = True
    confined = False

    @classmethod
    def plan(cls, config: Config, draft: RoundPlan) -> RoundPlan:
        plan = super().plan(config, draft)
        return replace(plan, dense_upload=True) if _whole_at_first(config, plan.round) else plan

    @classmethod
    def counted(cls, config: Config, finished: int) -> int:
        """The published code cuts after its rounds t = 0, R, 2R ... to s_t, not to s_t+1."""
        return finished - 1 if config.server_memory == "published" else finished

    def received(self, srv: Server) -> Tensor:
        return srv.weights if _whole_at_first(self.config, srv.round) else super().received(srv)

    def local_rule(self) -> LocalRule:
        return replace(super().local_rule(), feedback=self.config.feedback)

    def memory(self, round: int) -> str:
        return "off" if _whole_at_first(self.config, round) else self.config.server_memory


def _whole_at_first(config: Config, round: int) -> bool:
    """Whether the mask of a round is for its gradients alone, and all weights travel.

    In the published code the random mask of round 0 prunes nothing that lasts: its masks begin with the cut after that round.
    """
    return config.server_memory == "published" and round == 0
