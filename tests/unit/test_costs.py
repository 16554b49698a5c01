"""The cost model: by hand, and the fit of what it needs."""

from dataclasses import replace

import pytest

from feddip_mpi import costs
from feddip_mpi.costs import Compute, Load, Network, Sample

NETWORK = Network(latency=1e-3, bandwidth=1e6, ranks=4, nodes=2)
LOAD = Load(participants=8, payload=1000.0, download=4000.0, reduced=5000.0, messages=2, overlap=True)
COMPUTE = Compute(encode=0.1, decode=0.02, apply=0.05, frame=0.001, hand_on=0.4, take_in=0.3, reduce=0.8)


@pytest.mark.parametrize("latency, bandwidth", [(3e-6, 1e10), (2e-4, 1.25e7), (0.0, 1e8), (1e-3, float("inf"))])
def test_the_fit_recovers_a_known_network(latency: float, bandwidth: float) -> None:
    def took(steps: int, size: float) -> Sample:
        return Sample(steps, size, steps * latency + size / bandwidth)

    samples = [took(steps, size) for steps in (6, 9) for size in (24, 12_288, 3_000_000)]
    a, b, error = costs.fit(samples)
    assert a == pytest.approx(latency, rel=1e-6, abs=1e-12)
    assert b == pytest.approx(bandwidth, rel=1e-6)
    assert error == pytest.approx(0, abs=1e-6)


def test_the_fit_says_how_far_off_it_is_and_never_goes_below_zero() -> None:
    noisy = [Sample(6, 24, 8e-4), Sample(6, 24, 1.2e-3), Sample(6, 3e6, 2e-3)]
    a, b, error = costs.fit(noisy)
    assert a > 0 and b > 0 and 0.1 < error < 0.3
    falling = [Sample(6, 24, 2e-3), Sample(6, 3e6, 1e-3)]  # longer is faster: no bandwidth explains that
    a, b, error = costs.fit(falling)
    assert a > 0 and b == float("inf") and error > 0.1


def test_probes_count_their_steps_and_bytes() -> None:
    assert costs.gathered(4, 100, 0.5) == Sample(6, 300, 0.5)  # lengths, payloads
    assert costs.exchanged(4, 100, 0.5) == Sample(9, 300, 0.5)  # lengths, the longest of them, parts


def test_transfers_by_hand() -> None:
    # Two clients a rank, two messages each, one after the other: four waves.
    assert costs.seconds(NETWORK, LOAD) == pytest.approx({
        "allgatherv": 2 * 4 * 3e-3 + 8000 * 0.75 / 1e6,
        "sharded": (3 * 4 + 2) * 3e-3 + (2000 + 4000) * 0.75 / 1e6,
        "node": 4 * (3 + 1) * 1e-3 + 8000 * 0.5 / 2e6,
        "dense": 2 * 3e-3 + 2 * 5000 * 0.75 / 1e6,
    })  # fmt: skip
    at_once = costs.seconds(NETWORK, replace(LOAD, overlap=False))
    assert at_once["allgatherv"] == pytest.approx(2 * 3e-3 + 6e-3)


def test_measured_lengths_stand_in_place_of_the_straight_line() -> None:
    curve = [(10.0, 1e-3), (110.0, 2e-3), (1110.0, 4e-3)]  # ten times longer is three times slower
    network = replace(NETWORK, probes={"allgatherv": curve})
    seconds = {size: network.took("allgatherv", size) / 3 for size in (0, 10, 60, 110, 610, 1110, 2110)}
    assert seconds == pytest.approx({0: 9e-4, 10: 1e-3, 60: 1.5e-3, 110: 2e-3, 610: 3e-3, 1110: 4e-3, 2110: 6e-3})
    assert network.grown(7).took("allgatherv", 110) == pytest.approx(6 * 2e-3)
    assert network.took("alltoallv", 110) == NETWORK.took("alltoallv", 110)  # not measured
    # Two clients a rank, 1000 bytes each in two messages, one after the other; as long as that of one fourth of the sum.
    times = costs.seconds(network, LOAD)
    assert times["allgatherv"] == pytest.approx(4 * 3 * (2e-3 + 390 * 2e-6))
    assert times["dense"] == pytest.approx(2 * 3 * (4e-3 + 140 * 2e-6 - 9e-4 / 2))


