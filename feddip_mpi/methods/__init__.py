"""The federated methods: each is what it changes in the shared engine, not a copy of the loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from feddip_mpi import masks
from feddip_mpi.config import Config
from feddip_mpi.local import LocalRule
from feddip_mpi.schedules import METHODS_THAT_PRUNE
from feddip_mpi.streams import stream
from feddip_mpi.vector import Layout


@dataclass(frozen=True)
class Method:
    """What a method asks of the engine.

    Attributes:
        prunes: has a mask, a sparsity schedule and a penalty; otherwise every weight is kept and travels.
        proximal: adds FedProx's term to the local objective.
    """

    prunes: bool
    proximal: bool = False


METHODS = {
    "feddip": Method(prunes=True),
    "fedavg": Method(prunes=False),
    "fedprox": Method(prunes=False, proximal=True),
}
assert {name for name, method in METHODS.items() if method.prunes} == set(METHODS_THAT_PRUNE)


def local_rule(config: Config) -> LocalRule:
    """How the method's clients train."""
    return LocalRule(
        seed=config.seed,
        epochs=config.local_epochs,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        feedback=config.feedback,
        penalty_norm=config.penalty.norm,
        proximal=config.proximal if METHODS[config.method].proximal else 0.0,
        augment=config.data.augment,
    )


def needs_saliency(config: Config) -> bool:
    """Whether the first mask asks the clients for gradients."""
    return METHODS[config.method].prunes and config.mask.initial == "snip"


def uses_reference(config: Config) -> bool:
    """Whether server and clients share references (EF21) instead of residuals."""
    return config.upload.residual == "ef21"


def initial_mask(config: Config, layout: Layout, weights: Tensor, saliency: Tensor | None = None) -> Tensor:
    """The first mask bool [P] on the device of `weights`, one for the whole federation, of exact sparsity s_0.

    Args:
        weights: float32 [n], the initial weights.
        saliency: float32 [P], |gradient * weight| (SNIP, Lee et al. 2019, eq. 7), where `needs_saliency`.
    """
    prunable = weights[: layout.prunable]
    rule = config.mask.initial if METHODS[config.method].prunes else "none"
    if rule == "none":
        return prunable == prunable
    keep = masks.kept_count(layout.prunable, config.sparsity.initial)
    if rule == "magnitude":
        return masks.select_largest(prunable.abs(), keep)
    if rule == "snip":
        assert saliency is not None
        return masks.select_largest(saliency, keep)
    generator = stream(config.seed, "initial mask")
    return masks.initial_random(rule, layout.prunable_shapes, config.sparsity.initial, generator).to(weights.device)
