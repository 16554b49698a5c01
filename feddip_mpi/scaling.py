"""A scaling study in numbers: medians of its runs, speed-up and efficiency, a cost model fitted to them. Pure.

A round of K participants on P ranks is taken for the sum of its phases. One rank trains at most ceil(K/P) clients, so
ranks above K idle and K bounds the speed-up of a strong study. With I images a client (epochs counted):

    train      c ceil(K/P) I x(min(P, K))            x(n) = max(1, n / cores): n busy ranks on cores that all share
    encode     e ceil(K/P) x(min(P, K))
    exchange   `costs.seconds`: latency x(P), bandwidth   who waits for a message waits for a core first
    decode     (d0 + d1 share) x(P)                  share: frames that a rank reads, `costs.predict`
    server     s x(P)                                every rank repeats the server's step
    evaluate   (v0 + v1 / P) x(P)                    test images are shared among the ranks
    rest       (r0 + r1 log2 P) x(P)                 digests, records: what no phase counts, small messages of all ranks

The constants come out of least squares, none negative; latency and bandwidth from `costs.fit`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from feddip_mpi import costs
from feddip_mpi.costs import Compute, Load, Network, Sample

Record = Mapping[str, Any]
Row = dict[str, Any]

KINDS = ("strong", "weak")
# The phases that follow each other on the slowest rank. "wait" is not among them: the slowest rank waits for nobody.
PHASES = ("train", "encode", "exchange", "decode", "server", "evaluate")
REST = "rest"
FEWEST_PREDICTED = 64


@dataclass(frozen=True)
class Work:
    """A round's work.

    Attributes:
        ranks: P.
        participants: K.
        images: a client trains on, epochs counted.
        payload: bytes of one client's frames.
        download: bytes of the sum's frames (sharded).
        reduced: bytes that `dense` reduces.
    """

    ranks: int
    participants: int
    images: float
    payload: float
    download: float
    reduced: float

    @property
    def load(self) -> Load:
        """For `costs`. What overlap hides is not in `exchange`: the rest is taken for one wave of messages."""
        return Load(self.participants, self.payload, self.download, self.reduced)


@dataclass(frozen=True)
class Point:
    """A cell of the study: medians over the rounds that count, of all its repeats.

    Attributes:
        kind: "strong" or "weak".
        work: what a round had to do.
        rounds: that count.
        repeats: runs.
        seconds: by PHASES, "wait" and "checkpoint"; the slowest rank's.
        round: seconds of a round without its checkpoint.
        fastest, slowest: of the rounds.
        sent, received: update bytes a rank, mean of the ranks.
        moved: bytes of residuals that followed their client to another rank, a rank, mean of the rounds.
        memory, device_memory: peak bytes a rank, mean of the ranks.
    """

    kind: str
    work: Work
    rounds: int
    repeats: int
    seconds: Mapping[str, float]
    round: float
    fastest: float
    slowest: float
    sent: float
    received: float
    moved: float
    memory: float
    device_memory: float

    @property
    def ranks(self) -> int:
        return self.work.ranks

    @property
    def speed(self) -> float:
        """Images a second."""
        return self.work.participants * self.work.images / self.round


def point(kind: str, runs: Sequence[Sequence[Record]], warm_up: int) -> Point | None:
    """A cell from the records of its runs; None where no run has more rounds than `warm_up`."""
    counted = [record for run in runs for record in run[warm_up:]]
    if not counted:
        return None

    def middle(*names: str) -> float:
        return float(median(sum(record.get(name) or 0 for name in names) for record in counted))

    last = counted[-1]
    ranks, participants = int(last["ranks"]), len(last["participants"])
    work = Work(
        ranks=ranks,
        participants=participants,
        images=middle("samples") / participants,
        payload=middle("upload_bytes") / participants,
        download=middle(*(f"download_{kind}_bytes" for kind in ("values", "indices", "other", "frame"))),
        reduced=middle("dense_bytes") / participants,
    )
    rounds = [record["round_seconds"] - (record["checkpoint_seconds"] or 0) for record in counted]
    return Point(
        kind=kind,
        work=work,
        rounds=len(counted),
        repeats=sum(len(run) > warm_up for run in runs),
        seconds={name: middle(f"{name}_seconds") for name in (*PHASES, "wait", "checkpoint")},
        round=float(median(rounds)),
        fastest=min(rounds),
        slowest=max(rounds),
        sent=middle("wire_bytes") / ranks,
        received=middle("received_bytes") / ranks,
        moved=sum(record["residual_bytes"] or 0 for record in counted) / len(counted) / ranks,
        memory=max(record["host_memory_bytes"] for record in counted) / ranks,
        device_memory=max(record["device_memory_bytes"] for record in counted) / ranks,
    )


def rows(points: Sequence[Point]) -> list[Row]:
    """The study as a table, strong before weak, fewest ranks first.

    speed_up: images a second over those of the fewest ranks of the same kind (for strong: the old time over the new).
    efficiency: speed_up x fewest ranks / ranks.
    """
    table = []
    for kind in KINDS:
        mine = sorted((p for p in points if p.kind == kind), key=lambda p: p.ranks)
        for p in mine:
            gain = p.speed / mine[0].speed
            table.append(
                {
                    "kind": kind,
                    "ranks": p.ranks,
                    "participants": p.work.participants,
                    "repeats": p.repeats,
                    "rounds": p.rounds,
                    "round_seconds": p.round,
                    "fastest_round_seconds": p.fastest,
                    "slowest_round_seconds": p.slowest,
                    "speed_up": gain,
                    "efficiency": gain * mine[0].ranks / p.ranks,
                    "samples_per_second": p.speed,
                    **{f"{name}_seconds": value for name, value in p.seconds.items()},
                    "sent_bytes_per_rank": p.sent,
                    "received_bytes_per_rank": p.received,
                    "moved_bytes_per_rank": p.moved,
                    "host_memory_bytes_per_rank": p.memory,
                    "device_memory_bytes_per_rank": p.device_memory,
                }
            )
    return table


@dataclass(frozen=True)
class Place:
    """Where the ranks run.

    Attributes:
        mode: of the exchange, one of `costs.MODES`.
        ranks_per_node: as the nodes were filled; None: all ranks on one.
        cores: that all ranks share; None: every rank has its own.
    """

    mode: str
    ranks_per_node: int | None = None
    cores: int | None = None

    def nodes(self, ranks: int) -> int:
        return 1 if self.ranks_per_node is None else -(-ranks // self.ranks_per_node)

    def crowding(self, busy: int) -> float:
        """How many times longer a rank takes where `busy` ranks share the cores."""
        return 1.0 if self.cores is None else max(1.0, busy / self.cores)


@dataclass(frozen=True)
class Model:
    """What a round takes; see the top of this module.

    Attributes:
        place: where what was fitted ran.
        constants: seconds by phase (PHASES without "exchange", and REST), in the order of its columns.
        latency, bandwidth: of `costs.Network`.
        exchange_error: root of the mean squared relative error of the transfers; NaN where nothing was sent.
    """

    place: Place
    constants: Mapping[str, tuple[float, ...]]
    latency: float
    bandwidth: float
    exchange_error: float

    def seconds(self, work: Work) -> dict[str, float]:
        """Predicted seconds by phase."""
        found = {
            phase: float(np.dot(self.constants[phase], columns))
            for phase, columns in _columns(self.place, work).items()
        }
        latency = self.latency * self.place.crowding(work.ranks)
        network = Network(latency, self.bandwidth, work.ranks, self.place.nodes(work.ranks))
        found["exchange"] = costs.seconds(network, work.load)[self.place.mode] if work.ranks > 1 else 0.0
        return {phase: found[phase] for phase in (*PHASES, REST)}

    def round(self, work: Work) -> float:
        """Predicted seconds of a round."""
        return sum(self.seconds(work).values())

    def with_own_cores(self) -> Model:
        """The same constants where no rank shares its core."""
        return replace(self, place=replace(self.place, cores=None))


def fit(points: Sequence[Point], place: Place) -> Model:
    """Least squares of the errors in parts of a round; raises ValueError without points."""
    if not points:
        raise ValueError("no points to fit to")
    weights = np.array([1 / p.round for p in points])
    columns = [_columns(place, p.work) for p in points]
    constants = {}
    for phase in columns[0]:
        wanted = np.array([_rest(p) if phase == REST else p.seconds[phase] for p in points])
        table = np.array([c[phase] for c in columns])
        constants[phase] = tuple(nonnegative(table * weights[:, None], wanted * weights).tolist())
    samples = [_sample(place, p) for p in points if p.ranks > 1 and p.seconds["exchange"] > 0]
    latency, bandwidth, error = costs.fit(samples) if samples else (0.0, float("inf"), float("nan"))
    return Model(place, constants, latency, bandwidth, error)


def nonnegative(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """x >= 0 [k] with the least ||columns x - wanted||; columns [n, k], k small: every subset of them is tried."""
    count = columns.shape[1]
    best, least = np.zeros(count), float(np.linalg.norm(wanted))
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            found = np.zeros(count)
            found[chosen] = np.linalg.lstsq(columns[:, chosen], wanted, rcond=None)[0]
            error = float(np.linalg.norm(columns @ found - wanted))
            if (found >= 0).all() and error < least:
                best, least = found, error
    return best


def _columns(place: Place, work: Work) -> dict[str, list[float]]:
    """What the constants of each phase are multiplied with."""
    ranks, clients = work.ranks, -(-work.participants // work.ranks)
    training, everywhere = place.crowding(min(ranks, work.participants)), place.crowding(ranks)
    nothing = Network(0.0, float("inf"), ranks, place.nodes(ranks))
    share = costs.predict(place.mode, nothing, work.load, Compute(encode=0.0, decode=1.0, apply=0.0))["decode"]
    return {
        "train": [clients * work.images * training],
        "encode": [clients * training],
        "decode": [everywhere, share * everywhere],
        "server": [everywhere],
        "evaluate": [everywhere, everywhere / ranks],
        REST: [everywhere, everywhere * math.log2(ranks)],
    }


def _rest(p: Point) -> float:
    return p.round - sum(p.seconds[phase] for phase in PHASES)


def _sample(place: Place, p: Point) -> Sample:
    """The exchange of a point as `costs.fit` wants it: the two columns of `costs.seconds`."""
    nodes = place.nodes(p.ranks)
    steps = costs.seconds(Network(1.0, float("inf"), p.ranks, nodes), p.work.load)[place.mode]
    return Sample(steps * place.crowding(p.ranks), link_bytes(place, p.work), p.seconds["exchange"])


def link_bytes(place: Place, work: Work) -> float:
    """Bytes that pass a rank's link in one direction in a round, by the cost model."""
    return costs.seconds(Network(0.0, 1.0, work.ranks, place.nodes(work.ranks)), work.load)[place.mode]


