"""The loop: one federated round reads top to bottom in `play`, one call per idea."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from feddip_mpi import codec, control, evaluate, masks, methods, metrics, placement, residuals, server, streams
from feddip_mpi.collectives import Communicator
from feddip_mpi.errors import FeddipError, NumericalError, PeerError
from feddip_mpi.federation import Federation
from feddip_mpi.residuals import Residual
from feddip_mpi.runtime import peak_memory
from feddip_mpi.schedules import RoundPlan, plan_round
from feddip_mpi.server import Server

_PHASES = ("train", "encode", "wait", "exchange", "decode", "server", "evaluate")
_TRAFFIC = ("update", "residual", "control")


class Saver(Protocol):
    """What writes checkpoints; every rank calls it, rank 0 owns the file."""

    def save(self, state: State, history: Sequence[metrics.Record]) -> None: ...

    def overdue(self) -> bool: ...


@dataclass
class State:
    """What changes from round to round.

    Attributes:
        server: the replicated server.
        held: the residuals held by this rank, by client.
        holders: which rank holds each client's residual; the same on every rank.
    """

    server: Server
    held: dict[int, Residual]
    holders: list[int]


def initial_state(federation: Federation) -> State:
    """The state before the first round: initial weights, pruned by the first mask, nothing remembered."""
    config, layout = federation.config, federation.layout
    saliency = _saliency(federation) if methods.needs_saliency(config) else None
    mask = methods.initial_mask(config, layout, federation.initial, saliency)
    weights = server.pruned(federation.initial, mask)
    return State(Server(0, weights, mask), {}, initial_holders(config.clients, federation.comm.size))


def initial_holders(clients: int, ranks: int) -> list[int]:
    """Where residuals lie before anybody has trained, and where a resume puts them."""
    return [client % ranks for client in range(clients)]


def run(
    federation: Federation,
    state: State,
    history: list[metrics.Record],
    saver: Saver,
    report: Callable[[metrics.Record], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Play all rounds that are left; appends to `history`.

    Returns:
        Whether the run was stopped by a signal before its last round; its state is saved then.

    Raises:
        NumericalError: a client's loss or update is not finite; the same on all ranks.
        PeerError: the replicas have drifted apart.
    """
    config, comm = federation.config, federation.comm
    while state.server.round < config.rounds:
        started = time.perf_counter()
        # Rank 0's plan counts: it alone has the history of a resumed run, and its clock says what is overdue.
        own = plan_round(config, state.server.round, saver.overdue(), control.decide(config, history))
        plan = RoundPlan.from_json(comm.broadcast(own.to_json()))
        record = play(federation, state, plan)
        history.append(record)
        stop = comm.any(stop_requested()) and not _is_last(federation, state)
        saving = time.perf_counter()
        # A checkpoint cannot hold how long saving it took: its last row gets the time up to here.
        _clock(record, started, saving)
        if plan.checkpoint or stop:
            compare_replicas(comm, state.server)
            saver.save(state, history)
            _clock(record, started, saving)
        report(record)
        if stop:
            return True
    return False


def _clock(record: metrics.Record, started: float, saving: float) -> None:
    """Set the seconds of the round up to now; `started`, `saving`: when the round and its checkpoint began."""
    now = time.perf_counter()
    record["checkpoint_seconds"] = now - saving
    record["round_seconds"] = now - started
    record["samples_per_second"] = record["samples"] / (now - started)


def _is_last(federation: Federation, state: State) -> bool:
    return state.server.round >= federation.config.rounds


