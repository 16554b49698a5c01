"""Each method against a step by hand and against the rule of its paper."""

import dataclasses
import itertools
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alone import Alone
from test_methods import Net, build, play, settings
from torch import Tensor, nn

from feddip_mpi import allocation, codec, federation, masks, methods, models, rounds, server
from feddip_mpi import config as configs
from feddip_mpi.errors import InputError
from feddip_mpi.federation import Federation
from feddip_mpi.methods import channels, feddst, fedrts, prunefl, prunetrain, sparsyfed
from feddip_mpi.methods.base import Seen
from feddip_mpi.models import work
from feddip_mpi.report import terminal
from feddip_mpi.schedules import plan_round, sparsity
from feddip_mpi.settings import PruneFLConfig
from feddip_mpi.streams import stream
from feddip_mpi.support import Support
from feddip_mpi.vector import Layout, flatten


def batches(built: Federation, t: int, client: int) -> list[tuple[Tensor, Tensor]]:
    """A client's batches in a round, without the program's own code for them."""
    c = built.config
    images = torch.from_numpy(built.dataset.train_images).double() / 255
    shape = (1, -1, 1, 1)
    images = (images - torch.tensor(built.dataset.mean).view(shape)) / torch.tensor(built.dataset.std).view(shape)
    labels, order = torch.from_numpy(built.dataset.train_labels), stream(c.seed, "batches", t, client)
    out = []
    for _ in range(c.local_epochs):
        shuffled = order.permutation(built.partition.train[client])
        parts = [shuffled[i : i + c.batch_size] for i in range(0, len(shuffled), c.batch_size)]
        if len(parts[-1]) == 1:
            parts[-2:] = [np.concatenate(parts[-2:])]
        out += [(images[part].float(), labels[part]) for part in parts]
    return out


def gradient(model: nn.Module, images: Tensor, labels: Tensor, names: Any) -> Tensor:
    parameters = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(images), labels)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [parameters[n] for n in names])])


def load(model: nn.Module, vector: Tensor, built: Federation) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, view in zip(built.layout.names, built.layout.views(vector), strict=True):
            tensors[name].copy_(view)


def masked_client(built: Federation, received: Tensor, mask: Tensor, t: int, client: int) -> Tensor:
    """Masked training by torch's own SGD: the client's weights float32 [n]."""
    c, layout = built.config, built.layout
    model = deepcopy(built.bound.model).train()
    load(model, received, built)
    parts = mask.split(list(layout.prunable_sizes))
    kept = {n: m.view(s) for n, s, m in zip(layout.prunable_names, layout.prunable_shapes, parts, strict=True)}
    optimiser = torch.optim.SGD(
        model.parameters(), c.learning_rate * c.learning_rate_decay**t, weight_decay=c.weight_decay
    )
    for images, labels in batches(built, t, client):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.grad.mul_(kept[name])
        optimiser.step()
    return flatten(model, layout)


def fp32(method: str, **values: Any) -> Federation:
    return build(method, **{"upload": {"values": "fp32"}, **values})


@pytest.mark.parametrize("method", ["erk", "gradual", "snip", "ssfl"])
def test_masked_training_equals_a_plain_loop(method: str) -> None:
    """Zhu & Gupta's schedule for gradual pruning, one mask for the others."""
    built = fp32(method)
    state, prunable = rounds.initial_state(built), built.layout.prunable
    weights, mask = state.server.weights.clone(), state.server.mask.clone()
    for t in range(4):
        chosen = sorted(int(k) for k in stream(1, "participants", t).choice(5, 3, replace=False))
        total = sum(built.samples[k] for k in chosen)
        clients = [built.samples[k] / total * masked_client(built, weights, mask, t, k).double() for k in chosen]
        weights = sum(clients).float()
        if method == "gradual" and t + 1 in (2, 3):  # every second round until three quarters of four
            keep = prunable - round(prunable * sparsity(built.config.sparsity, t + 1, 3))
            order = weights[:prunable].abs().masked_fill(~mask, -1).argsort(descending=True, stable=True)
            mask = torch.zeros_like(mask)
            mask[order[:keep]] = True
            weights[:prunable].mul_(mask)
        record = rounds.play(built, state, plan_round(built.config, t))
        assert torch.equal(state.server.mask, mask), t
        assert torch.allclose(state.server.weights, weights, rtol=1e-4, atol=1e-5), t
        assert record["mask_grown"] == 0
    assert int(mask.sum()) == masks.kept_count(prunable, 0.8)


def feddip_client(built: Federation, received: Tensor, mask: Tensor, penalty: float, t: int, client: int) -> Tensor:
    """Training at the pruned weights of the dense ones: the client's update float64 [n]."""
    c, layout = built.config, built.layout
    model = deepcopy(built.bound.model).double().train()
    load(model, received, built)
    parameters = dict(model.named_parameters())
    dense = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    kept = dict(zip(layout.prunable_names, layout.views(mask.double()), strict=True))
    for images, labels in batches(built, t, client):
        loss = nn.functional.cross_entropy(model(images.double()), labels)
        loss = loss + penalty * sum(torch.linalg.vector_norm(parameters[name]) for name in kept)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, parameter), step in zip(parameters.items(), gradients, strict=True):
                own = kept.get(name, torch.ones(()))
                step = step if c.feedback else step * own
                dense[name] -= c.learning_rate * c.learning_rate_decay**t * (step + c.weight_decay * dense[name])
                parameter.copy_(own * dense[name])
    tensors = {**dense, **dict(model.named_buffers())}
    return torch.cat([tensors[name].reshape(-1) for name in layout.names]) - received


@pytest.mark.parametrize("feedback", [True, False])
def test_feddip_equals_a_plain_loop(feedback: bool) -> None:
    """A penalty that grows, residuals, weights that come back; the mask is cut after the second and the third round."""
    upload = {"values": "fp32", "regrow": 0.2, "regrow_schedule": "constant"}
    built = fp32(
        "feddip", feedback=feedback, rounds=3, model={"name": "test_fedavg:Net"}, upload=upload,
        mask={"every": 2, "freeze_after": 1.0, "initial": "erk"}, penalty={"maximum": 0.2, "schedule": "linear"},
    )  # fmt: skip
    state, prunable = rounds.initial_state(built), built.layout.prunable
    weights, mask = state.server.weights.double(), state.server.mask
    residuals = {k: torch.zeros(prunable, dtype=torch.float64) for k in range(5)}
    grown = 0
    for t in range(3):
        chosen = sorted(int(k) for k in stream(1, "participants", t).choice(5, 3, replace=False))
        total = sum(built.samples[k] for k in chosen)
        received, moved = weights.clone(), torch.zeros_like(weights)
        received[:prunable].mul_(mask)
        for k in chosen:
            update, travels = feddip_client(built, received, mask, 0.1 * t, t, k), mask.clone()
            update[:prunable] += residuals[k]
            if t > 0:
                travels[update[:prunable].abs().masked_fill(mask, -1).topk(round(0.2 * int(mask.sum()))).indices] = True
            residuals[k] = update[:prunable] * ~travels
            update[:prunable].mul_(travels)
            moved += built.samples[k] / total * update
        weights = weights + moved
        if t > 0:
            keep = prunable - round(prunable * sparsity(built.config.sparsity, t + 1, 3))
            mask = torch.zeros_like(mask)
            mask[weights[:prunable].abs().topk(keep).indices] = True
        record = rounds.play(built, state, plan_round(built.config, t))
        grown += record["mask_grown"]
        assert torch.equal(state.server.mask, mask), t
        assert torch.allclose(state.server.weights.double(), weights, rtol=1e-4, atol=1e-5), t
        for k, residual in state.held.items():
            assert torch.allclose(residual.values.double(), residuals[k], rtol=1e-4, atol=1e-5), (t, k)
        assert {k for k, values in residuals.items() if bool(values.any())} == set(state.held)
    assert grown > 0 and bool(state.held) == feedback


