"""A network that is slow on request, so that what happens to a job hits it while it trains.

FEDDIP_TEST_SLOW: a file; as long as it exists, every training forward but a process's first FEDDIP_TEST_FREE (24) takes
FEDDIP_TEST_SLEEP (0.1) seconds longer.
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn


class Patient(nn.Module):
    """A linear classifier with one hidden layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 16), nn.Linear(16, classes)
        self.slow = os.environ.get("FEDDIP_TEST_SLOW", "")
        self.free = int(os.environ.get("FEDDIP_TEST_FREE", "24"))
        self.pause = float(os.environ.get("FEDDIP_TEST_SLEEP", "0.1"))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.free -= 1
            if self.free < 0 and os.path.exists(self.slow):
                time.sleep(self.pause)
        return self.second(torch.relu(self.first(images.flatten(1))))


def patient(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return Patient(in_channels * image_size[0] * image_size[1], classes)
