"""The loop: one federated round reads top to bottom in `play`, one call per idea."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import (
    besides,
    codec,
    control,
    costs,
    masks,
    metrics,
    placement,
    records,
    residuals,
    scoring,
    server,
    streams,
)
from feddip_mpi.aggregate import Aggregate
from feddip_mpi.codec import SUPPORT, Bytes
from feddip_mpi.collectives import Communicator
from feddip_mpi.errors import Abandoned, FeddipError, InputError, NumericalError, PeerError, RankLost, UnrecordableError
from feddip_mpi.exchange import Exchange, Task
from feddip_mpi.federation import Federation
from feddip_mpi.life import Life
from feddip_mpi.local import LocalResult, LocalTrainer
from feddip_mpi.residual_store import ResidualStore, device_budget
from feddip_mpi.residuals import Residual
from feddip_mpi.runtime import log
from feddip_mpi.schedules import RoundPlan, plan_round
from feddip_mpi.server import Server
from feddip_mpi.settings import UploadConfig
from feddip_mpi.support import Support


class Saver(Protocol):
    """What writes checkpoints; every rank calls it, rank 0 owns the file."""

    def save(self, state: State, history: Sequence[metrics.Record]) -> None: ...

    def overdue(self) -> bool: ...


class Outlet(Protocol):
    """Where a client's messages go: an `Exchange`."""

    def post(self, message: codec.Message) -> Bytes: ...


@dataclass
class State:
    """What changes from round to round.

    Attributes:
        server: the replicated server.
        held: the residuals held by this rank, by client; in memory or in a file.
        holders: which rank holds each client's residual; the same on every rank.
        reference: float32 [P], the server's sum of all clients' references (`upload.residual: ef21`); replicated.
        owed: float32 [kept weights], what this rank, as the owner of a slice, rounded off the sums that it handed on
            (`download.values`); zero elsewhere.
        memories: what the method keeps besides, by name; replicated.
        opened: what was sent before the first round; the first record tells it.
        residuals_lost: of how many clients a dead rank took residuals along since the last complete round.
        speeds: measured training speed of every rank (`balance: speed`), the same on every rank; None for equal ones.
        unscored: the record of the last round where its model is still to be evaluated, in the next one (`scoring`).
    """

    server: Server
    held: ResidualStore
    holders: list[int]
    reference: Tensor | None = None
    owed: Tensor | None = None
    memories: dict[str, Tensor] = field(default_factory=dict)
    opened: besides.Opened | None = None
    residuals_lost: int = 0
    speeds: list[float] | None = None
    unscored: metrics.Record | None = None

    def become(self, other: State) -> None:
        """Take over all of `other`: a round is complete."""
        vars(self).update(vars(other))


