"""Dropout whose random numbers are the trainer's own, so that clients may train at once in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`nn.Dropout`; where it is given a generator it draws from that and leaves torch's global one alone.

    On the CPU a generator with the seed of the global one gives the same bits.

    Attributes:
        generator: on the device of the input; a `LocalTrainer` sets it.
    """

    generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Float [any shape] to the same shape; the input itself where nothing is trained."""
        if not self.training or self.generator is None:
            return super().forward(x)
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * kept.div_(1 - self.p)
