"""What an exchange costs by mode: latency, bandwidth and measured computation in, seconds out.

Used by `exchange: auto` (the transfer alone: computation is much the same in all modes) and by `feddip-mpi bench`.
A collective of P ranks is taken for P - 1 steps of a ring, each with a latency, all bytes through one link a rank.
Every message is preceded by its length; w waves of messages travel one after the other (1 without `overlap`):

    allgatherv   2w (P-1) a + K p (P-1)/P / b                each rank gets all K payloads of p bytes but its own
    sharded      (3w+2) (P-1) a + (K/P p + d) (P-1)/P / b    each rank sends its payloads once, gets the sum (d bytes) once
    node         w (P-1 + M-1) a + K p (M-1)/M / (b P/M)     M nodes; one rank of each has its node's links to itself
    dense        2 (P-1) a + 2 r (P-1)/P / b                 an Allreduce of r bytes

Real links are not straight lines: short messages get less of the bandwidth than long ones, and libraries change their
algorithm with the length. Where transfers of several lengths were measured (`Network.probes`), their own seconds stand in
place of a and b.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from feddip_mpi.collectives import Communicator

MODES = ("allgatherv", "sharded", "node", "dense")
EQUAL_BITS = ("allgatherv", "sharded", "node")  # what `auto` chooses from: a choice must not change a result
MOST_RANKS = 4096  # as far as a prediction goes
_PROBE_BYTES = 2**18
_PROBES = 5
# Steps of a ring for each other rank: lengths and payloads; with alltoallv the longest of the lengths as well.
_STEPS = {"allgatherv": 2, "alltoallv": 3}


@dataclass(frozen=True)
class Network:
    """What the ranks are connected by.

    Attributes:
        latency: seconds a step, a.
        bandwidth: bytes a second of one rank while all ranks send, b.
        ranks: P.
        nodes: M, groups of ranks that share memory.
        probes: by collective ("allgatherv", "alltoallv") what was measured: (bytes from each rank, to each of the others
            with alltoallv; seconds of a call for each of the P - 1 other ranks), shortest first.
    """

    latency: float
    bandwidth: float
    ranks: int
    nodes: int
    probes: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    def grown(self, ranks: int) -> Network:
        """The same links and as many ranks a node as now, with another number of ranks."""
        a_node = -(-self.ranks // self.nodes)
        return replace(self, ranks=ranks, nodes=-(-ranks // a_node))

    def took(self, collective: str, size: float) -> float:
        """Seconds of one call of `Communicator.allgatherv` or `alltoallv` with `size` bytes (see `probes`).

        On the straight line through the two measured lengths around `size`, or the last two where it is longer.
        """
        probes = self.probes.get(collective, ())
        if len(probes) < 2:
            return (self.ranks - 1) * (_STEPS[collective] * self.latency + size / self.bandwidth)
        upper = next((k for k in range(1, len(probes) - 1) if probes[k][0] >= size), len(probes) - 1)
        (short, soon), (long, late) = probes[upper - 1], probes[upper]
        return (self.ranks - 1) * (soon + (late - soon) / (long - short) * (size - short))


@dataclass(frozen=True)
class Load:
    """What an exchange has to carry.

    Attributes:
        participants: K.
        payload: bytes of one client's frames, p.
        download: bytes of the sum's frames, d.
        reduced: bytes that `dense` reduces, r.
        messages: frames of one client where they are not cut.
        overlap: each of them travels by itself.
    """

    participants: int
    payload: float
    download: float
    reduced: float
    messages: int = 1
    overlap: bool = False


@dataclass(frozen=True)
class Compute:
    """Measured seconds of computation on one rank.

    Attributes:
        encode: one client's update and residual to frames.
        decode: one client's frames to values, added to the sum.
        frame: what a frame costs however short it is, made or read.
        hand_on: the whole sum to frames (sharded; each owner does its slice).
        take_in: the whole sum's frames to values.
        apply: the sum added to the dense vector.
        reduce: the additions of an Allreduce of the bytes that `dense` reduces.
    """

    encode: float
    decode: float
    apply: float
    frame: float = 0.0
    hand_on: float = 0.0
    take_in: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True)
class Sample:
    """A measured transfer: steps that a ring of its ranks takes, bytes through each rank's link, seconds."""

    steps: float
    bytes: float
    seconds: float


