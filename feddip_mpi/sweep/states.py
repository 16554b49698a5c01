"""What is done of a cell: read off its run folder, which is compared with what the grid says now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from feddip_mpi import config, metrics, run_folder
from feddip_mpi.errors import InputError
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.settings import Config
from feddip_mpi.sweep.grid import Cell

_MEASURED = ("train_seconds", "evaluate_seconds", "round_seconds", "samples")

NEW, UNFINISHED, FAILED, FINISHED, BUSY, REFUSED = "new", "unfinished", "failed", "finished", "busy", "refused"
BEGUN = (UNFINISHED, FAILED)  # both are resumed


@dataclass(frozen=True)
class State:
    """A cell's state.

    Attributes:
        kind: NEW (no folder), UNFINISHED (is resumed), FAILED (ended with an error; is resumed, too), FINISHED (is skipped),
            BUSY (another job is at work in it) or REFUSED (its folder holds something else than this cell).
        rounds: that are in its metrics.
        remark: why, where there is something to say.
    """

    kind: str
    rounds: int = 0
    remark: str = ""


def look(cell: Cell, out: Path) -> State:
    """The state of a cell whose folder is `out`/name."""
    folder = RunFolder(out / cell.name)
    try:
        known = folder.config.is_file()
        if not known and (maker := run_folder.holder(folder)) is not None:  # it is just being made
            return State(BUSY, 0, f"another job is at work there ({maker})")
        if folder.is_unused():  # or its making was cut off: the next one takes it over
            return State(NEW)
    except OSError as error:
        return State(REFUSED, remark=f"the folder cannot be looked into ({error})")
    if not known:
        return State(REFUSED, remark="the folder holds files, but no config.yaml: it is no run folder")
    rounds = len(records(folder))
    try:
        there = config.load(folder.config)
    except InputError as error:
        return State(REFUSED, rounds, f"its config.yaml cannot be read: {' '.join(str(error).split())}")
    if differing := differences(there, cell.config):
        return State(REFUSED, rounds, f"the folder was made with another configuration: {'; '.join(differing)}")
    if (holder := run_folder.holder(folder)) is not None:
        return State(BUSY, rounds, f"another job is at work there ({holder})")
    if not folder.finished.exists():
        why = run_folder.failure(folder)
        return State(UNFINISHED, rounds) if why is None else State(FAILED, rounds, why)
    try:
        done = json.loads(folder.finished.read_text(encoding="utf-8"))["rounds"]
    except (OSError, ValueError, KeyError, TypeError):
        return State(REFUSED, rounds, "its finished.json is damaged")
    return State(FINISHED, rounds) if done == cell.config.rounds else State(UNFINISHED, rounds)


def records(folder: RunFolder) -> list[metrics.Record]:
    """The rounds in a folder's metrics; none where these cannot be read, or lack what an estimate takes of them."""
    try:
        found = metrics.read(folder.metrics)
    except (OSError, ValueError, RecursionError):
        return []
    whole = all(isinstance(row, dict) and not metrics.misfits(row) for row in found)
    return found if whole and all(row.get(name) is not None for row in found for name in _MEASURED) else []


def differences(there: Config, wanted: Config) -> list[str]:
    """`key: there, now wanted` for every key that matters and differs."""
    old, new = config.flat(there), config.flat(wanted)
    return [
        f"{key} is {old[key]!r} there, {new[key]!r} in the grid"
        for key in old
        if old[key] != new[key] and not config.is_without_meaning(key, wanted)
    ]


def require_none_refused(cells: Sequence[Cell], states: Sequence[State], out: Path) -> None:
    """Raises InputError that names every folder which is in the way of its cell."""
    refused = [
        f"  {out / cell.name}: {state.remark}"
        for cell, state in zip(cells, states, strict=True)
        if state.kind == REFUSED
    ]
    if refused:
        raise InputError(
            f"nothing was started: {len(refused)} of {len(cells)} cells have a folder that is not theirs; move these away, "
            "or name another --out:\n" + "\n".join(refused)
        )