def initial_state(federation: Federation, life: Life | None = None) -> State:
    """The state before the first round: initial weights, pruned by the first mask, nothing remembered.

    Raises:
        Stopped, Abandoned: as `life` says, on all ranks.
        RankLost: a rank died; on every survivor.
    """
    config, layout, method = federation.config, federation.layout, federation.method
    holders = initial_holders(config.clients, federation.comm.size)
    sums, opened = besides.opening(federation, holders, life or Life())
    weights, mask = method.begin(federation.initial, sums)
    weights = method.received(Server.of(0, weights, mask))
    # With references (EF21) server and clients share what was sent instead of keeping what was not.
    reference = torch.zeros_like(weights[: layout.prunable]) if config.upload.residual == "ef21" else None
    return State(
        Server.of(0, weights, mask),
        ResidualStore.of(config.upload, lambda: device_budget(config, federation.device)),
        holders,
        reference,
        memories=method.begin_memories(weights, mask),
        opened=opened,
    )


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
    life: Life | None = None,
) -> bool:
    """Play all rounds that are left; appends to `history`.

    Returns:
        Whether the run was stopped by a signal before its last round. Its state is saved then: that after the round, or
        that before it where the round was abandoned. Before the first round there is nothing to save.

    Raises:
        NumericalError: a client's loss or update is not finite; the same on all ranks.
        PeerError: the replicas have drifted apart.
    """
    config, comm = federation.config, federation.comm
    choice, life = Choice(federation), life or Life()
    if config.overlap and comm.size > 1 and not comm.open_background():
        log.info(
            "overlap: this MPI library lets one thread call it (%s): messages wait for the end", comm.thread_level()
        )
    while state.server.round < config.rounds:
        started = time.perf_counter()
        life.enter("plan", state.server.round)
        # Rank 0's plan counts: it alone has the history of a resumed run, and its clock says what is overdue.
        own = plan_round(config, state.server.round, saver.overdue(), control.decide(config, history))
        own = replace(own, exchange=choice.mode(own, state.server.support))
        plan = RoundPlan.from_json(comm.broadcast(own.to_json()))
        try:
            with _line_of_the_round_before(federation, state, report, life):
                record = play(federation, state, plan, life)
        except Abandoned as abandoned:
            log.info("%s", abandoned)
            if state.server.round:
                compare_replicas(comm, state.server)
                saver.save(state, history)
            return True
        history.append(record)
        if comm.rank and not comm.fault_tolerant:
            # Rank 0 alone plans and saves by the rounds before, and here nobody can take its place. A record has a number for
            # each participant: of 4096 and 20,000 rounds they would take 3 GB on every rank.
            del history[:-1]
        stop = comm.any(stop_requested()) and not _is_last(federation, state)
        if stop:
            _score_now(federation, state, life)
        life.enter("checkpoint", plan.round)
        saving = time.perf_counter()
        # A checkpoint cannot hold how long saving it took: its last row gets the time up to here.
        _clock(record, started, saving)
        if plan.checkpoint or stop:
            compare_replicas(comm, state.server)
            saver.save(state, history)
            _clock(record, started, saving)
        if state.unscored is None:
            report(record)
        if stop:
            return True
    if state.unscored is not None:  # saved without, and resumed with as many rounds as were done
        report(_score_now(federation, state, life))
    return False


@contextmanager
def _line_of_the_round_before(
    federation: Federation, state: State, report: Callable[[metrics.Record], None], life: Life
) -> Iterator[None]:
    """A round that scores the one before; however it ends, that one is reported, unless the survivors of a rank go on."""
    earlier = state.unscored
    try:
        yield
    except RankLost:
        raise
    except BaseException as error:
        if earlier is not None:
            # Ranks that end together can score it; where there is no time, or a GPU that can, whoever resumes does it.
            unable = isinstance(error, (Abandoned, UnrecordableError))
            if isinstance(error, FeddipError) and error.shared and not unable:
                _score_now(federation, state, life)
            report(earlier)
        raise
    if earlier is not None:
        report(earlier)


def _score_now(federation: Federation, state: State, life: Life) -> metrics.Record:
    """Evaluate the last round now, if that is still to be done; all ranks have the scores, or none. Returns its record."""
    record = state.unscored
    if record is None:
        return {}
    life.enter("evaluate", state.server.round - 1)
    scores = scoring.score_model(federation, server.pruned(state.server.weights, state.server.mask))
    federation.comm.commit()
    record.update(records.score_fields(scores))
    state.unscored = None
    return record


def _clock(record: metrics.Record, started: float, saving: float) -> None:
    """Set the seconds of the round up to now; `started`, `saving`: when the round and its checkpoint began."""
    now = time.perf_counter()
    record["checkpoint_seconds"] = now - saving
    record["round_seconds"] = now - started
    record["samples_per_second"] = record["samples"] / (now - started)


def _is_last(federation: Federation, state: State) -> bool:
    return state.server.round >= federation.config.rounds


class Choice:
    """Which exchange a round takes; where the configuration says "auto", the cheapest by the cost model (`costs`)."""

    def __init__(self, federation: Federation) -> None:
        """Every rank makes one: the network is measured here if that is needed and not given."""
        self._federation, self._last = federation, ""
        comm, given = federation.comm, federation.config.network
        self._network: costs.Network | None = None
        if federation.config.exchange == "auto":
            nodes = comm.open_nodes()
            latency, bandwidth = given.latency, given.bandwidth
            behind = federation.config.overlap and comm.open_background()
            measured = costs.measure(comm, behind) if latency is None or bandwidth is None else None
            self._network = costs.network(latency, bandwidth, measured, comm.size, nodes)

    def mode(self, plan: RoundPlan, support: Support) -> str:
        """The exchange of this round, logged with its reason when it changes."""
        if self._network is None:
            return plan.exchange
        federation = self._federation
        upload = federation.method.updates(upload_rule(federation, plan, support))
        counts = support.count, support.size, federation.layout.size
        payload = codec.expected_bytes(upload, *counts)
        # The sum has the off-mask coordinates of all participants; that they all name others is the worst case.
        union = upload.regrow * len(plan.participants)
        download = codec.expected_bytes(
            replace(upload, values=federation.config.download.values, regrow=union), *counts
        )
        load = costs.Load(
            len(plan.participants), payload, download, download, len(upload.kinds), federation.config.overlap
        )
        chosen, why = costs.choose(self._network, load)
        if chosen != self._last:
            log.info("exchange from round %d: %s (%s)", plan.round + 1, chosen, why)
            self._last = chosen
        return chosen


