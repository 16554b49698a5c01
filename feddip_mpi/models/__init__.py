"""The networks, and which of their tensors are prunable."""

from feddip_mpi.models.registry import NAMES, check, create, prunable_names

__all__ = ["NAMES", "check", "create", "prunable_names"]
