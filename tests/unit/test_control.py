"""Adaptive control: decisions by hand-made histories, and what they change in the plan."""

from __future__ import annotations

from typing import Any

import pytest

from feddip_mpi import config as configs
from feddip_mpi import control
from feddip_mpi.schedules import NO_CONTROL, Control, plan_round
from feddip_mpi.settings import Config


def settings(**keys: Any) -> Config:
    return configs.validate({"rounds": 20, "mask": {"every": 5, "freeze_after": 1.0}, **keys})


def history(losses: list[float], updates: set[int] = frozenset(), **last: Any) -> list[dict[str, Any]]:  # type: ignore[assignment]
    """One record a round; `updates` are the finished rounds that renewed the mask; `last` changes the last record."""
    records = [
        {
            "train_loss": loss, "mask_updated": int(r in updates), "mask_delayed": 0, "penalty_scale": 1.0,
            "regrow_scale": 1.0, "pruning_error": 0.01, "upload_bytes": 500, "participants": [0, 1, 2, 3, 4],
        }
        for r, loss in enumerate(losses, 1)
    ]  # fmt: skip
    if records:
        records[-1] |= last
    return records


def test_off_by_default() -> None:
    for length in range(20):
        assert control.decide(settings(), history([1.0 + r for r in range(length)], {5, 10})) == NO_CONTROL


@pytest.mark.parametrize("method", ["fedavg", "fedprox"])
def test_methods_without_a_mask_are_left_alone(method: str) -> None:
    chosen = settings(method=method, control={"mask_delay": 3, "upload_bytes": 1})
    assert control.decide(chosen, history([1.0] * 9, {5})) == NO_CONTROL


@pytest.mark.parametrize("method", ["sparsyfed", "feddst", "fedrts", "gradual", "feddip"])
def test_what_a_method_does_not_have_is_not_said_to_change(method: str) -> None:
    """A record says what was done: no wait where masks change in all rounds, no factor of what is not there."""
    keys = {"mask_delay": 3, "pruning_error": 0.001, "upload_bytes": 1}
    chosen = settings(method=method, control=keys)
    waiting = control.decide(chosen, history([1.0] * 5 + [9.0] * 4, {5}, upload_indices_bytes=0))
    assert waiting.mask_waits == (method != "sparsyfed")
    cut = control.decide(chosen, history([1.0] * 5, {5}, upload_bytes=5000, upload_indices_bytes=100))
    assert (cut.penalty_scale, cut.regrow_scale) == ((1.25, 0.5) if method == "feddip" else (1.0, 1.0))


def play(config: Config, losses: list[float]) -> list[tuple[int, bool, bool]]:
    """(finished round, updated, delayed) when round r ends with losses[r - 1]."""
    records: list[dict[str, Any]] = []
    out = []
    for t, loss in enumerate(losses):
        plan = plan_round(config, t, control=control.decide(config, records))
        out.append((t + 1, plan.update_mask, plan.mask_delayed))
        new = history([loss])[0]
        records.append({**new, "mask_updated": int(plan.update_mask), "mask_delayed": int(plan.mask_delayed)})
    return out


def test_an_update_waits_until_the_loss_is_back_and_happens_then() -> None:
    config = settings(control={"mask_delay": 4, "loss_tolerance": 1.1})
    # Update after 5 at loss 1; the loss stays high to round 11 and is back in round 12, so round 13 makes up for 10.
    losses = [1.0] * 5 + [2.0] * 6 + [1.05] * 3
    events = play(config, losses)
    assert [r for r, updated, _ in events if updated] == [5, 13]
    assert [r for r, _, delayed in events if delayed] == [10, 11, 12]


def test_an_update_waits_no_longer_than_allowed() -> None:
    events = play(settings(control={"mask_delay": 2}), [1.0] * 5 + [9.0] * 9)
    assert [r for r, updated, _ in events if updated] == [5, 12]


def test_the_last_update_never_waits() -> None:
    events = play(settings(control={"mask_delay": 50}), [1.0] * 5 + [9.0] * 15)
    assert events[-1] == (20, True, False)


def test_regrow_travels_in_the_round_that_really_updates() -> None:
    config = settings(control={"mask_delay": 4}, upload={"regrow": 0.1, "regrow_schedule": "constant"})
    assert plan_round(config, 9, control=Control(mask_waits=True)).regrow == 0
    assert plan_round(config, 10, control=Control(mask_due=True)).regrow == pytest.approx(0.1)
    assert plan_round(config, 10, control=Control(mask_due=True)).update_mask


@pytest.mark.parametrize(
    ("error", "scale", "expected"),
    [(0.3, 1.0, 1.25), (0.3, 4.0, 4.0), (0.04, 1.0, 0.8), (0.04, 0.25, 0.25), (0.07, 2.0, 2.0)],
)
def test_the_penalty_follows_the_pruning_error_of_a_cut(error: float, scale: float, expected: float) -> None:
    config = settings(control={"pruning_error": 0.1})
    cut = history([1.0] * 5, {5}, pruning_error=error, penalty_scale=scale)
    assert control.decide(config, cut).penalty_scale == pytest.approx(expected)
    assert plan_round(config, 19, control=Control(penalty_scale=2.0)).penalty == pytest.approx(2e-3)
    between = history([1.0] * 6, {5}, pruning_error=error, penalty_scale=scale)
    assert control.decide(config, between).penalty_scale == scale


@pytest.mark.parametrize(
    ("used", "indices", "updated", "scale", "expected"),
    [(101, 9, 0, 1.0, 0.5), (101, 9, 1, 1 / 64, 1 / 64), (70, 9, 1, 0.25, 0.5), (70, 9, 1, 1.0, 1.0), (70, 9, 0, 0.5, 0.5),
     (90, 9, 1, 0.5, 0.5), (101, 0, 0, 1.0, 1.0), (101, 0, 1, 0.5, 0.5)],
)  # fmt: skip
def test_regrow_follows_the_upload_budget(used: int, indices: int, updated: int, scale: float, expected: float) -> None:
    """Rounds that sent no regrow coordinates say nothing about them."""
    config = settings(control={"upload_bytes": 100})
    records = history(
        [1.0], upload_bytes=5 * used, upload_indices_bytes=indices, mask_updated=updated, regrow_scale=scale
    )
    assert control.decide(config, records).regrow_scale == pytest.approx(expected)
