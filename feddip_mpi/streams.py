"""Random streams: each is a pure function of (seed, purpose, round, client), so no result depends on who draws it.

A stream is never carried from one round to the next. That is why neither the number of ranks nor a stop and a
resume can change a number, and why a checkpoint holds no generator state.
"""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """A fresh Philox generator for one purpose in one round at one client.

    Args:
        seed: the run's seed, 0 <= seed < 2**63.
        purpose: what the numbers are for, e.g. "batches"; streams of different purposes are independent.
        round, client: non-negative counters.
    """
    entropy = [seed, zlib.crc32(purpose.encode()), round, client]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def torch_seed(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """A 63-bit seed for torch's own generators (weight initialisation, dropout)."""
    return int(stream(seed, purpose, round, client).integers(2**63))