def play(federation: Federation, state: State, plan: RoundPlan, life: Life | None = None) -> metrics.Record:
    """One round: train, encode and send here, add up, step the replicated server, evaluate, commit.

    Changes `state` when all that can fail is over, on all ranks or on none: after an error it is that before the round.

    Raises:
        RankLost: a rank died; on every survivor.
    """
    life = life or Life()
    comm = federation.comm
    meter = records.Meter(comm, lambda phase: life.enter(phase, plan.round))
    placed = placement.assign(plan.participants, federation.samples, state.holders, comm.size, state.speeds)
    earlier, part = state.unscored, None
    common = [plan.to_json(), placed, state.server.support.digest, codec.FRAME_BYTES, earlier is not None]
    comm.require_same(f"the plan of round {plan.round + 1}", common)
    held = _move_residuals(federation, state, placed)
    task = _task(federation, state, plan, placed)
    exchange = Exchange(comm, task, state.owed, meter.phase)
    work, error = records.Work.nothing(len(plan.participants), held), None
    rules: Sequence[codec.Upload] = ()
    messages: list[list[codec.Message]] = []
    received = federation.method.received(state.server)

    def give_up() -> bool:
        comm.poll()  # who only computes would learn of a rank's death when it has finished
        return life.give_up()

    try:
        _train_and_send(federation, state, received, plan, task, exchange, work, meter, give_up)
        if earlier is not None:
            exchange.close()  # others' messages are not to wait for this rank's evaluation
            with meter.phase("evaluate_waiting"):
                part = scoring.score_part(federation, received, placed, state.speeds, give_up)
        planned = upload_rule(federation, plan, state.server.support)
        rules = federation.method.extras(federation.config, plan, planned)
        messages = _encode_extras(federation, state.server.support, plan, rules, work)
    except RankLost:
        raise
    except FeddipError as caught:
        error = caught
    del received  # 4 n bytes, before the server step takes its own
    with meter.phase("wait"):
        exchange.close()
        _check_all(comm, exchange, error)
    speeds = _speeds(federation, state, placed, meter.seconds["train"])
    outcome = exchange.finish()
    meter.seconds["transfer"] = exchange.transfer_seconds
    extras = besides.summed(
        federation, messages, rules, state.server.support, plan.round, placed, meter.phase, plan.exchange
    )
    with meter.phase("server"):
        stepped, step, memories = federation.method.step(state.server, outcome.aggregate, extras, state.memories, plan)
    reference = _reference(state, task, outcome.aggregate)
    after = State(stepped, work.held, _holders(state, placed), reference, outcome.owed, memories, speeds=speeds)
    later = plan.evaluate and not plan.checkpoint and scoring.can_wait(federation, stepped.round, after.holders, speeds)
    with meter.phase("evaluate"):
        known = scoring.merged(federation, part) if part is not None else None
        now = plan.evaluate and not later
        scores = scoring.score_model(federation, server.pruned(stepped.weights, stepped.mask)) if now else None
    told = records.Told(outcome.download, state.opened, state.residuals_lost)
    record = records.merged(federation, stepped, plan, work, told, step, scores, meter)
    after.unscored = record if later else None
    life.enter("commit", plan.round)
    comm.commit()
    if earlier is not None:
        earlier.update(records.score_fields(known))
    state.become(after)
    return record


def _check_all(comm: Communicator, exchange: Exchange, error: FeddipError | None) -> None:
    try:
        comm.check(error)
    except FeddipError:
        exchange.drain()
        raise


