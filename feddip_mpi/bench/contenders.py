"""What is compared: a round's exchange in each of its modes, and the two yardsticks. Each ends with the mean on all ranks."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import codec, records, rounds, values
from feddip_mpi.aggregate import Aggregate, Sum
from feddip_mpi.bench.inputs import Inputs
from feddip_mpi.bench.options import DENSE, PAIRS, Options
from feddip_mpi.codec import Bytes, Message
from feddip_mpi.collectives import Communicator
from feddip_mpi.costs import Load
from feddip_mpi.exchange import Exchange, Outcome, Task, framed_sum
from feddip_mpi.settings import UploadConfig
from feddip_mpi.support import Support

_SHORT_FRAMES = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What one exchange left on a rank.

    Attributes:
        sent, received: bytes by kind of the frames (or arrays) handed to MPI, and of those that came from others.
        digest: CRC-32 of the mean; the same on all ranks.
        aggregate: the mean itself; None from a yardstick.
    """

    sent: Bytes
    received: Bytes
    digest: int
    aggregate: Aggregate | None = None


@dataclass
class Desk:
    """What all contenders of a rank use in turn.

    Attributes:
        vector: float32 [n], what the mean is added to.
        work: float32 [n] by client, copies of the updates: an exchange leaves its residual there.
        support_of: the mask by sparsity, made once.
    """

    comm: Communicator
    options: Options
    inputs: Inputs
    vector: Tensor
    work: dict[int, Tensor]
    support_of: dict[float, Support] = field(default_factory=dict)

    @classmethod
    def of(cls, comm: Communicator, options: Options, inputs: Inputs) -> Desk:
        work = {client: torch.empty_like(update) for client, update in inputs.updates.items()}
        return cls(comm, options, inputs, torch.zeros(inputs.size), work)

    def lay_out(self) -> None:
        """Fresh copies of the updates."""
        for client, update in self.inputs.updates.items():
            self.work[client].copy_(update)


class Contender(Protocol):
    """One line of the table.

    Attributes:
        mode: its name, of CONTENDERS.
        base: the mode of the cost model that it transfers like.
        sparsity, values, download: None where they say nothing.
    """

    mode: str
    base: str
    sparsity: float | None
    values: str | None
    download: str | None

    def play(self, meter: records.Meter) -> None:
        """The whole exchange, from `Desk.work` to the mean on this rank; every rank calls it."""

    def result(self) -> Result:
        """What `play` left, put together outside the time that it takes; every rank calls it."""

    def calibrate(self) -> dict[str, float]:
        """Seconds by the names of costs.Compute, measured once without a message; changes `Desk.work`."""

    def load(self) -> Load:
        """What the cost model has to know; participants and bytes a client."""