@pytest.mark.parametrize("method", ["feddip", "gradual"])
@pytest.mark.parametrize("rule", ["lamp", "erk", "uniform"])
def test_every_cut_of_a_run_shares_its_weights_among_the_layers_as_asked(method: str, rule: str) -> None:
    built = fp32(method, mask={"every": 2, "freeze_after": 0.75, "initial": "magnitude", "allocation": rule})
    state, size = rounds.initial_state(built), built.layout.prunable
    shapes = built.layout.prunable_shapes
    first = allocation.select(built.initial[:size].abs(), masks.kept_count(size, 0.4), shapes, rule)
    assert torch.equal(state.server.mask, first)
    for t in range(3):
        old = state.server.mask
        record = rounds.play(built, state, plan_round(built.config, t))
        if not record["mask_updated"]:
            continue
        if method == "gradual":
            assert record["mask_grown"] == 0 and not bool((state.server.mask & ~old).any())
        else:  # W keeps what is pruned: the cut can be made again
            value, keep = state.server.weights[:size].abs(), int(state.server.mask.sum())
            assert torch.equal(state.server.mask, allocation.select(value, keep, shapes, rule))
    if rule == "uniform":
        assert masks.layer_sparsities(state.server.mask, built.layout.prunable_sizes) == pytest.approx(
            [0.8] * 3, abs=0.02
        )
    assert int(state.server.mask.sum()) == masks.kept_count(size, 0.8)


def test_erk_follows_its_densities() -> None:
    built = fp32("erk")
    mask = rounds.initial_state(built).server.mask
    shapes = built.layout.prunable_shapes
    densities = masks.erk_densities(shapes, 0.2)
    for part, size, density in zip(
        mask.split(list(built.layout.prunable_sizes)), built.layout.prunable_sizes, densities, strict=True
    ):
        assert abs(int(part.sum()) - density * size) <= 1


def own_saliency(built: Federation, client: int) -> Tensor:
    model = deepcopy(built.bound.model).train()
    samples = built.partition.train[client]
    total = torch.zeros(built.layout.prunable, dtype=torch.float64)
    images = torch.from_numpy(built.dataset.train_images).float() / 255
    shape = (1, -1, 1, 1)
    images = (images - torch.tensor(built.dataset.mean).view(shape)) / torch.tensor(built.dataset.std).view(shape)
    labels = torch.from_numpy(built.dataset.train_labels)
    for start in range(0, len(samples), 16):
        part = samples[start : start + 16]
        if len(samples) - start == 17:
            part = samples[start:]
        elif len(part) == 1:
            break
        load(model, built.initial, built)
        g = gradient(model, images[part], labels[part], built.layout.prunable_names)
        total += g.double() * len(part) / len(samples)
    return total * built.initial[: built.layout.prunable].double()


@pytest.mark.parametrize("method", ["snip", "ssfl"])
def test_saliency_at_initialisation(method: str) -> None:
    """SNIP: |sum_k p_k g_k w| over the first participants. SSFL: sum_k p_k |g_k w| over everybody."""
    built = fp32(method)
    record = rounds.play(built, state := rounds.initial_state(built), plan_round(built.config, 0))
    clients = list(range(5)) if method == "ssfl" else record["participants"]
    total = sum(built.samples[k] for k in clients)
    found = [built.samples[k] / total * own_saliency(built, k) for k in clients]
    saliency = sum(s.abs() for s in found) if method == "ssfl" else sum(found).abs()
    mask, cut = state.server.mask, masks.kept_count(built.layout.prunable, 0.8)
    assert float(saliency[mask].min()) >= float(saliency.sort(descending=True).values[cut - 1]) * (1 - 1e-3)
    other = sum(found).abs() if method == "ssfl" else sum(s.abs() for s in found)
    assert not torch.equal(mask, masks.select_largest(other, cut))  # the two rules are not one
    assert record["upload_extra_bytes"] == len(clients) * (56 + 4 * built.layout.prunable)


# FedDST


def test_feddst_exchanges_by_hand() -> None:
    weights = torch.tensor([5.0, -1, 3, 0, 0, 0, 2, -4, 0, 0])
    pull = torch.tensor([9.0, 9, 9, 1, -3, 2, 9, 9, 0.5, -0.25])
    kept = torch.tensor([True, True, True, False, False, False, True, True, False, False])
    # Layers of 6 and 4: a share of a half drops one of three and one of two.
    new = feddst.exchanged(weights, pull, kept, [6, 4], 0.5)
    assert new.tolist() == [True, False, True, False, True, False, False, True, True, False]
    # Never more than there is outside.
    assert feddst.exchanged(weights, pull, torch.ones(10, dtype=torch.bool), [6, 4], 0.5).all()


def test_feddst_alpha_falls_as_a_cosine() -> None:
    chosen = settings("feddst", rounds=100, mask={"every": 5, "freeze_after": 0.8}, feddst={"drop": 0.4})
    shares = [feddst.FedDST.exchanged_share(chosen, t) for t in (0, 40, 80, 99)]
    assert shares == pytest.approx([0.4, 0.2, 0.0, 0.0], abs=1e-12)
    assert shares[2] == 0.2 * (1 + math.cos(math.pi))


def test_feddst_merges_by_hand() -> None:
    """Each weight is averaged over those who kept it; each layer keeps the largest of these."""
    built = fp32("feddst")
    method, size = built.method, built.layout.prunable
    old = torch.zeros(size, dtype=torch.bool)
    old[:3] = True
    votes, value, before = torch.zeros(size), torch.zeros(built.layout.size), torch.zeros(built.layout.size)
    votes[:5] = torch.tensor([1.0, 0.25, 0.0, 0.5, 0.75])
    before[:3] = torch.tensor([0.5, 0.2, 0.7])
    value[:5] = torch.tensor([0.4, 0.2 - 0.25 * 2.2, 0.7, 0.15, 0.3])  # of those who dropped: nothing is added to W
    value[size:] = 7
    plan = dataclasses.replace(plan_round(built.config, 1), update_mask=True)
    seen = Seen(plan, Support.of(old), value, (votes,), {}, before)
    merged = method.merge(seen)
    assert torch.allclose(merged[:5], torch.tensor([0.4, -2.0, 0.0, 0.3, 0.4])) and (merged[size:] == 7).all()
    mask = method.cut(dataclasses.replace(seen, value=merged))
    assert mask.nonzero().squeeze(1).tolist() == [0, 1, 4]  # 0.4 at 0 and 4, not 0.3; nobody kept 2
    assert torch.equal(method.merge(dataclasses.replace(seen, plan=plan_round(built.config, 0))), value)


