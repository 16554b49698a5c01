"""What a round is measured by on each rank, and the record that all ranks' measurements make."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from feddip_mpi import besides, evaluate, masks, metrics
from feddip_mpi.codec import Bytes
from feddip_mpi.collectives import Communicator
from feddip_mpi.federation import Federation
from feddip_mpi.residual_store import ResidualStore
from feddip_mpi.runtime import peak_memory
from feddip_mpi.schedules import RoundPlan
from feddip_mpi.server import Server, StepReport
from feddip_mpi.vector import Layout

_PHASES = ("train", "encode", "wait", "exchange", "decode", "server", "evaluate", "evaluate_waiting", "transfer")
_TRAFFIC = ("update", "residual", "control")
# What is added up over the ranks, in the order in which `merged` gathers it behind the seconds.
_SUMMED = (
    "wire_bytes", "residual_bytes", "control_bytes", "received_bytes", "host_memory_bytes", "device_memory_bytes",
    *(f"download_{kind}_bytes" for kind in metrics.KINDS_OF_BYTES),
)  # fmt: skip


@dataclass
class Work:
    """What this rank's participants left in a round.

    Attributes:
        numbers: float64 [K, 8], mean loss, images trained on, squared residual norm, the bytes of the update by kind,
            and those of what is no update; zero for others' participants.
        held: the residuals that this rank will hold after the round, by client.
        extras: what the clients' hooks left to send besides, float32 [P] each, by client.
    """

    numbers: np.ndarray
    held: ResidualStore
    extras: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def nothing(cls, participants: int, held: ResidualStore) -> Work:
        """Before any participant has trained."""
        return cls(np.zeros((participants, 4 + len(metrics.KINDS_OF_BYTES))), held)


@dataclass
class Meter:
    """Seconds by phase and bytes by purpose of one round on this rank."""

    comm: Communicator
    enter: Callable[[str], None] = lambda phase: None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0.0))

    def __post_init__(self) -> None:
        self._start = self._bytes()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def traffic(self) -> list[int]:
        """Bytes since the meter was made: sent by purpose, then update bytes received."""
        return [now - before for now, before in zip(self._bytes(), self._start, strict=True)]

    def add(self, sent: int, received: int) -> None:
        """Count update bytes of before the meter was made."""
        self._start[0] -= sent
        self._start[-1] -= received

    def _bytes(self) -> list[int]:
        return [self.comm.sent[purpose] for purpose in _TRAFFIC] + [self.comm.received["update"]]


@dataclass(frozen=True)
class Told:
    """What a round's record says besides what the round itself did.

    Attributes:
        download: bytes of the sums that this rank handed on.
        opened: what was sent before the first round, in its record.
        residuals_lost: see `State`.
    """

    download: Bytes
    opened: besides.Opened | None
    residuals_lost: int


def merged(
    federation: Federation,
    srv: Server,
    plan: RoundPlan,
    work: Work,
    told: Told,
    step: StepReport,
    scores: evaluate.Scores | None,
    meter: Meter,
) -> metrics.Record:
    """Merge all ranks' measurements into the round's record (names and units: metrics.FIELDS)."""
    comm, layout, opened = federation.comm, federation.layout, told.opened
    handed_on = [getattr(told.download, kind) for kind in metrics.KINDS_OF_BYTES]
    if opened is not None:
        if comm.rank == 0:
            work.numbers[0, -1] += opened.uploaded
        meter.add(opened.sent, opened.received)
    own = np.array([*meter.seconds.values(), *meter.traffic(), *peak_memory(federation.device), *handed_on], np.float64)
    measured = comm.gather(own)
    slowest = dict(zip(meter.seconds, measured.max(axis=0), strict=False))
    sums = [int(x) for x in measured[:, len(meter.seconds) :].sum(axis=0)]
    # Every slot is filled by one rank and zero elsewhere, and bytes are whole.
    loss, samples, squared, *uploaded, extra = comm.total(work.numbers).T
    upload = dict(zip(metrics.KINDS_OF_BYTES, (int(column.sum()) for column in uploaded), strict=True))
    record = {
        **_planned(plan, comm.size),
        **_of_the_server(layout, srv, step),
        **score_fields(scores),
        "train_loss": float((loss * samples).sum() / samples.sum()),
        "residual_norm": float(np.sqrt(squared.sum())),
        "samples": int(samples.sum()),
        "upload_bytes": sum(upload.values()) + int(extra.sum()),
        **{f"upload_{kind}_bytes": count for kind, count in upload.items()},
        "upload_extra_bytes": int(extra.sum()),
        "dense_bytes": 4 * layout.size * len(plan.participants),
        "residuals_lost": told.residuals_lost,
        **{f"{name}_seconds": float(s) for name, s in slowest.items()},
        "idle_seconds": float(measured[:, list(meter.seconds).index("wait")].mean()),
        **dict(zip(_SUMMED, sums, strict=True)),
    }
    return {name: record[name] for name in metrics.FIELDS if name in record}


def _planned(plan: RoundPlan, ranks: int) -> metrics.Record:
    return {
        "participants": list(plan.participants),
        "learning_rate": plan.learning_rate,
        "penalty": plan.penalty,
        "sparsity_asked": plan.sparsity,
        "mask_updated": int(plan.update_mask),
        "mask_delayed": int(plan.mask_delayed),
        "penalty_scale": plan.penalty_scale,
        "regrow_scale": plan.regrow_scale,
        "ranks": ranks,
    }


def _of_the_server(layout: Layout, srv: Server, step: StepReport) -> metrics.Record:
    by_layer = masks.layer_sparsities(srv.mask, layout.prunable_sizes)
    return {
        "round": srv.round,
        "sparsity": masks.sparsity(srv.mask),
        "sparsity_by_layer": dict(zip(layout.prunable_names, by_layer, strict=True)),
        "mask_grown": step.grown,
        "mask_pruned": step.pruned,
        "update_norm": step.update_norm,
        "pruning_error": step.pruning_error,
    }


def score_fields(scores: evaluate.Scores | None) -> dict[str, Any]:
    """What an evaluation adds to a record; nulls where there was none, or not yet."""
    if scores is None:
        return {"test_loss": None, "test_accuracy": None, "test_accuracy_top5": None, "client_accuracy": None}
    clients = None if scores.by_client is None else list(scores.by_client)
    return {
        "test_loss": scores.loss,
        "test_accuracy": scores.top1,
        "test_accuracy_top5": scores.top5,
        "client_accuracy": clients,
    }
