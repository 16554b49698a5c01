"""Masks over the prunable weights: tensors in, tensors out.

A mask is bool [P], True where a weight is kept. Sparsity is the share of zeros, in [0, 1].
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isqrt, prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor


def kept_count(size: int, sparsity: float) -> int:
    """How many of `size` weights remain at `sparsity` in [0, 1]; exact to one weight."""
    return size - round(sparsity * size)


def largest(values: Tensor, count: int, exclude: Tensor | None = None) -> Tensor:
    """Where the `count` largest |values| stand, exactly; of equal ones those with the lowest index.

    Extra memory beside the result: a few per cent of `values`; one float per value where the bracket fails (below).

    Args:
        values: float32 or float64 [P], finite.
        count: 0 <= count <= values that are not excluded.
        exclude: bool [P], True where a value must not be chosen.

    Returns:
        int64 [count], ascending, on the device of `values`.

    Raises:
        ValueError: `count` is out of range.
    """
    source = _Source(values, exclude, signed=True)
    source.check(count)
    out = torch.empty(count, dtype=torch.int64, device=values.device)
    filled = 0
    for where, chosen in _chosen(source, count):
        found = _positions(chosen)
        torch.add(found, where.start, out=out[filled : filled + len(found)])
        filled += len(found)
    return out[:filled]


def select_largest(magnitude: Tensor, count: int) -> Tensor:
    """The `count` largest entries, exactly; of equal ones those with the lowest index.

    Args:
        magnitude: float32 or float64 [P], finite; compared as they are, so that a -1 comes after every magnitude.
        count: 0 <= count <= P.

    Returns:
        bool [P] with exactly `count` True.

    Raises:
        ValueError: `count` is out of range.
    """
    source = _Source(magnitude, None, signed=False)
    source.check(count)
    selected = torch.zeros_like(magnitude, dtype=torch.bool)
    for where, chosen in _chosen(source, count):
        selected[where] = chosen
    return selected


# How wide a bracket is tried first, and how wide then.
_DEVIATIONS = (4, 16)


@dataclass(frozen=True)
class _Source:
    """What is selected from: floats [P], by |value| if they are signed, without those that bool [P] excludes."""

    values: Tensor
    exclude: Tensor | None
    signed: bool

    @cached_property
    def eligible(self) -> int:
        return self.values.numel() - (0 if self.exclude is None else int(self.exclude.count_nonzero()))

    def check(self, count: int) -> None:
        if not 0 <= count <= self.eligible:
            raise ValueError(f"cannot select {count} of {self.eligible}")

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Magnitudes piece by piece: nothing as long as `values` is made, and on a CPU a piece stays in its cache."""
        for start in range(0, self.values.numel(), step := _chunk(self.values)):
            where = slice(start, start + step)
            yield where, self.values[where].abs() if self.signed else self.values[where]

    def allowed(self, hits: Tensor, where: slice) -> Tensor:
        """bool `hits` of a chunk without the excluded, in place."""
        return hits if self.exclude is None else hits.gt_(self.exclude[where])  # True > False: hit and not excluded

    def every(self, stride: int) -> Tensor:
        """A copy of every `stride`-th magnitude, -inf for the excluded."""
        out = self.values[::stride].abs() if self.signed else self.values[::stride].clone()
        return out if self.exclude is None else out.masked_fill_(self.exclude[::stride], -inf)


def _chosen(source: _Source, count: int) -> Iterator[tuple[slice, Tensor]]:
    """The `count` largest as bool chunks, in order."""
    if count == 0:
        return
    cut, ties, equal = _cut(source, count)
    if ties == equal:  # as a rule: one value equals the cut, itself
        relation, ties = operator.ge, 0
    else:
        relation = operator.gt
    for where, magnitude in source.chunks():
        chosen = source.allowed(_compare(relation, magnitude, cut), where)
        if ties:
            tied = _positions(source.allowed(_compare(operator.eq, magnitude, cut), where))[:ties]
            chosen[tied] = True
            ties -= len(tied)
        yield where, chosen