def test_a_round_of_feddst_equals_a_plain_loop() -> None:
    built = fp32("feddst", local_epochs=2, feddst={"drop": 0.4, "after": 0.5})
    c, layout = built.config, built.layout
    state, prunable = rounds.initial_state(built), layout.prunable
    rounds.play(built, state, plan_round(c, 0))
    start, old = state.server.weights.clone(), state.server.mask.clone()
    plan = plan_round(c, 1)
    assert plan.update_mask
    share = 0.2 * (1 + math.cos(math.pi * 1 / 3))
    value, votes = torch.zeros(layout.size, dtype=torch.float64), torch.zeros(prunable, dtype=torch.float64)
    total = sum(built.samples[k] for k in plan.participants)
    for client in plan.participants:
        model, kept = deepcopy(built.bound.model).train(), old.clone()
        load(model, start, built)
        given = batches(built, 1, client)
        for number, (images, labels) in enumerate(given):
            pull = gradient(model, images, labels, layout.names[: layout.parameter_tensors])
            now = flatten(model, layout)
            if number == len(given) // 2:
                kept = feddst.exchanged(now[:prunable], pull[:prunable], kept, layout.prunable_sizes, share)
                now[:prunable].mul_(kept)
            pull[:prunable].mul_(kept)
            now[: layout.parameters] -= plan.learning_rate * (pull + c.weight_decay * now[: layout.parameters])
            load(model, now, built)
        p = built.samples[client] / total
        value += p * flatten(model, layout).double()
        votes += p * kept
    expected = value.clone()
    expected[:prunable] = torch.where(votes > 0, value[:prunable] / votes.clamp(min=1e-9), 0.0)
    record = rounds.play(built, state, plan)
    assert record["mask_grown"] == record["mask_pruned"] > 5
    for new, before, mean, voted in zip(
        *(x.split(list(layout.prunable_sizes)) for x in (state.server.mask, old, expected[:prunable], votes)),
        strict=True,
    ):
        assert int(new.sum()) == int(before.sum()) and (voted[new] > 0).all()
        left_out = mean[(voted > 0) & ~new].abs()
        if len(left_out):
            assert mean[new].abs().min() >= left_out.max() - 1e-5
    expected[:prunable][~state.server.mask] = 0
    assert torch.allclose(state.server.weights.double(), expected, rtol=1e-3, atol=2e-5)
    # Bits for the old mask's weights and for the grown ones, whose places travel with both messages.
    grown = sum(min(int(share * int(m.sum())), len(m) - int(m.sum())) for m in old.split(list(layout.prunable_sizes)))
    extra = record["upload_extra_bytes"] / 3
    assert 2 * 56 + math.ceil(int(old.sum()) / 8) + grown / 8 < extra < 2 * 56 + int(old.sum()) / 8 + 2.2 * grown + 8


# FedRTS


def test_fedrts_votes_by_hand() -> None:
    kept = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    sizes = [6, 4, 2]  # keep 3, 2 and 2; a share of a half exchanges one of three, one of two, none where all are kept
    weights = torch.tensor([5.0, -1, 3, 9, 9, 9, 2, -4, 9, 9, 0.1, -0.2])
    assert fedrts.core(weights, kept, sizes, 0.5).nonzero().squeeze(1).tolist() == [0, 2, 7, 10, 11]
    pull = torch.tensor([9.0, 9, 9, 1, -3, 2, 9, 9, 0.5, -0.25, 9, 9])
    assert fedrts.wanted(pull, kept, sizes, 0.5).nonzero().squeeze(1).tolist() == [4, 8]


def test_fedrts_outcomes_by_hand() -> None:
    """Inside the mask a quarter of the server's own judgement, outside a quarter of 1/2; the rest are clients' votes."""
    votes = torch.tensor([1.0, 0.4, 0.0, 0.0, 0.6])
    own = torch.tensor([True, False, True, False, False])
    kept = torch.tensor([True, True, True, False, False])
    found = fedrts.outcomes(votes, own, kept, 0.25)
    assert torch.allclose(found, torch.tensor([1.0, 0.3, 0.25, 0.125, 0.575]))
    assert fedrts.outcomes(votes + 1e-6, own, kept, 0.0).max() == 1  # rounding of shares makes no outcome of above 1


def small_fedrts(**values: Any) -> tuple[Federation, Seen]:
    """At a mask update in which half of each layer's weights may be exchanged; the first layer keeps weights 0 to 3."""
    built = fp32("fedrts", fedrts={"adjust": 0.6, "mix": 0.5, "scale": 8, **values})
    size, layers = built.layout.prunable, built.layout.prunable_sizes
    old = torch.zeros(size, dtype=torch.bool)
    old[:4] = True
    old[layers[0] : layers[0] + 2] = True
    value, votes = torch.zeros(built.layout.size), torch.zeros(size)
    value[:4] = torch.tensor([0.4, -0.5, 0.1, 0.2])
    value[layers[0] : layers[0] + 2] = torch.tensor([1.0, 2.0])
    votes[:6] = torch.tensor([1.0, 0.75, 0.25, 0.0, 0.5, 0.0])
    memories = {"alpha": torch.full((size,), 2.0), "beta": torch.full((size,), 3.0)}
    plan = dataclasses.replace(plan_round(built.config, 1), update_mask=True)
    assert fedrts.FedRTS.exchanged_share(built.config, 1) == pytest.approx(0.3 * (1 + math.cos(math.pi / 3)))  # 0.45
    return built, Seen(plan, Support.of(old), value, (votes,), memories, value)


def test_fedrts_learns_by_hand() -> None:
    """alpha <- alpha + lambda X, beta <- beta + lambda (1 - X)."""
    built, seen = small_fedrts()
    after = built.method.remember(seen, seen.old.mask)
    # One of four may go: the server itself would drop weight 2. Outside: a half of 0.5 and of the votes.
    x = torch.tensor([1.0, 0.875, 0.125, 0.5, 0.5, 0.25])
    assert torch.allclose(after["alpha"][:6], 2 + 8 * x) and torch.allclose(after["beta"][:6], 3 + 8 * (1 - x))
    assert torch.allclose(seen.memories["alpha"], torch.tensor(2.0))  # pure
    # In a round that keeps the mask nothing is learnt of what is outside it.
    between = dataclasses.replace(seen, plan=dataclasses.replace(seen.plan, update_mask=False))
    after = built.method.remember(between, seen.old.mask)
    assert torch.allclose(after["alpha"][:6], 2 + 8 * x * seen.old.mask[:6])
    assert torch.allclose(after["beta"][:6], 3 + 8 * (1 - x) * seen.old.mask[:6])
    # After the last mask update nothing is.
    last = dataclasses.replace(seen, plan=plan_round(built.config, 3), extras=())
    assert built.method.remember(last, seen.old.mask) == seen.memories


