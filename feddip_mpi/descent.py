"""The step of dynamic pruning with feedback: from the gradient of the loss to the next weights. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feddip_mpi.vector import Layout

if TYPE_CHECKING:
    from feddip_mpi.local import LocalRule

# So many floats, 1 MB, stay in a core's second-level cache.
PIECE = 1 << 18


def add_regularisation(
    gradient: Tensor, weights: Tensor, active: Tensor, layout: Layout, kept: Tensor, rule: LocalRule,
    penalty: float | Tensor, received: Tensor,
) -> None:  # fmt: skip
    """Turn the loss gradient into the step direction g + mu * w, in place.

    Args:
        gradient: float [parameters], gradient of the loss at the pruned weights, for all coordinates.
        weights: float [parameters], the dense local weights w.
        active: float [n], the pruned weights m*w (and the rest).
        kept: mask as float [P].
        penalty: lambda_t, as a number or float32 []; its term is lambda_t * sum over prunable tensors of their norm at the
            pruned weights.
        received: float [parameters].
    """
    prunable = layout.prunable
    if isinstance(penalty, Tensor) or penalty:
        _add_penalty_gradient(gradient, active, layout, penalty, rule.penalty_norm)
    if not rule.feedback:
        gradient[:prunable].mul_(kept)
    _add_the_rest(gradient, weights, rule, received)


def descend(weights: Tensor, direction: Tensor, rate: float | Tensor) -> None:
    """w <- w - eta * direction, in place."""
    if isinstance(rate, Tensor):
        weights.addcmul_(direction, rate, value=-1)
    else:
        weights.add_(direction, alpha=-rate)


def _add_the_rest(gradient: Tensor, weights: Tensor, rule: LocalRule, received: Tensor) -> None:
    if rule.proximal:
        gradient.add_(weights, alpha=rule.proximal).sub_(received, alpha=rule.proximal)
    if rule.weight_decay:
        gradient.add_(weights, alpha=rule.weight_decay)


def _add_penalty_gradient(gradient: Tensor, active: Tensor, layout: Layout, penalty: float | Tensor, norm: str) -> None:
    # One tensor at a time, but no value returns to the host.
    prunable = layout.prunable
    targets = layout.views(gradient[:prunable])
    for target, values in zip(targets, layout.views(active[:prunable]), strict=True):
        _add_penalty(target, values, _penalty_scale(values, penalty, norm), norm)


def _penalty_scale(values: Tensor, penalty: float | Tensor, norm: str) -> Tensor | float:
    """What the gradient of a tensor's penalty is in units of its pruned weights `values` (l1: of their signs)."""
    if norm != "l2":
        return penalty if norm == "l1" else 2 * penalty
    length = torch.linalg.vector_norm(values)  # lambda * w / ||w||, and 0 where the norm is 0
    # Not a quotient, which is rounded once where the penalty is a tensor and twice where it is a number.
    return torch.where(length > 0, length.reciprocal() * penalty, torch.zeros_like(length))


def _add_penalty(target: Tensor, values: Tensor, scale: Tensor | float, norm: str) -> None:
    """Add the penalty's gradient to that of (a part of) a tensor, in place."""
    direction = values.sign() if norm == "l1" else values
    if isinstance(scale, Tensor):
        target.addcmul_(direction, scale)
    else:
        target.add_(direction, alpha=scale)


def descend_by_pieces(
    gradients: Sequence[Tensor], weights: Tensor, active: Tensor, layout: Layout, kept: Tensor, rule: LocalRule,
    penalty: float | Tensor, received: Tensor, learning_rate: float | Tensor, scratch: Tensor,
) -> None:  # fmt: skip
    """w <- w - eta (g + mu w) and the pruned weights after it, to the bits of the same passes over the whole vectors.

    Piece by piece, so that each value comes from memory once and not with every operation: the passes over 93 MB are
    a fifth of AlexNet's step.

    Args:
        gradients: of the loss at the pruned weights, one for each parameter in flat order; not changed.
        active: also the vector that `weights` is, where nothing is pruned.
        scratch: float32, at least a piece; overwritten.
        The others as in `add_regularisation`.
    """
    for index, (gradient, start) in enumerate(zip(gradients, layout.offsets, strict=False)):
        flat, prunable = gradient.reshape(-1), index < layout.prunable_tensors
        whole = slice(start, start + flat.numel())
        penalised = prunable and (isinstance(penalty, Tensor) or penalty)
        scale = _penalty_scale(active[whole], penalty, rule.penalty_norm) if penalised else None
        for first in range(0, flat.numel(), PIECE):
            part = flat[first : first + PIECE]
            here = slice(start + first, start + first + part.numel())
            g, w, a = scratch[: part.numel()].copy_(part), weights[here], active[here]
            if scale is not None:
                _add_penalty(g, a, scale, rule.penalty_norm)
            if prunable and not rule.feedback:
                g.mul_(kept[here])
            _add_the_rest(g, w, rule, received[here])
            descend(w, g, learning_rate)
            if w.data_ptr() == a.data_ptr():
                continue
            if prunable:
                torch.mul(w, kept[here], out=a)
            else:
                a.copy_(w)
