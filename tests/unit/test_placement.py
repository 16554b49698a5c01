"""Placement: everybody works somewhere, loads are even, residuals stay where that costs nothing."""

from hypothesis import given
from hypothesis import strategies as st

from feddip_mpi.placement import assign, by_rank, fill_up, learnt_speeds


@st.composite
def federations(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    ranks = draw(st.integers(1, 6))
    samples = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
    holders = draw(st.lists(st.integers(0, ranks - 1), min_size=len(samples), max_size=len(samples)))
    participants = draw(st.lists(st.sampled_from(range(len(samples))), min_size=1, unique=True))
    return sorted(participants), samples, holders, ranks


@given(federations())
def test_every_participant_has_one_rank_and_loads_are_even(case: tuple[list[int], list[int], list[int], int]) -> None:
    participants, samples, holders, ranks = case
    placed = assign(participants, samples, holders, ranks)
    assert list(placed) == participants
    assert all(0 <= rank < ranks for rank in placed.values())
    loads = [sum(samples[c] for c, r in placed.items() if r == rank) for rank in range(ranks)]
    mean, largest = sum(loads) / ranks, max(samples[c] for c in participants)
    # Longest first onto the least loaded: below mean + largest; a holder may be 10 % above the mean or the largest.
    assert max(loads) <= max(mean + largest, 1.1 * max(mean, largest)) + 1e-9


@given(federations())
def test_a_client_moves_only_from_a_rank_that_is_full(case: tuple[list[int], list[int], list[int], int]) -> None:
    participants, samples, holders, ranks = case
    placed = assign(participants, samples, holders, ranks)
    limit = 1.1 * max(sum(samples[c] for c in participants) / ranks, max(samples[c] for c in participants))
    for client in participants:
        home = holders[client]
        if placed[client] != home:
            load = sum(samples[c] for c, r in placed.items() if r == home)
            assert load + samples[client] > limit


def test_equal_clients_spread_one_per_rank_when_all_residuals_lie_on_one() -> None:
    placed = assign([0, 1, 2, 3], [10] * 4, [0] * 4, 4)
    assert sorted(placed.values()) == [0, 1, 2, 3]


def test_clients_stay_with_their_residuals_where_loads_allow() -> None:
    assert assign([1, 3, 4, 6], [10] * 8, [c % 2 for c in range(8)], 2) == {1: 1, 3: 1, 4: 0, 6: 0}


@given(federations())
def test_by_rank_lists_each_rank_in_the_order_of_the_clients(case: tuple[list[int], list[int], list[int], int]) -> None:
    placed = assign(*case)
    lists = by_rank(placed, case[3])
    assert len(lists) == case[3]
    assert sorted(c for own in lists for c in own) == case[0]
    assert all(own == [c for c in case[0] if placed[c] == rank] for rank, own in enumerate(lists))


def test_a_fast_rank_gets_more_of_the_work() -> None:
    samples, clients = [10] * 12, list(range(12))
    placed = assign(clients, samples, [c % 2 for c in clients], 2, [3.0, 1.0])
    counts = [len(own) for own in by_rank(placed, 2)]
    assert counts == [9, 3]


def test_one_large_client_goes_to_the_fast_rank() -> None:
    placed = assign([0, 1, 2], [100, 10, 10], [1, 1, 1], 2, [4.0, 1.0])
    assert placed[0] == 0


@given(federations())
def test_equal_speeds_are_no_speeds(case: tuple[list[int], list[int], list[int], int]) -> None:
    assert assign(*case, [2.0] * case[3]) == assign(*case)


def test_speeds_are_learnt_from_what_was_trained_in_which_time() -> None:
    samples = [100, 100, 300]
    first = learnt_speeds(None, {0: 0, 2: 1}, samples, [1.0, 2.0, 0.0])
    assert first == [100.0, 150.0, 125.0]  # nobody knows the third
    second = learnt_speeds(first, {1: 2}, samples, [0.0, 0.0, 10.0])
    assert second[:2] == first[:2] and 10 < second[2] < 125
    assert learnt_speeds(None, {}, samples, [0.0, 0.0, 0.0]) == [1.0, 1.0, 1.0]
    assert learnt_speeds(second, {}, samples, [0.0, 0.0, 0.0]) == second


@given(
    st.integers(0, 40),
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 9)), min_size=1, max_size=6),
)
def test_pieces_go_where_they_are_done_first(pieces: int, size: int, ranks: list[tuple[int, int]]) -> None:
    loads, speeds = [float(load) for load, _ in ranks], [float(speed) for _, speed in ranks]
    given = fill_up(pieces, size, loads, speeds)
    assert sorted(piece for own in given for piece in own) == list(range(pieces))
    assert all(own == sorted(own) for own in given)
    done = [(load + size * len(own)) / speed for load, own, speed in zip(loads, given, speeds, strict=True)]
    for rank, own in enumerate(given):
        # No rank with a piece would have it done sooner elsewhere.
        others = [done[r] + size / speeds[r] for r in range(len(ranks)) if r != rank]
        assert not own or done[rank] <= min(others, default=done[rank]) + 1e-9


def test_pieces_without_speeds_even_out_loads() -> None:
    assert fill_up(5, 10, [30.0, 10.0, 0.0]) == [[], [1, 3], [0, 2, 4]]
