"""The coordinates that travel without indices: gathered, scattered, counted."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from feddip_mpi import masks
from feddip_mpi.support import Support

MASKS = st.one_of(
    st.lists(st.booleans(), max_size=30),
    st.integers(0, 9).map(lambda n: [True] * n),
    st.integers(0, 9).map(lambda n: [False] * n),
)


@given(MASKS, st.integers(0, 4), st.booleans())
def test_what_is_taken_is_put_back(bits: list[bool], tail: int, whole: bool) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    support = Support.of(mask)
    digest = support.digest
    assert (support.size, support.count, digest) == (len(bits), sum(bits), masks.digest(mask))
    if whole:
        support, bits = support.whole(), [True] * len(bits)
    places = [i for i, kept in enumerate(bits) if kept]
    assert (support.size, support.count, support.digest) == (len(bits), len(places), digest)
    assert support.positions is None if all(bits) else support.positions.tolist() == places
    vector = torch.arange(len(bits) + tail, dtype=torch.float32) + 1
    packed = support.take(vector)
    assert packed.tolist() == [float(i + 1) for i in places]
    target = torch.zeros_like(vector)
    support.put(target, packed)
    support.add(target, 2 * packed)
    expected = [3.0 * (i + 1) if i in places else 0.0 for i in range(len(vector))]
    assert target.tolist() == expected


@given(MASKS, st.booleans())
def test_rank_and_coordinate(bits: list[bool], whole: bool) -> None:
    support = Support.of(torch.tensor(bits, dtype=torch.bool))
    if whole:
        support, bits = support.whole(), [True] * len(bits)
    places = [i for i, kept in enumerate(bits) if kept]
    for coordinate in range(len(bits) + 3):
        assert support.rank(coordinate) == sum(place < coordinate for place in places)
    for rank in range(len(places) + 3):
        assert support.coordinate(rank) == (places[rank] if rank < len(places) else len(bits))
        assert type(support.coordinate(rank)) is type(support.rank(0)) is int


def test_the_whole_of_a_whole_is_itself() -> None:
    support = Support.of(torch.tensor([True, False]))
    assert support.whole().whole() is not support
    assert Support.of(torch.tensor([True, True])).whole().count == 2
    assert support.whole().mask is support.mask  # what was left out still is known
