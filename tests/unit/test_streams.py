"""Random streams: pure functions of what they are for."""

import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_methods import build

from feddip_mpi import config, rounds
from feddip_mpi.data import partition
from feddip_mpi.schedules import participants
from feddip_mpi.settings import DataConfig
from feddip_mpi.streams import stream, torch_seed

COUNTERS = st.integers(0, 2**31)
SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS, st.sampled_from(["batches", "participants"]), COUNTERS, COUNTERS)
def test_a_stream_depends_on_its_arguments_alone(seed: int, purpose: str, round: int, client: int) -> None:
    first = stream(seed, purpose, round, client).random(4)
    stream(seed, "another", round, client).random(7)
    assert np.array_equal(stream(seed, purpose, round, client).random(4), first)
    assert torch_seed(seed, purpose, round, client) == torch_seed(seed, purpose, round, client)


@given(st.sets(st.tuples(SEEDS, st.sampled_from(["a", "b"]), COUNTERS, COUNTERS), min_size=2, max_size=6))
def test_different_arguments_give_different_numbers(keys: set[tuple[int, str, int, int]]) -> None:
    assert len({stream(*key).bytes(16) for key in keys}) == len(keys)
    assert len({torch_seed(*key) for key in keys}) == len(keys)


def test_neighbouring_counters_are_not_confused() -> None:
    # round and client swapped, a seed of two words beside one of one word: all 64-bit, so no accidental equals
    seeds = (0, 1, 2, 2**32, 2**32 + 1, 2**63 - 1)
    keys = [(s, p, r, c) for s, p, r, c in itertools.product(seeds, ("a", "b"), range(4), range(4))]
    assert len({stream(*key).integers(2**63) for key in keys}) == len(keys)


def test_streams_are_not_correlated() -> None:
    draws = np.stack([stream(1, "batches", t, k).random(2000) for t in range(4) for k in range(4)])
    correlation = np.corrcoef(draws) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
def test_torch_seed_is_one_that_torch_takes(seed: int) -> None:
    assert 0 <= torch_seed(seed, "initial weights") < 2**63


# A run that was begun with one version is resumed with another: what a configuration draws never changes.


def test_streams_stay_as_they_are() -> None:
    assert stream(1, "batches", 3, 2).bytes(8).hex() == "a50ba91fb47f5992"
    assert stream(2**63 - 1, "partition").bytes(8).hex() == "879a1f863d3a00b5"
    assert torch_seed(1, "initial weights") == 7311168383385588658


def test_participants_and_initial_masks_stay_as_they_are() -> None:
    chosen = config.validate({"clients": 50, "participants": 5})
    assert [participants(chosen, t) for t in (0, 1)] == [(3, 6, 11, 32, 40), (7, 12, 22, 25, 31)]
    mask = rounds.initial_state(build("erk")).server.mask
    assert mask.nonzero().squeeze(1)[:8].tolist() == [1, 2, 9, 14, 15, 17, 22, 26]
    assert zlib.crc32(mask.numpy().tobytes()) == 4280384275


@pytest.mark.parametrize(
    ("rule", "train", "test"),
    [
        ("iid", [12, 13, 17, 18, 20, 26], [4, 5]),
        ("dirichlet", [1, 4, 8, 10, 14, 16], [2, 4, 7]),
        ("pathological", [5, 15, 18, 20, 23, 29], [3, 8]),
        ("quantity", [8, 21, 22], []),
    ],
)
def test_partitions_stay_as_they_are(rule: str, train: list[int], test: list[int]) -> None:
    labels = np.arange(40) % 3
    made = partition.make(DataConfig(partition=rule, min_samples=1), 4, labels, labels[:9], 3, seed=1)
    assert (made.train[1][:6].tolist(), made.test[1].tolist()) == (train, test)