def left_out(points: Sequence[Point], place: Place) -> list[Row]:
    """Every rank count predicted by a model that has not seen it; empty where too few are left to fit to.

    Returns:
        Rows with "kind", "ranks", "measured" and "predicted" seconds a round, "error" (relative), and "beyond": no
        rank count as large was among those fitted, so that this one is a real prediction.
    """
    counts = sorted({p.ranks for p in points})
    found = []
    for ranks in counts:
        others = [p for p in points if p.ranks != ranks]
        if len({p.ranks for p in others}) < 2 or not any(p.ranks > 1 for p in others):
            continue
        model = fit(others, place)
        for p in (p for p in points if p.ranks == ranks):
            predicted = model.round(p.work)
            found.append(
                {
                    "kind": p.kind,
                    "ranks": ranks,
                    "measured": p.round,
                    "predicted": predicted,
                    "error": predicted / p.round - 1,
                    "beyond": ranks == counts[-1],
                }
            )
    return found


def errors(rows: Sequence[Row]) -> Row:
    """Root of the mean square and largest size of the errors of `left_out`, and the largest beyond what was fitted."""
    sizes = [abs(row["error"]) for row in rows]
    beyond = [abs(row["error"]) for row in rows if row["beyond"]]
    return {
        "root_mean_square": float(np.sqrt(np.mean(np.square(sizes)))) if sizes else None,
        "largest": max(sizes, default=None),
        "beyond": max(beyond, default=None),
    }


