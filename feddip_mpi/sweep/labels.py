"""What grids call their cells, for the report; beside the run folders, which know nothing of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from feddip_mpi import hdf5, run_folder

BESIDE = "_sweep"  # folder of the sweep's own files; no cell has such a name
_FILE = "cells.json"


def write(labels: Mapping[str, Mapping[str, str]], out: Path) -> None:
    """Add the labels of some cells, by name and axis; those of other grids' cells in the same folder stay."""
    before = read(out)
    if all(before.get(name) == own for name, own in labels.items()):  # a folder that is done may be read-only
        return
    path = out / BESIDE / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with run_folder.alone(path.with_name(f".{_FILE}.lock")):
        both = read(out) | {name: dict(own) for name, own in labels.items()}
        hdf5.write_text(path, json.dumps(both, indent=1) + "\n")


def read(out: Path) -> dict[str, dict[str, str]]:
    """All labels of a sweep's folder, by cell and axis; empty where there are none that can be read."""
    try:
        found = json.loads((out / BESIDE / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(name): {str(k): str(v) for k, v in own.items()} for name, own in found.items() if isinstance(own, dict)}
