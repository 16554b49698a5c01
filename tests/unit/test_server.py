"""The server step: exact sums, exact masks, and what may come back from the dead."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feddip_mpi import codec, masks, server
from feddip_mpi.aggregate import Aggregate, Sum
from feddip_mpi.codec import Upload
from feddip_mpi.schedules import RoundPlan
from feddip_mpi.server import Server
from feddip_mpi.support import Support

MEMORIES = ("on", "off", "published")
WEIGHT = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 0.0, -0.0, 1.0, -1.0]))


def plan(t: int = 0, sparsity: float = 0.5, update_mask: bool = True) -> RoundPlan:
    return RoundPlan(t, 0.1, 0.0, sparsity, update_mask, 0.0, False, (0,), False, False)


def bits(values: torch.Tensor) -> bytes:
    return values.numpy().tobytes()


def random_server(seed: int, size: int = 200, tail: int = 7, sparsity: float = 0.5) -> Server:
    generator = np.random.default_rng(seed)
    weights = torch.from_numpy(generator.standard_normal(size + tail).astype(np.float32))
    mask = masks.select_largest(weights[:size].abs(), masks.kept_count(size, sparsity))
    return Server.of(0, server.pruned(weights, mask), mask)


def updates(seed: int, count: int, size: int) -> list[torch.Tensor]:
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.standard_normal(size).astype(np.float32)) for _ in range(count)]


def whole(vector: torch.Tensor, size: int) -> Aggregate:
    """A sum [n] in which every one of `size` prunable weights was sent."""
    none = torch.zeros(0, dtype=torch.int64)
    everything = Support.of(torch.ones(size, dtype=torch.bool))
    return Aggregate(everything, vector[:size].clone(), none, vector[:0], vector[size:].clone())


def sparse(vector: torch.Tensor, mask: torch.Tensor) -> Aggregate:
    """The same sum [n] as the values of a mask and others with indices."""
    support, rest = Support.of(mask), vector[: mask.numel()].masked_fill(mask, 0.0)
    indices = rest.nonzero().squeeze(1)
    return Aggregate(support, support.take(vector), indices, rest[indices], vector[mask.numel() :].clone())


def test_pruned_writes_positive_zeros_and_copies() -> None:
    weights = torch.tensor([-1.0, -0.0, 2.0, -3.0, -0.0])
    out = server.pruned(weights, torch.tensor([True, False, False, True]))
    assert out.tolist() == [-1, 0, 0, -3, 0]
    assert torch.signbit(out).tolist() == [True, False, False, True, True]  # the last lies beyond the mask
    assert weights.tolist() == [-1, 0, 2, -3, 0]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("update_mask", [False, True])
@pytest.mark.parametrize("form", ["whole", "sparse"])
def test_step_by_its_formula(memory: str, update_mask: bool, form: str) -> None:
    before, combined = random_server(1), updates(2, 1, 207)[0]
    given = whole(combined, 200) if form == "whole" else sparse(combined, before.mask)
    after, report = server.step(before, given, plan(4, 0.8, update_mask), memory)
    value = (before.weights + combined).numpy().copy()
    old = before.mask.numpy()
    if memory == "published":
        value[:200] *= old
    new = old
    if update_mask:
        order = sorted(range(200), key=lambda i: (-abs(value[i]), i))
        new = np.isin(np.arange(200), order[:40])
    kept = np.concatenate([new, np.ones(7, bool)])
    assert after.round == 5
    assert after.mask.tolist() == new.tolist()
    assert after.weights.tolist() == (value if memory == "on" else np.where(kept, value, 0)).tolist()
    exact = value[:200].astype(np.float64) ** 2
    assert report.pruning_error == pytest.approx(exact[~new].sum() / exact.sum(), rel=1e-5)
    assert report.update_norm == pytest.approx(np.linalg.norm(combined.numpy().astype(np.float64)), rel=1e-6)
    assert (report.grown, report.pruned) == (int((new & ~old).sum()), int((old & ~new).sum()))


def test_step_leaves_its_arguments_alone() -> None:
    before, combined = random_server(1), updates(2, 1, 207)[0]
    weights, mask = before.weights.clone(), before.mask.clone()
    for memory in MEMORIES:
        for aggregate in (whole(combined, 200), sparse(combined, mask)):
            copies = {name: value.clone() for name, value in vars(aggregate).items() if name != "support"}
            after, _ = server.step(before, aggregate, plan(), memory)
            after.weights.fill_(7.0)
            assert torch.equal(before.weights, weights) and torch.equal(before.mask, mask)
            assert all(torch.equal(getattr(aggregate, name), copy) for name, copy in copies.items())


def test_a_mask_that_is_not_renewed_is_not_derived_anew() -> None:
    before, combined = random_server(1), whole(updates(2, 1, 207)[0], 200)
    assert server.step(before, combined, plan(update_mask=False), "on")[0].support is before.support
    after, _ = server.step(before, combined, plan(update_mask=True), "on")
    assert after.support.digest == masks.digest(after.mask) != before.support.digest
    assert after.support.positions.tolist() == after.mask.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.333, 0.5, 0.9, 0.999])
def test_mask_is_exact_to_one_weight(memory: str, sparsity: float) -> None:
    dense = Server.of(0, updates(3, 1, 207)[0], torch.ones(200, dtype=torch.bool))
    after, _ = server.step(dense, whole(updates(4, 1, 207)[0], 200), plan(sparsity=sparsity), memory)
    assert int(after.mask.sum()) == 200 - round(200 * sparsity)


def test_a_model_of_zeros_has_no_pruning_error() -> None:
    nothing = Server.of(0, torch.zeros(4), torch.ones(4, dtype=torch.bool))
    after, report = server.step(nothing, whole(torch.zeros(4), 4), plan(), "on")
    assert after.mask.tolist() == [True, True, False, False]
    assert report.pruning_error == 0


def test_a_pruned_weight_comes_back_with_memory_on() -> None:
    """Off-mask mass adds up over rounds: no single update of 0.4 would beat the kept 1.0."""
    before = Server.of(0, torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    push = whole(torch.tensor([0.0, 0.4]), 2)
    seen = {}
    for memory in MEMORIES:
        state = before
        for t in range(3):
            state, report = server.step(state, push, plan(t), memory)
            seen[memory, t] = (state.mask.tolist(), report.grown, report.pruned)
    assert seen["on", 1] == ([True, False], 0, 0)
    assert seen["on", 2] == ([False, True], 1, 1)
    assert seen["off", 2] == seen["published", 2] == ([True, False], 0, 0)


def test_a_pruned_weight_comes_back_with_memory_off_when_one_update_is_large_enough() -> None:
    before = Server.of(0, torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    push = whole(torch.tensor([0.0, 1.5]), 2)
    assert server.step(before, push, plan(), "off")[0].mask.tolist() == [False, True]
    assert server.step(before, push, plan(), "published")[0].mask.tolist() == [True, False]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_published_masks_nest(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    vectors = st.lists(WEIGHT, min_size=size, max_size=size).map(lambda v: torch.tensor(v, dtype=torch.float32))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    state = Server.of(0, server.pruned(data.draw(vectors), mask), mask)
    for t, sparsity in enumerate(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))):
        after, report = server.step(state, whole(data.draw(vectors), size), plan(t, sparsity), "published")
        assert not (after.mask & ~state.mask).any()
        assert report.grown == 0
        assert not after.weights[~after.mask].any()
        state = after


@settings(deadline=None)
@given(st.data(), st.sampled_from(MEMORIES))
def test_a_mask_never_grows_in_size(data: st.DataObject, memory: str) -> None:
    size = data.draw(st.integers(1, 12))
    vectors = st.lists(WEIGHT, min_size=size, max_size=size).map(lambda v: torch.tensor(v, dtype=torch.float32))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    asked = data.draw(st.floats(0, 1))
    state = Server.of(0, server.pruned(data.draw(vectors), mask), mask)
    after, _ = server.step(state, whole(data.draw(vectors), size), plan(0, asked), memory)
    assert int(after.mask.sum()) == min(int(mask.sum()), size - round(asked * size))


def play(state: Server, values: str, dense: bool, t: int) -> tuple[Server, torch.Tensor, int]:
    """One round of three clients without a mask update: the new server, the sum of updates, bytes sent."""
    support, sent = state.support, 0
    total = Sum(support.whole() if dense else support, 207, 0, 207)
    for share, client in [(0.25, 3), (0.3, 5), (0.45, 9)]:
        update = updates(100 * t + client, 1, 207)[0]
        upload, rng = Upload(values, dense=dense), np.random.default_rng(0)
        for message in codec.encode(update, support, upload, t, client, rng):
            total.add(share, codec.read(message.frame(), support, 207, t))
            sent += message.frame().size
    combined = torch.zeros(207)
    total.result().add_to(combined)
    return server.step(state, total.result(), plan(t, update_mask=False), "off")[0], combined, sent


@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
def test_masked_upload_equals_dense_upload_with_memory_off_between_mask_updates(values: str) -> None:
    masked = dense = random_server(7)
    for t in range(4):
        masked, _, few_bytes = play(masked, values, False, t)
        dense, combined, many_bytes = play(dense, values, True, t)
        assert few_bytes < many_bytes
        assert combined[:200][~dense.mask].any()  # the dense uploads did carry off-mask mass
        assert bits(masked.weights) == bits(dense.weights)
        assert torch.equal(masked.mask, dense.mask)
