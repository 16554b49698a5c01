"""How many weights each layer keeps: exact in all, by the rule in each, no layer emptied by LAMP."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feddip_mpi import allocation, masks

RULES = ("global", "lamp", "erk", "uniform")
MAGNITUDE = st.one_of(st.floats(0, 100, width=32), st.sampled_from([0.0, 1.0, -1.0]))
LAYERS = st.lists(st.lists(MAGNITUDE, min_size=1, max_size=12), min_size=1, max_size=4)


def lamp_by_definition(layer: list[float]) -> list[float]:
    """Every weight's score by the formula, in the order of the layer."""
    allowed = [v for v in layer if v >= 0]
    # Of equal weights the first comes first, as where they are chosen: those before it count as larger.
    larger = [sum(1 for j, v in enumerate(layer) if v > w or (v == w and j < i)) for i, w in enumerate(layer)]
    descending = sorted(allowed, reverse=True)
    sums = np.cumsum(np.array(descending, dtype=np.float64) ** 2)
    return [w**2 / sums[n] if w >= 0 and sums[n] > 0 else min(w, 0.0) for w, n in zip(layer, larger, strict=True)]


@settings(deadline=None)
@given(LAYERS, st.sampled_from(RULES), st.data())
def test_every_rule_keeps_exactly_what_is_asked_and_nothing_forbidden(
    layers: list[list[float]], rule: str, data: st.DataObject
) -> None:
    magnitude = torch.tensor([v for layer in layers for v in layer])
    keep = data.draw(st.integers(0, int((magnitude >= 0).sum())))
    mask = allocation.select(magnitude, keep, [[len(layer)] for layer in layers], rule)
    assert int(mask.sum()) == keep
    assert not bool((mask & (magnitude < 0)).any())
    for values, kept in zip(
        magnitude.split([len(x) for x in layers]), mask.split([len(x) for x in layers]), strict=True
    ):
        if kept.any() and not kept.all():
            assert float(values[kept].min()) >= float(values[~kept].max())  # in a layer: by magnitude


@settings(deadline=None)
@given(LAYERS, st.data())
def test_lamp_is_the_largest_scores_of_the_definition(layers: list[list[float]], data: st.DataObject) -> None:
    magnitude = torch.tensor([v for layer in layers for v in layer])
    keep = data.draw(st.integers(0, int((magnitude >= 0).sum())))
    mask = allocation.select(magnitude, keep, [[len(layer)] for layer in layers], "lamp")
    scores = [s for layer in layers for s in lamp_by_definition([float(np.float32(v)) for v in layer])]
    assert mask.tolist() == masks.select_largest(torch.tensor(scores, dtype=torch.float64), keep).tolist()


def test_lamp_by_hand() -> None:
    # Layer one: 9/9, 16... of 4, 3, 0: 16/16, 9/25, 0. Layer two, a hundred times smaller: 1, 4/13 of 0.03 and 0.02.
    scores = allocation.lamp_scores(torch.tensor([3.0, 0.0, -1.0, 4.0]), 9)
    assert scores.tolist() == [1.0, 9 / 25, 0.0]
    assert allocation.lamp_scores(torch.tensor([0.02, 0.03]), 2)[1].item() == pytest.approx(4 / 13)
    values = torch.tensor([3.0, 0.0, 4.0, 0.02, 0.03])
    by = {rule: allocation.select(values, 2, [[3], [2]], rule).tolist() for rule in ("global", "lamp")}
    assert by["global"] == [True, False, True, False, False]
    assert by["lamp"] == [False, False, True, False, True]


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_lamp_leaves_every_layer_a_weight(layers: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = [int(n) for n in generator.integers(1, 40, layers)]
    scales = 10.0 ** generator.integers(-6, 3, layers)
    drawn = [np.abs(generator.standard_normal(n)) * s + 1e-12 for n, s in zip(sizes, scales, strict=True)]
    magnitude = torch.from_numpy(np.concatenate(drawn).astype(np.float32))
    keep = int(generator.integers(layers, sum(sizes) + 1))
    mask = allocation.select(magnitude, keep, [[n] for n in sizes], "lamp")
    assert all(bool(part.any()) for part in mask.split(sizes))


@pytest.mark.parametrize("rule", ["erk", "uniform"])
def test_fixed_counts_follow_the_shapes_and_what_is_left_to_keep(rule: str) -> None:
    shapes = [[6, 1, 5, 5], [120, 400], [10, 84]]
    sizes = [prod(shape) for shape in shapes]
    magnitude = torch.from_numpy(np.random.default_rng(3).random(sum(sizes), dtype=np.float32))
    keep = masks.kept_count(sum(sizes), 0.9)
    counts = [int(part.sum()) for part in allocation.select(magnitude, keep, shapes, rule).split(sizes)]
    densities = masks.erk_densities(shapes, keep / sum(sizes)) if rule == "erk" else [keep / sum(sizes)] * 3
    assert counts == pytest.approx([n * d for n, d in zip(sizes, densities, strict=True)], abs=1)
    # Of the last layer only 20 may be kept; the others take over what it cannot give.
    magnitude[-820:] = -1.0
    counts = [int(part.sum()) for part in allocation.select(magnitude, keep, shapes, rule).split(sizes)]
    assert counts[2] <= 20
    assert sum(counts) == keep
