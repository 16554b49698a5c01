"""Masks over the prunable weights: tensors in, tensors out.

A mask is bool [P], True where a weight is kept. Sparsity is the share of zeros, in [0, 1].
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


def kept_count(size: int, sparsity: float) -> int:
    """How many of `size` weights remain at `sparsity` in [0, 1]; exact to one weight."""
    return size - round(sparsity * size)


def select_largest(magnitude: Tensor, count: int) -> Tensor:
    """The `count` largest entries, exactly; of equal ones those with the lowest index.

    Args:
        magnitude: [P], finite.
        count: 0 <= count <= P.

    Returns:
        bool [P] with exactly `count` True.
    """
    size = magnitude.numel()
    if not 0 <= count <= size:
        raise ValueError(f"cannot select {count} of {size}")
    if count == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    threshold = _kth_largest(magnitude, count)
    selected = magnitude > threshold
    tied = (magnitude == threshold).nonzero().squeeze(1)
    selected[tied[: count - int(selected.sum())]] = True
    return selected


def _kth_largest(values: Tensor, k: int) -> Tensor:
    if values.device.type == "cpu":
        # numpy's introselect needs a third of the time of torch.topk at 23 M values (docs/results/step.json).
        position = values.numel() - k
        return torch.from_numpy(np.partition(values.numpy(), position)[position : position + 1])[0]
    return torch.topk(values, k, sorted=False).values.min()


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Erdos-Renyi-Kernel densities (Evci et al. 2020, RigL, appendix): proportional to sum(shape) / prod(shape).

    Layers that would pass 1 become dense and the rest share what is left. Each result lies in [0, 1]; weighted by
    layer size they average `density`.
    """
    sizes = [prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(sizes)) if i not in dense]
        if not free:
            return [1.0] * len(sizes)
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = budget / sum(raw[i] * sizes[i] for i in free)
        over = [i for i in free if scale * raw[i] > 1]
        if not over:
            return [1.0 if i in dense else max(0.0, scale * raw[i]) for i in range(len(sizes))]
        dense.update(over)


def layer_counts(sizes: Sequence[int], densities: Sequence[float], total: int) -> list[int]:
    """Whole numbers near size * density that add up to `total`, by largest remainder, none above its size."""
    wanted = [size * density for size, density in zip(sizes, densities, strict=True)]
    counts = [min(size, int(w)) for size, w in zip(sizes, wanted, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - wanted[i], i))
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        movable = [i for i in order if 0 <= counts[i] + step <= sizes[i]][: abs(missing)]
        for i in movable:
            counts[i] += step
    return counts


def random_mask(sizes: Sequence[int], counts: Sequence[int], generator: np.random.Generator) -> Tensor:
    """`counts[l]` positions kept at random in each layer of `sizes[l]` weights; bool [P] on the CPU."""
    layers = []
    for size, count in zip(sizes, counts, strict=True):
        layer = np.zeros(size, dtype=bool)
        layer[generator.permutation(size)[:count]] = True
        layers.append(layer)
    return torch.from_numpy(np.concatenate(layers)) if layers else torch.zeros(0, dtype=torch.bool)


def initial_random(
    rule: str, shapes: Sequence[Sequence[int]], sparsity: float, generator: np.random.Generator
) -> Tensor:
    """A random mask of exact total sparsity whose layer densities follow `rule`: "erk" or "uniform"."""
    sizes = [prod(shape) for shape in shapes]
    total = kept_count(sum(sizes), sparsity)
    density = total / max(1, sum(sizes))
    densities = erk_densities(shapes, density) if rule == "erk" else [density] * len(sizes)
    return random_mask(sizes, layer_counts(sizes, densities, total), generator)


def sparsity(mask: Tensor) -> float:
    """Share of zeros of a mask bool [P]; 0 for an empty one."""
    return 1 - int(mask.sum()) / mask.numel() if mask.numel() else 0.0


def layer_sparsities(mask: Tensor, sizes: Sequence[int]) -> list[float]:
    """Share of zeros of each layer."""
    return [sparsity(layer) for layer in mask.split(list(sizes))]


def pack(mask: Tensor) -> np.ndarray:
    """bool [P] as uint8 [ceil(P / 8)], most significant bit first."""
    return np.packbits(mask.cpu().numpy())


def unpack(packed: np.ndarray, size: int) -> Tensor:
    """The inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(packed, count=size).astype(bool))


def digest(mask: Tensor) -> int:
    """CRC-32 of the packed mask: two ranks whose masks differ find out before they add anything up."""
    return zlib.crc32(pack(mask).tobytes())