def play(federation: Federation, state: State, plan: RoundPlan) -> metrics.Record:
    """One round: train and encode here, exchange, step the replicated server, evaluate. Changes `state`."""
    config, comm, meter = federation.config, federation.comm, Meter(federation.comm)
    placed = placement.assign(plan.participants, federation.samples, state.holders, comm.size)
    _move_residuals(federation, state, placed)
    work = Work.nothing(len(plan.participants))
    error = None
    try:
        _train_and_encode(federation, state, plan, placed, work, meter)
    except FeddipError as caught:
        error = caught
    with meter.phase("wait"):
        comm.check(error)
    with meter.phase("exchange"):
        gathered = exchange(comm, work.payloads, placed)
    with meter.phase("decode"):
        combined, upload = _combine(federation, state.server, plan, gathered)
    with meter.phase("server"):
        memory = config.server_memory if methods.METHODS[config.method].prunes else "on"
        state.server, step = server.step(state.server, combined, plan, memory)
    with meter.phase("evaluate"):
        scores = _evaluate(federation, state.server) if plan.evaluate else None
    return _record(federation, state.server, plan, work, upload, step, scores, meter)


def exchange(comm: Communicator, payloads: Sequence[np.ndarray], placed: dict[int, int]) -> list[np.ndarray]:
    """Every participant's payload on every rank, in client order: the round's one large exchange."""
    clients = placement.by_rank(placed, comm.size)
    gathered = comm.allgatherv(payloads, [len(own) for own in clients])
    order = [client for own in clients for client in own]
    return [payload for _, payload in sorted(zip(order, gathered, strict=True), key=lambda pair: pair[0])]


@dataclass
class Work:
    """What this rank's participants left in a round.

    Attributes:
        payloads: one per own participant, in client order.
        numbers: float64 [K, 3], mean loss, images trained on, squared residual norm; zero for others' participants.
    """

    payloads: list[np.ndarray]
    numbers: np.ndarray

    @classmethod
    def nothing(cls, participants: int) -> Work:
        """Before any participant has trained."""
        return cls([], np.zeros((participants, 3)))


def _train_and_encode(
    federation: Federation, state: State, plan: RoundPlan, placed: dict[int, int], work: Work, meter: Meter
) -> None:
    config, comm, srv = federation.config, federation.comm, state.server
    received = server.pruned(srv.weights, srv.mask)
    for slot, client in enumerate(plan.participants):
        if placed[client] != comm.rank:
            continue
        with meter.phase("train"):
            samples = federation.partition.train[client]
            result = federation.trainer.train(
                received, srv.mask, samples, plan.learning_rate, plan.penalty, plan.round, client
            )
        with meter.phase("encode"):
            _require_finite(result.loss, result.update, plan, client, comm.rank)
            payload, left = _encode(federation, state, plan, client, result.update)
            residual = residuals.remember(left, srv.mask, config.upload, plan.round)
            state.held.pop(client, None)
            if residual is not None:
                state.held[client] = residual
        squared = float(residual.values.square().sum()) if residual is not None else 0.0
        work.payloads.append(payload)
        work.numbers[slot] = (result.loss, result.samples, squared)


def _encode(
    federation: Federation, state: State, plan: RoundPlan, client: int, update: torch.Tensor
) -> tuple[np.ndarray, torch.Tensor]:
    """Add the client's old residual to its update (in place) and compress the sum."""
    config, mask = federation.config, state.server.mask
    old = residuals.recall(state.held.get(client), config.upload, plan.round)
    if old is not None:
        update[: mask.numel()] += old.to(update.device)
    upload = codec.Upload(
        values=config.upload.values,
        stochastic=config.upload.rounding == "stochastic",
        dense=plan.dense_upload,
        regrow=round(plan.regrow * int(mask.sum())),
    )
    generator = streams.stream(config.seed, "rounding", plan.round, client)
    return codec.encode(update, mask, upload, plan.round, client, generator)


def _require_finite(loss: float, update: torch.Tensor, plan: RoundPlan, client: int, rank: int) -> None:
    if np.isfinite(loss) and bool(torch.isfinite(update).all()):
        return
    raise NumericalError(
        f"client {client} (rank {rank}) diverged in round {plan.round + 1}: loss {loss}, learning rate "
        f"{plan.learning_rate:g}; the last checkpoint is untouched: lower learning_rate and start again from there"
    )


