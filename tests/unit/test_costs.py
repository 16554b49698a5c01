"""The cost model: seconds by hand, and a choice that cannot change a result."""

from dataclasses import replace

import numpy as np
import pytest
from alone import Alone
from hypothesis import given
from hypothesis import strategies as st

from feddip_mpi import costs
from feddip_mpi.costs import Network

# 8 ranks on 2 nodes, 1 ms a step, 1 MB/s.
NETWORK = Network(latency=1e-3, bandwidth=1e6, ranks=8, nodes=2)


def test_seconds_by_hand() -> None:
    assert costs.seconds(NETWORK, participants=16, payload=1000, download=20_000) == pytest.approx({
        "allgatherv": 7e-3 + 14_000e-6,  # 16 payloads, 7/8 of them from elsewhere
        "sharded": 14e-3 + (2000 + 20_000) * 7 / 8 * 1e-6,
        "node": 1e-3 + 16_000 / 2 / 4e6,  # half of them from the other node, over four links
        "dense": 14e-3 + 2 * 20_000 * 7 / 8 * 1e-6,
    })  # fmt: skip


def test_one_rank_sends_nothing() -> None:
    alone = Network(1e-3, 1e6, 1, 1)
    assert set(costs.seconds(alone, 5, 1e6, 1e6).values()) == {0.0}
    assert costs.choose(alone, 5, 1e6, 1e6) == ("allgatherv", "one rank: nothing to send")


def test_the_cheapest_is_chosen_and_the_reason_says_by_how_much() -> None:
    assert costs.choose(replace(NETWORK, nodes=8), 8, 100, 1000)[0] == "allgatherv"  # latency is all
    assert costs.choose(replace(NETWORK, nodes=8), 200, 10**6, 10**6)[0] == "sharded"  # bytes are all
    assert costs.choose(NETWORK, 8, 10**6, 4 * 10**6)[0] == "node"
    mode, why = costs.choose(NETWORK, 16, 1000, 20_000)
    assert mode == "node"
    for clue in ("allgatherv 21.00 ms", "sharded 33.25 ms", "node 3.00 ms", "16 payloads of 1000 bytes", "sum of 20000",
                 "8 ranks on 2 nodes", "latency 1000 us", "bandwidth 8 Mbit/s"):  # fmt: skip
        assert clue in why
    assert "dense" not in why
    assert "on 1 node," in costs.choose(replace(NETWORK, nodes=1), 16, 1000, 20_000)[1]


@given(
    st.integers(1, 64), st.integers(1, 64), st.floats(0, 1), st.floats(1, 1e10), st.integers(1, 100),
    st.floats(0, 1e9), st.floats(0, 1e9),
)  # fmt: skip
def test_a_choice_is_the_first_of_the_cheapest_that_give_equal_bits(
    ranks: int, nodes: int, latency: float, bandwidth: float, participants: int, payload: float, download: float
) -> None:
    network = Network(latency, bandwidth, ranks, min(nodes, ranks))
    mode, _ = costs.choose(network, participants, payload, download)
    predicted = costs.seconds(network, participants, payload, download)
    assert set(predicted) == set(costs.MODES) and all(np.isfinite(s) and s >= 0 for s in predicted.values())
    usable = [m for m in ("allgatherv", "sharded", "node") if m != "node" or network.nodes < ranks]
    assert mode == min(usable, key=lambda m: (predicted[m], usable.index(m)))
    assert "dense" not in costs.EQUAL_BITS  # its bits depend on the number of ranks


def test_of_equal_ones_the_first() -> None:
    free = Network(0.0, float("inf"), 4, 2)
    assert costs.seconds(free, 4, 10, 10) == dict.fromkeys(costs.MODES, 0.0)
    assert costs.choose(free, 4, 10, 10)[0] == "allgatherv"


def test_what_is_given_counts_more_than_what_was_measured() -> None:
    for latency, bandwidth, measured, expected in [
        (50.0, 100.0, None, (50e-6, 12.5e6)), (None, 100.0, (1e-3, 5.0), (1e-3, 12.5e6)),
        (50.0, None, (1e-3, 5.0), (50e-6, 5.0)), (None, None, (1e-3, 5.0), (1e-3, 5.0)),
    ]:  # fmt: skip
        made = costs.network(latency, bandwidth, measured, 4, 2)
        assert (made.latency, made.bandwidth) == pytest.approx(expected) and (made.ranks, made.nodes) == (4, 2)


class Ring(Alone):
    """Eight ranks whose clock advances as the model says."""

    size, clock = 8, 0.0

    def perf_counter(self) -> float:
        return self.clock

    def allgatherv(self, payloads: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
        assert counts == [1] * 8
        self.calls["allgatherv"] += 1
        # Lengths, then bytes; now and then somebody else uses the machine.
        self.clock += 2 * 7 * 1e-3 + 7 * payloads[0].size / 1e6 + 5.0 * (self.calls["allgatherv"] % 4 == 0)
        return payloads * 8


def test_latency_and_bandwidth_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring()
    monkeypatch.setattr(costs, "time", ring)
    latency, bandwidth = costs.measure(ring)
    assert latency == pytest.approx(1e-3, rel=0.01) and bandwidth == pytest.approx(1e6, rel=0.01)


def test_one_rank_measures_nothing() -> None:
    comm = Alone()
    assert costs.measure(comm) == (0.0, float("inf"))
    assert not comm.calls
