"""Methods whose masks take weights back: these begin anew, in the model and in what clients still owe."""

import dataclasses

import pytest
import torch
from test_method_rules import fp32
from test_methods import build

from feddip_mpi import rounds
from feddip_mpi.methods import feddst, prunefl
from feddip_mpi.methods.exchanging import exchangeable
from feddip_mpi.schedules import plan_round

RETURNING = ["feddst", "fedrts", "prunefl"]


@pytest.mark.parametrize("method", RETURNING)
def test_a_residual_is_paid_to_weights_that_never_left_since(method: str) -> None:
    built = build(
        method, upload={"values": "int4"}, rounds=8, participants=2, mask={"every": 1, "freeze_after": 1.0},
        prunefl={"removable": 0.5},
    )  # fmt: skip
    state, masks, refused = rounds.initial_state(built), [], 0
    for t in range(8):
        plan = plan_round(built.config, t)
        masks.append(state.server.mask)
        for client in set(plan.participants) & set(state.held):
            old = state.held[client]
            stayed = torch.stack(masks[old.round :]).all(dim=0)
            paid = built.method.paid(state.server, state.memories, (), old.round)
            assert torch.equal(paid, stayed)
            refused += int((state.server.mask & ~paid & (old.values != 0)).sum())
            state.held[client] = dataclasses.replace(old, values=torch.where(paid, old.values, 1e6))
        rounds.play(built, state, plan)
        assert state.server.weights[: built.layout.prunable].abs().max() < 10
    assert refused > 0


def test_what_feddsts_client_drops_it_owes_nothing_and_sends_nothing() -> None:
    built = fp32("feddst", upload={"values": "int4"})
    state, size = rounds.initial_state(built), built.layout.prunable
    kept = state.server.mask & (torch.arange(size) % 2 == 0)
    assert torch.equal(built.method.paid(state.server, state.memories, (kept.float(),), 0), kept)
    plan = plan_round(built.config, 1)
    assert plan.update_mask
    built.trainer.hook.begin_round(1, updates_mask=True)
    client = plan.participants[0]
    result = built.trainer.train(
        state.server.weights, state.server.mask, built.partition.train[client], 0.05, 0.0, 1, client
    )
    dropped = state.server.mask & (result.extras[0] == 0)
    assert dropped.any() and not result.update[:size][dropped].any()


@pytest.mark.parametrize("method", ["feddst", "fedrts"])
def test_as_many_coordinates_travel_as_are_exchanged(method: str) -> None:
    """In a layer of which little stands outside, less than the share."""
    built = fp32(method, sparsity={"initial": 0.2, "final": 0.4}, feddst={"drop": 0.6}, fedrts={"adjust": 0.6})
    state, sizes = rounds.initial_state(built), built.layout.prunable_sizes
    plan = plan_round(built.config, 1)
    rule = rounds.upload_rule(built, plan, state.server.support)
    counts = [int(part.sum()) for part in state.server.mask.split(list(sizes))]
    assert rule.regrow == sum(exchangeable(plan.regrow, k, n) for k, n in zip(counts, sizes, strict=True))
    assert 0 < rule.regrow < round(plan.regrow * sum(counts))
    new = feddst.exchanged(torch.rand(sum(sizes)), torch.rand(sum(sizes)), state.server.mask, sizes, plan.regrow)
    assert int((new & ~state.server.mask).sum()) == rule.regrow
    assert rounds.upload_rule(built, plan_round(built.config, 0), state.server.support).regrow == 0


def test_prunefls_removable_share_is_rounded_down() -> None:
    value, old = torch.tensor([3.0, 2, 1, 5, 9]), torch.tensor([1, 1, 1, 1, 0], dtype=torch.bool)
    assert prunefl.not_removable(value, old, [3, 2], 0.3, None).tolist() == [True] * 4 + [False]
    assert prunefl.not_removable(value, old, [3, 2], 0.4, None).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("method", RETURNING)
def test_a_run_that_would_end_with_untrained_weights_says_so(method: str) -> None:
    late, early = (fp32(method, rounds=4, mask={"every": 2, "freeze_after": share}).method for share in (1.0, 0.75))
    assert early.caution() is None
    assert (late.caution() is None) == (method == "feddst")  # what enters there has been trained by its clients
    assert late.caution() is None or "mask.freeze_after=1: the last mask update ends the last round" in late.caution()
