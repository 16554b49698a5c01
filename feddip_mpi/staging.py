"""Between a device and the host memory that MPI reads and writes. On the CPU both are the same and nothing is copied.

Host staging is the default on GPUs: the MPI libraries that come as wheels take no device pointers, and a library that
wrongly says it does ends in a segmentation fault.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def to_host(data: Tensor) -> np.ndarray:
    """uint8 [bytes] in host memory, complete when this returns.

    From a GPU it goes through pinned memory (PyTorch keeps such blocks for the next time) on a stream of its own, so
    that it waits for what made the data and for nothing else.
    """
    if data.device.type == "cpu":
        return data.numpy()
    staged = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    side = _side_stream(data.device)
    side.wait_stream(torch.cuda.current_stream(data.device))
    with torch.cuda.stream(side):
        staged.copy_(data, non_blocking=True)
    side.synchronize()
    return staged.numpy()


def to_device(data: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [bytes] on the device; on the CPU the same memory."""
    staged = torch.from_numpy(data)
    if device.type == "cpu":
        return staged
    return staged.pin_memory().to(device, non_blocking=True)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: PyTorch has 32 and hands them out in turn, so that a new one may be the one that a client trains on."""
    return torch.cuda.Stream(device)