def predictions(model: Model, points: Sequence[Point]) -> list[Row]:
    """1, 2, 4, ... `costs.MOST_RANKS` ranks with a core each, for every kind that was measured.

    Strong: the participants that were measured. Weak: as many a rank as were measured. speed_up and efficiency are
    against the model's own single rank, in images a second.
    """
    own, table = model.with_own_cores(), []
    for kind in KINDS:
        mine = [p for p in points if p.kind == kind]
        if not mine:
            continue
        last = max(mine, key=lambda p: p.ranks).work
        single = None
        for ranks in [1, *costs.powers()]:
            participants = last.participants
            if kind == "weak":
                participants = -(-last.participants // last.ranks) * ranks
            work = replace(last, ranks=ranks, participants=participants)
            took = own.seconds(work)
            total = sum(took.values())
            speed = participants * work.images / total
            single = single or speed
            table.append(
                {
                    "kind": kind,
                    "ranks": ranks,
                    "participants": participants,
                    "idle_ranks": max(0, ranks - participants),
                    "round_seconds": total,
                    "speed_up": speed / single,
                    "efficiency": speed / single / ranks,
                    "link_bytes_per_rank": link_bytes(model.place, work),
                    **{f"{phase}_seconds": value for phase, value in took.items()},
                }
            )
    return table
