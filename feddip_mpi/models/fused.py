"""A convolution, 2x2 max pooling and ReLU as one operation on the CPU, for the first layer of a small network.

The pooled places of a convolution are the largest of four: those at even and odd rows and columns. One convolution of
stride 2 whose kernel holds the four shifted copies of the weight computes all four as channels, and pooling becomes
three elementwise maxima over contiguous memory. With one or three input channels and few output channels, where
PyTorch's convolution leaves most of a vector register idle and its pooling is slow, the four copies cost no more than
the one (docs/results/performance.md has the times).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PHASES = 4


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
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str) or conv.bias is None:
        return False
    if conv._forward_hooks or conv._forward_pre_hooks:  # whoever watches the layer is to see it called
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
        spread = torch.empty_like(found)
        # Each pooled value's gradient goes to the first of the four that equals it.
        left = torch.ops.aten.threshold_backward(gradient.contiguous(), pooled, 0)
        values, targets = (t.unflatten(1, (_PHASES, outputs)).unbind(1) for t in (found, spread))
        for value, target in zip(values[:-1], targets, strict=False):
            torch.mul(left, value == pooled, out=target)
            left = left - target
        targets[-1].copy_(left)
        _, for_kernel, for_bias = torch.ops.aten.convolution_backward(
            spread, x, kernel, [_PHASES * outputs], [2, 2], ctx.padding, [1, 1], False, [0, 0], 1, [False, True, True]
        )
        flat = for_kernel.view(_PHASES, outputs, inputs, -1).permute(1, 2, 0, 3).reshape(outputs * inputs, -1)
        summed = flat.new_zeros(outputs * inputs, height * width + 1).index_add_(1, _places(height, width), flat)
        return None, summed[:, :-1].reshape(ctx.weight_shape), for_bias.view(_PHASES, outputs).sum(0), None
