"""Schedules: tables by hand, and what holds for every length of run."""

import json
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feddip_mpi.config import validate
from feddip_mpi.errors import InputError
from feddip_mpi.schedules import RoundPlan, last_mask_update, learning_rate, participants, penalty, plan_round, sparsity
from feddip_mpi.settings import Config, PenaltyConfig, SparsityConfig


def config(**values: object) -> Config:
    return validate({"clients": 8, "participants": 3, **values})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("cubic", [0.5, 0.73125, 0.85, 0.89375, 0.9, 0.9]),
        ("linear", [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]),
        ("constant", [0.9] * 6),
        ("one_shot", [0.5, 0.5, 0.5, 0.5, 0.9, 0.9]),
    ],
)
def test_sparsity_table(shape: str, expected: list[float]) -> None:
    schedule = SparsityConfig(initial=0.5, final=0.9, schedule=shape)
    assert [sparsity(schedule, finished, 4) for finished in range(6)] == pytest.approx(expected, abs=1e-12)


@given(
    st.integers(1, 200),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.sampled_from(["cubic", "linear", "constant", "one_shot"]),
)
def test_sparsity_grows_from_initial_to_exactly_final(horizon: int, a: float, b: float, shape: str) -> None:
    schedule = SparsityConfig(initial=min(a, b), final=max(a, b), schedule=shape)
    values = [sparsity(schedule, finished, horizon) for finished in range(horizon + 3)]
    assert values[horizon:] == [schedule.final] * 3
    assert all(y >= x - 1e-15 for x, y in pairwise(values))
    assert all(schedule.initial - 1e-15 <= v <= schedule.final + 1e-15 for v in values)


@settings(max_examples=300)
@given(
    st.integers(1, 25),
    st.integers(1, 30),
    st.sampled_from([0.01, 0.3, 0.5, 0.75, 1.0]),
    st.sampled_from(["cubic", "linear", "constant", "one_shot"]),
)
def test_the_last_mask_update_reaches_the_final_sparsity(rounds: int, every: int, freeze: float, shape: str) -> None:
    settings_ = config(
        rounds=rounds,
        mask={"every": every, "freeze_after": freeze},
        sparsity={"initial": 0.3, "final": 0.95, "schedule": shape},
    )
    plans = [plan_round(settings_, t) for t in range(rounds)]
    updates = [plan.round + 1 for plan in plans if plan.update_mask]
    share = Fraction(str(freeze)) * rounds
    last = max(1, -(-share.numerator // share.denominator))
    assert updates == sorted({*range(every, last, every), last})
    assert plans[last - 1].sparsity == 0.95
    assert all(plan.sparsity == 0.95 for plan in plans[last:])
    if shape != "constant":
        assert all(plan.sparsity < 0.95 for plan in plans[: last - 1])


@pytest.mark.parametrize(
    ("rounds", "freeze", "last"),
    [(1, 1.0, 1), (1, 0.01, 1), (100, 0.75, 75), (100, 0.07, 7), (10, 0.71, 8), (3, 0.5, 2), (1000, 1.0, 1000)],
)
def test_last_mask_update_table(rounds: int, freeze: float, last: int) -> None:
    assert last_mask_update(rounds, freeze) == last


@pytest.mark.parametrize(
    ("rounds", "steps", "nineteenths"),
    [
        (1, 20, [0]),
        (2, 20, [0, 10]),
        (5, 20, [0, 4, 8, 12, 16]),  # fewer rounds than steps: segments are skipped, the last is not entered
        (20, 20, list(range(20))),
        (25, 20, [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12, 13, 14, 15, 16, 16, 17, 18, 19]),
        (4, 2, [0, 0, 19, 19]),
        (5, 2, [0, 0, 0, 19, 19]),
        (3, 1, [19, 19, 19]),
        (1, 1, [19]),
    ],
)
def test_penalty_steps_table(rounds: int, steps: int, nineteenths: list[int]) -> None:
    schedule = PenaltyConfig(maximum=0.019, steps=steps)
    assert [penalty(schedule, t, rounds) for t in range(rounds)] == pytest.approx(
        [0.001 * n for n in nineteenths], abs=1e-15
    )


@given(st.integers(2, 30), st.integers(0, 300), st.floats(1e-6, 10))
def test_penalty_climbs_in_equal_steps_of_equal_length(steps: int, more: int, maximum: float) -> None:
    rounds = steps + more
    values = [penalty(PenaltyConfig(maximum=maximum, steps=steps), t, rounds) for t in range(rounds)]
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] == pytest.approx(maximum)
    assert sorted(set(values)) == pytest.approx([maximum * i / (steps - 1) for i in range(steps)])
    lengths = [values.count(value) for value in set(values)]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(2, 60), st.integers(1, 59), st.floats(1e-6, 10))
