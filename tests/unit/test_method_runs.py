"""What a method's configuration asks for reaches its runs; the rules themselves: test_method_rules.py."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from test_method_rules import batches, fp32, gradient, load
from torch import Tensor

from feddip_mpi import rounds, server
from feddip_mpi.local import LocalResult, LocalTrainer
from feddip_mpi.methods import channels, prunefl, prunetrain
from feddip_mpi.methods.base import Seen
from feddip_mpi.schedules import plan_round
from feddip_mpi.streams import stream
from feddip_mpi.vector import flatten


def test_the_first_client_of_prunefl_trains_and_prunes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], LocalTrainer.train

    def noting(self: LocalTrainer, received: Tensor, mask: Tensor, *rest: Any) -> LocalResult:
        result = train(self, received, mask, *rest)
        trained.append((received.clone(), mask.clone(), received + result.update, result.extras[0].clone()))
        return result

    monkeypatch.setattr(LocalTrainer, "train", noting)
    built = fp32("prunefl", prunefl={"first_rounds": 2})
    c, layout, prunable = built.config, built.layout, built.layout.prunable
    state, model = rounds.initial_state(built), deepcopy(built.bound.model).train()
    client = int(stream(c.seed, "the first client").integers(c.clients))
    for r, (received, mask, after, scores) in enumerate(trained):
        load(model, received, built)
        given, squares = batches(built, prunefl._BEFORE + r, client), torch.zeros(prunable)
        for images, labels in given:
            pull = gradient(model, images, labels, layout.names[: layout.parameter_tensors])
            squares += pull[:prunable].square() / len(given)
            pull[:prunable].mul_(mask)
            now = flatten(model, layout)
            now[: layout.parameters] -= c.learning_rate * (pull + c.weight_decay * now[: layout.parameters])
            load(model, now, built)
        assert torch.allclose(after, flatten(model, layout), rtol=1e-4, atol=1e-5)
        assert torch.allclose(scores, squares, rtol=1e-3, atol=1e-8)
    (first, everything, value, scores), (second, mask, last, last_scores) = trained
    assert torch.equal(first, built.initial) and everything.all()
    assert torch.equal(mask, built.method._chosen(value, scores, everything, 0.2, 0))
    assert torch.equal(second, server.pruned(value, mask))
    sent = first + (last - first)
    assert torch.equal(state.server.mask, built.method._chosen(sent, last_scores, mask, 0.4, 0))
    assert torch.equal(state.server.weights, server.pruned(sent, state.server.mask))


def test_prunefl_keeps_more_weights_where_more_time_is_spent_anyway() -> None:
    kept = [
        int(rounds.initial_state(fp32("prunefl", prunefl={"size": "adaptive", "overhead": overhead})).server.mask.sum())
        for overhead in (0.01, 1.0)
    ]
    assert kept[0] < kept[1]


def test_prunetrain_cuts_by_its_threshold_or_to_a_sparsity() -> None:
    cuts = {}
    for rule in ("threshold", "sparsity"):
        built = fp32("prunetrain", prunetrain={"cut": rule, "threshold": 0.2})
        method, srv, shapes = built.method, rounds.initial_state(built).server, built.layout.prunable_shapes
        seen = Seen(plan_round(built.config, 1), srv.support, srv.weights, (), {}, srv.weights)
        cuts[rule] = method.cut(seen)
        kept = channels.kept_channels(srv.mask, shapes, method.links)
        left = prunetrain.above(srv.weights, kept, shapes, method.links, 0.2)
    assert 2 < sum(int(each.sum()) for each in left) < 28
    assert torch.equal(cuts["threshold"], channels.mask_of(left, shapes, method.links))
    assert not torch.equal(*cuts.values())


def test_sparsyfed_prunes_activations_where_it_is_asked_to() -> None:
    ends = []
    for asked in (True, False):
        built = fp32("sparsyfed", sparsyfed={"activations": asked})
        state = rounds.initial_state(built)
        for t in range(2):
            rounds.play(built, state, plan_round(built.config, t))
        ends.append(state.server.weights)
    assert not torch.allclose(*ends, rtol=0.1, atol=0.01)