def _combine(
    federation: Federation, srv: Server, plan: RoundPlan, gathered: Sequence[np.ndarray]
) -> tuple[torch.Tensor, codec.Bytes]:
    """sum_k p_k q_k in client order, and the uploads' bytes by kind. Every rank does the same sum."""
    total = sum(federation.samples[client] for client in plan.participants)
    digest, counted = masks.digest(srv.mask), []

    def updates() -> Iterator[tuple[float, torch.Tensor]]:
        for client, payload in zip(plan.participants, gathered, strict=True):
            decoded = codec.decode(payload, srv.mask, federation.layout.size, plan.round, digest)
            if decoded.client != client:
                raise PeerError(
                    f"round {plan.round + 1}: payload of client {decoded.client} in client {client}'s place"
                )
            counted.append(decoded.bytes)
            yield federation.samples[client] / total, decoded.update

    combined = server.aggregate(updates(), srv.weights)
    return combined, sum(counted, codec.Bytes())


def _evaluate(federation: Federation, srv: Server) -> evaluate.Scores:
    return score_model(federation, server.pruned(srv.weights, srv.mask))


def score_model(federation: Federation, weights: torch.Tensor) -> evaluate.Scores:
    """Evaluate float32 [n] on the global test set, sharded over the ranks; the same result on every rank."""
    comm, config = federation.comm, federation.config
    own = evaluate.score(federation.bound, weights, federation.test_data, config.eval.batch_size, comm.rank, comm.size)
    parts = [
        evaluate.BatchScores(losses, correct)
        for losses, correct in zip(comm.gather(own.losses), comm.gather(own.correct), strict=True)
    ]
    return evaluate.merge(parts, federation.partition.test if config.eval.clients else None)


def compare_replicas(comm: Communicator, srv: Server) -> None:
    """Every rank must hold the same server, bit for bit. Raises PeerError that names the ranks that do not."""
    digests = comm.gather(np.array([float(digest_of(srv))]))[:, 0]
    drifted = np.flatnonzero(digests != digests[0])
    if drifted.size:
        error = PeerError(
            f"round {srv.round}: rank {', '.join(map(str, drifted))} holds other weights than rank 0: the ranks compute "
            "differently (mixed CPU or GPU types, or thread counts?); resume from the last checkpoint on equal nodes"
        )
        comm.check(error)


def digest_of(srv: Server) -> int:
    """CRC-32 of weights and mask."""
    return zlib.crc32(srv.weights.cpu().numpy().view(np.uint8).data, masks.digest(srv.mask))


def _move_residuals(federation: Federation, state: State, placed: dict[int, int]) -> None:
    """Send each participant's residual to the rank that will train it; this is simulation, not upload."""
    transfers = [(client, state.holders[client], rank) for client, rank in placed.items()]
    arrived = federation.comm.move(transfers, lambda client: pack_residual(state.held.pop(client, None)))
    for client, message in arrived.items():
        residual = unpack_residual(message)
        if residual is not None:
            state.held[client] = residual
    for client, rank in placed.items():
        state.holders[client] = rank


def pack_residual(residual: Residual | None) -> np.ndarray:
    """A residual as a message: int64 round, float32 values; no bytes for none."""
    if residual is None:
        return np.zeros(0, np.uint8)
    head = np.array([residual.round], np.int64).view(np.uint8)
    return np.concatenate([head, residual.values.numpy().view(np.uint8)])


def unpack_residual(message: np.ndarray) -> Residual | None:
    """The inverse of `pack_residual`."""
    if not message.size:
        return None
    values = torch.from_numpy(message[8:].copy().view(np.float32))
    return Residual(values, int(message[:8].view(np.int64)[0]))


def _saliency(federation: Federation) -> torch.Tensor:
    """|g * w| [P] at the initial weights, g averaged over the first round's participants (SNIP)."""
    config, comm, layout = federation.config, federation.comm, federation.layout
    plan = plan_round(config, 0)
    placed = placement.assign(
        plan.participants, federation.samples, initial_holders(config.clients, comm.size), comm.size
    )
    everything = torch.ones(layout.prunable, dtype=torch.bool, device=federation.device)
    payloads = []
    for client in plan.participants:
        if placed[client] == comm.rank:
            gradient = federation.trainer.mean_gradient(federation.initial, federation.partition.train[client])
            generator = streams.stream(config.seed, "rounding", 0, client)
            payloads.append(codec.encode(gradient, everything, codec.Upload(), 0, client, generator)[0])
    whole = Server(0, federation.initial, everything)
    combined, _ = _combine(federation, whole, plan, exchange(comm, payloads, placed))
    return (combined * federation.initial)[: layout.prunable].abs()