def test_fedrts_draws_by_hand() -> None:
    """Each layer keeps its largest samples, as many as it had; the draws are a pure function of seed and round."""
    built, seen = small_fedrts()
    after = built.method.remember(seen, seen.old.mask)
    drawn = stream(1, "thompson sampling", 1).beta(after["alpha"].double().numpy(), after["beta"].double().numpy())
    mask, (first, second, _) = built.method.cut(seen), built.layout.prunable_sizes
    assert set(mask[:first].nonzero().squeeze(1).tolist()) == set(np.argsort(-drawn[:first])[:4].tolist())
    best = np.argsort(-drawn[first : first + second])[:2].tolist()
    assert set(mask[first : first + second].nonzero().squeeze(1).tolist()) == set(best)
    assert not mask[first + second :].any() and torch.equal(mask, built.method.cut(seen))
    # With overwhelming evidence there is no luck in it.
    sure, seen = small_fedrts(scale=1e4, mix=0)
    assert sure.method.cut(seen)[:first].nonzero().squeeze(1).tolist()[:2] == [0, 1]


def test_a_round_of_fedrts_equals_a_plain_loop() -> None:
    """Clients vote by their own weights and by the mean gradient of their last epoch."""
    built = fp32("fedrts", fedrts={"adjust": 0.6, "mix": 0.25, "scale": 4})
    c, layout = built.config, built.layout
    state, prunable, sizes = rounds.initial_state(built), layout.prunable, list(layout.prunable_sizes)
    first = rounds.play(built, state, plan_round(c, 0))
    start, old, before = state.server.weights.clone(), state.server.mask.clone(), dict(state.memories)
    assert first["mask_grown"] == 0 and torch.allclose(before["alpha"] + before["beta"], 2.0 + 4 * old)
    plan, share = plan_round(c, 1), 0.3 * (1 + math.cos(math.pi / 3))
    value, votes = torch.zeros(layout.size, dtype=torch.float64), torch.zeros(prunable, dtype=torch.float64)
    total = sum(built.samples[k] for k in plan.participants)

    def best(magnitudes: Tensor, among: Tensor, count: Any) -> Tensor:
        parts = []
        for part, allowed, kept in zip(magnitudes.split(sizes), among.split(sizes), old.split(sizes), strict=True):
            moved = min(int(share * int(kept.sum())), int((~kept).sum()))
            order = part.abs().masked_fill(~allowed, -1).argsort(descending=True, stable=True)
            parts.append(torch.zeros_like(allowed))
            parts[-1][order[: count(int(kept.sum()), moved)]] = True
        return torch.cat(parts)

    named = 0
    for client in plan.participants:
        model, given = deepcopy(built.bound.model).train(), batches(built, 1, client)
        load(model, start, built)
        pulled = torch.zeros(prunable)
        for number, (images, labels) in enumerate(given):
            pull = gradient(model, images, labels, layout.names[: layout.parameter_tensors])
            if number >= len(given) // 2:  # the second of two epochs
                pulled += pull[:prunable]
            now = flatten(model, layout)
            pull[:prunable].mul_(old)
            now[: layout.parameters] -= plan.learning_rate * (pull + c.weight_decay * now[: layout.parameters])
            load(model, now, built)
        own = flatten(model, layout)
        inside, outside = best(own[:prunable], old, lambda k, m: k - m), best(pulled, ~old, lambda k, m: m)
        named += int(outside.sum())
        p = built.samples[client] / total
        value += p * own.double()
        votes += p * (inside | outside)
    aggregated = torch.where(old, best(value[:prunable], old, lambda k, m: k - m).double(), 0.5)
    x = 0.25 * aggregated + 0.75 * votes
    record = rounds.play(built, state, plan)
    alpha, beta = before["alpha"] + 4 * x, before["beta"] + 4 * (1 - x)
    assert torch.allclose(state.memories["alpha"].double(), alpha, atol=1e-4)
    assert torch.allclose(state.memories["beta"].double(), beta, atol=1e-4)
    assert record["mask_grown"] == record["mask_pruned"] > 5 and named > 15
    for new, kept in zip(state.server.mask.split(sizes), old.split(sizes), strict=True):
        assert int(new.sum()) == int(kept.sum())
    value[:prunable][~(state.server.mask & old)] = 0  # what has just entered has no weight yet
    assert torch.allclose(state.server.weights.double(), value, rtol=1e-3, atol=2e-5)


def test_fedrts_sends_indices_and_no_gradients() -> None:
    """In-mask values as ever; votes are bits of these, and at mask updates indices of others (and a bit for each)."""
    built = fp32("fedrts")
    state = rounds.initial_state(built)
    records, kept = play(built, state), int(state.server.mask.sum())
    plain = records[3]["upload_bytes"]  # no mask update follows, nobody votes
    assert records[3]["upload_extra_bytes"] == 0
    for record, update in zip(records, (False, True, True, False), strict=True):
        assert record["upload_bytes"] - record["upload_extra_bytes"] == plain
        if record is not records[3]:
            named = round(plan_round(built.config, record["round"] - 1).regrow * kept)
            assert (named > 0) == update and record["upload_indices_bytes"] == 0  # an update's own
            least = (56 + math.ceil(kept / 8)) + update * (56 + math.ceil(named / 8))
            indices = record["upload_extra_bytes"] / 3 - least
            assert (indices > 0) == update and 0 <= indices < 1.5 * named * update + 1
    quiet = play(built := fp32("fedrts", fedrts={"observe": "mask_updates"}), rounds.initial_state(built))
    assert [r["upload_extra_bytes"] > 0 for r in quiet] == [False, True, True, False]


# PruneFL


def test_prunefl_costs_by_hand() -> None:
    """Two layers: 10 weights used 4 times, 30 used once; a use takes half of what sending takes: 3 and 1.5 each."""
    found = prunefl.costs([4, 1], [10, 30], 0.5)
    assert found.sum() == pytest.approx(1)
    assert found[0] == pytest.approx(3 / 75) and found[-1] == pytest.approx(1.5 / 75)
    assert torch.equal(prunefl.costs([4, 1], [10, 30], 0), torch.full((40,), 1 / 40, dtype=torch.float64))


def test_prunefl_costs_are_near_the_authors_measured_ones() -> None:
    """Seconds per weight of their table for Conv-2 on FEMNIST: 5.56e-6 for sending, 5 local steps of so much each."""
    measured = [5.56e-6 + 5 * step for step in (0, 7.10e-6, 1.93e-7)]
    found = prunefl.costs([0, 196, 1], [1, 1, 1], PruneFLConfig().computing)
    for one in (1, 2):
        assert float(found[one] / found[0]) == pytest.approx(measured[one] / measured[0], rel=0.2)


