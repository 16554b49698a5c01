"""How many weights each layer keeps when a mask is cut by magnitude: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import masks


def select(magnitude: Tensor, keep: int, shapes: Sequence[Sequence[int]], rule: str) -> Tensor:
    """A mask by magnitude: each layer keeps its largest, as many as `rule` gives it; of equal ones the first.

    Args:
        magnitude: float32 [P], |v|; -1 where a weight may not be kept.
        keep: how many are kept in all; at most those that may be.
        shapes: of the layers, in their order in `magnitude`.
        rule: "global": the largest over all layers together.
            "lamp": the largest scores w^2 / (sum of all w'^2 of the layer with |w'| >= |w|) over all layers together
            (Lee et al. 2021, eq. 3). A layer's largest weight has the score 1, so that no layer is emptied while
            `keep` is not below the number of layers.
            "erk", "uniform": by the layers' shapes, or the same share of each (`masks.erk_densities`).

    Returns:
        bool [P] with exactly `keep` True.
    """
    if rule == "global":
        return masks.select_largest(magnitude, keep)
    layers = magnitude.split([prod(shape) for shape in shapes])
    counts = _lamp_counts(layers, keep) if rule == "lamp" else _fixed_counts(layers, keep, shapes, rule)
    return torch.cat([masks.select_largest(layer, count) for layer, count in zip(layers, counts, strict=True)])


def lamp_scores(magnitude: Tensor, most: int) -> Tensor:
    """The `most` largest LAMP scores of a layer.

    Sums run in float64 and one after the other, on the CPU: a GPU adds in an order of its own, and ranks on different
    devices must agree.

    Args:
        magnitude: float32 [m]; -1 where a weight may not be kept: it has no score and adds nothing to the others'.
        most: >= 0.

    Returns:
        float64 [at most `most`] on the device of `magnitude`, in [0, 1], descending; 0 for weights of 0.
    """
    squares = _largest_descending(magnitude, most).astype(np.float64) ** 2
    sums = np.cumsum(squares)
    scores = np.divide(squares, sums, out=np.zeros_like(sums), where=sums > 0)
    return torch.from_numpy(scores).to(magnitude.device)


def _largest_descending(magnitude: Tensor, most: int) -> np.ndarray:
    """The `most` largest of float32 [m] that are not below 0, or all of them."""
    if magnitude.device.type != "cpu":  # a GPU sorts faster than all of it would travel
        return magnitude[magnitude >= 0].sort(descending=True).values[:most].cpu().numpy()
    values = magnitude.numpy()
    values = values[values >= 0]
    first = len(values) - min(most, len(values))
    largest = np.partition(values, first)[first:] if 0 < first < len(values) else values[first:]
    return np.sort(largest)[::-1]


def _lamp_counts(layers: Sequence[Tensor], keep: int) -> list[int]:
    """How many of each layer's weights are among the `keep` with the largest scores; of equal ones the first layer's."""
    scores = [lamp_scores(layer, keep) for layer in layers]
    chosen = masks.select_largest(torch.cat(scores), keep)
    return [int(part.count_nonzero()) for part in chosen.split([len(s) for s in scores])]


def _fixed_counts(layers: Sequence[Tensor], keep: int, shapes: Sequence[Sequence[int]], rule: str) -> list[int]:
    """Counts by shape, none above what a layer has left to keep; what one has not, the others share."""
    room = [int((layer >= 0).count_nonzero()) for layer in layers]
    sizes = [layer.numel() for layer in layers]
    density = keep / max(1, sum(sizes))
    densities = masks.erk_densities(shapes, density) if rule == "erk" else [density] * len(sizes)
    wanted = [
        min(1.0, size * share / left) if left else 0.0 for size, share, left in zip(sizes, densities, room, strict=True)
    ]
    return masks.layer_counts(room, wanted, keep)