@dataclass
class Meter:
    """Seconds by phase and bytes by purpose of one round on this rank."""

    comm: Communicator
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0.0))

    def __post_init__(self) -> None:
        self._start = self._bytes()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def traffic(self) -> list[int]:
        """Bytes since the meter was made: sent by purpose, then update bytes received."""
        return [now - before for now, before in zip(self._bytes(), self._start, strict=True)]

    def _bytes(self) -> list[int]:
        return [self.comm.sent[purpose] for purpose in _TRAFFIC] + [self.comm.received["update"]]


def _record(
    federation: Federation,
    srv: Server,
    plan: RoundPlan,
    work: Work,
    upload: codec.Bytes,
    step: server.StepReport,
    scores: evaluate.Scores | None,
    meter: Meter,
) -> metrics.Record:
    """Merge all ranks' measurements into the round's record (names and units: metrics.FIELDS)."""
    comm, layout = federation.comm, federation.layout
    own = np.array([*meter.seconds.values(), *meter.traffic(), *peak_memory(federation.device)], np.float64)
    measured = comm.gather(own)
    slowest = dict(zip(meter.seconds, measured.max(axis=0), strict=False))
    sums = [int(x) for x in measured[:, len(meter.seconds) :].sum(axis=0)]
    # Every slot is filled by one rank and zero elsewhere: the sum is exact whatever the number of ranks.
    loss, samples, squared = comm.gather(work.numbers).sum(axis=0).T
    record: metrics.Record = {
        "round": srv.round,
        "participants": list(plan.participants),
        "learning_rate": plan.learning_rate,
        "penalty": plan.penalty,
        "sparsity_asked": plan.sparsity,
        "sparsity": masks.sparsity(srv.mask),
        "sparsity_by_layer": _by_layer(federation, srv),
        "mask_updated": int(plan.update_mask),
        "mask_grown": step.grown,
        "mask_pruned": step.pruned,
        "mask_delayed": int(plan.mask_delayed),
        "penalty_scale": plan.penalty_scale,
        "regrow_scale": plan.regrow_scale,
        "train_loss": float((loss * samples).sum() / samples.sum()),
        **_score_fields(scores),
        "update_norm": step.update_norm,
        "pruning_error": step.pruning_error,
        "residual_norm": float(np.sqrt(squared.sum())),
        "samples": int(samples.sum()),
        "upload_bytes": upload.total,
        "upload_values_bytes": upload.values,
        "upload_indices_bytes": upload.indices,
        "upload_other_bytes": upload.other,
        "upload_frame_bytes": upload.frame,
        "dense_bytes": 4 * layout.size * len(plan.participants),
        "ranks": comm.size,
    }
    names = (
        "wire_bytes",
        "residual_bytes",
        "control_bytes",
        "received_bytes",
        "host_memory_bytes",
        "device_memory_bytes",
    )
    measurements = {
        **{f"{name}_seconds": float(s) for name, s in slowest.items()},
        **dict(zip(names, sums, strict=True)),
    }
    return {**record, **{name: measurements[name] for name in metrics.FIELDS if name in measurements}}


def _by_layer(federation: Federation, srv: Server) -> dict[str, float]:
    layout = federation.layout
    return dict(zip(layout.prunable_names, masks.layer_sparsities(srv.mask, layout.prunable_sizes), strict=True))


def _score_fields(scores: evaluate.Scores | None) -> dict[str, Any]:
    if scores is None:
        return {"test_loss": None, "test_accuracy": None, "test_accuracy_top5": None, "client_accuracy": None}
    clients = None if scores.by_client is None else list(scores.by_client)
    return {
        "test_loss": scores.loss,
        "test_accuracy": scores.top1,
        "test_accuracy_top5": scores.top5,
        "client_accuracy": clients,
    }
