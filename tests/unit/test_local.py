"""Local training against the formulas of docs/method.md, written out plainly in float64."""

import random
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from feddip_mpi import descent
from feddip_mpi.batches import DeviceData, batch_bounds
from feddip_mpi.errors import InputError
from feddip_mpi.local import LocalRule, LocalTrainer
from feddip_mpi.server import pruned
from feddip_mpi.streams import stream
from feddip_mpi.vector import BoundModel, Layout, flatten

MEAN, STD = 120.0, 60.0
PRUNABLE = ["conv.weight", "fc1.weight", "fc2.weight"]


class Small(nn.Module):
    """Convolution, batch norm of both kinds (exponential and cumulative average), linear layers, biases."""

    def __init__(self, dropout: float = 0.0, own_noise: bool = False) -> None:
        super().__init__()
        self.own_noise = own_noise
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.fc1, self.norm1 = nn.Linear(12, 6), nn.BatchNorm1d(6, momentum=None)
        self.drop, self.fc2 = nn.Dropout(dropout), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.own_noise:
            x = x + random.random() + np.random.standard_normal()  # noqa: NPY002
        x = nn.functional.avg_pool2d(torch.tanh(self.norm(self.conv(x))), 2)
        return self.fc2(self.drop(torch.tanh(self.norm1(self.fc1(x.flatten(1))))))


def small(dropout: float = 0.0, own_noise: bool = False) -> tuple[nn.Module, Layout]:
    torch.manual_seed(5)
    model = Small(dropout, own_noise)
    return model, Layout.of(model, PRUNABLE)


def data() -> DeviceData:
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (60, 1, 6, 6), dtype=np.uint8))
    labels = torch.from_numpy(generator.integers(0, 4, 60))
    return DeviceData(images, labels, torch.full((1, 1, 1, 1), MEAN), torch.full((1, 1, 1, 1), STD))


def trainer(rule: LocalRule, dropout: float = 0.0, own_noise: bool = False) -> LocalTrainer:
    model, layout = small(dropout, own_noise)
    return LocalTrainer(BoundModel(model, layout, torch.device("cpu")), data(), rule)


def rule(**values: object) -> LocalRule:
    return LocalRule(**{"seed": 3, "epochs": 2, "batch_size": 8, "weight_decay": 0.0, **values})