def _cut(source: _Source, count: int) -> tuple[float, int, int]:
    """The `count`-th largest magnitude, how many of those equal to it are chosen, and how many there are.

    A bracket from a sample, then one pass that keeps what lies within. Where that does not contain it a wider bracket
    follows, at last all magnitudes.
    """
    for deviations in _DEVIATIONS:
        low, high = _bracket(source, count, deviations)
        within = _within(source, low, high)
        if within is None or within[0] >= count:
            continue
        above, near = within
        if count <= above + near.numel():
            break
        # Many may be equal to the lower bound, above all to 0: weights that no gradient has reached.
        equal = sum(_count(source.allowed(_compare(operator.eq, part, low), where)) for where, part in source.chunks())
        if count <= above + near.numel() + equal:
            return low, count - above - near.numel(), equal
    else:
        above, near = 0, source.every(1)
    cut = float(_kth_largest_(near, count - above))
    parts = near.split(_chunk(near))
    larger = above + sum(_count(_compare(operator.gt, part, cut)) for part in parts)
    return cut, count - larger, sum(_count(_compare(operator.eq, part, cut)) for part in parts)


def _bracket(source: _Source, count: int, deviations: int) -> tuple[float, float]:
    """Two bounds with the `count`-th largest magnitude in (low, high], unless the data repeat as the sample does.

    The sample is every so many-th value: no random numbers, and each layer is represented by its size. An odd stride
    meets all rows and columns of tensors whose dimensions are powers of two. `deviations` are standard deviations of the
    rank in a random sample: neighbours are alike, so that a regular sample may be further off.
    """
    size, stride = source.values.numel(), isqrt(source.values.numel()) // 8 | 1
    sample = source.every(stride)
    rank = count / stride
    margin = 1 + deviations * sqrt(rank * (1 - count / size))
    first, last = int(rank - margin), int(rank + margin) + 1
    high = float(_kth_largest_(sample, first)) if first >= 1 else inf
    low = float(_kth_largest_(sample, last)) if last <= sample.numel() else -inf
    return low, high


def _within(source: _Source, low: float, high: float) -> tuple[int, Tensor] | None:
    """How many magnitudes lie above `high`, and a copy of those in (low, high]; None if these are no longer few."""
    above, found, room = 0, [source.values[:0]], source.values.numel() // 8
    for where, magnitude in source.chunks():
        over = source.allowed(_compare(operator.gt, magnitude, high), where)
        near = source.allowed(_compare(operator.gt, magnitude, low), where).logical_xor_(over)
        above += _count(over)
        found.append(magnitude[_positions(near)])
        room -= found[-1].numel()
        if room < 0:
            return None
    return above, torch.cat(found)


def _count(hits: Tensor) -> int:
    return int(hits.count_nonzero())


def _chunk(values: Tensor) -> int:
    # 1 MB of float32 stays in a core's second-level cache; elsewhere a launch should have more to do.
    return 1 << 18 if _by_numpy(values) else 1 << 22


def _by_numpy(values: Tensor) -> bool:
    """On a CPU numpy compares and finds three to six times as fast as torch, and can partition."""
    return values.device.type == "cpu"


def _compare(relation: Callable[[Any, float], Any], values: Tensor, bound: float) -> Tensor:
    """bool [m]."""
    return torch.from_numpy(relation(values.numpy(), bound)) if _by_numpy(values) else relation(values, bound)


def _positions(hits: Tensor) -> Tensor:
    """int64 positions of the True in bool [m]."""
    return torch.from_numpy(np.flatnonzero(hits.numpy())) if _by_numpy(hits) else hits.nonzero().squeeze(1)


def _kth_largest_(values: Tensor, k: int) -> Tensor:
    """The k-th largest of floats [m], which may be reordered."""
    if _by_numpy(values):
        position = values.numel() - k
        values.numpy().partition(position)
        return values[position]
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
    return random_mask([prod(shape) for shape in shapes], random_counts(rule, shapes, sparsity), generator)


def random_counts(rule: str, shapes: Sequence[Sequence[int]], sparsity: float) -> list[int]:
    """How many weights of each layer `initial_random` keeps."""
    sizes = [prod(shape) for shape in shapes]
    total = kept_count(sum(sizes), sparsity)
    density = total / max(1, sum(sizes))
    densities = erk_densities(shapes, density) if rule == "erk" else [density] * len(sizes)
    return layer_counts(sizes, densities, total)


def sparsity(mask: Tensor) -> float:
    """Share of zeros of a mask bool [P]; 0 for an empty one."""
    return 1 - int(mask.count_nonzero()) / mask.numel() if mask.numel() else 0.0  # sum() would make int64 of it


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
