"""Residuals: what each policy keeps, how it ages, and that both ends of EF21 believe the same."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from feddip_mpi import codec
from feddip_mpi.aggregate import Sum
from feddip_mpi.codec import REGROW, SUPPORT, Upload
from feddip_mpi.residuals import Residual, recall, remember
from feddip_mpi.settings import UploadConfig
from feddip_mpi.support import Support

POLICIES = ("keep", "decay", "in_mask_only", "drop", "ef21")
LEFT = torch.tensor([1.0, -2.0, 0.0, 4.0])
SUPPORTED = Support.of(torch.tensor([True, False, True, False]))
SENT = torch.tensor([10.0, 20.0])
ZEROS = torch.tensor([0.0, -0.0, 0.0, 0.0])


def policy(name: str, decay: float = 0.5) -> UploadConfig:
    return UploadConfig(residual=name, residual_decay=decay)


def recalled(residual: Residual | None, name: str, round: int, support: Support = SUPPORTED) -> list[float]:
    """What is added to an update of zeros [n]."""
    update = torch.zeros(6)
    recall(update, residual, policy(name), support, round)
    return update.tolist()


@pytest.mark.parametrize(
    ("name", "kept"),
    [("keep", [1, -2, 0, 4]), ("decay", [1, -2, 0, 4]), ("in_mask_only", [1, 0, 0, 0]), ("drop", None),
     ("ef21", [10, 0, 20, 0])],
)  # fmt: skip
def test_what_each_policy_remembers(name: str, kept: list[float] | None) -> None:
    left = LEFT.clone()
    residual = remember(left, SENT, None, policy(name), SUPPORTED, 7)
    if kept is None:
        assert residual is None
        return
    assert residual is not None
    assert residual.values.tolist() == kept
    assert residual.values.dtype == torch.float32 and residual.values.device.type == "cpu"
    assert residual.round == 7
    assert torch.equal(left, LEFT)


@pytest.mark.parametrize("name", POLICIES)
def test_zero_is_not_stored(name: str) -> None:
    assert remember(ZEROS.clone(), torch.zeros(2), None, policy(name), SUPPORTED, 1) is None
    nothing = Support.of(torch.zeros(0, dtype=torch.bool))
    assert remember(torch.zeros(0), torch.zeros(0), None, policy(name), nothing, 1) is None


@pytest.mark.parametrize("name", ["keep", "decay"])
@pytest.mark.parametrize("value", [1e-45, -1e-45, 3e38, -2.0])
@pytest.mark.parametrize("place", range(4))
def test_the_smallest_rest_is_stored(name: str, value: float, place: int) -> None:
    left = ZEROS.clone()
    left[place] = value
    assert remember(left, torch.zeros(2), None, policy(name), SUPPORTED, 1) is not None


def test_a_reference_that_returns_to_zero_is_forgotten() -> None:
    old = Residual(torch.tensor([-10.0, 0.0, -20.0, 0.0]), 3)
    assert remember(LEFT.clone(), SENT, old, policy("ef21"), SUPPORTED, 4) is None


def test_what_lies_outside_the_mask_alone_is_not_stored_in_mask_only() -> None:
    left = torch.tensor([0.0, 5.0, 0.0, 5.0])
    assert remember(left, SENT, None, policy("in_mask_only"), SUPPORTED, 1) is None
    assert remember(left, SENT, None, policy("keep"), SUPPORTED, 1) is not None


def test_where_everything_travels_in_mask_is_everywhere() -> None:
    residual = remember(LEFT.clone(), LEFT, None, policy("in_mask_only"), SUPPORTED.whole(), 1)
    assert residual is not None and torch.equal(residual.values, LEFT)


@pytest.mark.parametrize(("now", "absent"), [(5, 0), (6, 1), (9, 4)])
def test_decay_shrinks_once_per_round_of_absence(now: int, absent: int) -> None:
    assert recalled(Residual(LEFT, 4), "decay", now) == [*(LEFT * 0.5**absent).tolist(), 0, 0]


@pytest.mark.parametrize("name", ["keep", "in_mask_only"])
def test_other_policies_do_not_age(name: str) -> None:
    assert recalled(Residual(LEFT, 0), name, 1000) == [*LEFT.tolist(), 0, 0]


def test_a_reference_is_taken_off_where_it_counts_and_does_not_age() -> None:
    assert recalled(Residual(LEFT, 0), "ef21", 1000) == [-1, 0, 0, 0, 0, 0]
    assert recalled(Residual(LEFT, 0), "ef21", 1000, SUPPORTED.whole()) == [-1, 2, 0, -4, 0, 0]


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_remembers_before_the_first_round(name: str) -> None:
    assert recalled(None, name, 3) == [0] * 6


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("support", [SUPPORTED, SUPPORTED.whole()], ids=["masked", "whole"])
def test_what_is_stored_is_left_alone(name: str, support: Support) -> None:
    old = Residual(LEFT.clone(), 0)
    update = torch.ones(6)
    recall(update, old, policy(name), support, 9)
    kept = remember(update[:4], torch.ones(support.count), old, policy(name), support, 9)
    assert torch.equal(old.values, LEFT)
    if name == "ef21":
        assert kept is not None
        kept.values.fill_(7.0)
        assert torch.equal(old.values, LEFT) and not (update == 7).any()


# With the real codec


def one_round(
    client: int, update: Tensor, old: Residual | None, settings: UploadConfig, support: Support, upload: Upload, t: int
) -> tuple[list[codec.Message], Residual | None]:
    """A client's side of a round, as rounds.play does it."""
    carried = support.whole() if upload.dense else support
    recall(update, old, settings, carried, t)
    messages, size = [], update.numel()
    for message in codec.encode(update, support, upload, t, client, np.random.default_rng(1000 * t + client)):
        messages.append(message)
    sent = codec.read(messages[0].frame(), support, size, t).values
    return messages, remember(update[: support.size], sent, old, settings, carried, t)


