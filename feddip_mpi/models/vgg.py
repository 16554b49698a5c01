"""VGG-11 for 32x32 images (configuration A of Simonyan and Zisserman 2015, with batch norm)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

_WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
_POOL_AFTER = (1, 2, 4, 6, 8)


class VGG11(nn.Module):
    """Eight 3x3 convolutions with batch norm and one linear layer on 512 features.

    9,222,848 prunable weights for 3x32x32 images and 10 classes.
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        """See `feddip_mpi.models.create`; the features do not depend on `image_size`."""
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = in_channels
        for number, width in enumerate(_WIDTHS, start=1):
            # Batch norm removes any constant its input carries, so a bias before it would do nothing.
            layers[f"conv{number}"] = nn.Conv2d(before, width, 3, padding=1, bias=False)
            layers[f"bn{number}"] = nn.BatchNorm2d(width)
            layers[f"relu{number}"] = nn.ReLU(inplace=True)
            if number in _POOL_AFTER:
                layers[f"pool{number}"] = nn.MaxPool2d(2)
            before = width
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 [batch, channels, height, width] to logits [batch, classes]."""
        # A mean, not adaptive pooling: its gradient is deterministic on a GPU too.
        return self.fc(self.features(x).mean(dim=(2, 3)))
