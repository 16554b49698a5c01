"""Random streams: pure functions of what they are for."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