def as_vector(residual: Residual | None, size: int) -> Tensor:
    return torch.zeros(size) if residual is None else residual.values


@given(st.data())
@pytest.mark.parametrize("name", POLICIES)
def test_law_of_each_policy_over_rounds(name: str, data: st.DataObject) -> None:
    """What is recalled and what an update brings either travels or is remembered, as far as the policy allows."""
    numbers = st.integers(-64, 64).map(float)
    size, settings, old = 8, policy(name), None
    t = 0
    for _ in range(3):
        t += data.draw(st.integers(1, 3))
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        update = torch.tensor(data.draw(st.lists(numbers, min_size=size + 2, max_size=size + 2)))
        upload = Upload("fp32", regrow=data.draw(st.integers(0, 3)))
        before = as_vector(old, size).clone()
        messages, new = one_round(0, update.clone(), old, settings, Support.of(mask), upload, t)
        decoded = codec.decode([m.frame() for m in messages], Support.of(mask), size + 2, t)[:size]
        after = as_vector(new, size)
        if name == "ef21":
            # The reference moves by what arrived and, with exact values, to the update; elsewhere it stays.
            assert torch.equal(after[mask], update[:size][mask])
            assert torch.equal(after[mask], before[mask] + decoded[mask])
            assert torch.equal(after[~mask], before[~mask])
        else:
            factor = 0.5 ** (t - old.round - 1) if old is not None and name == "decay" else 1.0
            rest = before * factor + update[:size] - decoded
            expected = {"drop": torch.zeros(size), "in_mask_only": rest * mask}.get(name, rest)
            assert torch.equal(after, expected)
        old = new


def federation(values: str, rounds: int, dense_at: tuple[int, ...] = (), stochastic: bool = False) -> dict[str, Any]:
    """Rounds of EF21 with partial participation and moving masks, the server beside it."""
    size, n, clients = 600, 620, 7
    rng = np.random.default_rng(3)
    share = rng.random(clients) + 0.2
    share /= share.sum()
    target = rng.standard_normal((clients, n)).astype(np.float32)
    held: dict[int, Residual] = {}
    reference, settings, gaps = torch.zeros(size), policy("ef21"), []
    for t in range(rounds):
        support = Support.of(torch.from_numpy(rng.random(size) < 0.4))
        upload = Upload(values, stochastic, t in dense_at, 0 if t in dense_at else 30)
        carried = support.whole() if upload.dense else support
        total = Sum(carried, n, 0, n, reference)
        participants = sorted(rng.choice(clients, 3, replace=False).tolist())
        for client in participants:
            update = torch.from_numpy(target[client] * (1 + 0.01 * rng.standard_normal(n)).astype(np.float32))
            messages, kept = one_round(client, update, held.pop(client, None), settings, support, upload, t)
            if kept is not None:
                held[client] = kept
            p = share[client] / share[participants].sum()
            for message in messages:
                total.add(p, codec.read(message.frame(), support, n, t), share[client])
        reference = reference.clone()
        carried.put(reference, total.result().packed)
        believed = sum(share[c] * as_vector(held.get(c), size).double() for c in range(clients))
        gaps.append(float((reference.double() - believed).abs().max()))
    return {"gaps": gaps, "reference": reference, "held": held, "share": share, "target": target, "size": size}


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("dense_at", "stochastic"), [((), False), ((2, 5), False), ((), True)])
def test_server_and_clients_believe_the_same(values: str, dense_at: tuple[int, ...], stochastic: bool) -> None:
    played = federation(values, 25, dense_at, stochastic)
    assert len(played["held"]) == 7
    assert bool(played["reference"].any())
    assert max(played["gaps"]) < 2e-6  # a few roundings of numbers near 1


def test_references_learn_what_clients_repeat() -> None:
    """Coded differences shrink: even 4 bits end near the mean of what all clients want, absent ones included."""
    played = federation("int4", 60)
    wanted = (played["share"][:, None] * played["target"]).sum(axis=0)[: played["size"]]
    error = played["reference"].numpy() - wanted
    assert np.sqrt((error**2).mean()) < 0.03 * np.sqrt((wanted**2).mean())


def test_what_regrows_is_no_part_of_a_reference() -> None:
    support = Support.of(torch.tensor([True, False, False, False]))
    messages, kept = one_round(
        0, torch.tensor([1.0, 5.0, 0.0, 2.0, 9.0]), None, policy("ef21"), support, Upload(regrow=1), 0
    )
    assert [message.kind for message in messages] == [SUPPORT, REGROW] and messages[1].indices.tolist() == [1]
    assert kept is not None and kept.values.tolist() == [1, 0, 0, 0]
