"""Code of the user's that a configuration names by import path."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from feddip_mpi.errors import InputError


def imported(key: str, path: str, what: str) -> tuple[ModuleType, Any]:
    """The module of `package.module:name`, and what it holds under the name; None where it holds nothing.

    Args:
        key: of the configuration.
        path: its value.
        what: the name stands for, in a word.

    Raises:
        InputError: `path` has another form, or the module cannot be imported.
    """
    module_name, separator, name = path.partition(":")
    if not (separator and name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise InputError(f"{key}: {path!r} is no import path, which has the form package.module:{what}")
    # The code is the user's: whatever it raises is reported as wrong input, with its own traceback as the cause.
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"{key}: cannot import {module_name!r}: {type(error).__name__}: {error} ({path}); "
            "is its folder in PYTHONPATH?"
        ) from error
    return module, getattr(module, name, None)