class Indexed(Small):
    """Writes values to places, of which torch has no deterministic form, here neither."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().put_(torch.tensor([0]), torch.zeros(1))
        return super().forward(x)


def test_a_layer_that_cannot_repeat_its_bits_is_told_with_the_way_out() -> None:
    layout = small()[1]
    local = LocalTrainer(BoundModel(Indexed(), layout, torch.device("cpu")), data(), rule())
    received = local.bound.vector.clone()
    torch.set_deterministic_debug_mode("error")
    try:
        with pytest.raises(InputError, match=r"^deterministic: got on.* put_, .*deterministic=off"):
            local.train(received, some_mask(layout), SAMPLES, 0.1, 0.0, 0, 0)
    finally:
        torch.set_deterministic_debug_mode("default")


def some_mask(layout: Layout) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).random(layout.prunable) < 0.5)


SAMPLES = np.arange(4, 29)  # 25 images: batches of 8, 8 and, because one image would be left alone, 9


def reference(
    rule: LocalRule, mask: Tensor, learning_rate: float, penalty: float, t: int, client: int
) -> tuple[Tensor, list[float], dict[str, Tensor]]:
    """Dense local weights minus received ones [parameters] in float64, losses by batch, buffers."""
    model, layout = small()
    received = pruned(flatten(model, layout), mask)
    images, labels = data().images.double(), data().labels
    model = deepcopy(model).double()
    parameters = dict(model.named_parameters())
    masks = dict(zip(PRUNABLE, layout.views(mask.double()), strict=True))
    start = {n: v.double() for n, v in zip(layout.names, layout.views(received), strict=True) if n in parameters}
    w = {n: v.clone() for n, v in start.items()}
    order = stream(rule.seed, "batches", t, client)
    losses = []
    for _ in range(rule.epochs):
        shuffled = order.permutation(SAMPLES)
        for batch in (shuffled[:8], shuffled[8:16], shuffled[16:]):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(masks[name] * w[name] if name in masks else w[name])
            cross_entropy = nn.functional.cross_entropy(model((images[batch] - MEAN) / STD), labels[batch])
            norms = {
                "l2": lambda p: p.square().sum().sqrt() if p.any() else p.sum() * 0,
                "l2_squared": lambda p: p.square().sum(),
                "l1": lambda p: p.abs().sum(),
            }
            term = penalty * sum(norms[rule.penalty_norm](parameters[name]) for name in masks)
            grads = torch.autograd.grad(cross_entropy + term, list(parameters.values()))
            losses.append(float(cross_entropy.detach()))
            for (name, value), g in zip(
                w.items(), (dict(zip(parameters, grads, strict=True))[n] for n in w), strict=True
            ):
                if name in masks and not rule.feedback:
                    g = g * masks[name]
                step = g + rule.weight_decay * value + rule.proximal * (value - start[name])
                w[name] = value - learning_rate * step
    update = torch.cat([(w[n] - start[n]).reshape(-1) for n in layout.names if n in w])
    return update, losses, dict(model.named_buffers())


@pytest.mark.parametrize(
    ("changes", "penalty"),
    [
        ({}, 0.0),
        ({"feedback": False}, 0.0),
        ({}, 0.3),
        ({"feedback": False}, 0.3),
        ({"penalty_norm": "l2_squared"}, 0.3),
        ({"penalty_norm": "l1"}, 0.3),
        ({"weight_decay": 0.2}, 0.0),
        ({"proximal": 0.7}, 0.0),
        ({"weight_decay": 0.2, "proximal": 0.7, "penalty_norm": "l1"}, 0.3),
        ({"weight_decay": 0.2, "proximal": 0.7, "feedback": False}, 0.3),
    ],
)
@pytest.mark.parametrize("which", ["half", "one tensor empty", "all kept"])
def test_local_training_follows_the_formulas(changes: dict, penalty: float, which: str) -> None:
    this = rule(**changes)
    local = trainer(this)
    layout = local.bound.layout
    mask = some_mask(layout)
    if which == "one tensor empty":
        mask[layout.offsets[2] : layout.prunable] = False
    if which == "all kept":
        mask[:] = True
    received = pruned(local.bound.vector.clone(), mask)
    result = local.train(received, mask, SAMPLES, 0.2, penalty, 9, 7)
    expected, losses, buffers = reference(this, mask, 0.2, penalty, 9, 7)
    assert torch.allclose(result.update[: layout.parameters].double(), expected, rtol=1e-4, atol=2e-6)
    assert result.loss == pytest.approx(np.average(losses, weights=[8, 8, 9] * 2), rel=1e-5)
    assert result.samples == 2 * 25
    # Pruned weights move with feedback and stay without it.
    assert bool(result.update[: layout.prunable][~mask].any()) == (this.feedback and which != "all kept")
    # The tail: statistics of the pruned forward passes.
    for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
        if name in buffers:
            got = received[offset : offset + size] + result.update[offset : offset + size]
            assert torch.allclose(got.double(), buffers[name], rtol=1e-4, atol=1e-5)
            assert result.update[offset : offset + size].any()


@pytest.mark.parametrize("which", ["half", "all kept"])
@pytest.mark.parametrize("norm", ["l2", "l1", "l2_squared"])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_step_by_pieces_changes_no_bit(
    norm: str, feedback: bool, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = rule(weight_decay=0.2, proximal=0.7, penalty_norm=norm, feedback=feedback)
    mask = some_mask(small()[1])
    if which == "all kept":
        mask[:] = True
    received = pruned(flatten(*small()), mask)
    at_once = trainer(this).train(received, mask, SAMPLES, 0.2, 0.1, 4, 2)
    monkeypatch.setattr(descent, "PIECE", 7)
    by_pieces = trainer(this)
    assert by_pieces._large
    assert torch.equal(by_pieces.train(received, mask, SAMPLES, 0.2, 0.1, 4, 2).update, at_once.update)


def test_received_weights_and_mask_are_not_changed() -> None:
    local = trainer(rule(weight_decay=0.1))
    mask = some_mask(local.bound.layout)
    received = pruned(local.bound.vector.clone(), mask)
    before, mask_before = received.clone(), mask.clone()
    local.train(received, mask, SAMPLES, 0.2, 0.1, 0, 0)
    assert torch.equal(received, before) and torch.equal(mask, mask_before)


@pytest.mark.parametrize("own_noise", [False, True])
@pytest.mark.parametrize("augment", ["none", "standard"])
def test_a_client_does_not_see_who_was_trained_before(augment: str, own_noise: bool) -> None:
    this = rule(augment=augment, weight_decay=0.1)
    mask = some_mask(small()[1])
    received = pruned(flatten(*small()), mask)
    alone = trainer(this, 0.3, own_noise).train(received, mask, SAMPLES, 0.2, 0.1, 4, 2)
    busy = trainer(this, 0.3, own_noise)
    for client in (0, 1):
        busy.train(received + 0.1, ~mask, np.arange(30, 47), 0.3, 0.2, 3, client)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    after_others = busy.train(received, mask, SAMPLES, 0.2, 0.1, 4, 2)
    assert torch.equal(after_others.update, alone.update)
    assert after_others.loss == alone.loss


def test_the_loss_is_the_mean_over_images_not_over_batches() -> None:
    local = trainer(rule(epochs=1, batch_size=20))  # 25 images: batches of 20 and 5
    received = local.bound.vector.clone()
    everything = torch.ones(local.bound.layout.prunable, dtype=torch.bool)
    losses, backward = [], local._backward

    def watched(images: Tensor, labels: Tensor) -> tuple:
        found = backward(images, labels)
        losses.append((found[0], len(labels)))
        return found

    local._backward = watched
    result = local.train(received, everything, SAMPLES, 0.2, 0.0, 0, 0)
    assert [count for _, count in losses] == [20, 5]
    assert result.loss == pytest.approx(sum(float(loss) * count for loss, count in losses) / 25, rel=1e-6)
    assert result.loss != pytest.approx(sum(float(loss) for loss, _ in losses) / 2, rel=1e-3)


@pytest.mark.parametrize("augment", ["none", "standard"])
def test_round_client_and_seed_change_the_batches(augment: str) -> None:
    mask = some_mask(small()[1])
    received = pruned(flatten(*small()), mask)
    keys = [(3, 0, 0), (3, 1, 0), (3, 0, 1), (4, 0, 0)]
    updates = [
        trainer(rule(seed=seed, augment=augment)).train(received, mask, SAMPLES, 0.2, 0.0, t, k).update
        for seed, t, k in keys
    ]
    assert len({update.numpy().tobytes() for update in updates}) == 4


def test_augmentation_and_dropout_have_an_effect() -> None:
    mask = some_mask(small()[1])
    received = pruned(flatten(*small()), mask)
    plain = trainer(rule()).train(received, mask, SAMPLES, 0.2, 0.0, 0, 0).update
    assert not torch.equal(
        trainer(rule(augment="standard")).train(received, mask, SAMPLES, 0.2, 0.0, 0, 0).update, plain
    )
    assert not torch.equal(trainer(rule(), dropout=0.5).train(received, mask, SAMPLES, 0.2, 0.0, 0, 0).update, plain)


def test_a_client_with_one_batch_and_a_client_with_all_images() -> None:
    local = trainer(rule(epochs=1))
    mask = some_mask(local.bound.layout)
    received = pruned(local.bound.vector.clone(), mask)
    for samples in (np.arange(3), np.arange(60)):
        result = local.train(received, mask, samples, 0.1, 0.0, 0, 0)
        assert result.samples == samples.size
        assert bool(torch.isfinite(result.update).all())


def test_mean_gradient_is_that_of_the_mean_loss() -> None:
    """Without batch norm the mean over batches is the gradient over all images at once."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 4))
    layout = Layout.of(model, ["1.weight", "3.weight"])
    exact, split = deepcopy(model).double(), data()
    loss = nn.functional.cross_entropy(exact((split.images[SAMPLES].double() - MEAN) / STD), split.labels[SAMPLES])
    loss.backward()
    expected = torch.cat([exact.get_parameter(name).grad.reshape(-1) for name in layout.names])
    local = LocalTrainer(BoundModel(model, layout, torch.device("cpu")), split, rule())
    got = local.mean_gradient(local.bound.vector.clone(), SAMPLES, 0, 0)
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-7)


