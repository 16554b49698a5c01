"""What methods have in common that exchange weights: each layer keeps its count, a falling share of it may change places."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from math import cos, pi

import torch
from torch import Tensor

from feddip_mpi import masks
from feddip_mpi.methods.base import Method
from feddip_mpi.schedules import RoundPlan, last_mask_update
from feddip_mpi.settings import Config
from feddip_mpi.vector import Layout


class Exchanging(Method):
    """As sparse as asked for from the start, with ERK densities that never change; clients name what they want from outside."""

    returns = True
    any_residual = False

    @classmethod
    @abstractmethod
    def first_share(cls, config: Config) -> float:
        """alpha: share of each layer's weights that may be exchanged at first."""

    @classmethod
    def exchanged_share(cls, config: Config, t: int) -> float:
        """alpha_t = (alpha / 2) (1 + cos(pi t / H)), H the last mask update."""
        horizon = last_mask_update(config.rounds, config.mask.freeze_after)
        return cls.first_share(config) / 2 * (1 + cos(pi * min(1.0, t / horizon)))

    @classmethod
    def plan(cls, config: Config, draft: RoundPlan) -> RoundPlan:
        """At mask updates as many coordinates from outside the mask travel as may be exchanged."""
        plan = super().plan(config, draft)
        masked = plan.update_mask and config.upload.mode == "masked"
        share = cls.exchanged_share(config, plan.round) if masked else 0.0
        return replace(plan, sparsity=config.sparsity.final, regrow=share)

    @classmethod
    def regrown(cls, config: Config, plan: RoundPlan, layout: Layout, kept: int) -> int:
        """As many as `exchangeable` of all layers: a layer with little outside has not its whole share to exchange."""
        counts = masks.random_counts("erk", layout.prunable_shapes, config.sparsity.final)
        layers = zip(counts, layout.prunable_sizes, strict=True)
        return sum(exchangeable(plan.regrow, count, size) for count, size in layers)

    @classmethod
    def first_sparsity(cls, config: Config) -> float:
        return config.sparsity.final

    def opening(self) -> None:
        return None

    def start(self, weights: Tensor, opened: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return weights, self.first_mask("erk", weights[: self.layout.prunable], opened)

    def largest_of_each_layer(self, scores: Tensor, mask: Tensor) -> Tensor:
        """bool [P]: the largest `scores` [P] of each layer, as many as `mask` bool [P] keeps there."""
        sizes = list(self.layout.prunable_sizes)
        layers = zip(scores.split(sizes), mask.split(sizes), strict=True)
        return torch.cat([masks.select_largest(layer, int(old.sum())) for layer, old in layers])


def exchangeable(share: float, count: int, size: int) -> int:
    """How many of a layer's `count` kept weights may change places: the share, rounded down, never more than stand outside."""
    return min(int(share * count), size - count)