def test_prunefl_may_remove_less_and_less() -> None:
    """A share of 0.5 is 0.35 after two of four rounds and 0.25 after all: of 8 kept weights 4, 2 and 2 may go."""
    built = fp32("prunefl", prunefl={"removable": 0.5}, sparsity={"initial": 0, "final": 0})
    method, size = built.method, built.layout.prunable
    old = torch.zeros(size, dtype=torch.bool)
    old[:8] = True
    value, scores = torch.zeros(size), torch.zeros(size)
    value[:8] = torch.arange(8, 0, -1)
    scores[8:16] = 1.0  # eight pruned weights of the same layer pay, the kept ones do not
    assert built.layout.prunable_sizes[0] >= 16
    for finished, fixed in ((0, 4), (2, 6), (4, 6)):
        mask = method._chosen(value, scores, old, 0.0, finished)
        assert mask[:8].tolist() == [True] * fixed + [False] * (8 - fixed) and int(mask[8:16].sum()) == 8 - fixed


@pytest.mark.parametrize("seed", range(6))
def test_prunefl_adaptive_is_the_best_of_all_masks(seed: int) -> None:
    """Jiang et al.: the greedy rule maximises the sum of squared gradients over the time of a round."""
    draw = np.random.default_rng(seed)
    scores = torch.from_numpy(draw.exponential(size=9).astype(np.float32))
    cost = torch.from_numpy(draw.uniform(0.05, 0.3, 9))
    fixed = torch.from_numpy(draw.random(9) < 0.25)
    overhead = float(draw.uniform(0.05, 0.5))

    def ratio(mask: Tensor) -> float:
        return float(scores[mask].double().sum()) / (overhead + float(cost[mask].sum()))

    every = [torch.tensor(bits) for bits in itertools.product([False, True], repeat=9)]
    best = max(ratio(mask) for mask in every if (mask | ~fixed).all())
    chosen = prunefl.adaptive(scores, cost, fixed, overhead)
    assert ratio(chosen) == pytest.approx(best) and chosen[fixed].all()


def test_prunefl_keeps_large_weights_and_large_gradients_by_hand() -> None:
    value = torch.tensor([5.0, 4, 3, 2, 1, 0, 0, 0])
    old = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    assert prunefl.not_removable(value, old, [8], 0.4, None).tolist() == [True] * 3 + [False] * 5
    # To shrink to three weights, the share that must stay shrinks too: 0.6 * 3 / 5 of five.
    assert prunefl.not_removable(value, old, [8], 0.4, 3).tolist() == [True] + [False] * 7


def test_prunefl_sends_the_mean_square_of_all_batches() -> None:
    """Not that of the last batch alone, and for pruned weights too."""
    built = fp32("prunefl", weight_decay=0.1)
    state, prunable = rounds.initial_state(built), built.layout.prunable
    received, mask = state.server.weights.clone(), state.server.mask.clone()
    built.trainer.hook.begin_round(1, updates_mask=True)
    result = built.trainer.train(received, mask, built.partition.train[2], 1e-9, 0.0, 1, 2)
    model, expected, last = deepcopy(built.bound.model).train(), torch.zeros(prunable), None
    given = batches(built, 1, 2)
    for images, labels in given:
        load(model, received, built)
        last = gradient(model, images, labels, built.layout.prunable_names).square()
        expected += last / len(given)
    assert torch.allclose(result.extras[0], expected, rtol=1e-3, atol=1e-9)
    assert bool((expected[~mask] > 0).any()) and not torch.allclose(last, expected, rtol=0.1)


def test_prunefl_reconfigures_by_gradient_over_time() -> None:
    built = fp32("prunefl", prunefl={"removable": 0.5, "first_rounds": 0}, sparsity={"initial": 0.8, "final": 0.8},
                 mask={"every": 1, "initial": "erk", "freeze_after": 1.0})  # fmt: skip
    state, prunable = rounds.initial_state(built), built.layout.prunable
    srv, draw = state.server, torch.Generator().manual_seed(5)
    scores = torch.rand(prunable, generator=draw)
    plan = plan_round(built.config, 0)
    mask = built.method.cut(Seen(plan, srv.support, srv.weights, (scores,), {}, srv.weights))
    assert int(mask.sum()) == srv.support.count
    used = work.uses(built.bound.model, (2, 6, 6), built.layout.prunable_names)
    uses = [0, *(used[n] for n in built.layout.prunable_names[1:])]
    cost = prunefl.costs(uses, built.layout.prunable_sizes, built.config.prunefl.computing)
    share = 0.5 * 0.5 ** (1 / 4)
    fixed = prunefl.not_removable(
        srv.weights[:prunable], srv.mask, built.layout.prunable_sizes, share, srv.support.count
    )
    assert mask[fixed].all()
    per_time = scores / cost
    assert per_time[mask & ~fixed].min() >= per_time[~mask].max()
    assert bool((mask & ~srv.mask).any())
    after = play(built, state)  # and in a run: what comes back starts at zero, because W is zero there
    assert sum(r["mask_grown"] for r in after) > 0
    assert not state.server.weights[:prunable][~state.server.mask].any()


def test_prunefl_prunes_first_at_one_client() -> None:
    built = fp32("prunefl", prunefl={"first_rounds": 2})
    state, layout = rounds.initial_state(built), built.layout
    assert int(state.server.mask.sum()) == masks.kept_count(layout.prunable, 0.4)
    assert not torch.equal(state.server.weights[layout.prunable :], built.initial[layout.prunable :])  # it has trained
    assert state.opened.uploaded == 2 * 56 + 4 * layout.size + 4 * layout.prunable


def test_prunefl_adaptive_size_is_its_own() -> None:
    built = fp32("prunefl", prunefl={"size": "adaptive"})
    state = rounds.initial_state(built)
    play(built, state)
    assert 0 < int(state.server.mask.sum()) != masks.kept_count(built.layout.prunable, 0.8)


# PruneTrain


def test_prunetrain_strength_is_its_share_of_the_first_loss() -> None:
    built = fp32("prunetrain", prunetrain={"ratio": 0.2})
    lasso = prunetrain.group_lasso(built.initial, built.layout.prunable_shapes, built.method.links)
    penalty = built.method.strength * lasso
    assert penalty / (penalty + math.log(3)) == pytest.approx(0.2)
    conv, hidden, out = built.layout.views(built.initial)[:3]
    by_hand = conv.flatten(1).norm(dim=1).sum() + hidden.view(20, 8, 16).norm(dim=(0, 2)).sum()
    by_hand = by_hand + hidden.norm(dim=1).sum() + out.norm(dim=0).sum()
    assert lasso == pytest.approx(float(by_hand), rel=1e-6)


