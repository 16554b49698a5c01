"""What makes two runs the same experiment: a sweep runs each once, a report takes their seeds together."""

from __future__ import annotations

from typing import Any

from feddip_mpi import config, methods
from feddip_mpi.settings import METHODS, Config

OF_MASKS = ("sparsity.", "mask.", "penalty.", "control.")


def of(settings: Config) -> dict[str, Any]:
    """All keys but those that change neither a bit nor a measurement."""
    return {
        key: value for key, value in what_it_reads(settings).items() if not config.is_without_meaning(key, settings)
    }


def what_it_reads(settings: Config) -> dict[str, Any]:
    """All keys but those that this method does not look at: without a mask there is no sparsity, penalty or cut."""
    flat = config.flat(settings)
    if has_mask(settings):
        return flat
    return {key: value for key, value in flat.items() if not key.startswith(OF_MASKS)}


def has_mask(settings: Config) -> bool:
    """Whether the method prunes. One of your own counts as one that does: its code need not be here."""
    return settings.method not in METHODS or methods.named(settings.method).masking != "none"
