"""Finished run folders as a report needs them, and why the other folders are left out. No MPI."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feddip_mpi import config, identity, metrics, run_folder
from feddip_mpi.errors import FeddipError, InputError
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.settings import Config
from feddip_mpi.sweep import labels

Row = Mapping[str, Any]

_DEEPEST = 3  # folders of folders of runs
_NEEDED = (
    "round", "sparsity", "penalty", "upload_bytes", "dense_bytes", "round_seconds", "train_seconds", "update_norm",
    "host_memory_bytes",
)  # fmt: skip
_SUMMARY_NEEDED = ("rounds", "test_accuracy", "test_accuracy_mean_of_last_5", "upload_bytes", "seconds", "seed")


@dataclass(frozen=True, order=True)
class Hardware:
    """What seconds depend on. Runs on equal ones may be compared in seconds."""

    processor: str
    cores: str
    device: str
    ranks: str

    def __str__(self) -> str:
        return f"{self.processor or 'unknown processor'}, {self.cores} cores, {self.device}, ranks: {self.ranks}"


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
        name: of its folder.
        records: a mapping a round, all rounds from 1 to the last.
        summary: its finished.json, with the mean of the last evaluations as `metrics.last_accuracies` has them.
        label: what a sweep calls its method; else the method's name.
        histogram: int64 [clients, classes], training images; None where no checkpoint could be read.
        class_names: one a class, or none.
    """

    path: Path
    config: Config
    records: Sequence[Row]
    summary: Row
    hardware: Hardware
    label: str
    histogram: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def versions(self) -> str:
        """What computed it, in one line."""
        known = self.summary.get("versions") or {}
        library = str(self.summary.get("mpi", "")).split(",")[0]
        return ", ".join([*(f"{name} {version}" for name, version in known.items()), *([library] if library else [])])


Partition = tuple[np.ndarray | None, tuple[str, ...], str]  # histogram, class names, remark


@dataclass(frozen=True)
class LeftOut:
    """A folder that a report does not use."""

    path: Path
    reason: str


@dataclass
class Found:
    """What folders hold."""

    runs: list[Run] = field(default_factory=list)
    partitions: dict[str, Partition] = field(default_factory=dict)  # each read once: all runs of a seed have the same
    left_out: list[LeftOut] = field(default_factory=list)


def find(paths: Sequence[Path]) -> Found:
    """All runs in these folders: each is a run folder, or holds some.

    Raises:
        InputError: a path is no folder, or there is no finished run in any.
    """
    found = Found()
    seen: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; name run folders, or folders of run folders")
        _search(path, found, seen, 0)
    _leave_out_twins(found)
    if not found.runs:
        reasons = "".join(f"\n  {item.path}: {item.reason}" for item in found.left_out)
        raise InputError(f"no finished run in {', '.join(map(str, paths))}; nothing to report{reasons}")
    return found


def _search(path: Path, found: Found, seen: set[Path], depth: int) -> None:
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    shown = Path(os.fsencode(path).decode("utf-8", "replace"))
    if shown != path:  # no page and no table could hold it
        found.left_out.append(LeftOut(shown, "its name is not UTF-8; rename it"))
        return
    if is_run(path):
        try:
            found.runs.append(load(path, found.partitions))
        except FeddipError as error:
            found.left_out.append(LeftOut(path, str(error)))
        return
    try:
        inner = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith((".", "_")))
    except OSError as error:
        found.left_out.append(LeftOut(path, f"cannot be read ({error.strerror})"))
        return
    if depth == _DEEPEST or not inner:
        found.left_out.append(LeftOut(path, "no run folder: it has no config.yaml, and no folder of runs inside"))
        return
    for item in inner:
        _search(item, found, seen, depth + 1)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, whole or not."""
    folder = RunFolder(path)
    # os.path: a folder that cannot be looked into is none, and no error.
    return any(os.path.isfile(file) for file in (folder.config, folder.metrics, folder.finished))


def load(path: Path, partitions: dict[str, Partition] | None = None) -> Run:
    """A finished run.

    Args:
        partitions: those that are known, by what decides them; added to.

    Raises:
        FeddipError: it is unfinished or damaged; says why.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise FeddipError("damaged: it has no config.yaml")
    try:
        settings = config.load(folder.config)
    except InputError as error:
        raise FeddipError(f"damaged, or of another version: {' '.join(str(error).split())}") from None
    records = _records(folder)
    if not folder.finished.is_file():
        raise FeddipError(_unfinished(folder, f"{len(records)} of {settings.rounds} rounds"))
    summary = _summary(folder)
    rounds = [row.get("round") for row in records]
    if summary["rounds"] != len(rounds) or rounds != list(range(1, len(rounds) + 1)):
        raise FeddipError(f"damaged: metrics.jsonl has {len(records)} rounds, finished.json says {summary['rounds']}")
    if missing := sorted({name for row in records for name in _NEEDED if not isinstance(row.get(name), (int, float))}):
        raise FeddipError(f"damaged, or of another version: metrics.jsonl lacks {', '.join(missing)}")
    if wrong := sorted({name for row in records for name in metrics.misfits(row)}):
        raise FeddipError(f"damaged: metrics.jsonl has something else than finite numbers as {', '.join(wrong)}")
    summary |= _last_mean(records)
    histogram, names, remark = _partition(folder, settings, {} if partitions is None else partitions)
    return Run(
        path, settings, records, summary, _hardware(folder, records, summary), _label(path, settings), histogram, names,
        (remark,) if remark else (),
    )  # fmt: skip