def test_prunetrain_adds_the_gradient_of_the_group_lasso() -> None:
    built = fp32("prunetrain")
    layout, method = built.layout, built.method
    active = built.initial.clone()
    active[: layout.sizes[0] // 8] = 0  # the first channel of the convolution is gone: its gradient is 0
    values = active[: layout.prunable].clone().requires_grad_()
    parts = [part.view(shape) for part, shape in zip(
        values.split(list(layout.prunable_sizes)), layout.prunable_shapes, strict=True
    )]  # fmt: skip
    rows = torch.cat([parts[0].flatten(1)[1:].norm(dim=1), parts[1].norm(dim=1)]).sum()
    columns = parts[1].view(20, 8, 16).norm(dim=(0, 2)).sum() + parts[2].norm(dim=0).sum()
    (expected,) = torch.autograd.grad(method.strength * (rows + columns), values)
    found = torch.zeros(layout.parameters)
    built.trainer.hook.gradient(found, active[: layout.parameters], active, torch.ones(layout.prunable), 0)
    assert torch.allclose(found[: layout.prunable], expected, rtol=1e-5, atol=1e-8)
    assert not found[layout.prunable :].any()


def test_prunetrain_removes_the_least_important_channels_by_hand() -> None:
    shapes = ((3, 1), (2, 3), (1, 2))
    links = (channels.Link(0, 1, 3, 1, ()), channels.Link(1, 2, 2, 1, ()))
    # Made (first link), taken and made (rows of three), taken (second link).
    vector = torch.tensor([9.0, 1, 5, 8, 8, 0.5, 8, 8, 0.5, 7, 4])
    # Channels of the first link: min(9, 8), min(1, 8), min(5, 0.5); of the second: min(rms, 7), min(rms, 4).
    kept = [torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)]
    assert channels.weights_left([3, 2], shapes, links) == 11
    one = prunetrain.fewest_lost(vector, kept, shapes, links, 10)
    assert [k.tolist() for k in one] == [[True, True, False], [True, True]]
    two = prunetrain.fewest_lost(vector, kept, shapes, links, 7)
    assert [k.tolist() for k in two] == [[True, False, False], [True, True]]
    least = prunetrain.fewest_lost(vector, kept, shapes, links, 0)
    assert [k.tolist() for k in least] == [[True, False, False], [True, False]]  # one of each is left
    mask = channels.mask_of(two, shapes, links)
    assert mask.tolist() == [True, False, False] + [True, False, False] * 2 + [True, True]
    assert int(mask.sum()) == channels.weights_left([1, 2], shapes, links)
    # The paper's rule: a channel goes where all of both sides is below the threshold.
    by_threshold = prunetrain.above(vector, kept, shapes, links, 6.0)
    assert [k.tolist() for k in by_threshold] == [[True, True, False], [True, True]]
    assert [k.tolist() for k in prunetrain.above(vector, kept, shapes, links, 99.0)] == [
        [True, False, False],
        [True, False],
    ]