def test_noise_makes_no_prediction_fall_below_zero() -> None:
    measured = {8: 4.1e-3, 16_384: 2.3e-3, 262_144: 13e-3}  # the shortest was not the fastest
    assert costs.curve(4, measured) == [(8, 2.3e-3 / 3), (16_384, 2.3e-3 / 3), (262_144, 13e-3 / 3)]
    network = replace(NETWORK, probes={"allgatherv": costs.curve(4, measured)})
    times = [costs.seconds(network.grown(ranks), replace(LOAD, reduced=1e8))["dense"] for ranks in costs.powers()]
    assert all(time > 0 for time in times)


def test_whole_exchanges_by_hand() -> None:
    transfer = costs.seconds(NETWORK, LOAD)
    common = {"encode": 0.2, "apply": 0.05}
    gathered = costs.predict("allgatherv", NETWORK, LOAD, COMPUTE)
    assert gathered == pytest.approx({**common, "transfer": transfer["allgatherv"], "decode": 8 * 0.02})
    dense = costs.predict("dense", NETWORK, LOAD, COMPUTE)
    assert dense == pytest.approx({**common, "transfer": transfer["dense"], "decode": 2 * 0.02 + 0.75 * 0.8})
    sharded = costs.predict("sharded", NETWORK, LOAD, COMPUTE)
    frames_made, frames_read = 2 * 2 * 3, 8 * 2 + 2 * 3  # cut for 4 owners; 8 clients' parts and 3 others' sums
    assert sharded == pytest.approx({
        "encode": 0.2 + frames_made * 0.001, "transfer": transfer["sharded"], "apply": 0.05,
        "decode": 8 * 0.018 / 4 + frames_read * 0.001 + 0.4 / 4 + 0.3,
    })  # fmt: skip


def test_one_rank_sends_nothing() -> None:
    alone = Network(1e-3, 1e6, 1, 1)
    assert set(costs.seconds(alone, LOAD).values()) == {0.0}
    assert costs.predict("sharded", alone, LOAD, COMPUTE) == costs.predict("allgatherv", alone, LOAD, COMPUTE)


def test_sharded_wins_exactly_from_the_crossover_on() -> None:
    fast = Compute(encode=0.0, decode=0.0, apply=0.0)
    load = replace(LOAD, participants=4, messages=1, overlap=False, payload=1e6, download=1e6)
    wins = {}
    for ranks in (2, 3, 4):
        there, grown = NETWORK.grown(ranks), costs.grown(load, NETWORK, ranks)
        wins[ranks] = costs.seconds(there, grown)["sharded"] < costs.seconds(there, grown)["allgatherv"]
    assert wins == {2: False, 3: True, 4: True}  # evidence.md: two phases win from 3 ranks on
    assert costs.crossover_ranks(NETWORK, load, fast) == 3
    assert costs.crossover_ranks(NETWORK, replace(load, payload=1.0), fast) is None
    fewest = costs.crossover_participants(NETWORK, load, fast)
    assert fewest is not None
    for participants, wanted in ((fewest - 1, False), (fewest, True)):
        took = costs.seconds(NETWORK, replace(load, participants=participants))
        assert (took["sharded"] < took["allgatherv"]) is wanted
    assert costs.crossover_participants(NETWORK, replace(load, payload=1.0), fast) is None


def test_a_network_grows_by_whole_nodes_and_a_load_with_its_ranks() -> None:
    assert [NETWORK.grown(ranks).nodes for ranks in (2, 4, 5, 4096)] == [1, 2, 3, 2048]
    assert costs.grown(LOAD, NETWORK, 64).participants == 128
    assert (costs.powers()[0], costs.powers()[-1]) == (2, costs.MOST_RANKS)


def test_auto_never_chooses_what_would_change_a_result() -> None:
    slow = Network(1e-5, 1e6, 16, 16)
    mode, why = costs.choose(slow, Load(16, 1e6, 4e6, 4e6))
    assert mode == "sharded" and "node " not in why and "dense" not in why
    assert costs.choose(slow, Load(16, 1.0, 4e6, 4e6))[0] == "allgatherv"
    assert costs.choose(Network(0.0, 1.0, 1, 1), Load(16, 1e6, 4e6, 4e6)) == ("allgatherv", "one rank: nothing to send")
    assert costs.choose(Network(1e-5, 1e6, 16, 2), Load(4, 1e6, 4e6, 4e6))[0] == "node"
    # 32 clients on 8 ranks travel in waves where they overlap, each with its latency, and sharded has more collectives.
    waves = Network(1e-3, 12.5e6, 8, 8)
    assert costs.choose(waves, Load(32, 2e4, 6e4, 6e4))[0] == "sharded"
    assert costs.choose(waves, Load(32, 2e4, 6e4, 6e4, 2, overlap=True))[0] == "allgatherv"