def _unfinished(folder: RunFolder, done: str) -> str:
    """What is the matter with a run that has no finished.json."""
    if (holder := run_folder.holder(folder)) is not None:
        return f"unfinished: {done} (at work: {holder})"
    if (error := run_folder.failure(folder)) is not None:
        return f"failed after {done}: {error}"
    return f"unfinished: {done} (`feddip-mpi resume` goes on)"


def _records(folder: RunFolder) -> list[metrics.Record]:
    try:
        records = metrics.read(folder.metrics)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise FeddipError(f"damaged: metrics.jsonl cannot be read ({' '.join(str(error).split())})") from None
    if not all(isinstance(row, dict) for row in records):
        raise FeddipError("damaged: metrics.jsonl has a line that is no record")
    return records


def _summary(folder: RunFolder) -> dict[str, Any]:
    try:
        summary = json.loads(folder.finished.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FeddipError(f"damaged: finished.json cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(summary, dict) or not all(_is_finite(summary.get(name)) for name in _SUMMARY_NEEDED):
        raise FeddipError(
            f"damaged, or of another version: finished.json lacks one of {', '.join(_SUMMARY_NEEDED)}, or it is no finite number"
        )
    for name in ("versions", "hardware"):
        if not isinstance(summary.get(name) or {}, dict):
            raise FeddipError(f"damaged: finished.json has no names and values as {name}")
    return summary


def _last_mean(records: Sequence[Row]) -> dict[str, Any]:
    """The mean of the last evaluations as this program takes it: a summary of an older version may have another one."""
    last = metrics.last_accuracies(records)
    return {"test_accuracy_mean_of_last_5": sum(last) / len(last), "evaluations_in_mean": len(last)} if last else {}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _hardware(folder: RunFolder, records: Sequence[Row], summary: Row) -> Hardware:
    """All that the run ran on: finished.json knows where it ended, its log also where it was before."""
    told = summary.get("hardware") or {}
    pairs = {(str(told.get("processor", "")), str(told.get("cores", "?")))} | run_folder.logged_hardware(folder)
    device = str(summary.get("device") or ("GPU" if any(row.get("device_memory_bytes") for row in records) else "CPU"))
    ranks = sorted({int(row["ranks"]) for row in records if row.get("ranks")})
    return Hardware(
        " and ".join(sorted({processor for processor, _ in pairs})),
        " and ".join(sorted({cores for _, cores in pairs})),
        device,
        " and ".join(map(str, ranks)) or "?",
    )


def _label(path: Path, settings: Config) -> str:
    """The sweep's label of the method, where a sweep made the run."""
    return labels.read(path.parent).get(path.name, {}).get("method", settings.method)


def _partition(folder: RunFolder, settings: Config, known: dict[str, Partition]) -> Partition:
    """The newest checkpoint's histogram and class names, and a remark where there are none."""
    from feddip_mpi import checkpoint

    key = json.dumps([settings.data.model_dump(mode="json"), settings.clients, settings.seed])
    if key in known:
        return known[key]
    for path in reversed(checkpoint.listed(folder.checkpoints)):
        try:
            known[key] = (*checkpoint.read_partition(path), "")
        except FeddipError as error:
            return None, (), f"partition unknown: {error}"
        return known[key]
    return None, (), "partition unknown: no checkpoint is left"


def _leave_out_twins(found: Found) -> None:
    """Of runs with one configuration and one seed the first counts: they are no further sample."""
    first: dict[str, Run] = {}
    kept = []
    for run in found.runs:
        key = json.dumps(identity.of(run.config), sort_keys=True)
        if key in first:
            found.left_out.append(LeftOut(run.path, _same_as(first[key], run)))
        else:
            first[key] = run
            kept.append(run)
    found.runs = kept


def _same_as(first: Run, run: Run) -> str:
    """Why a run is no further sample, with the keys that differ and that its method does not look at."""
    one, other = config.flat(first.config), config.flat(run.config)
    unread = [key for key in one if one[key] != other[key] and key not in identity.what_it_reads(run.config)]
    beside = f", but for what {run.config.method} does not look at ({', '.join(unread)})" if unread else ""
    return f"the same configuration and seed as {first.path}{beside}"
