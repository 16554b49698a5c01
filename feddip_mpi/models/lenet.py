"""LeNet-5 with ReLU and max pooling (after LeCun et al. 1998)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from feddip_mpi.models.fused import conv_of_few_channels, conv_pool_relu


class LeNet5(nn.Module):
    """Two 5x5 convolutions and three linear layers: 61,470 prunable weights for 1x28x28 images and 10 classes."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        """See `feddip_mpi.models.create`."""
        super().__init__()
        # The network was drawn for 32x32: a 28x28 image is padded to it, which makes fc1 400x120 in both cases.
        pad = tuple(2 if side < 32 else 0 for side in image_size)
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=(pad[0], pad[1]))
        self.conv2 = nn.Conv2d(6, 16, 5)
        height, width = (((side + 2 * p - 4) // 2 - 4) // 2 for side, p in zip(image_size, pad, strict=True))
        self.fc1 = nn.Linear(16 * height * width, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 [batch, channels, height, width] to logits [batch, classes]."""
        # Pooling before ReLU gives the same values as after it, for a quarter of the work.
        x = conv_pool_relu(x, self.conv1)
        x = F.relu(F.max_pool2d(conv_of_few_channels(x, self.conv2), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
