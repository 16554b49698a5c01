"""The federated methods: each is what it changes in the shared engine, not a copy of the loop.

`base.Method` says what a method may change. This module turns a name into a method and knows no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from feddip_mpi import own_code
from feddip_mpi.errors import InputError
from feddip_mpi.settings import METHODS, Config

if TYPE_CHECKING:
    from torch import nn

    from feddip_mpi.methods.base import Method
    from feddip_mpi.vector import Layout

_CLASSES = {
    "feddip": "FedDIP",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "erk": "StaticERK",
    "gradual": "Gradual",
    "snip": "Snip",
    "ssfl": "SSFL",
    "feddst": "FedDST",
    "prunefl": "PruneFL",
    "prunetrain": "PruneTrain",
    "sparsyfed": "SparsyFed",
    "fedrts": "FedRTS",
}
assert tuple(_CLASSES) == METHODS


def named(name: str) -> type[Method]:
    """The class of a method: one of `settings.METHODS`, or an import path `package.module:name`.

    Raises:
        InputError: the import path does not give a subclass of `methods.base.Method`.
    """
    if name in _CLASSES:
        module = importlib.import_module(f"feddip_mpi.methods.{name}")
        found: type[Method] = getattr(module, _CLASSES[name])
        return found
    return _imported(name)


def _imported(path: str) -> type[Method]:
    from feddip_mpi.methods.base import Method

    _, found = own_code.imported("method", path, "name")
    if not (isinstance(found, type) and issubclass(found, Method)):
        module_name, _, class_name = path.partition(":")
        what = f"no class {class_name!r}" if found is None else f"{class_name!r}, which is no subclass of it"
        raise InputError(
            f"method: {path!r}: allowed is a subclass of feddip_mpi.methods.base.Method; module {module_name!r} has {what}"
        )
    return found


def make(config: Config, model: nn.Module, layout: Layout, input_shape: Sequence[int]) -> Method:
    """The method of a run, for its network.

    Args:
        model: on the CPU; looked at, not changed.
        input_shape: channels, height, width.

    Raises:
        InputError: no such method, or it does not fit the network or the rest of the configuration.
    """
    return named(config.method)(config, model, layout, tuple(int(x) for x in input_shape))
