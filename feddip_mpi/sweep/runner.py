"""Runs the cells of a sweep as commands of their own, a few at once; one that fails does not stop the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from feddip_mpi import config, hdf5, run_folder
from feddip_mpi.errors import Stopped
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.sweep import states
from feddip_mpi.sweep.grid import Cell
from feddip_mpi.sweep.labels import BESIDE

_TRIES_SECONDS = 0.1
# After a signal a cell has so long to end its first round, without which it has nothing to save.
_FIRST_ROUND_SECONDS = 60.0
_SECOND_SIGNAL_SECONDS = 1.0  # some programs send the same one twice


class Process(Protocol):
    """What the runner needs of a `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, sig: int) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: "finished", "failed", "stopped" (goes on next time, if it had saved) or "busy" (another job has it)."""

    name: str
    kind: str
    seconds: float = 0.0
    error: str = ""
    result: str = ""


@dataclass
class Stop:
    """Set by a signal: no cell is started any more, those at work save and end.

    Attributes:
        requested: a signal came.
        insisted: a second one did: cells that cannot save yet end at once.
    """

    requested: bool = False
    insisted: bool = False
    _since: float = 0.0

    @contextlib.contextmanager
    def heard(self) -> Iterator[Stop]:
        """Within it signals that ask for an end set this, and do nothing else."""
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        before = [signal.signal(number, lambda *_: self._hear()) for number in signals]
        try:
            yield self
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def _hear(self) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since >= _SECOND_SIGNAL_SECONDS:
            self.insisted = True


@dataclass
class _Job:
    """A cell at work.

    Attributes:
        written: see `Commands.written`, before it began.
        told: to save and end, when it could.
        asked: since when it cannot (time.monotonic).
        ended: because it could not for too long.
    """

    cell: Cell
    written: int | None
    process: Process
    started: float = field(default_factory=time.monotonic)
    told: bool = False
    asked: float | None = None
    ended: bool = False

    def stop(self, can_save: bool, insisted: bool) -> None:
        """Once it has metrics of this start it saves on a signal; while it still imports, one would kill it."""
        self.asked = self.asked or time.monotonic()
        if can_save:
            self.process.send_signal(signal.SIGUSR1)
            self.told = True
        elif insisted or time.monotonic() - self.asked > _FIRST_ROUND_SECONDS:
            end(self.process)
            self.ended = True


class Commands:
    """Starts cells as `feddip-mpi train` or `resume` in processes of their own."""

    def __init__(self, out: Path, launcher: Sequence[str] = ()) -> None:
        """`launcher` stands before every command, for example ("mpirun", "-n", "4")."""
        self._out, self.launcher = out, tuple(launcher)

    def log_of(self, name: str) -> Path:
        """What a cell's command says; beside the run folder, which has to be empty at first."""
        return self._out / BESIDE / f"{name}.log"

    def start(self, cell: Cell) -> subprocess.Popen[bytes]:
        """Begin or go on."""
        folder = RunFolder(self._out / cell.name)
        words = ["resume", str(folder.path)] if folder.config.exists() else (
            ["train", str(write_config(cell, self._out)), "--out", str(folder.path)])  # fmt: skip
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "FEDDIP_PROGRESS": "plain"}
        self.log_of(cell.name).parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_of(cell.name), "ab") as log:
            # A session of its own: Ctrl-C reaches the sweep alone, which passes it on as a signal that all launchers pass on.
            return subprocess.Popen(
                [*self.launcher, sys.executable, "-m", "feddip_mpi", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def error_of(self, cell: Cell) -> str:
        """The line of a cell's log that says what went wrong."""
        try:
            lines = self.log_of(cell.name).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        said = [line.strip() for line in lines if any(letter.isalnum() for letter in line)]  # launchers draw lines
        complaints = [line for line in said if line.startswith(("error:", "watchdog:", "deadline:"))]
        return (complaints or said or [""])[-1]

    def written(self, cell: Cell) -> int | None:
        """When a cell's metrics were last written, by the clock of their file system; None: never."""
        try:
            return RunFolder(self._out / cell.name).metrics.stat().st_mtime_ns
        except OSError:
            return None


def wait(process: Process, stop: Stop) -> None:
    """Until the process has ended, or a signal asks for an end."""
    while process.poll() is None and not stop.requested:
        time.sleep(_TRIES_SECONDS)


def end(process: Process) -> None:
    """End a command and all that its launcher has started, if it still runs; nothing of it is kept."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_config(cell: Cell, out: Path) -> Path:
    """The cell's configuration as a file beside the run folders."""
    path = out / BESIDE / f"{cell.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    hdf5.write_text(path, config.to_yaml(cell.config))
    return path


def run(
    cells: Sequence[Cell],
    out: Path,
    commands: Commands,
    jobs: int,
    say: Callable[[str], None],
    stop: Stop,
) -> list[Outcome]:
    """Run the cells that are not finished, at most `jobs` at once, in their order.

    Returns:
        An outcome for each cell that was started or found busy.

    Raises:
        Stopped: by a signal, when all cells at work have saved and ended.
    """
    waiting, at_work, outcomes = list(cells), list[_Job](), list[Outcome]()
    count = len(waiting)
    while waiting or at_work:
        while waiting and len(at_work) < jobs and not stop.requested:
            cell = waiting.pop(0)
            state = states.look(cell, out)  # another sweep may have been here since
            if state.kind == states.FINISHED:
                continue
            if state.kind in (states.BUSY, states.REFUSED):
                outcomes.append(
                    Outcome(cell.name, "busy" if state.kind == states.BUSY else "failed", 0.0, state.remark)
                )
                say(f"{cell.name}: {state.remark}")
                continue
            try:
                at_work.append(_Job(cell, commands.written(cell), commands.start(cell)))
            except OSError as error:  # those at work go on
                outcomes.append(Outcome(cell.name, "failed", 0.0, f"cannot be started ({error})"))
                say(_line(outcomes[-1]))
                continue
            what = f"goes on after round {state.rounds}" if state.kind in states.BEGUN else "starts"
            say(f"[{count - len(waiting)}/{count}] {cell.name}: {what}")
        for job in list(at_work):
            if job.process.poll() is not None:
                at_work.remove(job)
                outcomes.append(_outcome(job, out, commands))
                say(_line(outcomes[-1]))
            elif stop.requested and not job.told:
                job.stop(commands.written(job.cell) not in (None, job.written), stop.insisted)
        if stop.requested and not at_work:
            raise Stopped(f"by a signal, {len(waiting)} cells not begun; the same command goes on")
        time.sleep(_TRIES_SECONDS if at_work else 0)
    return outcomes


def _outcome(job: _Job, out: Path, commands: Commands) -> Outcome:
    """By the run folder, not by the exit code alone: launchers do not pass it on faithfully (docs/sharp-bits.md)."""
    seconds = time.monotonic() - job.started
    finished = RunFolder(out / job.cell.name).finished
    if finished.exists():
        return Outcome(job.cell.name, "finished", seconds, result=_result(finished))
    if job.ended:
        return Outcome(job.cell.name, "stopped", seconds, "before its first round, with nothing to save")
    code = job.process.poll()
    if code == Stopped.exit_code:
        return Outcome(job.cell.name, "stopped", seconds)
    if (holder := run_folder.holder(RunFolder(out / job.cell.name))) is not None:  # another sweep was faster
        return Outcome(job.cell.name, "busy", seconds, f"another job is at work there ({holder})")
    error = commands.error_of(job.cell) or "no message"
    return Outcome(job.cell.name, "failed", seconds, f"exit code {code}: {error}")


def _result(finished: Path) -> str:
    """What a run has reached, in a few words; none where its summary cannot be read: the report says why."""
    try:
        told = json.loads(finished.read_text(encoding="utf-8"))
        return f"accuracy {told['test_accuracy']:.4f} at sparsity {told['sparsity']:.4f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _line(outcome: Outcome) -> str:
    tail = f": {outcome.error}" if outcome.error else f", {outcome.result}" if outcome.result else ""
    return f"{outcome.name}: {outcome.kind} after {outcome.seconds:.0f} s{tail}"
