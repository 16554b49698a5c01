"""What the cells that are left will take: seconds from what rounds took so far, bytes from what is on the disk."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feddip_mpi.run_folder import RunFolder
from feddip_mpi.settings import Config
from feddip_mpi.sweep import states
from feddip_mpi.sweep.grid import Cell
from feddip_mpi.sweep.states import State

Row = Mapping[str, Any]
Kind = tuple[str, str, str]  # data, model, device: cells of one kind are alike in speed and size


@dataclass(frozen=True)
class Pace:
    """What one kind of cell takes.

    Attributes:
        sample_seconds: of training, for one image once, on one rank.
        evaluation_seconds: of one evaluation.
        other_seconds: of a round besides.
        start_seconds: before the first round.
        source: where this is from.
        ranks: of the run, which train at the same time.
    """

    sample_seconds: float
    evaluation_seconds: float
    other_seconds: float
    start_seconds: float
    source: str
    ranks: int = 1


@dataclass(frozen=True)
class Estimate:
    """Of the cells that are left.

    Attributes:
        seconds: one after another; None where nothing is known of some of them.
        sources: where the seconds are from.
        bytes: on the disk, when all are finished, in addition to now.
        bytes_are: "measured" (cells of this kind that are finished) or "at most" (from the sizes of the model).
    """

    seconds: float | None
    sources: tuple[str, ...]
    bytes: int
    bytes_are: str


def kind_of(config: Config) -> Kind:
    """Which cells are alike."""
    return config.data.name, config.model.name, config.device


def pace_of(records: Sequence[Row], source: str, start_seconds: float = 0.0) -> Pace | None:
    """The pace of a run from its rounds; medians, because a machine has bad moments. None without a round."""
    if not records:
        return None
    # A model may be evaluated in the round after its own, by ranks that are not the slowest ones there.
    evaluations = sum(row.get("test_accuracy") is not None for row in records)
    others = [max(0.0, row["round_seconds"] - row["train_seconds"] - row["evaluate_seconds"]) for row in records]
    return Pace(
        statistics.median(row["train_seconds"] / max(1, row["samples"]) / _share(row) for row in records),
        sum(_evaluation(row) for row in records) / evaluations if evaluations else 0.0,
        statistics.median(others),
        start_seconds,
        source,
        int(records[-1].get("ranks") or 1),
    )


def _share(row: Row) -> float:
    return busiest_share(len(row.get("participants") or [0]), int(row.get("ranks") or 1))


def busiest_share(participants: int, ranks: int) -> float:
    """Of a round's images those that the busiest rank trains: ranks train their clients at the same time."""
    return -(-participants // ranks) / participants


def _evaluation(row: Row) -> float:
    return float(row["evaluate_seconds"] + (row.get("evaluate_waiting_seconds") or 0.0))


def known_paces(cells: Sequence[Cell], found: Sequence[State], out: Path) -> dict[Kind, Pace]:
    """The pace of each kind of which the sweep has rounds already: the mean of its cells."""
    paces: dict[Kind, list[Pace]] = {}
    for cell, state in zip(cells, found, strict=True):
        if state.rounds and (pace := pace_of(states.records(RunFolder(out / cell.name)), "")) is not None:
            paces.setdefault(kind_of(cell.config), []).append(pace)
    return {kind: _mean(group) for kind, group in paces.items()}


def _mean(paces: Sequence[Pace]) -> Pace:
    return Pace(
        statistics.fmean(pace.sample_seconds for pace in paces),
        statistics.fmean(pace.evaluation_seconds for pace in paces),
        statistics.fmean(pace.other_seconds for pace in paces),
        statistics.fmean(pace.start_seconds for pace in paces),
        f"rounds of {len(paces)} cell{'s' * (len(paces) > 1)} of this sweep",
        max(pace.ranks for pace in paces),
    )


def seconds_left(config: Config, pace: Pace, images: int, done: int) -> float:
    """Of a cell with `done` finished rounds, on a training set of so many `images`."""
    rounds = config.rounds - done
    samples = images / config.clients * config.participants * config.local_epochs
    samples *= busiest_share(config.participants, pace.ranks)
    evaluations = -(-rounds // config.eval.every)
    return (
        pace.start_seconds
        + rounds * (samples * pace.sample_seconds + pace.other_seconds)
        + evaluations * pace.evaluation_seconds
    )


def folder_bytes(folder: Path) -> int:
    """What the files below a folder hold; those that go meanwhile hold nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def most_bytes(config: Config, size: int, prunable: int) -> int:
    """What a finished cell takes at most: each checkpoint has the weights, the mask and every client's residual.

    Args:
        size, prunable: numbers of the model.
    """
    clients = min(config.clients, config.rounds * config.participants)
    kept = min(config.checkpoint.keep + config.checkpoint.best, config.rounds)
    return kept * (4 * size + prunable // 8 + 4 * size * clients) + 4000 * config.rounds


def estimate(
    cells: Sequence[Cell],
    found: Sequence[State],
    out: Path,
    paces: Mapping[Kind, Pace],
    images: Callable[[Config], int],
    sizes: Callable[[Config], tuple[int, int]],
) -> Estimate:
    """Of all cells that are new, unfinished or failed.

    Args:
        images: training images of a configuration.
        sizes: values and prunable values of its model.
    """
    measured: dict[Kind, list[int]] = {}
    for cell, state in zip(cells, found, strict=True):
        if state.kind == states.FINISHED:
            measured.setdefault(kind_of(cell.config), []).append(folder_bytes(out / cell.name))
    left = [(c, s) for c, s in zip(cells, found, strict=True) if s.kind in (states.NEW, *states.BEGUN)]
    seconds, total, guessed = 0.0, 0, False
    for cell, state in left:
        kind = kind_of(cell.config)
        if kind in paces:
            seconds += seconds_left(cell.config, paces[kind], images(cell.config), state.rounds)
        if kind in measured:
            final = max(measured[kind])
        else:
            final, guessed = most_bytes(cell.config, *sizes(cell.config)), True
        present = folder_bytes(out / cell.name) if state.kind in states.BEGUN else 0
        total += max(0, final - present)
    known = all(kind_of(cell.config) in paces for cell, _ in left)
    used = {kind_of(cell.config) for cell, _ in left} & set(paces)
    sources = tuple(sorted({f"{kind[1]} on {kind[0]}: {paces[kind].source}" for kind in used}))
    return Estimate(seconds if known else None, sources, total, "at most" if guessed else "as finished cells")
