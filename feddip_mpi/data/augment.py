"""Augmentation of image batches on the device that trains on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PADDING = 4  # pixels; He et al. 2016, section 4.2


def draw(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The random choices for `count` images, drawn on the host so that they do not depend on the device.

    Returns:
        offsets: int64 [count, 2] in 0..8, row and column of the crop in the padded image (4 is the original place).
        flips: bool [count], whether the crop is mirrored left to right.
    """
    offsets = generator.integers(0, 2 * PADDING + 1, (count, 2), dtype=np.int64)
    return offsets, generator.integers(0, 2, count, dtype=np.bool_)


def standard(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Random crop with 4 pixels of zero padding, then horizontal flip: one gather for the whole batch.

    Apply it to pixels as they were read, before mean and std: the usual CIFAR recipe pads with black, which is not
    0 after normalisation.

    Args:
        images: uint8 or floating point [B, C, H, W]; not changed.
        offsets: int64 [B, 2] in 0..8, on the same device.
        flips: bool [B], on the same device.

    Returns:
        A new tensor of the shape, type and device of `images`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    batch, channels, height, width = images.shape
    if offsets.shape != (batch, 2) or flips.shape != (batch,):
        raise ValueError(f"{batch} images need offsets [B, 2] and flips [B], got {offsets.shape} and {flips.shape}")
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    rows = offsets[:, :1] + row - PADDING
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - column, column) - PADDING
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    index = flat.view(batch, 1, height * width).expand(-1, channels, -1)
    cropped = images.reshape(batch, channels, height * width).gather(2, index).view(images.shape)
    return cropped.masked_fill_(~inside[:, None], 0)
