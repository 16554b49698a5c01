"""Masks: exact counts, exact order, densities, packing."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feddip_mpi import masks

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
TIED = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, 1e-45])
SHAPES = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=6)


@contextmanager
def selection_by(numpy: bool, chunk: int) -> Iterator[None]:
    """Select on the CPU as there, or by the operations that other devices get, in chunks of `chunk` values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_by_numpy", lambda _: numpy)
        patch.setattr(masks, "_chunk", lambda _: chunk)
        yield


def sorted_out(magnitude: np.ndarray, count: int, exclude: np.ndarray | None = None) -> list[int]:
    """The definition: sort by value, then by index, leave out what is excluded, take `count`, ascending."""
    order = np.lexsort((np.arange(magnitude.size), -magnitude))
    return sorted((order if exclude is None else order[~exclude[order]])[:count].tolist())


@pytest.mark.parametrize("numpy", [True, False])
@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(FINITE, TIED), min_size=1, max_size=30), st.data())
def test_select_largest_is_a_stable_sort(numpy: bool, values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    expected = sorted_out(np.array(values, np.float32), count)
    with selection_by(numpy, 7):
        selected = masks.select_largest(torch.tensor(values), count)
    assert selected.dtype == torch.bool and selected.nonzero().squeeze(1).tolist() == expected


@pytest.mark.parametrize("numpy", [True, False])
@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.one_of(FINITE, TIED, st.integers(-2, 2)), st.booleans()), max_size=30), st.data())
def test_largest_is_a_stable_sort_of_what_is_left(
    numpy: bool, entries: list[tuple[float, bool]], data: st.DataObject
) -> None:
    values, exclude = np.array([v for v, _ in entries], np.float32), np.array([e for _, e in entries], bool)
    count = data.draw(st.integers(0, int((~exclude).sum())))
    with selection_by(numpy, 7):
        got = masks.largest(torch.from_numpy(values), count, torch.from_numpy(exclude))
    assert got.dtype == torch.int64 and got.tolist() == sorted_out(np.abs(values), count, exclude)