def upload_rule(federation: Federation, plan: RoundPlan, support: Support) -> codec.Upload:
    """How every client encodes in a round, as its plan says it; see `Method.updates`."""
    config = federation.config
    return codec.Upload(
        values=config.upload.values,
        stochastic=config.upload.rounding == "stochastic",
        dense=plan.dense_upload,
        regrow=federation.method.regrown(config, plan, federation.layout, support.count),
        compress=config.upload.entropy == "zstd",
    )


def _task(federation: Federation, state: State, plan: RoundPlan, placed: dict[int, int]) -> Task:
    config, support, samples = federation.config, state.server.support, federation.samples
    everybody = None if state.reference is None else sum(samples)
    return Task(
        mode=plan.exchange,
        overlap=config.overlap,
        round=plan.round,
        support=support,
        size=federation.layout.size,
        upload=federation.method.updates(upload_rule(federation, plan, support)),
        placed=placed,
        shares=besides.shares(samples, plan.participants),
        # With references the sum runs over all clients, those that are absent with what they sent last.
        support_shares=None if everybody is None else {c: samples[c] / everybody for c in plan.participants},
        start=state.reference,
        # The mask is about to change, and with it who owns what: nothing may be owed across it.
        download="fp32" if plan.update_mask else config.download.values,
    )


def _reference(state: State, task: Task, combined: Aggregate) -> Tensor | None:
    """The server's new reference, where there is one: the support's sums at their places."""
    if state.reference is None:
        return None
    reference = state.reference.clone()
    task.carried.put(reference, combined.packed)
    return reference


def _train_and_send(
    federation: Federation, state: State, received: Tensor, plan: RoundPlan, task: Task, exchange: Exchange,
    work: records.Work, meter: records.Meter, give_up: Callable[[], bool],
) -> None:  # fmt: skip
    comm = federation.comm
    federation.trainers.begin_round(plan.round, plan.update_mask)

    def train(trainer: LocalTrainer, client: int, give_up: Callable[[], bool], alone: bool) -> LocalResult:
        samples, rates = federation.partition.train[client], (plan.learning_rate, plan.penalty)
        return trainer.train(received, state.server.mask, samples, *rates, plan.round, client, give_up, alone)

    own = placement.by_rank(task.placed, comm.size)[comm.rank]
    with closing(federation.trainers.results(own, train, give_up)) as results:
        for client in own:
            with meter.phase("train"):
                result = next(results)
            with meter.phase("encode"):
                _encode(federation, state, plan, task, exchange, work, client, result)


def _encode(
    federation: Federation, state: State, plan: RoundPlan, task: Task, exchange: Exchange, work: records.Work, client: int,
    result: LocalResult,
) -> None:  # fmt: skip
    """Send what a client leaves, and note it."""
    config, rank = federation.config, federation.comm.rank
    for vector in (result.update, *result.extras):
        _require_finite(result.loss, vector, plan, client, rank)
    _confine(federation, state, work.held, client, result)
    sent, residual = encode_and_send(exchange, task, config.upload, config.seed, work.held, client, result.update)
    squared = float(torch.linalg.vector_norm(residual.values)) ** 2 if residual is not None else 0.0
    if not np.isfinite(squared):  # update and old residual are finite, but their sum is not
        raise NumericalError(_diverged(plan, client, rank, f"residual norm {squared**0.5}"))
    work.numbers[plan.participants.index(client), :-1] = (
        result.loss, result.samples, squared, *(getattr(sent, kind) for kind in metrics.KINDS_OF_BYTES)
    )  # fmt: skip
    work.extras[client] = result.extras


def _confine(
    federation: Federation, state: State, held: MutableMapping[int, Residual], client: int, result: LocalResult
) -> None:
    """What a client still owes to weights that are no more is not paid; references (EF21) are no debts."""
    old = held.get(client)
    if old is None or federation.config.upload.residual == "ef21":
        return
    paid = federation.method.paid(state.server, state.memories, result.extras, old.round)
    if paid is not None:
        held[client] = replace(old, values=old.values * paid.to(old.values.device))