@pytest.mark.parametrize(("name", "shape"), [("lenet5", (1, 28, 28)), ("alexnet", (3, 32, 32)), ("vgg11", (3, 32, 32))])
def test_the_smaller_network_computes_what_the_masked_one_does(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    model = models.create(name, shape[0], shape[1:], 10).eval()
    names = models.prunable_names(model)
    links = channels.chain(model, shape, names)
    assert [(link.producer, link.consumer) for link in links] == [(i, i + 1) for i in range(len(names) - 1)]
    kept = [torch.rand(link.channels) < 0.3 for link in links]
    for each in kept:
        each[0] = True
    shapes = [tuple(dict(model.named_parameters())[n].shape) for n in names]
    parts = channels.mask_of(kept, shapes, links).split([math.prod(s) for s in shapes])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.bias.uniform_(-1, 1)
        for n, s, part in zip(names, shapes, parts, strict=True):
            dict(model.named_parameters())[n].mul_(part.view(s))
        small = channels.smaller(model, names, links, kept)
        images = torch.randn(3, *shape)
        assert torch.allclose(small(images), model(images), rtol=1e-4, atol=1e-5)
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert counts[0] < 0.4 * counts[1]
    assert [k.tolist() for k in channels.kept_channels(torch.cat(parts), shapes, links)] == [k.tolist() for k in kept]


def test_prunetrain_counts_what_a_network_has() -> None:
    """vgg11's convolutions have no bias, its normalisations have two numbers a channel."""
    model = models.create("vgg11", 3, (32, 32), 10)
    layout = Layout.of(model, names := models.prunable_names(model))
    method = methods.make(configs.validate({"method": "prunetrain"}), model, layout, (3, 32, 32))
    kept = [torch.arange(link.channels) % 2 == 0 for link in method.links]
    facts = method.facts(channels.mask_of(kept, layout.prunable_shapes, method.links))
    small = channels.smaller(model, names, method.links, kept)
    assert facts["parameters_left"] == sum(p.numel() for p in small.parameters())


def test_prunetrain_needs_two_layers() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    layout = Layout.of(model, ["1.weight"])
    with pytest.raises(InputError, match="prunetrain removes channels between two"):
        methods.make(configs.validate({"method": "prunetrain"}), model, layout, (1, 4, 4))


def test_prunetrain_counts_the_smaller_network() -> None:
    built = fp32("prunetrain")
    state = rounds.initial_state(built)
    play(built, state)
    facts = built.method.facts(state.server.mask)
    kept = channels.kept_channels(state.server.mask, built.layout.prunable_shapes, built.method.links)
    model = deepcopy(built.bound.model)
    load(model, state.server.weights, built)
    small = channels.smaller(model, built.layout.prunable_names, built.method.links, kept)
    assert facts["parameters_left"] == sum(p.numel() for p in small.parameters()) < facts["parameters"]
    used = work.uses(small, (2, 6, 6), built.layout.prunable_names)
    weights = dict(small.named_parameters())
    assert facts["multiplications_left"] == sum(u * weights[n].numel() for n, u in used.items())
    assert facts["channels_removed"] == sum(int((~k).sum()) for k in kept) > 0
    ((what, numbers),) = terminal._smaller(facts)
    assert (
        what == "channels removed" and f"{facts['parameters_left']:,} of {facts['parameters']:,} parameters" in numbers
    )
    assert not terminal._smaller({})


@pytest.mark.parametrize(
    ("count", "remembers", "expected"),
    [
        (5, True, ["mean (spread) of the last 5", "server's memory W, without the mask"]),
        (3, False, ["of the last 3 evaluations"]),
        (1, False, []),
    ],
)
def test_the_summary_says_only_what_there_was(count: int, remembers: bool, expected: list[str]) -> None:
    summary = {
        "evaluations_in_mean": count, "server_remembers": remembers, "test_accuracy_mean_of_last_5": 0.5,
        "test_accuracy_spread_of_last_5": 0.25, "dense_memory_accuracy": 0.75,
    }  # fmt: skip
    rows = [*terminal._mean_of_last(summary), *terminal._remembered(summary)]
    assert len(rows) == len(expected) and all(part in name for part, (name, _) in zip(expected, rows, strict=True)), (
        rows
    )


def test_every_name_of_the_summary_stands_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 80 columns, too: the second line of a name would read as a row without a value."""
    monkeypatch.setenv("COLUMNS", "80")
    summary = {
        "test_accuracy": 0.5, "evaluations_in_mean": 5, "test_accuracy_mean_of_last_5": 0.5, "ranks": 4, "rounds": 5,
        "test_accuracy_spread_of_last_5": 0.25, "server_remembers": True, "dense_memory_accuracy": 0.75, "sparsity": 0.9,
        "sparsity_by_layer": {"fc": 0.9}, "upload_bytes": 222_600, "dense_bytes": 3_900_000, "upload_extra_bytes": 9,
        "upload_bytes_by_kind": dict.fromkeys(("values", "indices", "other", "frame"), 100_000), "received_bytes": 5,
        "seconds": 30.0,
    }  # fmt: skip
    folder = Path("/a/folder/with/a/long/name/for/runs")
    terminal.show_summary(summary, folder, folder / "run.png")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, value in terminal._rows(summary, folder, folder / "run.png"):
        assert any(f"│ {name} " in line and line.split("│")[2].strip() for line in lines), (name, value)


def test_prunetrain_refuses_networks_that_are_no_chain() -> None:
    skips = (
        "conv1.weight goes into layer1.0.conv1.weight, layer1.1.conv1.weight, .*Models that fit: lenet5, alexnet, vgg11"
    )
    with pytest.raises(InputError, match=f"prunetrain.*{skips}"):
        model = models.create("resnet18", 3, (32, 32), 10)
        channels.chain(model, (3, 32, 32), models.prunable_names(model))
    with pytest.raises(InputError, match="prunetrain.*model.keep_dense"):
        fp32("prunetrain", model={"name": f"{Net.__module__}:Net", "keep_dense": ["hidden.weight"]})


# SparsyFed


def test_sparsyfed_steps_in_theta() -> None:
    """Power propagation (Schwarz et al. 2021): w = theta |theta|^(beta - 1), one step of SGD in theta by autograd."""
    built = fp32(
        "sparsyfed", sparsyfed={"power": 1.5, "activations": False}, weight_decay=0.01, local_epochs=1, batch_size=64,
        model={"name": "lenet5"}, data={"name": "synthetic", "synthetic": {"shape": [1, 12, 12], "train_samples": 200}},
    )  # fmt: skip
    layout, c, prunable = built.layout, built.config, built.layout.prunable
    ((images, labels),) = batches(built, 0, 1)
    model = deepcopy(built.bound.model).train()
    load(model, built.initial, built)
    theta = {
        n: (p.detach().abs() ** (1 / 1.5) * p.detach().sign()).requires_grad_() if n in layout.prunable_names
        else p.detach().clone().requires_grad_()
        for n, p in model.named_parameters()
    }  # fmt: skip
    weights = {n: t * t.abs() ** 0.5 if n in layout.prunable_names else t for n, t in theta.items()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, weights, images), labels)
    grads = torch.autograd.grad(loss, list(theta.values()))
    after = {n: t - 0.05 * (g + 0.01 * t) for (n, t), g in zip(theta.items(), grads, strict=True)}
    expected = torch.cat([after[n].detach().reshape(-1) for n in layout.names])
    everything = torch.ones(layout.prunable, dtype=torch.bool)
    built.trainer.hook.begin_round(3, updates_mask=False)
    result = built.trainer.train(built.initial, everything, built.partition.train[1], 0.05, 0.0, 0, 1)
    # What is sent is by how much theta has moved.
    begun = torch.cat([(built.initial[:prunable].abs() ** (1 / 1.5)) * built.initial[:prunable].sign(),
                       built.initial[prunable:]])  # fmt: skip
    assert torch.allclose(begun + result.update, expected, rtol=1e-4, atol=1e-6)
    # And in rounds that merge masks a client sends its largest weights alone, as many as s_t leaves.
    built.trainer.hook.begin_round(1, updates_mask=True)
    result = built.trainer.train(built.initial, everything, built.partition.train[1], 0.05, 0.0, 0, 1)
    keep = masks.kept_count(prunable, sparsity(c.sparsity, 2, 3))
    assert keep != masks.kept_count(prunable, c.sparsity.final)
    top = masks.select_largest(expected[:prunable].abs(), keep)
    assert int(result.extras[0].sum()) == keep and (result.extras[0].bool() == top).float().mean() > 0.999
    sent = (begun + result.update)[:prunable]
    assert torch.allclose(sent[result.extras[0] == 0], torch.zeros(1), atol=1e-7)


def test_sparsyfed_averages_theta_by_hand() -> None:
    """Two clients of equal weight: theta 1 becomes 2 and 4, on the mean 3, so w = 9 (the mean of their w is 10)."""
    built = fp32("sparsyfed", sparsyfed={"power": 2.0})
    size = built.layout.prunable
    weights, value, votes = torch.zeros(built.layout.size), torch.zeros(built.layout.size), torch.ones(size)
    weights[:size], value[:size] = -1.0, -1.0 + (-(2 - 1) - (4 - 1)) / 2
    votes[3], value[size:] = 0, 5.0
    plan, everything = plan_round(built.config, 0), Support.of(torch.ones(size, dtype=torch.bool))
    merged = built.method.merge(Seen(plan, everything, value, (votes,), {}, weights))
    assert merged[:5].tolist() == [-9.0, -9.0, -9.0, 0.0, -9.0] and merged[size:].eq(5).all()
    last = plan_round(built.config, 3)  # the mask is fixed: nothing travels besides
    assert built.method.merge(Seen(last, everything, value, (), {}, weights))[:size].eq(-9).all()


def test_sparsyfed_begins_as_its_authors_do() -> None:
    built = fp32("sparsyfed", model={"name": "lenet5"}, data={"name": "synthetic"})
    weights, mask = built.method.start(built.initial, None)
    assert mask.all() and not torch.equal(weights, built.initial)
    assert torch.equal(weights, built.method.start(torch.zeros_like(weights), None)[0])  # by the seed alone
    views = dict(zip(built.layout.names, built.layout.views(weights), strict=True))
    for name, fan_in in (("conv2.weight", 6 * 25), ("fc1.weight", 400), ("fc2.weight", 120)):
        deviation = fan_in**-0.5
        assert float(views[name].std()) == pytest.approx(deviation, rel=0.05)
        assert 1.9 * deviation < float(views[name].abs().max()) < 2.28 * deviation
    assert not any(views[name].any() for name in views if name.endswith(".bias"))


def test_sparsyfed_cuts_at_once_where_the_schedule_is_constant() -> None:
    """The paper's rule."""
    built = fp32("sparsyfed", sparsity={"initial": 0.4, "final": 0.8, "schedule": "constant"})
    state = rounds.initial_state(built)
    plan = plan_round(built.config, 0)
    assert plan.sparsity == 0.8 and plan.update_mask
    built.trainer.hook.begin_round(0, updates_mask=True)
    result = built.trainer.train(state.server.weights, state.server.mask, built.partition.train[1], 0.05, 0.0, 0, 1)
    assert int(result.extras[0].sum()) == masks.kept_count(built.layout.prunable, 0.8)


def test_sparsyfed_weights_of_zero_stay_zero() -> None:
    built = fp32("sparsyfed")
    received, layout = built.initial.clone(), built.layout
    received[: layout.prunable : 2] = 0
    everything = torch.ones(layout.prunable, dtype=torch.bool)
    built.trainer.hook.begin_round(3, updates_mask=False)
    result = built.trainer.train(received, everything, built.partition.train[1], 0.1, 0.0, 0, 1)
    assert not result.update[: layout.prunable : 2].any() and result.update[1 : layout.prunable : 2].any()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_weights_see_the_largest_activations_alone(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    for layer, given in (
        (nn.Conv2d(3, 5, 3), torch.randn(4, 3, 6, 6).contiguous(memory_format=order)), (nn.Linear(7, 5), torch.randn(4, 7)),
    ):  # fmt: skip
        plain = deepcopy(layer)
        with torch.no_grad():
            for each in (layer, plain):
                each.weight.view(-1)[: each.weight.numel() // 4 * 3] = 0
        sparsyfed.prune_activations(layer)
        share = float(layer.weight.count_nonzero()) / layer.weight.numel()
        keep = int(share * given.numel())
        smallest = given.abs().flatten().sort(descending=True).values[keep - 1]
        pruned = torch.where(given.abs() >= smallest, given, 0.0)
        assert int(pruned.count_nonzero()) == keep
        one, other = given.clone().requires_grad_(), given.clone().requires_grad_()
        out = layer(one)
        pull = torch.randn_like(out)
        assert torch.equal(out, plain(other))
        weight, whole = torch.autograd.grad(out, [layer.weight, one], pull)
        (expected,) = torch.autograd.grad(plain(pruned), [plain.weight], pull)
        (inputs,) = torch.autograd.grad(plain(other), [other], pull)
        assert torch.allclose(weight, expected, rtol=1e-4, atol=1e-5) and torch.allclose(whole, inputs, atol=1e-6)
        assert not torch.allclose(weight, torch.autograd.grad(plain(given), [plain.weight], pull)[0], atol=1e-2)
        layer.eval()
        (unpruned,) = torch.autograd.grad(layer(given), [layer.weight], pull)
        assert torch.allclose(unpruned, torch.autograd.grad(plain(given), [plain.weight], pull)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(40, 4), (4, 40)), (nn.Conv2d(3, 5, 3), (4, 3, 8, 8)), (nn.Linear(6, 6), (6, 6))]
)
def test_activations_are_pruned_in_bf16_too(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Autograd then saves a reduced copy of the input; another tensor of its shape, the weight, is not taken for it."""
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.view(-1)[layer.weight.numel() // 4 :] = 0
    plain, given = deepcopy(layer), torch.randn(shape)
    sparsyfed.prune_activations(layer)
    gradients = []
    for each in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = each(given)
        gradients.append(torch.autograd.grad(out.float().sum(), each.weight)[0])
    share = float(layer.weight.count_nonzero()) / layer.weight.numel()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = plain(sparsyfed.largest_inputs(given.bfloat16(), share))
    (expected,) = torch.autograd.grad(out.float().sum(), plain.weight)
    assert torch.allclose(gradients[0], expected, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1, atol=0.1)


def test_sparsyfed_keeps_the_union_then_cuts_by_hand() -> None:
    built = fp32("sparsyfed", sparsyfed={"power": 1})
    size = built.layout.prunable
    votes, value = torch.zeros(size), torch.zeros(built.layout.size)
    union = masks.kept_count(size, 0.8) + 7
    votes[:union], value[:size] = 0.3, torch.linspace(1, 2, size)
    seen = Seen(plan_round(built.config, 0), Support.of(torch.ones(size, dtype=torch.bool)), value, (votes,), {},
                torch.zeros_like(value))  # fmt: skip
    merged = built.method.merge(seen)
    assert torch.equal(merged[:union], value[:union]) and not merged[union:size].any()
    assert built.method.cut(dataclasses.replace(seen, value=merged)).nonzero().numel() == union
    last = plan_round(built.config, 2)
    assert last.update_mask and not plan_round(built.config, 3).update_mask
    mask = built.method.cut(dataclasses.replace(seen, plan=last, value=merged))
    assert mask.nonzero().squeeze(1).tolist() == list(range(7, union))


# What they share


@pytest.mark.parametrize("method", ["erk", "snip", "ssfl", "feddst", "fedrts"])
def test_a_sparse_beginning_can_be_rescaled(method: str) -> None:
    plain, scaled = fp32(method), fp32(method, mask={"every": 2, "rescale": True})
    one, other = rounds.initial_state(plain).server, rounds.initial_state(scaled).server
    assert torch.equal(one.mask, other.mask)
    sizes = list(plain.layout.prunable_sizes)
    for dense, before, after in zip(*(v[: sum(sizes)].split(sizes) for v in (plain.initial, one.weights, other.weights)),
                                    strict=True):  # fmt: skip
        assert torch.allclose(after, before * float(dense.norm() / before.norm()))
        assert float(after.norm()) == pytest.approx(float(dense.norm()), rel=1e-5)
    assert torch.equal(one.weights[sum(sizes) :], other.weights[sum(sizes) :])


def test_what_was_trained_before_is_not_rescaled() -> None:
    states = [rounds.initial_state(fp32("prunefl", mask={"every": 2, "rescale": on})).server for on in (True, False)]
    assert torch.equal(states[0].weights, states[1].weights)


def test_uses_by_hand() -> None:
    model = models.create("lenet5", 1, (28, 28), 10)
    names = models.prunable_names(model)
    assert work.uses(model, (1, 28, 28), names) == dict(zip(names, [28 * 28, 10 * 10, 1, 1, 1], strict=True))


def test_votes_travel_as_bits() -> None:
    draw = torch.Generator().manual_seed(1)
    for count in (0, 1, 7, 8, 9, 333):
        vector = (torch.rand(count, generator=draw) < 0.4).float()
        support = Support.of(torch.ones(count, dtype=torch.bool))
        (message,) = codec.encode(vector.clone(), support, codec.Upload("bit"), 3, 1, np.random.default_rng(0))
        frame = message.frame()
        assert len(frame) == 56 + math.ceil(count / 8) == codec.expected_bytes(codec.Upload("bit"), count, count, count)
        assert torch.equal(codec.decode([frame], support, count, 3), vector)
        cuts = [message.frame(lo, hi) for lo, hi in ((0, count // 3), (count // 3, count))]
        assert torch.equal(codec.decode(cuts, support, count, 3), vector)


def test_server_step_takes_the_methods_word() -> None:
    """`merge` comes before the cut, and what it returns is not overwritten."""
    before = server.Server.of(0, torch.zeros(4), torch.ones(4, dtype=torch.bool))
    total = rounds.Aggregate(before.support, torch.tensor([1.0, -2, 3, 4]), *(torch.zeros(0, dtype=d) for d in (
        torch.int64, torch.float32, torch.float32)))  # fmt: skip
    plan = dataclasses.replace(plan_round(settings("gradual"), 1), sparsity=0.5)
    chosen = torch.tensor([True, False, False, True])
    seen: list[Tensor] = []
    after, report = server.step(before, total, plan, "off", lambda v: seen.append(2 * v) or seen[0], lambda: chosen)
    assert after.weights.tolist() == [2, 0, 0, 8] and seen[0].tolist() == [2, -4, 6, 8] and report.pruned == 2


def test_the_method_is_told_of_the_network_it_prunes() -> None:
    with pytest.raises(InputError, match="prunetrain"):
        federation.build(settings("prunetrain", model={"name": "resnet18"}, data={
            "name": "synthetic", "synthetic": {"shape": [3, 16, 16], "train_samples": 50, "test_samples": 10},
        }), Alone(), torch.device("cpu"))  # fmt: skip
