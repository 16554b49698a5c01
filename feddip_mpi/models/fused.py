"""A convolution, 2x2 max pooling and ReLU as one operation on the CPU, for the first layer of a small network.

The pooled places of a convolution are the largest of four: those at even and odd rows and columns. One convolution of
stride 2 whose kernel holds the four shifted copies of the weight computes all four as channels, and pooling becomes
three elementwise maxima over contiguous memory. With one or three input channels and few output channels, where
PyTorch's convolution leaves most of a vector register idle and its pooling is slow, the four copies cost no more than
the one (docs/results/performance.md has the times).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PHASES = 4
# The normal float32 next to 0: what is smaller counts as 0 where a program has denormal numbers flushed.
_BELOW_ZERO = -1.1754943508222875e-38


def conv_pool_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """relu(max_pool2d(conv(x), 2)) for float32 [B, C, H, W]; of equal values the first is the largest, as in PyTorch.

    Fused where that is known to be equal and faster (`_fits`), else by PyTorch's own three operations.
    """
    if not _fits(x, conv):
        return F.relu(F.max_pool2d(conv(x), 2))
    if x.shape[1] == 1:  # one channel lies the same way in both memory orders; the plain one is faster here
        _, _, height, width = x.shape
        x = x.as_strided(x.shape, (x.stride(0), height * width, x.stride(2), x.stride(3)))
    assert conv.bias is not None
    pooled: Tensor = _ConvPoolReLU.apply(x, conv.weight, conv.bias, conv.padding)
    return pooled.contiguous(memory_format=torch.channels_last)  # what the next convolution is fastest on


def _fits(x: Tensor, conv: nn.Conv2d) -> bool:
    if not _is_plain(conv) or isinstance(conv.padding, str) or conv.bias is None:
        return False
    if _is_watched(conv):
        return False
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or x.requires_grad or conv.in_channels > 3:
        return False
    if x.dtype != torch.float32 or conv.weight.dtype != torch.float32:
        return False
    # An odd last row or column is dropped by the pooling, but would be part of the strided convolution.
    sides = zip(x.shape[2:], conv.padding, conv.kernel_size, strict=True)
    return all((side + 2 * padding - kernel + 1) % 2 == 0 for side, padding, kernel in sides)


@lru_cache
def _places(height: int, width: int) -> Tensor:
    """Which weight [height * width] lies where in the four shifted kernels [4, height + 1, width + 1], flat.

    `height * width` names the zero that is appended to the weights.
    """
    places = torch.full((_PHASES, height + 1, width + 1), height * width)
    for phase in range(_PHASES):
        row, column = divmod(phase, 2)
        places[phase, row : row + height, column : column + width] = torch.arange(height * width).view(height, width)
    return places.reshape(-1)


class _ConvPoolReLU(torch.autograd.Function):
    """The gradient goes to the weight and the bias; the images have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
        outputs, inputs, height, width = weight.shape
        flat = F.pad(weight.reshape(outputs * inputs, height * width), (0, 1))
        shifted = flat.index_select(1, _places(height, width)).view(outputs, inputs, _PHASES, height + 1, width + 1)
        kernel = shifted.permute(2, 0, 1, 3, 4).reshape(_PHASES * outputs, inputs, height + 1, width + 1)
        found = F.conv2d(x, kernel, bias.repeat(_PHASES), stride=2, padding=padding)
        a, b, c, d = found.unflatten(1, (_PHASES, outputs)).unbind(1)
        pooled = torch.maximum(torch.maximum(a, b), torch.maximum(c, d)).relu_()
        ctx.save_for_backward(x, kernel, found, pooled)
        ctx.padding, ctx.weight_shape = padding, weight.shape
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None]:
        x, kernel, found, pooled = ctx.saved_tensors
        outputs, inputs, height, width = ctx.weight_shape
        values = found.unflatten(1, (_PHASES, outputs)).unbind(1)
        opened = torch.ops.aten.threshold_backward(gradient.contiguous(), pooled, 0)
        if has_wide_vectors() or not len(x):
            spread = torch.empty_like(found)
            _scatter(opened, values, pooled, spread.unflatten(1, (_PHASES, outputs)).unbind(1))
            _, for_kernel, _ = torch.ops.aten.convolution_backward(
                spread, x, kernel, None, [2, 2], ctx.padding, [1, 1], False, [0, 0], 1, [False, True, False]
            )
        else:
            # The sum over images and places is itself a convolution: images are its channels, of which there are enough
            # to fill a vector register, the output's gradient is its kernel, and the stride lies between its taps.
            by_channel = opened.transpose(0, 1).contiguous()
            spread = found.new_empty(_PHASES, *by_channel.shape)
            turned = [value.transpose(0, 1) for value in values]
            _scatter(by_channel, turned, pooled.transpose(0, 1), spread.unbind(0))
            images = x.transpose(0, 1)
            for_kernel = F.conv2d(images, spread.flatten(0, 1), padding=ctx.padding, dilation=2).transpose(0, 1)
        flat = for_kernel.reshape(_PHASES, outputs, inputs, -1).permute(1, 2, 0, 3).reshape(outputs * inputs, -1)
        summed = flat.new_zeros(outputs * inputs, height * width + 1).index_add_(1, _places(height, width), flat)
        return None, summed[:, :-1].reshape(ctx.weight_shape), opened.sum((0, 2, 3)), None


