"""The global generators of torch, Python and numpy: nothing here draws from the last two, but a model's own code may.

What a global generator holds depends on which clients a rank has trained before. It is therefore seeded before every
use, and no number depends on the number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from feddip_mpi.streams import torch_seed


def seed_all(seed: int, purpose: str, round: int = 0, client: int = 0) -> None:
    """Seed all three for one purpose in one round at one client; arguments as of `streams.stream`."""
    drawn = torch_seed(seed, purpose, round, client)
    # torch.manual_seed also asks every kind of device that is not there, which costs a stack trace each (0.2 ms).
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(drawn)
    random.seed(drawn)
    np.random.seed(drawn % 2**32)  # noqa: NPY002


def states(gpus: bool = False) -> tuple[object, ...]:
    """What all three hold: equal if and only if nothing was drawn or seeded.

    Args:
        gpus: torch's of every GPU too. Where the CPU computes they say nothing: whatever else in this process begins to use
            a GPU meanwhile makes them.
    """
    held = [torch.default_generator.get_state()]
    if gpus:
        held += torch.cuda.get_rng_state_all()
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return (*(state.numpy().tobytes() for state in held), random.getstate(), kind, np.asarray(keys).tobytes(), *rest)


@contextmanager
def preserved() -> Iterator[None]:
    """All three (torch's of the CPU) are afterwards as they were before."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
