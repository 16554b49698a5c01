"""`feddip-mpi watch`: a running job as its files show it. Nothing is written, nothing is asked of the job."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feddip_mpi import config, metrics, run_folder
from feddip_mpi.errors import InputError
from feddip_mpi.report import terminal
from feddip_mpi.report.summaries import PHASES
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.settings import Config

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = Mapping[str, Any]

_SECONDS = 1.0  # between two looks
_LOG_LINES = 6
_LOG_BYTES = 16384
_PACE_ROUNDS = 10  # the time left goes by the last rounds


@dataclass(frozen=True)
class View:
    """What a run folder shows at one moment.

    Attributes:
        records: the rounds that are written completely, without lists (participants) and layers.
        holder: who is at work in the folder; None: nobody.
        finished: whether finished.json is there.
        error: what the run ended with, if it did with an error.
        log: the last lines of run.log.
        quiet: seconds since something was written last; None where nothing was.
    """

    config: Config
    records: Sequence[Row]
    holder: str | None
    finished: bool
    error: str | None
    log: tuple[str, ...]
    quiet: float | None

    @property
    def state(self) -> str:
        if self.finished:
            return "finished"
        if self.holder:
            return f"at work: {self.holder}"
        if self.error:
            return f"failed: {self.error.removeprefix('error: ')}"
        return "nobody is at work (or the file system has no locks): `feddip-mpi resume` goes on"


class Records:
    """The records of a metrics.jsonl that may be written right now, without their lists; what was read is not read again.

    A line has a number for each participant: of 4096 and 10,000 rounds the file has 315 MB.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._done = path, (0, 0), 0
        self._found: list[Row] = []

    def read(self) -> Sequence[Row]:
        """The complete lines until now; what is no record is passed over."""
        try:
            with open(self._path, "rb") as file:
                now = os.fstat(file.fileno())
                if (now.st_dev, now.st_ino) != self._file or now.st_size < self._done:  # of a resume: it has its own
                    self._file, self._done, self._found = (now.st_dev, now.st_ino), 0, []
                file.seek(self._done)
                for line in file:
                    if not line.endswith(b"\n"):  # half a line
                        break
                    self._done += len(line)
                    self._found += _record(line)
        except OSError:
            self._found, self._done = [], 0
        return tuple(self._found)


def _record(line: bytes) -> list[Row]:
    """The record of a line, or nothing."""
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return []
    if not isinstance(row, dict) or row.get("round") is None or metrics.misfits(row):
        return []
    return [{name: value for name, value in row.items() if not isinstance(value, (list, dict))}]


def look(folder: RunFolder, read: Records | None = None) -> View:
    """The state of a run folder now.

    Args:
        read: what was read of its records in earlier looks.

    Raises:
        InputError: it is no run folder, or its configuration cannot be read.
    """
    if not folder.config.is_file():
        raise InputError(
            f"{folder.path}: no run folder (it has no config.yaml); "
            + (run_folder.name_one_of(folder.path) or "`train` prints the name of the one it makes")
        )
    return View(
        config.load(folder.config),
        (read or Records(folder.metrics)).read(),
        run_folder.holder(folder),
        folder.finished.exists(),
        run_folder.failure(folder),
        tail(folder.log, _LOG_LINES),
        _quiet(folder),
    )


def tail(path: Path, count: int) -> tuple[str, ...]:
    """The last lines of a log."""
    lines = [line for line in _text(path, _LOG_BYTES).splitlines() if line.strip()]
    return tuple(lines[-count:])