def _scatter(gradient: Tensor, values: Sequence[Tensor], pooled: Tensor, targets: Sequence[Tensor]) -> None:
    """Write the gradient of the pooled values to the first of the four that each equals, and 0 to the others.

    Args:
        gradient: float32 [B, O, h, w] or [O, B, h, w], 0 where the ReLU was shut.
        values: the same, of each phase.
        pooled: the same, the largest of the four.
        targets: the same, of each phase; written.
    """
    left, below = gradient.clone(), torch.empty_like(gradient)
    for value, target in zip(values[:-1], targets, strict=False):
        # Where it is not the largest it is below it, and of what is not positive only 0 is above the threshold.
        torch.sub(value, pooled, out=below)
        torch.ops.aten.threshold_backward.grad_input(left, below, _BELOW_ZERO, grad_input=target)
        left.sub_(target)
    targets[-1].copy_(left)


def conv_of_few_channels(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(x)` for float32 [B, C, H, W]; where that is faster, the gradient of x is computed in the plain memory order.

    Without AVX-512 PyTorch's channels-last gradient of an input of few channels took twice the time.
    """
    plain = conv.padding == (0, 0) and conv.bias is not None and not _is_watched(conv)
    fits = x.device.type == "cpu" and x.dtype == conv.weight.dtype == torch.float32 and x.requires_grad
    left_alone = has_wide_vectors() or torch.is_autocast_enabled("cpu") or not (plain and fits and _is_plain(conv))
    out: Tensor = conv(x) if left_alone else _ConvOfFewChannels.apply(x, conv.weight, conv.bias)
    return out


class _ConvOfFewChannels(torch.autograd.Function):
    """A convolution of stride 1 without padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rest = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        backward = torch.ops.aten.convolution_backward
        # Of its input the gradient of x takes the shape and the memory order alone.
        shape = x.new_empty(x.shape)
        for_x, _, _ = backward(gradient.contiguous(), shape, weight.contiguous(), None, *rest, [True, False, False])
        _, for_weight, for_bias = backward(gradient, x, weight, [len(weight)], *rest, [False, True, True])
        return for_x, for_weight, for_bias


def _is_watched(conv: nn.Conv2d) -> bool:
    """Whether somebody is to see the layer called, or has given it a forward pass of his own."""
    hooks = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks
    return bool(hooks) or type(conv) is not nn.Conv2d


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"


@lru_cache
def has_wide_vectors() -> bool:
    """Whether this CPU has AVX-512: which way to a gradient is fast depends on it (docs/results/performance.md)."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