def test_penalty_of_a_run_shorter_than_its_steps_begins_at_zero_and_stays_below_the_maximum(
    steps: int, rounds: int, maximum: float
) -> None:
    rounds = min(rounds, steps - 1)
    values = [penalty(PenaltyConfig(maximum=maximum, steps=steps), t, rounds) for t in range(rounds)]
    assert values[0] == 0
    assert all(0 <= x < y < maximum for x, y in pairwise(values))
    assert values == pytest.approx(
        [maximum * float(Fraction(steps * t, rounds) // 1) / (steps - 1) for t in range(rounds)]
    )


def test_published_penalty() -> None:
    schedule = PenaltyConfig(maximum=1e-3, schedule="published")
    step = 5e-4 / 19
    table = [0.0] + [5e-4 + step * i for i in range(19)]
    assert [penalty(schedule, t, 1000) for t in range(1000)] == pytest.approx([table[t // 50] for t in range(1000)])
    # 107 rounds: segments of 5, the last one takes the remainder
    assert [penalty(schedule, t, 107) for t in range(107)] == pytest.approx(
        [table[min(19, t // 5)] for t in range(107)]
    )
    # fewer rounds than segments: these are empty, and the last one takes all
    assert [penalty(schedule, t, 19) for t in range(19)] == pytest.approx([table[19]] * 19)


@pytest.mark.parametrize("maximum", [0, 1e-4, 4.999e-4])
def test_published_penalty_above_its_maximum_is_refused(maximum: float) -> None:
    with pytest.raises(InputError, match=f"penalty.maximum: got {float(maximum)}, below the 0.0005 .*=published"):
        config(penalty={"maximum": maximum, "schedule": "published"})
    assert config(penalty={"maximum": maximum, "schedule": "linear"})


@given(st.floats(5e-4, 1e3), st.integers(1, 200))
def test_published_penalty_stays_below_its_maximum(maximum: float, rounds: int) -> None:
    schedule = config(penalty={"maximum": maximum, "schedule": "published"}).penalty
    values = [penalty(schedule, t, rounds) for t in range(rounds)]
    assert (values[0] == 0) == (rounds >= 20) and all(0 <= x <= y <= maximum for x, y in pairwise(values))


def test_other_penalties() -> None:
    def values(shape: str, rounds: int) -> list[float]:
        return [penalty(PenaltyConfig(maximum=0.4, schedule=shape), t, rounds) for t in range(rounds)]

    assert values("constant", 3) == [0.4] * 3
    assert values("linear", 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert values("linear", 1) == [0]
    assert values("off", 3) == [0] * 3


def test_learning_rate() -> None:
    settings_ = config(learning_rate=0.2, learning_rate_decay=0.5)
    assert [learning_rate(settings_, t) for t in range(4)] == [0.2, 0.1, 0.05, 0.025]
    assert plan_round(settings_, 2).learning_rate == 0.05


@pytest.mark.parametrize(
    ("upload", "expected"),
    [
        ({}, [0, 0.75, 0, 0.5, 0, 0.25, 0, 0, 0, 0]),
        ({"regrow_schedule": "constant"}, [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]),
        ({"regrow_rounds": "all"}, [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0, 0]),
        ({"regrow_rounds": "all", "regrow_schedule": "constant"}, [1] * 8 + [0, 0]),
        ({"mode": "dense"}, [0] * 10),
        ({"mode": "dense_at_mask_updates"}, [0] * 10),
    ],
)
def test_regrow_ends_with_the_last_mask_update(upload: dict, expected: list[float]) -> None:
    settings_ = config(rounds=10, mask={"every": 2, "freeze_after": 0.8}, upload={"regrow": 0.04, **upload})
    assert [plan_round(settings_, t).regrow for t in range(10)] == pytest.approx([0.04 * share for share in expected])
    published = config(**{**settings_.model_dump(), "server_memory": "published"})
    assert not any(plan_round(published, t).regrow for t in range(10))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("masked", [False] * 5), ("dense", [True] * 5), ("dense_at_mask_updates", [False, True, False, True, True])],
)
def test_dense_uploads(mode: str, expected: list[bool]) -> None:
    settings_ = config(rounds=5, mask={"every": 2, "freeze_after": 1.0}, upload={"mode": mode})
    assert [plan_round(settings_, t).dense_upload for t in range(5)] == expected


@pytest.mark.parametrize("mode", ["allgatherv", "sharded", "node", "dense", "auto"])
def test_a_plan_says_how_updates_travel(mode: str) -> None:
    plan = plan_round(config(rounds=5, exchange=mode), 2)
    assert plan.exchange == mode and plan.to_json()["exchange"] == mode
    assert RoundPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_when_a_round_is_evaluated_and_saved() -> None:
    settings_ = config(rounds=7, eval={"every": 3}, checkpoint={"every": 2})
    plans = [plan_round(settings_, t) for t in range(7)]
    assert [plan.evaluate for plan in plans] == [False, False, True, False, False, True, True]
    assert [plan.checkpoint for plan in plans] == [False, True, False, True, False, True, True]
    assert plan_round(settings_, 0, overdue=True).checkpoint


@pytest.mark.parametrize("method", ["fedavg", "fedprox"])
def test_methods_that_do_not_prune_have_no_schedule(method: str) -> None:
    for t in range(5):
        plan = plan_round(config(rounds=5, method=method, upload={"regrow_rounds": "all"}, mask={"every": 1}), t)
        assert (plan.sparsity, plan.penalty, plan.update_mask, plan.regrow) == (0, 0, False, 0)


@given(st.integers(1, 60), st.data(), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_participants_are_sorted_unique_and_in_range(clients: int, data: st.DataObject, seed: int, t: int) -> None:
    count = data.draw(st.integers(1, clients))
    chosen = participants(config(clients=clients, participants=count, seed=seed), t)
    assert len(chosen) == count
    assert list(chosen) == sorted(set(chosen))
    assert 0 <= chosen[0] and chosen[-1] < clients
    assert all(type(client) is int for client in chosen)


def test_participants_change_with_round_and_seed_and_are_fair() -> None:
    def draws(seed: int) -> list[tuple[int, ...]]:
        return [participants(config(clients=20, participants=5, seed=seed), t) for t in range(400)]

    first = draws(1)
    assert first == draws(1)
    assert len(set(first)) > 380
    assert sum(x == y for x, y in zip(first, draws(2), strict=True)) < 5
    counts = [sum(client in chosen for chosen in first) for client in range(20)]
    assert all(abs(count - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for count in counts)


@settings(max_examples=50)
@given(
    st.integers(1, 30),
    st.integers(0, 29),
    st.sampled_from(["masked", "dense"]),
    st.sampled_from(["feddip", "fedavg"]),
    st.booleans(),
)
def test_a_plan_survives_json(rounds: int, t: int, mode: str, method: str, overdue: bool) -> None:
    plan = plan_round(config(rounds=rounds, method=method, upload={"mode": mode}), min(t, rounds - 1), overdue)
    back = RoundPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert hash(back) == hash(plan)  # participants are a tuple again