def _text(path: Path, last_bytes: int) -> str:
    """A file's end as text; empty where there is none, or where it is replaced at this moment."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - last_bytes))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _quiet(folder: RunFolder) -> float | None:
    times = []
    for path in (folder.metrics, folder.log):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(0.0, time.time() - max(times)) if times else None


def seconds_left(view: View) -> float | None:
    """From the last rounds; None before there is one."""
    last = [float(row["round_seconds"]) for row in view.records[-_PACE_ROUNDS:] if row.get("round_seconds")]
    if not last:
        return None
    return statistics.fmean(last) * max(0, view.config.rounds - int(view.records[-1]["round"]))


def rows(view: View) -> list[tuple[str, str]]:
    """The frame as names and values."""
    c, done = view.config, int(view.records[-1]["round"]) if view.records else 0
    found = [
        ("state", view.state),
        ("round", f"{done} of {c.rounds} ({100 * done / c.rounds:.0f} %)"),
    ]
    if view.records:
        found += _numbers(view)
    left = seconds_left(view)
    if left is not None and not view.finished:
        found.append(("time left", f"{terminal.clock(left)}, as the last rounds went"))
    if view.quiet is not None and not view.finished:
        found.append(("last written", f"{terminal.clock(view.quiet)} ago"))
    return found


def _numbers(view: View) -> list[tuple[str, str]]:
    last = view.records[-1]
    scored = [
        (float(row["test_accuracy"]), int(row["round"])) for row in view.records if row.get("test_accuracy") is not None
    ]
    found = []
    if scored:
        best = max(scored)
        found.append(
            ("accuracy", f"{scored[-1][0]:.4f} in round {scored[-1][1]}, best {best[0]:.4f} in round {best[1]}")
        )
    if last.get("train_loss") is not None:
        found.append(("train loss", f"{float(last['train_loss']):.4f}"))
    asked = float(last.get("sparsity_asked") or 0)
    found.append(("sparsity", f"{float(last.get('sparsity') or 0):.4f} (asked after this round: {asked:.4f})"))
    sent, dense = (sum(float(row.get(name) or 0) for row in view.records) for name in ("upload_bytes", "dense_bytes"))
    found.append(
        ("uploaded", f"{terminal.size(sent)}, dense {terminal.size(dense)} ({dense / max(1.0, sent):.1f} times)")
    )
    phases = [(phase, float(last.get(f"{phase}_seconds") or 0)) for phase in PHASES]
    told = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases if seconds >= 0.005)
    found.append(("seconds", f"{float(last.get('round_seconds') or 0):.2f} for the last round: {told}"))
    return found


def title(view: View, folder: Path) -> str:
    """The run in one line."""
    c = view.config
    return (
        f"{folder}: {c.method}, {c.model.name} on {c.data.name}, {c.participants} of {c.clients} clients, seed {c.seed}"
    )


def frame(view: View, folder: Path) -> RenderableType:
    """The frame for a terminal."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    table = terminal.table()
    for name, value in rows(view):
        table.add_row(Text(name), Text(value))
    done = int(view.records[-1]["round"]) if view.records else 0
    bar = ProgressBar(total=view.config.rounds, completed=done, width=60)
    log = Text("\n".join(view.log), style="dim", no_wrap=True, overflow="ellipsis")
    return Group(Text(title(view, folder), style="bold"), bar, table, log)


def watch(path: str, once: bool) -> None:
    """Show a run until it is finished: live on a terminal, a line a round elsewhere.

    Raises:
        InputError: no run folder.
    """
    folder = RunFolder(Path(path))
    view = look(folder)
    if once:
        _print_once(view, folder.path)
    elif terminal.is_terminal():
        _watch_live(folder)
    else:
        _watch_plain(folder)


def _print_once(view: View, folder: Path) -> None:
    table = terminal.table()
    for name, value in rows(view):
        table.add_row(name, value)
    terminal.print_tables(title(view, folder), table, *view.log)


def _watch_live(folder: RunFolder) -> None:
    from rich.live import Live

    read = Records(folder.metrics)
    view = look(folder, read)
    try:
        with Live(frame(view, folder.path), refresh_per_second=4) as live:
            while not view.finished:
                time.sleep(_SECONDS)
                view = look(folder, read)
                live.update(frame(view, folder.path), refresh=True)
    except KeyboardInterrupt:
        terminal.note("no longer watched; the run goes on")


def _watch_plain(folder: RunFolder) -> None:
    """Lines that can be piped: what is there already, then each round as it comes, and a change of state."""
    shown, state, read = 0, "", Records(folder.metrics)
    while True:
        view = look(folder, read)
        if view.records and int(view.records[-1]["round"]) < shown:
            shown = int(view.records[-1]["round"])  # resumed from a checkpoint before what was shown
        for row in view.records:
            if int(row["round"]) > shown:
                terminal.say(_line(row, view.config.rounds))
                shown = int(row["round"])
        if view.state != state:
            state = view.state
            terminal.say(state)
        if view.finished:
            return
        time.sleep(_SECONDS)


def _line(row: Row, rounds: int) -> str:
    """A round; a record of another version may lack a name."""
    try:
        return terminal.line(dict(row), rounds)
    except (KeyError, TypeError, ValueError):
        return f"round {row['round']}/{rounds}"
