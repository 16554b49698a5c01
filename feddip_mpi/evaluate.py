"""Accuracy and loss of the truly pruned model on the test images, in batches that any rank may take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddip_mpi.batches import DeviceData
from feddip_mpi.errors import Abandoned
from feddip_mpi.vector import BoundModel


@dataclass(frozen=True)
class BatchScores:
    """Scores of some evaluation batches of this rank.

    Attributes:
        losses: float64 [batches], summed cross-entropy of each batch, 0 for batches of other ranks.
        correct: uint8 [images], bit 0: top-1 right, bit 1: top-5 right; 0 for images of other ranks.
    """

    losses: np.ndarray
    correct: np.ndarray


def batch_count(data: DeviceData, batch_size: int) -> int:
    """Of how many evaluation batches a split consists."""
    return -(-data.labels.numel() // batch_size)


def score(
    bound: BoundModel,
    weights: Tensor,
    data: DeviceData,
    batch_size: int,
    batches: Collection[int] | None = None,
    give_up: Callable[[], bool] = lambda: False,
) -> BatchScores:
    """Evaluate some batches in eval mode without autograd.

    Batches are cut the same way for any number of ranks, so that sums in batch order give the same bits.

    Args:
        weights: float32 [n], the pruned model.
        data: the test split.
        batches: which of its batches; None: all.
        give_up: asked before every batch.

    Raises:
        Abandoned: `give_up` said so.
    """
    bound.vector.copy_(weights)
    bound.model.eval()
    count = data.labels.numel()
    whole = batch_count(data, batch_size)
    losses = np.zeros(whole)
    correct = torch.zeros(count, dtype=torch.uint8, device=data.labels.device)
    with torch.inference_mode(), _without_tf32(data.labels.device):
        for batch in range(whole) if batches is None else batches:
            if give_up():
                raise Abandoned("a round was abandoned while the model of the one before was evaluated")
            part = slice(batch * batch_size, min((batch + 1) * batch_size, count))
            logits = bound.model(data.normalised(data.images[part]))
            labels = data.labels[part]
            losses[batch] = float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            correct[part] = _right(logits, labels)
    return BatchScores(losses, correct.cpu().numpy())


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Training with `precision: tf32` sets these flags for the process; an evaluation is float32."""
    if device.type != "cuda":
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """uint8 [B]: bit 0 top-1, bit 1 top-5. Equal logits rank by class index."""
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    place = ahead.sum(dim=1)
    # A model that returns NaN is never right: NaN compares false, which would look like first place.
    finite = torch.isfinite(logits).all(dim=1)
    return ((place < 1) & finite).to(torch.uint8) + 2 * ((place < 5) & finite).to(torch.uint8)


def _shares(right: np.ndarray, parts: Sequence[np.ndarray]) -> tuple[float | None, ...]:
    """Mean of `right` (0 or 1 for each image) over the images of each part; None for a part without any.

    All parts in one pass: every rank does this after every evaluation, and there may be 100,000 clients.
    """
    sizes = np.array([len(part) for part in parts])
    owners = np.repeat(np.arange(len(parts)), sizes)
    counts = np.bincount(owners, weights=right[np.concatenate(parts)], minlength=len(parts))
    shares = (counts / np.maximum(sizes, 1)).tolist()
    return tuple(share if size else None for share, size in zip(shares, sizes.tolist(), strict=True))


@dataclass(frozen=True)
class Scores:
    """Merged scores: mean loss, top-1 and top-5 accuracy in [0, 1], accuracy of each client's own test part."""

    loss: float
    top1: float
    top5: float
    by_client: tuple[float | None, ...] | None = None


def merge(parts: Sequence[BatchScores], client_parts: Sequence[np.ndarray] | None = None) -> Scores:
    """Combine the ranks' scores; sums run in batch order whoever computed a batch."""
    losses = np.sum([part.losses for part in parts], axis=0)  # each batch is non-zero on one rank only: exact
    correct = np.bitwise_or.reduce([part.correct for part in parts])
    top1 = correct & 1
    by_client = None
    if client_parts is not None:
        by_client = _shares(top1, client_parts)
    count = correct.size
    return Scores(
        loss=float(np.cumsum(losses)[-1]) / count,
        top1=int(top1.sum()) / count,
        top5=int((correct >> 1).sum()) / count,
        by_client=by_client,
    )