def seconds(network: Network, load: Load) -> dict[str, float]:
    """Predicted seconds of the transfers of an exchange by mode."""
    a, b, ranks, nodes = network.latency, network.bandwidth, network.ranks, network.nodes
    count = waves(network, load)
    uploads = load.participants * load.payload
    a_rank = uploads / ranks / count
    lengths = network.took("allgatherv", 0) / 2  # which an Allreduce has not
    return {
        "allgatherv": count * network.took("allgatherv", a_rank),
        "sharded": count * network.took("alltoallv", a_rank / ranks)
        + network.took("allgatherv", load.download / ranks),
        "node": count * (ranks + nodes - 2) * a + uploads * (nodes - 1) / nodes / (b * ranks / nodes),
        "dense": 2 * (network.took("allgatherv", load.reduced / ranks) - lengths),
    }


def waves(network: Network, load: Load) -> int:
    """How many messages travel one after the other."""
    return load.messages * _clients(network, load) if load.overlap else 1


def predict(mode: str, network: Network, load: Load, compute: Compute) -> dict[str, float]:
    """Predicted seconds of a whole exchange by phase ("encode", "transfer", "decode", "apply"), on the busiest rank.

    The phases are taken one after the other: what `overlap` hides is not taken off.
    """
    own, ranks, frames = _clients(network, load), network.ranks, load.messages
    encode, decode = own * compute.encode, load.participants * compute.decode
    if mode == "sharded" and ranks > 1:
        # A slice has its share of the values, but every frame of it a header, a checksum, a place to be looked up.
        encode += own * frames * (ranks - 1) * compute.frame
        body = max(0.0, compute.decode - frames * compute.frame)
        decode = load.participants * (body / ranks + frames * compute.frame)
        decode += compute.hand_on / ranks + compute.take_in + frames * (ranks - 1) * compute.frame
    elif mode == "dense":
        decode = own * compute.decode + compute.reduce * (ranks - 1) / ranks
    return {"encode": encode, "transfer": seconds(network, load)[mode], "decode": decode, "apply": compute.apply}


def grown(load: Load, network: Network, ranks: int) -> Load:
    """The load of `network`'s ranks on another number of ranks, with as many clients each."""
    return replace(load, participants=_clients(network, load) * ranks)


def powers() -> list[int]:
    """2, 4, ... MOST_RANKS: what tables show."""
    return [2**k for k in range(1, MOST_RANKS.bit_length())]


def crossover_ranks(network: Network, load: Load, compute: Compute) -> int | None:
    """The fewest ranks, with as many clients a rank as now, at which `sharded` wins over `allgatherv`; None: never."""
    for ranks in range(2, MOST_RANKS + 1):
        if _sharded_wins(network.grown(ranks), grown(load, network, ranks), compute):
            return ranks
    return None


def crossover_participants(network: Network, load: Load, compute: Compute) -> int | None:
    """The fewest participants with which `sharded` wins over `allgatherv` on the network's ranks; None: never.

    Searched up to 64 clients a rank.
    """
    most = 64 * network.ranks
    wins = [k for k in _grid(most) if _sharded_wins(network, replace(load, participants=k), compute)]
    if not wins:
        return None
    # Between a number of the grid that does not win and the next, which does.
    below = max((k for k in _grid(most) if k < wins[0]), default=0)
    for k in range(below + 1, wins[0]):
        if _sharded_wins(network, replace(load, participants=k), compute):
            return k
    return wins[0]