class ByExchange:
    """A round's exchange."""

    def __init__(self, desk: Desk, mode: str, sparsity: float, kind: str, support: Support) -> None:
        inputs, options = desk.inputs, desk.options
        self.mode = self.base = mode
        self.sparsity: float | None = sparsity
        self.values: str | None = kind
        self.download = options.download if mode == "sharded" else None
        self._desk, self._policy = desk, UploadConfig(values=kind, residual="keep")
        regrow = min(round(options.regrow * support.count), support.size - support.count)
        self.task = Task(
            mode=mode,
            overlap=options.overlap,
            round=0,
            support=support,
            size=inputs.size,
            upload=codec.Upload(kind, regrow=regrow, compress=options.compress),
            placed=inputs.placed,
            shares=inputs.shares,
            download=self.download or "fp32",
        )
        self._payload = self._received = Bytes()
        self._outcome: Outcome

    def play(self, meter: records.Meter) -> None:
        desk, comm, held, payload = self._desk, self._desk.comm, dict(self._desk.inputs.residuals), Bytes()
        exchange = Exchange(comm, self.task, None, meter.phase)
        with meter.phase("encode"):
            for client, update in desk.work.items():
                sent, _ = rounds.encode_and_send(
                    exchange, self.task, self._policy, desk.options.seed, held, client, update
                )
                payload += sent
        with meter.phase("wait"):
            exchange.close()
            comm.check(None)
        outcome = exchange.finish()
        with meter.phase("server"):
            outcome.aggregate.add_to(desk.vector)
        meter.seconds["transfer"] = exchange.transfer_seconds
        self._payload, self._received, self._outcome = payload, exchange.received, outcome

    def result(self) -> Result:
        outcome = self._outcome
        sent, received = self._bytes(self._payload, outcome.download, self._received)
        return Result(sent, received, digest(outcome.aggregate), outcome.aggregate)

    def _bytes(self, payload: Bytes, handed_on: Bytes, received: Bytes) -> tuple[Bytes, Bytes]:
        """By kind, what this rank handed to MPI and what came back."""
        if self.mode == "node":
            return self._through_leaders(payload)
        if self.mode != "dense":
            return payload + handed_on, received
        other = 4 * (self.task.size - self.task.support.size)
        reduced = Bytes(values=self._reduced() - other, other=other)
        return reduced, reduced

    def _through_leaders(self, payload: Bytes) -> tuple[Bytes, Bytes]:
        """A node's payloads pass through its first rank; the others touch shared memory only."""
        comm = self._desk.comm
        if len(comm.nodes()) == 1:  # nobody to speak to: MPI is handed lengths alone
            return Bytes(), Bytes()
        by_rank = comm.gather(np.array(_row(payload), np.float64)).astype(np.int64)
        mine = next(node for node in comm.nodes() if comm.rank in node)
        if comm.rank != mine[0]:
            return Bytes(), Bytes()
        own = by_rank[mine].sum(axis=0)
        return Bytes(*own.tolist()), Bytes(*(by_rank.sum(axis=0) - own).tolist())

    def _reduced(self) -> int:
        """Bytes that `dense` reduces: the support's sums, and all prunable coordinates where some come from outside."""
        task = self.task
        return 4 * (task.carried.count + task.size - task.support.size + task.support.size * (task.upload.regrow > 0))

    def load(self) -> Load:
        task, fp32 = self.task, replace(self.task.upload, values=self.task.download)
        return Load(
            participants=len(task.placed),
            payload=self._payload.total / self._desk.options.clients,
            download=codec.expected_bytes(fp32, task.support.count, task.support.size, task.size),
            reduced=self._reduced(),
            messages=len(task.upload.kinds),
            overlap=task.overlap,
        )

    def calibrate(self) -> dict[str, float]:
        task, desk, took = self.task, self._desk, Stopwatch()
        client, drawer = next(iter(desk.work)), Drawer()
        took("encode", lambda: rounds.encode_and_send(
            drawer, task, self._policy, desk.options.seed, dict(desk.inputs.residuals), client, desk.work[client]
        ))  # fmt: skip
        total = Sum(task.carried, task.size, 0, task.size)
        took("decode", lambda: _add(total, drawer.frames, task))
        made = took("hand_on", lambda: framed_sum(task, total, None)[0])
        took("take_in", lambda: [codec.read(frame, task.support, task.size, task.round) for frame in made])
        took("apply", lambda: total.result().add_to(desk.vector))
        end = drawer.messages[0]
        took("frame", lambda: [
            codec.read(end.frame(task.size, task.size), task.support, task.size, task.round) for _ in range(_SHORT_FRAMES)
        ])  # fmt: skip
        took.seconds["frame"] /= 2 * _SHORT_FRAMES  # made and read
        took("reduce", lambda: _add_floats(desk.vector, self._reduced() // 4))
        return took.seconds


class Drawer:
    """Takes messages in place of an Exchange and keeps their frames."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.frames: list[np.ndarray] = []

    def post(self, message: Message) -> Bytes:
        frame, counted = message.framed()
        self.messages.append(message)
        self.frames.append(frame)
        return counted


class DenseAllreduce:
    """The yardstick: each rank's updates, weighted and added up, then MPI's own sum of the whole vector."""

    mode, base = DENSE, "dense"
    sparsity: float | None = None
    values: str | None = None
    download: str | None = None

    def __init__(self, desk: Desk, blocking: bool) -> None:
        """`blocking`: which of the library's two Allreduces (see Communicator.allreduce)."""
        self._desk, self.blocking, self._mean = desk, blocking, torch.zeros(0)

    def play(self, meter: records.Meter) -> None:
        desk = self._desk
        with meter.phase("encode"):
            own = self._own()
        with meter.phase("exchange"):
            mean = torch.from_numpy(desk.comm.allreduce(own.numpy(), self.blocking))
        with meter.phase("server"):
            desk.vector.add_(mean)
        meter.seconds["transfer"] = meter.seconds["exchange"]
        self._mean = mean

    def result(self) -> Result:
        prunable, size = self._desk.inputs.prunable, self._desk.inputs.size
        moved = Bytes(values=4 * prunable, other=4 * (size - prunable))
        return Result(moved, moved, zlib.crc32(self._mean.numpy().data))

    def _own(self) -> Tensor:
        """sum over this rank's clients of p_k times the update, in the first one's memory."""
        (first, total), *others = self._desk.work.items()
        total.mul_(self._desk.inputs.shares[first])
        for client, update in others:
            total.add_(update, alpha=self._desk.inputs.shares[client])
        return total

    def load(self) -> Load:
        return Load(len(self._desk.inputs.placed), 0, 0, 4 * self._desk.inputs.size)

    def calibrate(self) -> dict[str, float]:
        took = Stopwatch()
        total = took("encode", self._own)
        took.seconds["encode"] /= len(self._desk.work)  # the model counts clients
        took("apply", lambda: self._desk.vector.add_(total))
        took("reduce", lambda: _add_floats(self._desk.vector, self._desk.inputs.size))
        return {"decode": 0.0, **took.seconds}


class ValuesAndIndices:
    """The other yardstick: what sparse exchanges send that do not share a mask, float32 values with int32 indices."""

    mode, base = PAIRS, "allgatherv"
    values: str | None = None
    download: str | None = None

    def __init__(self, desk: Desk, sparsity: float, support: Support) -> None:
        self.sparsity: float | None = sparsity
        self._desk = desk
        kept = torch.arange(support.size) if support.positions is None else support.positions
        self._received: list[np.ndarray] = []
        self._kept = torch.cat([kept, torch.arange(support.size, desk.inputs.size)])

    def play(self, meter: records.Meter) -> None:
        desk, comm = self._desk, self._desk.comm
        with meter.phase("encode"):
            payloads = [self._payload(client) for client in desk.work]
        with meter.phase("exchange"):
            self._received = comm.allgatherv(payloads, [desk.options.clients] * comm.size)
        with meter.phase("decode"):
            for client, payload in enumerate(self._received):
                self._add(client, payload)
        meter.seconds["transfer"] = meter.seconds["exchange"]

    def result(self) -> Result:
        found, own = 0, self._desk.options.clients
        for payload in self._received:
            found = zlib.crc32(payload.data, found)
        return Result(self._bytes(own), self._bytes(len(self._received) - own), found)

    def _payload(self, client: int) -> np.ndarray:
        """uint8: the kept values, then their indices."""
        taken = self._desk.work[client].index_select(0, self._kept).numpy()
        return np.concatenate([taken.view(np.uint8), self._kept.to(torch.int32).numpy().view(np.uint8)])

    def _add(self, client: int, payload: np.ndarray) -> None:
        """Straight to the dense vector: nothing is shared that would have to be added up first."""
        half, share = payload.size // 2, self._desk.inputs.shares[client]
        taken, where = payload[:half].view(np.float32), payload[half:].view(np.int32)
        self._desk.vector.index_add_(0, torch.from_numpy(where), torch.from_numpy(taken) * share)

    def _bytes(self, payloads: int) -> Bytes:
        inputs, kept = self._desk.inputs, self._kept.numel()
        other = inputs.size - inputs.prunable
        return Bytes(4 * payloads * (kept - other), 4 * payloads * kept, 4 * payloads * other)

    def load(self) -> Load:
        return Load(len(self._desk.inputs.placed), 8.0 * self._kept.numel(), 0, 0)

    def calibrate(self) -> dict[str, float]:
        took, client = Stopwatch(), next(iter(self._desk.work))
        payload = took("encode", lambda: self._payload(client))
        took("decode", lambda: self._add(client, payload))
        return {"apply": 0.0, **took.seconds}


def make(desk: Desk, modes: list[str]) -> list[Contender]:
    """All lines of the table, in their order; the order in which they are measured too."""
    options, found = desk.options, list[Contender]()
    if DENSE in modes:
        found.append(DenseAllreduce(desk, blocking=True))
    for sparsity in dict.fromkeys(options.sparsity):
        support = desk.support_of[sparsity]
        if PAIRS in modes:
            found.append(ValuesAndIndices(desk, sparsity, support))
        for kind in dict.fromkeys(options.values):
            found += [ByExchange(desk, mode, sparsity, kind, support) for mode in modes if mode not in (DENSE, PAIRS)]
    return found


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        out = work()
        self.seconds[name] = time.perf_counter() - started
        return out


def digest(aggregate: Aggregate) -> int:
    """CRC-32 of a sum, off-mask coordinates included."""
    found = 0
    for part in (aggregate.packed, aggregate.indices, aggregate.sums, aggregate.other):
        found = zlib.crc32(values.as_bytes(part).numpy().data, found)
    return found


def handed_on_as(aggregate: Aggregate, kind: str) -> Aggregate:
    """What `sharded` makes of a sum that it hands on as `kind`: slices begin at whole blocks, so they do not show."""
    coded = values.code(aggregate.packed, kind, False, np.random.default_rng(0))
    return replace(aggregate, packed=coded.restored())


def distance(one: Aggregate, other: Aggregate) -> float:
    """||one - other|| / ||other||, off-mask coordinates included."""
    size = one.support.size
    difference = torch.zeros(size + one.other.numel())
    other.add_to(difference)
    norm = float(torch.linalg.vector_norm(difference))
    difference.neg_()
    one.add_to(difference)
    return float(torch.linalg.vector_norm(difference)) / (norm or 1.0)


def _add(total: Sum, frames: list[np.ndarray], task: Task) -> None:
    for frame in frames:
        piece = codec.read(frame, task.support, task.size, task.round)
        total.add(task.shares[piece.client], piece)


def _add_floats(vector: Tensor, count: int) -> None:
    """As many additions as `count` float32 need, in pairs of vectors that are at hand."""
    half = min(count, vector.numel()) // 2
    for _ in range(2):
        vector[:half].add_(vector[half : 2 * half])


def _row(counted: Bytes) -> list[int]:
    return [counted.values, counted.indices, counted.other, counted.frame]