def _encode_extras(
    federation: Federation, support: Support, plan: RoundPlan, rules: Sequence[codec.Upload], work: records.Work
) -> list[list[codec.Message]]:
    """What this rank's participants send besides, counted in their uploads."""
    for client, vectors in work.extras.items():
        left = [f"{vector.dtype} {list(vector.shape)}" for vector in vectors]
        if left != [f"{torch.float32} [{support.size}]"] * len(rules):
            raise InputError(
                f"method: its hook left {left or 'nothing'} to send besides for client {client}; allowed, by its extras: "
                f"{len(rules)} tensors {torch.float32} [{support.size}]; correct the class, then `train` or `resume`"
            )
    messages, counted = besides.encoded(work.extras, rules, support, plan.round, federation.config.seed)
    for client, taken in counted.items():
        work.numbers[plan.participants.index(client), -1] += taken
    return messages


def encode_and_send(
    exchange: Outlet,
    task: Task,
    policy: UploadConfig,
    seed: int,
    held: MutableMapping[int, Residual],
    client: int,
    update: Tensor,
) -> tuple[Bytes, Residual | None]:
    """Add the client's old residual to its update, compress the sum and send it; what is left is the new residual.

    Args:
        exchange: takes the messages.
        policy, seed: of the configuration.
        held: residuals by client; the client's is replaced, or removed.
        update: float32 [n]; becomes the residual's memory.

    Returns:
        The bytes sent, and the new residual on the update's device.
    """
    old = held.pop(client, None)
    residuals.recall(update, old, policy, task.carried, task.round)
    generator = streams.stream(seed, "rounding", task.round, client)
    counted, decoded = Bytes(), None
    for message in codec.encode(update, task.support, task.upload, task.round, client, generator):
        counted += exchange.post(message)
        if message.kind == SUPPORT and policy.residual == "ef21":
            decoded = message.coded.restored()
    left = update[: task.support.size]
    kept = residuals.remember(left, decoded, old, policy, task.carried, task.round)
    if kept is not None:
        held[client] = kept
    return counted, kept


def _require_finite(loss: float, update: Tensor, plan: RoundPlan, client: int, rank: int) -> None:
    # Smallest and largest are NaN if anything is: one pass, and no vector of answers.
    if np.isfinite(loss) and all(bool(torch.isfinite(end)) for end in torch.aminmax(update)):
        return
    raise NumericalError(_diverged(plan, client, rank, f"loss {loss}"))


def _diverged(plan: RoundPlan, client: int, rank: int, what: str) -> str:
    return (
        f"client {client} (rank {rank}) diverged in round {plan.round + 1}: {what}, learning rate "
        f"{plan.learning_rate:g}; checkpoints are untouched. Start a new run with a lower learning_rate"
    )


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


def _speeds(federation: Federation, state: State, placed: dict[int, int], seconds: float) -> list[float] | None:
    """What is known of the ranks' speeds after a round; `seconds`: for which this rank has trained."""
    if federation.config.balance != "speed":
        return None
    trained = federation.comm.gather(np.array([seconds]))[:, 0].tolist()
    return placement.learnt_speeds(state.speeds, placed, federation.samples, trained)


def _move_residuals(federation: Federation, state: State, placed: dict[int, int]) -> ResidualStore:
    """Send each participant's residual to the rank that will train it; this is simulation, not upload.

    Returns what this rank holds in the round. `state` keeps what left until the round is complete.
    """
    transfers = [(client, state.holders[client], rank) for client, rank in placed.items()]
    held = state.held.copy()
    arrived = federation.comm.move(transfers, lambda client: pack_residual(held.pop(client, None)))
    for client, message in arrived.items():
        residual = unpack_residual(message)
        if residual is not None:
            held[client] = residual
    return held


def _holders(state: State, placed: dict[int, int]) -> list[int]:
    """Where residuals lie after a round: with who trained their clients."""
    holders = list(state.holders)
    for client, rank in placed.items():
        holders[client] = rank
    return holders


def pack_residual(residual: Residual | None) -> np.ndarray:
    """A residual as a message: int64 round, float32 values; no bytes for none."""
    if residual is None:
        return np.zeros(0, np.uint8)
    head = np.array([residual.round], np.int64).view(np.uint8)
    return np.concatenate([head, residual.values.cpu().numpy().view(np.uint8)])


def unpack_residual(message: np.ndarray) -> Residual | None:
    """The inverse of `pack_residual`."""
    if not message.size:
        return None
    values = torch.from_numpy(message[8:].view(np.float32))  # the message's own memory: no second copy of 4 P bytes
    return Residual(values, int(message[:8].view(np.int64)[0]))
