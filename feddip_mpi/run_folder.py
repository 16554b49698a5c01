"""The folder of a run: the names inside it, and the lock that keeps a second job out of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from feddip_mpi import config, hdf5
from feddip_mpi.errors import FolderBusy, InputError
from feddip_mpi.runtime import in_batch_job, log
from feddip_mpi.settings import Config

# The lock of a process that has died is free as soon as its kernel has cleaned up, that of a node that has died when the file
# server no longer believes in it (a lease on NFSv4: 90 seconds unless set otherwise; Lustre: up to some minutes).
_LOCK_SECONDS, _LOCK_SECONDS_IN_A_JOB = 10.0, 300.0
_MOMENT, _LONGEST_PAUSE = 0.12, 1.0


def lock_seconds() -> float:
    """How long a lock that another job has is waited for."""
    return _LOCK_SECONDS_IN_A_JOB if in_batch_job() else _LOCK_SECONDS


def name_one_of(folder: Path) -> str:
    """The way out where a folder holds run folders, as a sweep's does, and is none itself; empty where it holds none."""
    try:
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
    except OSError:
        return ""
    return f"it holds {len(inside)} run folders: name one of them, such as {inside[0]}" if inside else ""


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One command at a time: those that begin together would each write what they have read before, without what others add."""
    with open(lock, "a", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class RunFolder:
    """Names inside a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> Path:
        """Exists exactly when the run is complete: an exit code of mpirun proves nothing (docs/sharp-bits.md)."""
        return self.path / "finished.json"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def plot(self) -> Path:
        return self.path / "run.png"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    def create(self, settings: Config) -> Lock:
        """Make a new folder, locked. Raises InputError if it exists with anything in it, or cannot be made."""
        self.require_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self)
            self.require_free()  # another job may have had the lock meanwhile
            self.checkpoints.mkdir(exist_ok=True)
            for draft in self._drafts():
                draft.unlink()
            hdf5.write_text(self.config, config.to_yaml(settings))
        except OSError as error:
            raise InputError(
                f"--out {self.path}: cannot be created ({error}); name a folder you may write to"
            ) from None
        return lock

    def _drafts(self) -> list[Path]:
        """What a configuration is written to before it has its name."""
        return list(self.path.glob(f".{self.config.name}.tmp-*"))

    def is_unused(self) -> bool:
        """Whether there is nothing: no folder, or one with no more than what `create` makes before the configuration."""
        if not self.path.is_dir():
            return not self.path.exists()
        inside = set(self.path.iterdir()) - {self.lock_file, *self._drafts()}
        return not inside or (inside == {self.checkpoints} and not any(self.checkpoints.iterdir()))

    def require_free(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path}: exists and is no folder; name another one")
        try:
            unused = self.is_unused()
        except OSError as error:
            raise InputError(
                f"--out {self.path}: cannot be looked into ({error}); name a folder you may write to"
            ) from None
        if not unused:
            raise InputError(
                f"--out {self.path}: holds files already and is never overwritten; `feddip-mpi resume {self.path}` goes "
                "on with it, another --out starts anew"
            )


def holder(folder: RunFolder) -> str | None:
    """Who is at work in a run folder, as the lock's file says; None: nobody. Leaves everything as it is.

    Where the file system has no locks, or the file cannot be opened, nobody seems to be there.
    """
    try:
        with open(folder.lock_file, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except OSError:
        pass
    return None


# Also as logs have it that were written before this line was one for people.
_HARDWARE = re.compile(r"trains on [^\n]*: ([^;\n]*); (\d+) cores|'processor': '([^']*)', 'cores': (\d+)")


def hardware_line(hardware: Mapping[str, object]) -> str:
    """The line of a run's log from which `logged_hardware` takes what it has run on."""
    return f"trains on {hardware['host']}: {hardware['processor']}; {hardware['cores']} cores"


def logged_hardware(folder: RunFolder) -> set[tuple[str, str]]:
    """(processor, cores) of every start of a run that its log tells of; none where there is no log."""
    try:
        text = folder.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {(new or old, count or counted) for new, count, old, counted in _HARDWARE.findall(text)}


_LOG_BYTES = 16384
_ENTRY = re.compile(r"^\S+ \S+ rank \d+ [A-Z]+ ", re.MULTILINE)  # as `runtime.start_log` begins each


def failure(folder: RunFolder) -> str | None:
    """The error that a run ended with: the last entry of its log; None where that is something else.

    Of a run that is at work, or was killed or stopped since, the last entry is another one.
    """
    try:
        with open(folder.log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    last = _ENTRY.split(text)[-1]
    return " ".join(last.split()) if last.startswith("error: ") else None


class Lock:
    """Held as long as this process lives: two jobs in one folder would remove each other's files."""

    def __init__(self, folder: RunFolder, seconds: float = 0.0, give_up: Callable[[], bool] = lambda: False) -> None:
        """Take it. Raises FolderBusy that names who has it.

        Args:
            folder: of the run.
            seconds: to wait for another job to leave.
            give_up: asked while it waits, to wait no longer.
        """
        self._folder = folder
        self._file: IO[str] = open(folder.lock_file, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
        try:
            self._take(seconds, give_up)
        except BlockingIOError:
            holder = self._holder()
            self._file.close()
            waited = f", also after {seconds:g} s of waiting" if seconds and not give_up() else ""
            raise FolderBusy(
                f"{folder.path}: another job is at work in this run folder ({holder}){waited}; wait for its end, or stop it "
                "(USR1 lets it save first). If its node has died, the file server will notice: try again later"
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s: no lock on this file system (%s): start no second job in this folder", folder.path, error)
        self._file.truncate(0)
        self._file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n"
        )
        self._file.flush()

    def _take(self, seconds: float, give_up: Callable[[], bool]) -> None:
        """Try for a moment at least: `holder` looks by taking the lock itself, which lasts no longer."""
        begun, pause, told = time.monotonic(), 0.02, False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited = time.monotonic() - begun
                if waited > max(seconds, _MOMENT) or give_up():
                    raise
                if waited > _MOMENT and not told:
                    told = True
                    log.warning(
                        "%s: waits up to %g s for another job to leave this run folder (%s)",
                        self._folder.path,
                        seconds,
                        self._holder(),
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read().strip() or "unknown"

    def release(self) -> None:
        self._file.close()
