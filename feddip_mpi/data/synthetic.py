"""Generated images that a network can learn: a coarse random pattern per class, under uniform noise.

For tests and timing runs: no file is read, and every number is a pure function of the seed.
"""

from __future__ import annotations

import numpy as np

from feddip_mpi.data.dataset import Dataset, channel_statistics
from feddip_mpi.errors import InputError
from feddip_mpi.settings import SyntheticConfig
from feddip_mpi.streams import stream

_CELLS = 4  # a pattern has at most 4 x 4 cells, so that it survives pooling and cropping
_CONTRAST = 64  # patterns lie in 0..63, noise in 0..192: the sum fits a byte, and one pixel alone tells little
_BLOCK_BYTES = 1 << 22


def generate(config: SyntheticConfig, seed: int) -> Dataset:
    """Training and test images of the same patterns; classes are as equal in size as possible.

    Raises:
        InputError: the images do not fit into memory.
    """
    channels, height, width = config.shape
    cells = (config.classes, channels, min(_CELLS, height), min(_CELLS, width))
    try:
        patterns = stream(seed, "synthetic patterns").integers(0, _CONTRAST, cells, dtype=np.uint8)
        train = _split(config, patterns, config.train_samples, seed, "synthetic train")
        test = _split(config, patterns, config.test_samples, seed, "synthetic test")
    except (MemoryError, ValueError, OverflowError):  # numpy has other names for more than 2^63 bytes
        bytes_needed = channels * height * width * (config.train_samples + config.test_samples)
        raise InputError(
            f"data.synthetic: {bytes_needed} bytes of images do not fit into memory; "
            "lower train_samples, test_samples or shape"
        ) from None
    mean, std = channel_statistics(train[0])
    names = tuple(f"pattern {index}" for index in range(config.classes))
    return Dataset(*train, *test, config.classes, names, mean, std, "synthetic", f"generated from seed {seed}")


def _split(
    config: SyntheticConfig, patterns: np.ndarray, count: int, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, C, H, W] and labels int64 [count]; one random stream per block of images."""
    _, height, width = config.shape
    images = np.empty((count, *config.shape), np.uint8)
    labels = stream(seed, purpose).permutation(np.arange(count) % config.classes)
    rows = np.arange(height) * patterns.shape[2] // height
    columns = np.arange(width) * patterns.shape[3] // width
    block = max(1, _BLOCK_BYTES // images[0].size)
    for number, start in enumerate(range(0, count, block), start=1):
        part = images[start : start + block]
        noise = np.frombuffer(stream(seed, purpose, number).bytes(part.size), np.uint8).reshape(part.shape)
        np.subtract(noise, noise >> 2, out=part)
        part += patterns[labels[start : start + block]][:, :, rows[:, None], columns]
    return images, labels