def _grid(most: int) -> list[int]:
    """1, 2, ... in steps of an eighth, up to `most`."""
    found = [1]
    while found[-1] < most:
        found.append(min(most, found[-1] + max(1, found[-1] // 8)))
    return found


def _sharded_wins(network: Network, load: Load, compute: Compute) -> bool:
    sharded, gathered = (sum(predict(mode, network, load, compute).values()) for mode in ("sharded", "allgatherv"))
    return sharded < gathered


def _clients(network: Network, load: Load) -> int:
    """Clients of the rank that has most."""
    return -(-load.participants // network.ranks)


def choose(network: Network, load: Load) -> tuple[str, str]:
    """The cheapest mode of EQUAL_BITS and why, in a line; see `Load`. Of equal ones the first."""
    if network.ranks == 1:
        return "allgatherv", "one rank: nothing to send"
    predicted = seconds(network, load)
    # Where every rank is a node of its own, `node` is `allgatherv` with more steps.
    usable = [mode for mode in EQUAL_BITS if mode != "node" or network.nodes < network.ranks]
    best = min(usable, key=lambda mode: predicted[mode])
    times = ", ".join(f"{mode} {1e3 * predicted[mode]:.2f} ms" for mode in usable)
    return best, (
        f"predicted: {times}; {load.participants} payloads of {load.payload:.0f} bytes, sum of {load.download:.0f}, "
        f"{network.ranks} ranks "
        f"on {network.nodes} node{'s' * (network.nodes > 1)}, latency {1e6 * network.latency:.0f} us, "
        f"bandwidth {8e-6 * network.bandwidth:.0f} Mbit/s"
    )


def network(
    latency_us: float | None, bandwidth_mbit: float | None, measured: tuple[float, float] | None, ranks: int, nodes: int
) -> Network:
    """From what is configured and, where that is None, what was measured (see `measure`)."""
    a, b = measured or (0.0, 0.0)
    return Network(
        a if latency_us is None else latency_us * 1e-6,
        b if bandwidth_mbit is None else bandwidth_mbit * 125e3,
        ranks,
        nodes,
    )


def gathered(ranks: int, size: int, seconds: float) -> Sample:
    """A `Communicator.allgatherv` of `size` bytes from each rank."""
    return Sample(_STEPS["allgatherv"] * (ranks - 1), (ranks - 1) * size, seconds)


def exchanged(ranks: int, size: int, seconds: float) -> Sample:
    """A `Communicator.alltoallv` of `size` bytes from each rank to each."""
    return Sample(_STEPS["alltoallv"] * (ranks - 1), (ranks - 1) * size, seconds)


def curve(ranks: int, times: Mapping[int, float]) -> list[tuple[float, float]]:
    """`Network.probes` of a collective from the seconds of a call on so many ranks, by length.

    A shorter message never takes longer than a longer one: where it was measured so, that was noise.
    """
    found: list[tuple[float, float]] = []
    least = float("inf")
    for size in sorted(times, reverse=True):
        least = min(least, times[size] / (ranks - 1))
        found.append((float(size), least))
    return found[::-1]


def fit(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """(latency in seconds, bandwidth in bytes a second, error) by least squares of the relative errors.

    Relative, because an absolute fit would see nothing but the longest messages. The error is the root of the mean
    squared relative error of the fit. Neither number comes out negative: a sample set that is explained best without
    latency (or without bytes) gets 0 (or infinity).
    """
    timed = np.array([sample.seconds for sample in samples])
    columns = np.array([[sample.steps, sample.bytes] for sample in samples], np.float64) / timed[:, None]
    usable = [np.linalg.lstsq(columns, np.ones(len(samples)), rcond=None)[0]]
    for alone in range(2):
        only = np.zeros(2)
        only[alone] = columns[:, alone].sum() / max((columns[:, alone] ** 2).sum(), 1e-300)
        usable.append(only)
    errors = [float(np.sqrt(np.mean((columns @ found - 1) ** 2))) for found in usable]
    best = min((k for k in range(3) if (usable[k] >= 0).all()), key=lambda k: errors[k])
    a, a_byte = (float(value) for value in usable[best])
    return a, 1 / a_byte if a_byte > 0 else float("inf"), errors[best]


def measure(comm: Communicator, background: bool) -> tuple[float, float]:
    """(latency in seconds, bandwidth in bytes a second) from a few small exchanges; takes well under a second a rank.

    Every rank calls it; rank 0's numbers count, because rank 0 plans. `background`: by the thread that sends where
    messages overlap, which looks at its requests now and then only.
    """

    def probe(size: int) -> object:
        def work() -> object:
            return comm.allgatherv([np.zeros(size, np.uint8)], [1] * comm.size)

        return comm.post(work).result() if background else work()

    if comm.size == 1:
        return 0.0, float("inf")
    samples = [gathered(comm.size, size, _median(functools.partial(probe, size))) for size in (8, _PROBE_BYTES)]
    return fit(samples)[:2]


def _median(work: Callable[[], object]) -> float:
    work()  # connections are made by the first message
    times = []
    for _ in range(_PROBES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[_PROBES // 2]
