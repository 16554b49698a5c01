"""sum_k p_k q_k over a range of coordinates, in client order, without a dense vector for each client. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feddip_mpi.codec import SUPPORT, Piece
from feddip_mpi.support import Support


@dataclass(frozen=True)
class Aggregate:
    """The weighted sum of all clients' updates.

    Attributes:
        support: of the coordinates that all clients have sent.
        packed: float32 [support.count], their sums.
        indices, sums: int64 [u] ascending and float32 [u]: off-mask coordinates that some clients have sent.
        other: float32 [n - P].
    """

    support: Support
    packed: Tensor
    indices: Tensor
    sums: Tensor
    other: Tensor

    def add_to(self, vector: Tensor) -> None:
        """Add the sum to float32 [n], in place."""
        self.support.add(vector, self.packed)
        vector.index_add_(0, self.indices, self.sums)
        vector[self.support.size :].add_(self.other)

    def norm(self) -> float:
        """||sum_k p_k q_k||."""
        parts = [torch.linalg.vector_norm(part) for part in (self.packed, self.sums, self.other)]
        return float(torch.linalg.vector_norm(torch.stack(parts)))


class Sum:
    """Adds up one range of coordinates.

    Every coordinate sees the same float32 operations in the same order whatever the range: a product, then a sum.
    A fused multiply-add would round differently at the end of a range than in its vectorised middle.
    """

    def __init__(self, support: Support, size: int, lo: int, hi: int, start: Tensor | None = None) -> None:
        """Begin with zeros.

        Args:
            support: of the coordinates that all clients send.
            size: n.
            lo, hi: the range.
            start: float32 [P], what the support's coordinates begin with instead.
        """
        self.support, self.lo, self.hi = support, lo, hi
        self.first, last = support.rank(lo), support.rank(hi)
        device = support.mask.device
        if start is None:
            self.packed = torch.zeros(last - self.first, device=device)
        else:
            self.packed = support.take(start)[self.first : last].clone()
        self.other = torch.zeros(max(0, hi - support.size) - max(0, lo - support.size), device=device)
        self._outside: list[tuple[Tensor, Tensor]] = []

    def add(self, weight: float, piece: Piece, support_weight: float | None = None) -> None:
        """Add weight * piece; `support_weight` for the support's coordinates where it differs."""
        if piece.kind == SUPPORT:
            self.packed.add_(piece.values * (weight if support_weight is None else support_weight))
            self.other.add_(piece.other * weight)
        else:
            self._outside.append((piece.indices, piece.values * weight))

    def result(self) -> Aggregate:
        """The sum so far; for a part of the coordinates `packed` and `other` are those of the range alone."""
        none = torch.zeros(0, dtype=torch.int64, device=self.packed.device)
        indices = torch.unique(torch.cat([none, *(places for places, _ in self._outside)]))
        sums = torch.zeros(indices.numel(), device=self.packed.device)
        for places, values in self._outside:
            # A client names a coordinate once, so this writes each place once.
            slots = torch.searchsorted(indices, places)
            sums[slots] = sums[slots] + values
        return Aggregate(self.support, self.packed, indices, sums, self.other)


def joined(parts: Sequence[Aggregate]) -> Aggregate:
    """The aggregate of adjacent ranges that cover everything, in their order."""
    return Aggregate(
        parts[0].support,
        torch.cat([part.packed for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.sums for part in parts]),
        torch.cat([part.other for part in parts]),
    )
