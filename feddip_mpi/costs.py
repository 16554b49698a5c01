"""What an exchange costs by mode: latency and bandwidth in, seconds out. Used by `exchange: auto` and by the benchmark.

A collective of P ranks is taken for P - 1 steps of a ring, each with a latency, all bytes through one link a rank:

    allgatherv   (P-1) a + K p (P-1)/P / b                  each rank gets all K payloads of p bytes but its own
    sharded     2(P-1) a + (K/P p + d) (P-1)/P / b          each rank sends its payloads once, gets the sum (d bytes) once
    node         (M-1) a + K p (M-1)/M / (b P/M)            M nodes; one rank of each has its node's links to itself
    dense       2(P-1) a + 2 d (P-1)/P / b                  d: the sum as float32
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from feddip_mpi.collectives import Communicator

MODES = ("allgatherv", "sharded", "node", "dense")
EQUAL_BITS = ("allgatherv", "sharded", "node")  # what `auto` chooses from: a choice must not change a result
_PROBE_BYTES = 2**18
_PROBES = 5


@dataclass(frozen=True)
class Network:
    """What the ranks are connected by.

    Attributes:
        latency: seconds a step, a.
        bandwidth: bytes a second of one rank while all ranks send, b.
        ranks: P.
        nodes: M, groups of ranks that share memory.
    """

    latency: float
    bandwidth: float
    ranks: int
    nodes: int


def seconds(network: Network, participants: int, payload: float, download: float) -> dict[str, float]:
    """Predicted seconds of an exchange by mode.

    Args:
        network: see Network.
        participants: K.
        payload: bytes of one client's frames, p.
        download: bytes of the sum's frames, d.
    """
    a, b, ranks, nodes = network.latency, network.bandwidth, network.ranks, network.nodes
    away = (ranks - 1) / ranks
    return {
        "allgatherv": (ranks - 1) * a + participants * payload * away / b,
        "sharded": 2 * (ranks - 1) * a + (participants / ranks * payload + download) * away / b,
        "node": (nodes - 1) * a + participants * payload * (nodes - 1) / nodes / (b * ranks / nodes),
        "dense": 2 * (ranks - 1) * a + 2 * download * away / b,
    }


def choose(network: Network, participants: int, payload: float, download: float) -> tuple[str, str]:
    """The cheapest mode of EQUAL_BITS and why, in a line; see `seconds`. Of equal ones the first."""
    if network.ranks == 1:
        return "allgatherv", "one rank: nothing to send"
    predicted = seconds(network, participants, payload, download)
    # Where every rank is a node of its own, `node` is `allgatherv` with more steps.
    usable = [mode for mode in EQUAL_BITS if mode != "node" or network.nodes < network.ranks]
    best = min(usable, key=lambda mode: predicted[mode])
    times = ", ".join(f"{mode} {1e3 * predicted[mode]:.2f} ms" for mode in usable)
    return best, (
        f"predicted: {times}; {participants} payloads of {payload:.0f} bytes, sum of {download:.0f}, {network.ranks} ranks "
        f"on {network.nodes} node{'s' * (network.nodes > 1)}, latency {1e6 * network.latency:.0f} us, "
        f"bandwidth {8e-6 * network.bandwidth:.0f} Mbit/s"
    )


def network(
    latency_us: float | None, bandwidth_mbit: float | None, measured: tuple[float, float] | None, ranks: int, nodes: int
) -> Network:
    """From what is configured and, where that is None, what was measured (see `measure`)."""
    a, b = measured or (0.0, 0.0)
    return Network(
        a if latency_us is None else latency_us * 1e-6, b if bandwidth_mbit is None else bandwidth_mbit * 125e3, ranks, nodes
    )


def measure(comm: Communicator) -> tuple[float, float]:
    """(latency in seconds, bandwidth in bytes a second) from a few small exchanges; takes well under a second a rank.

    Every rank calls it; rank 0's numbers count, because rank 0 plans.
    """
    if comm.size == 1:
        return 0.0, float("inf")
    small, large = (_median(lambda size=size: comm.allgatherv([np.zeros(size, np.uint8)], [1] * comm.size))  # type: ignore[misc]
                    for size in (8, _PROBE_BYTES))  # fmt: skip
    steps = comm.size - 1
    # An allgatherv of ours is two collectives: lengths, then bytes.
    return small / (2 * steps), steps * _PROBE_BYTES / max(large - small, 1e-9)


def _median(work: Callable[[], object]) -> float:
    work()  # connections are made by the first message
    times = []
    for _ in range(_PROBES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[_PROBES // 2]