def test_mean_gradient_does_not_learn_statistics() -> None:
    local = trainer(rule())
    weights = local.bound.vector.clone()
    first = local.mean_gradient(weights, SAMPLES, 0, 0)
    assert torch.equal(local.mean_gradient(weights, SAMPLES, 0, 0), first)
    assert torch.equal(local.bound.vector, weights)
    assert not first[local.bound.layout.parameters :].any()


@pytest.mark.parametrize("noise", [{"dropout": 0.5}, {"own_noise": True}])
def test_mean_gradient_of_a_random_forward_depends_on_round_and_client_only(noise: dict) -> None:
    weights = flatten(*small())
    alone = trainer(rule(), **noise).mean_gradient(weights, SAMPLES, 0, 2)
    busy = trainer(rule(), **noise)
    others = [busy.mean_gradient(weights, SAMPLES, *key) for key in ((0, 0), (1, 2))]
    assert torch.equal(busy.mean_gradient(weights, SAMPLES, 0, 2), alone)
    assert not any(torch.equal(other, alone) for other in others)


@given(st.integers(1, 300), st.integers(2, 64))
def test_batches_tile_the_epoch_and_none_has_a_single_image(count: int, batch_size: int) -> None:
    bounds = batch_bounds(count, batch_size)
    assert bounds[0][0] == 0 and bounds[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert all(size == batch_size for size in sizes[:-1])
    assert count == 1 or 2 <= sizes[-1] <= batch_size + 1
    assert len(bounds) == max(1, (count - 1 + batch_size - 1) // batch_size)


def test_images_are_normalised_in_place_of_the_reader() -> None:
    split = data()
    split = DeviceData(split.images.repeat(1, 3, 1, 1), split.labels, torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1),
                       torch.tensor([4.0, 5, 6]).view(1, 3, 1, 1))  # fmt: skip
    for part in (split, data()):
        expected = (part.images.double() - part.mean.double()) / part.std.double()
        assert torch.allclose(part.normalised(part.images).double(), expected, atol=1e-6)
        assert part.normalised(part.images).dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_the_memory_order_of_a_batch_is_as_asked(channels: int) -> None:
    one = torch.ones(1, 1, 1, 1)
    images = torch.zeros(2, channels, 4, 5, dtype=torch.uint8)
    for raw in (images, images.contiguous(memory_format=torch.channels_last)):
        plain = DeviceData(raw, torch.zeros(2), one, one).normalised(raw)
        assert plain.is_contiguous() and plain.view(2, -1).shape == (2, channels * 20)
        turned = DeviceData(raw, torch.zeros(2), one, one, channels_last=True).normalised(raw)
        assert turned.stride() == (channels * 20, 1, channels * 5, channels)
        assert torch.equal(plain, turned)


def test_bf16_changes_the_forward_pass_and_only_a_little() -> None:
    updates = []
    for precision in ("fp32", "bf16", "bf16"):
        local = trainer(rule(precision=precision))
        everything = torch.ones(local.bound.layout.prunable, dtype=torch.bool)
        result = local.train(local.bound.vector.clone(), everything, SAMPLES, 0.1, 0.0, 0, 0)
        assert result.update.dtype == torch.float32
        updates.append(result.update)
    assert torch.equal(updates[1], updates[2]) and not torch.equal(updates[0], updates[1])
    parameters = trainer(rule()).bound.layout.parameters
    difference = (updates[0] - updates[1])[:parameters].norm() / updates[0][:parameters].norm()
    assert 1e-4 < float(difference) < 0.2


@pytest.mark.parametrize("augment", ["none", "standard"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalising_once_a_round_changes_no_bit(
    augment: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = []
    for limit in (0, 10**9):
        monkeypatch.setattr("feddip_mpi.batches._NORMALISED_BYTES", limit)
        model, layout = small()
        own = replace(data(), channels_last=channels_last)
        local = LocalTrainer(BoundModel(model, layout, torch.device("cpu")), own, rule(augment=augment))
        batches = list(local._batches(SAMPLES, 1, 2))
        assert all(images.stride()[1] == (1 if channels_last else 36) for images, _ in batches)
        updates.append(local.train(local.bound.vector.clone(), some_mask(layout), SAMPLES, 0.2, 0.1, 1, 2).update)
    assert torch.equal(*updates)
