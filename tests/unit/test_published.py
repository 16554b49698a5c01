"""FedDIP by the rules of its published code, against a loop that repeats them."""

from copy import deepcopy

import pytest
import torch
from test_method_rules import batches, fp32, load
from torch import Tensor, nn

from feddip_mpi import masks, rounds
from feddip_mpi.federation import Federation
from feddip_mpi.schedules import penalty, plan_round
from feddip_mpi.streams import stream
from feddip_mpi.vector import flatten

PUBLISHED = {
    "server_memory": "published",
    "rounds": 6,
    "mask": {"initial": "erk", "every": 2, "freeze_after": 1.0},
    "penalty": {"maximum": 0.05, "schedule": "linear"},
}


def client(built: Federation, received: Tensor, mask: Tensor, t: int, k: int) -> Tensor:
    """Gradients at m*w for the dense w, which torch's SGD moves: the client's weights float32 [n]."""
    c, layout = built.config, built.layout
    dense, pruned = deepcopy(built.bound.model).train(), deepcopy(built.bound.model).train()
    load(dense, received, built)
    optimiser = torch.optim.SGD(dense.parameters(), c.learning_rate * c.learning_rate_decay**t, weight_decay=5e-4)
    lambda_t = penalty(c.penalty, t, c.rounds)
    for images, labels in batches(built, t, k):
        vector = flatten(dense, layout)
        vector[: layout.prunable] *= mask
        load(pruned, vector, built)
        norms = [parameter.norm() for name, parameter in pruned.named_parameters() if name in layout.prunable_names]
        loss = nn.functional.cross_entropy(pruned(images), labels) + lambda_t * sum(norms)
        gradients = torch.autograd.grad(loss, list(pruned.parameters()))
        for parameter, gradient in zip(dense.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        # Not as published: there the statistics of normalisation are lost with each batch's copy.
        for mine, seen in zip(dense.buffers(), pruned.buffers(), strict=True):
            mine.copy_(seen)
    return flatten(dense, layout)


@pytest.mark.parametrize("upload", [{"mode": "dense", "residual": "drop"}, {"mode": "masked", "residual": "keep"}])
def test_rounds_are_those_of_the_published_code(upload: dict[str, str]) -> None:
    """Its random mask is round 0's alone; cuts after t = 0, R, 2R ... to s_t; from then on masks nest."""
    built = fp32("feddip", **PUBLISHED, weight_decay=5e-4, upload={"values": "fp32", **upload})
    state, size = rounds.initial_state(built), built.layout.prunable
    assert torch.equal(state.server.weights, built.initial)
    random = state.server.mask
    weights, mask, cut = built.initial.clone(), random, None
    for t in range(6):
        chosen = sorted(int(k) for k in stream(1, "participants", t).choice(5, 3, replace=False))
        total = sum(built.samples[k] for k in chosen)
        weights = sum(built.samples[k] / total * client(built, weights, mask, t, k).double() for k in chosen).float()
        if cut is not None:
            weights[:size] *= cut
        if t % 2 == 0 or t == 5:
            share = 0.8 if t == 5 else 0.8 + (0.4 - 0.8) * (1 - t / 6) ** 3
            order = weights[:size].abs().argsort(descending=True, stable=True)
            mask = cut = torch.zeros_like(mask).index_fill_(0, order[: masks.kept_count(size, share)], True)
            weights[:size] *= cut
        record = rounds.play(built, state, plan_round(built.config, t))
        assert torch.equal(state.server.mask, mask), t
        assert torch.allclose(state.server.weights, weights, rtol=1e-4, atol=1e-5), t
        assert record["mask_updated"] == (t % 2 == 0 or t == 5)
        assert record["mask_grown"] == 0 or t == 0
    assert bool((mask & ~random).any())
    assert int(mask.sum()) == masks.kept_count(size, 0.8)


def test_the_weights_that_travel_are_all_in_round_0_only() -> None:
    built = fp32("feddip", **PUBLISHED)
    assert [plan_round(built.config, t).dense_upload for t in range(6)] == [True] + [False] * 5
    other = fp32("gradual", **PUBLISHED)
    assert not any(plan_round(other.config, t).dense_upload for t in range(6))
    assert [t for t in range(6) if plan_round(other.config, t).update_mask] == [1, 3, 5]