SIZE = 20_000
STRIDE = math.isqrt(SIZE) // 8 | 1  # of the sample that the bracket comes from
NOISE = np.random.default_rng(4).standard_normal(SIZE).astype(np.float32)
ON_STRIDE = np.arange(SIZE) % STRIDE == 0
HARD = {
    "normal": NOISE,
    "zero": np.zeros(SIZE, np.float32),
    "minus zero": np.where(NOISE > 0, np.float32(0.0), np.float32(-0.0)),
    "equal": np.where(NOISE > 0, np.float32(3), np.float32(-3)),
    "few that are not zero": np.where(np.abs(NOISE) > 3, NOISE, np.float32(0)),
    "half zero": np.maximum(NOISE, 0),
    "integers": np.round(NOISE * 2),
    "denormal": (NOISE * np.float32(1e-42)),
    "from denormal to huge": np.sign(NOISE)
    * np.exp(20 * NOISE.astype(np.float64)).clip(1e-45, 3e38).astype(np.float32),
    "ascending": np.sort(NOISE),
    "descending": np.sort(np.abs(NOISE))[::-1].copy(),
    "sample sees the large ones only": np.where(ON_STRIDE, 9 + NOISE, NOISE),
    "sample sees the small ones only": np.where(ON_STRIDE, NOISE / 1000, NOISE),
    "sample sees one value only": np.where(ON_STRIDE, np.float32(1), NOISE),
    "layers of different scale": NOISE * np.repeat(np.float32([1e-3, 1, 50, 1e-6]), SIZE // 4),
}


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("name", HARD)
def test_selection_is_exact_whatever_the_data(name: str, numpy: bool) -> None:
    values = HARD[name].astype(np.float32)
    exclusions = [None, np.abs(NOISE) > 1, ON_STRIDE, np.arange(SIZE) < SIZE // 2]
    for exclude in exclusions:
        eligible = SIZE if exclude is None else int((~exclude).sum())
        for count in (0, 1, SIZE // 100, SIZE // 20, eligible // 2, eligible - 1, eligible):
            with selection_by(numpy, 3000):
                got = masks.largest(
                    torch.from_numpy(values), count, None if exclude is None else torch.from_numpy(exclude)
                )
            assert got.tolist() == sorted_out(np.abs(values), count, exclude), count


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.05, 0.5, 0.98])
def test_usual_data_need_no_copy_of_everything(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = masks._Source.every
    monkeypatch.setattr(masks._Source, "every", lambda source, stride: sample(source, stride) if stride > 1 else 1 / 0)
    scales = torch.tensor([0.01, 1.0, 0.1, 5.0]).repeat_interleave(50_000)
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * scales
    count = int(share * values.numel())
    expected = sorted_out(values.abs().numpy(), count)
    assert masks.largest(values, count).tolist() == expected
    assert masks.select_largest(values.abs(), count).nonzero().squeeze(1).tolist() == expected


@pytest.mark.parametrize("count", [900, 1000, 1500, 150_000])
def test_zeros_need_no_copy_of_everything(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that no gradient has reached: the cut lies among or next to very many equal values."""
    sample = masks._Source.every
    monkeypatch.setattr(masks._Source, "every", lambda source, stride: sample(source, stride) if stride > 1 else 1 / 0)
    values, generator = torch.zeros(200_000), torch.Generator().manual_seed(0)
    values[torch.randperm(200_000, generator=generator)[:1000]] = torch.randn(1000, generator=generator)
    expected = sorted_out(values.abs().numpy(), count)
    assert masks.largest(values, count).tolist() == expected
    assert masks.select_largest(values.abs(), count).nonzero().squeeze(1).tolist() == expected


def test_selection_compares_doubles_as_doubles() -> None:
    values = torch.tensor([1.0, 1.0 + 1e-12, -1.0 - 2e-12, 1.0], dtype=torch.float64)
    assert masks.largest(values, 2).tolist() == [1, 2]
    assert masks.select_largest(values, 3).tolist() == [True, True, False, True]


def test_selection_takes_views_and_does_not_change_its_input() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    before = values.clone()
    for count in (0, 1, 300, 1500):
        assert int(masks.select_largest(values[::2], count).sum()) == count
        assert masks.largest(values[::2], count).tolist() == sorted_out(before[::2].abs().numpy(), count)
    assert torch.equal(values, before)


@pytest.mark.parametrize("count", [-1, 4])
def test_selection_refuses_impossible_counts(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot select {count} of 3"):
        masks.select_largest(torch.ones(3), count)
    with pytest.raises(ValueError, match=f"cannot select {count} of 3"):
        masks.largest(torch.ones(5), count, torch.tensor([False, True, False, True, False]))


def test_a_kept_weight_of_zero_goes_before_every_pruned_one() -> None:
    old = torch.tensor([False, True, True, False, True])
    magnitude = torch.tensor([-1.0, 0.0, 0.0, -1.0, 2.0])
    assert masks.select_largest(magnitude, 3).tolist() == old.tolist()
    assert masks.select_largest(magnitude, 4).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("size", "sparsity", "kept"),
    [(10, 0.0, 10), (10, 0.5, 5), (10, 1.0, 0), (61_470, 0.98, 1229), (61_470, 0.9, 6147), (1, 0.9, 0), (1, 0.4, 1), (0, 0.5, 0)],
)  # fmt: skip
def test_kept_count_table(size: int, sparsity: float, kept: int) -> None:
    assert masks.kept_count(size, sparsity) == kept


@given(st.integers(0, 10**8), st.floats(0, 1))
def test_kept_count_is_exact_to_one_weight(size: int, sparsity: float) -> None:
    kept = masks.kept_count(size, sparsity)
    assert 0 <= kept <= size
    assert abs(kept - (1 - sparsity) * size) <= 0.5 + 1e-6


@settings(deadline=None)
@given(SHAPES, st.floats(0, 1))
def test_erk_densities_average_and_stay_proportional(shapes: list[list[int]], density: float) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    got = masks.erk_densities(shapes, density)
    assert all(0 <= d <= 1 for d in got)
    assert sum(d * n for d, n in zip(got, sizes, strict=True)) == pytest.approx(
        density * sum(sizes), abs=1e-9 * sum(sizes)
    )
    raw = [sum(shape) / n for shape, n in zip(shapes, sizes, strict=True)]
    ratios = [d / r for d, r in zip(got, raw, strict=True) if d < 1]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-9) if ratios else density == pytest.approx(1)
    # A layer is dense only because the common factor would have carried it past 1.
    if ratios:
        assert all(ratios[0] * r >= 1 - 1e-9 for d, r in zip(got, raw, strict=True) if d == 1)


def test_erk_by_hand() -> None:
    # sum/prod = 8/12 and 80/1200: the small layer would get 5.3, becomes dense, the other takes the remaining budget
    assert masks.erk_densities([(6, 2), (60, 20)], 0.5) == pytest.approx([1.0, (606 - 12) / 1200])
    assert masks.erk_densities([(4, 4), (4, 4)], 0.25) == pytest.approx([0.25, 0.25])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=8), st.data())
def test_layer_counts_add_up(layers: list[tuple[int, float]], data: st.DataObject) -> None:
    sizes, densities = [n for n, _ in layers], [d for _, d in layers]
    total = data.draw(st.integers(0, sum(sizes)))
    counts = masks.layer_counts(sizes, densities, total)
    assert sum(counts) == total
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=8))
def test_layer_counts_are_the_nearest_whole_numbers(layers: list[tuple[int, float]]) -> None:
    sizes, wanted = [n for n, _ in layers], [n * d for n, d in layers]
    counts = masks.layer_counts(sizes, [d for _, d in layers], round(sum(wanted)))
    assert all(abs(c - w) < 1 + 1e-9 for c, w in zip(counts, wanted, strict=True))
    up = [w - math.floor(w) for c, w in zip(counts, wanted, strict=True) if c > w]
    down = [w - math.floor(w) for c, w in zip(counts, wanted, strict=True) if c < w]
    assert not up or not down or min(up) >= max(down) - 1e-9  # the largest remainders were rounded up


@pytest.mark.parametrize("rule", ["erk", "uniform"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.99, 1.0])
def test_initial_random_is_exact_and_follows_its_rule(rule: str, sparsity: float) -> None:
    shapes = [(6, 1, 5, 5), (16, 6, 5, 5), (120, 40), (10, 12)]
    sizes = [math.prod(shape) for shape in shapes]
    mask = masks.initial_random(rule, shapes, sparsity, np.random.default_rng(0))
    assert mask.dtype == torch.bool and mask.numel() == sum(sizes)
    assert int(mask.sum()) == masks.kept_count(sum(sizes), sparsity)
    density = int(mask.sum()) / sum(sizes)
    wanted = masks.erk_densities(shapes, density) if rule == "erk" else [density] * len(shapes)
    for layer, size, share in zip(mask.split(sizes), sizes, wanted, strict=True):
        assert abs(int(layer.sum()) - share * size) < 1 + 1e-6


def test_initial_random_depends_on_the_generator_alone() -> None:
    def draw(seed: int) -> torch.Tensor:
        return masks.initial_random("erk", [(30, 30)], 0.5, np.random.default_rng(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_mask_has_no_favourite_positions() -> None:
    generator = np.random.default_rng(3)
    hits = sum(masks.random_mask([20, 5], [5, 5], generator).to(torch.int64) for _ in range(2000))
    assert hits[20:].tolist() == [2000] * 5
    assert (hits[:20] - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)


@given(st.lists(st.booleans(), max_size=40))
def test_pack_and_unpack_are_inverse(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = masks.pack(mask)
    assert packed.dtype == np.uint8 and packed.size == -(-len(bits) // 8)
    assert masks.unpack(packed, len(bits)).tolist() == bits


def test_pack_puts_the_first_weight_into_the_highest_bit() -> None:
    assert masks.pack(torch.tensor([True, False, True, False, False, False, False, False, True])).tolist() == [
        0xA0,
        0x80,
    ]


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_digest_notices_every_single_weight(bits: list[bool]) -> None:
    mask = torch.tensor(bits)
    digests = {masks.digest(mask)}
    for i in range(len(bits)):
        other = mask.clone()
        other[i] = ~other[i]
        digests.add(masks.digest(other))
    assert len(digests) == len(bits) + 1


def test_sparsity_counts_zeros_over_all_and_by_layer() -> None:
    mask = torch.tensor([True, False, False, False, True, True])
    assert masks.sparsity(mask) == 0.5
    assert masks.layer_sparsities(mask, [4, 2]) == [0.75, 0.0]
    assert masks.sparsity(torch.zeros(0, dtype=torch.bool)) == 0.0
