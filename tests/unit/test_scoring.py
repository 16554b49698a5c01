"""When a model is evaluated, and by whom: whatever the ranks are given, the scores are those of all batches in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from alone import Alone

from feddip_mpi import config, evaluate, federation, placement, schedules, scoring
from feddip_mpi.errors import Abandoned
from feddip_mpi.federation import Federation


def build(**values: object) -> Federation:
    data = {"name": "synthetic", "synthetic": {"shape": [1, 12, 12], "train_samples": 80, "test_samples": 95}}
    settings = {
        "clients": 8, "participants": 3, "local_epochs": 1, "batch_size": 8, "data": data, "rounds": 6,
        "eval": {"batch_size": 10, "clients": True}, **values,
    }  # fmt: skip
    return federation.build(config.validate(settings), Alone(), torch.device("cpu"))


def as_rank(built: Federation, rank: int, size: int) -> Federation:
    built.comm.rank, built.comm.size = rank, size  # type: ignore[misc]
    return built


@pytest.mark.parametrize("speeds", [None, [1.0, 5.0, 2.0]])
def test_ranks_evaluate_the_more_the_less_they_train_and_the_bits_are_the_same(speeds: list[float] | None) -> None:
    built = build()
    placed = {0: 0, 3: 0, 7: 1}
    whole = evaluate.merge(
        [evaluate.score(built.bound, built.initial, built.test_data, 10)], built.partition.test
    )  # fmt: skip
    parts = [
        scoring.score_part(as_rank(built, rank, 3), built.initial, placed, speeds, lambda: False) for rank in range(3)
    ]
    assert evaluate.merge(parts, built.partition.test) == whole
    counts = [int((part.losses != 0).sum()) for part in parts]
    assert sum(counts) == 10 and len(set(counts)) == 3
    assert counts[0] == min(counts), "rank 0 trains most"
    assert counts.index(max(counts)) == (2 if speeds is None else 1)
    assert np.stack([part.losses != 0 for part in parts]).sum(axis=0).tolist() == [1] * 10


def test_an_evaluation_is_given_up_between_two_batches() -> None:
    built, asked = build(), []

    def give_up() -> bool:
        asked.append(True)
        return len(asked) == 4

    with pytest.raises(Abandoned):
        scoring.score_part(built, built.initial, {0: 0}, None, give_up)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("ranks", "changes", "waits"),
    [
        (2, {}, True),
        (1, {}, False),  # nobody to wait for
        (3, {}, False),  # one client each
        (4, {}, True),
        (2, {"eval": {"overlap": False}}, False),
        (2, {"participants": 4}, False),
        (2, {"participants": 4, "data": {"partition": "quantity", "alpha": 0.3}}, True),
    ],
)
def test_an_evaluation_is_left_to_the_next_round_where_a_rank_waits_there(
    ranks: int, changes: dict[str, object], waits: bool
) -> None:
    data = {"name": "synthetic", "synthetic": {"shape": [1, 12, 12], "train_samples": 800, "test_samples": 95}}
    changes = {**changes, "data": {**data, **dict(changes.get("data", {}))}}  # type: ignore[call-overload]
    built = as_rank(build(**changes), 0, ranks)
    holders = [client % ranks for client in range(8)]
    assert scoring.can_wait(built, 1, holders, None) is waits
    # It is the next round's clients that count, as that round will place them.
    chosen = schedules.participants(built.config, 1)
    placed = placement.assign(chosen, built.samples, holders, ranks)
    loads = [sum(built.samples[c] for c in own) for own in placement.by_rank(placed, ranks)]
    assert built.config.eval.overlap is False or waits is (ranks > 1 and len(set(loads)) > 1)


def test_nothing_is_left_to_a_round_that_will_not_be() -> None:
    built = as_rank(build(), 0, 2)
    holders = [client % 2 for client in range(8)]
    assert scoring.can_wait(built, 5, holders, None) and not scoring.can_wait(built, 6, holders, None)


def test_speeds_count_as_much_as_clients() -> None:
    built = as_rank(build(participants=2), 0, 2)
    assert not scoring.can_wait(built, 1, [0, 1] * 4, None)
    assert scoring.can_wait(built, 1, [0, 1] * 4, [1.0, 1.5])


@pytest.mark.parametrize(
    ("round", "accuracy", "owed"), [(4, None, True), (4, 0.5, False), (3, None, False), (6, None, True)]
)
def test_what_a_saved_history_still_lacks(round: int, accuracy: float | None, owed: bool) -> None:
    """Rounds 2, 4 and 6, the last, are to be evaluated."""
    settings = build(eval={"every": 2}).config
    assert scoring.is_owed(settings, {"round": round, "test_accuracy": accuracy}) is owed
