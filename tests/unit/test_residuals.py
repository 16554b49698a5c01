"""Residuals: what each policy keeps, and how it ages."""

import pytest
import torch

from feddip_mpi.config import UploadConfig
from feddip_mpi.residuals import Residual, recall, remember

LEFT = torch.tensor([1.0, -2.0, 0.0, 4.0])
MASK = torch.tensor([True, False, True, False])


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("keep", [1, -2, 0, 4]), ("decay", [1, -2, 0, 4]), ("in_mask_only", [1, 0, 0, 0]), ("drop", None)],
)
def test_what_each_policy_remembers(policy: str, kept: list[float] | None) -> None:
    residual = remember(LEFT, MASK, UploadConfig(residual=policy), 7)
    if kept is None:
        assert residual is None
    else:
        assert residual is not None
        assert residual.values.tolist() == kept
        assert residual.values.dtype == torch.float32
        assert residual.round == 7


@pytest.mark.parametrize("policy", ["keep", "decay", "in_mask_only", "drop"])
def test_zero_is_not_stored(policy: str) -> None:
    assert remember(torch.tensor([0.0, -0.0, 0.0, 0.0]), MASK, UploadConfig(residual=policy), 1) is None


def test_what_lies_outside_the_mask_alone_is_not_stored_in_mask_only() -> None:
    left = torch.tensor([0.0, 5.0, 0.0, 5.0])
    assert remember(left, MASK, UploadConfig(residual="in_mask_only"), 1) is None
    assert remember(left, MASK, UploadConfig(residual="keep"), 1) is not None


@pytest.mark.parametrize(("now", "absent"), [(5, 0), (6, 1), (9, 4)])
def test_decay_shrinks_once_per_round_of_absence(now: int, absent: int) -> None:
    policy = UploadConfig(residual="decay", residual_decay=0.5)
    old = recall(Residual(LEFT, 4), policy, now)
    assert old is not None
    assert torch.equal(old, LEFT * 0.5**absent)


@pytest.mark.parametrize("policy", ["keep", "in_mask_only"])
def test_other_policies_do_not_age(policy: str) -> None:
    old = recall(Residual(LEFT, 0), UploadConfig(residual=policy), 1000)
    assert old is not None
    assert torch.equal(old, LEFT)


def test_nobody_remembers_before_the_first_round() -> None:
    assert recall(None, UploadConfig(), 0) is None
    assert recall(None, UploadConfig(residual="decay"), 3) is None


def test_recall_does_not_age_the_stored_values() -> None:
    residual = Residual(LEFT.clone(), 0)
    recall(residual, UploadConfig(residual="decay", residual_decay=0.1), 9)
    assert torch.equal(residual.values, LEFT)
