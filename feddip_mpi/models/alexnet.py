"""AlexNet for 32x32 images: the widths of Krizhevsky (2014) with 3x3 kernels, as the pruning literature uses it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from feddip_mpi.models.dropout import Dropout


class AlexNet(nn.Module):
    """Five convolutions and three linear layers: 23,262,912 prunable weights for 3x32x32 images and 10 classes.

    Dropout draws from torch's global generator (seed it for runs that repeat), or from one that it is given.
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        """See `feddip_mpi.models.create`."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(64, 192, 3, padding=1)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        # The first stride rounds up, the three poolings round down. No adaptive pooling: its gradient is not
        # deterministic on a GPU.
        height, width = ((side + 1) // 2 // 8 for side in image_size)
        self.dropout = Dropout(0.5)
        self.fc1 = nn.Linear(256 * height * width, 4096)
        self.fc2 = nn.Linear(4096, 4096)
        self.fc3 = nn.Linear(4096, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 [batch, channels, height, width] to logits [batch, classes]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = F.max_pool2d(F.relu(self.conv5(x)), 2)
        x = self.dropout(x.flatten(1))
        x = self.dropout(F.relu(self.fc1(x)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
