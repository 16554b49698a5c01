"""Several hosts on this machine for the tests: made, used and removed through `benchmarks/hosts.sh`."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "hosts.sh"
PROGRAMS = Path(__file__).resolve().parent / "programs"

# The script ends a job in good time by itself; this much later it is killed.
_GRACE_SECONDS = 30
_numbers = itertools.count()


@dataclass(frozen=True)
class Traffic:
    """Bytes that crossed the eth0 of one host, headers and the launcher's own messages included."""

    received: int
    sent: int

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(self.received - before.received, self.sent - before.sent)


@dataclass(frozen=True)
class Result:
    """How a job ended: mpirun's exit code (124, 137: time over), all its output, duration, bytes by host."""

    code: int
    text: str
    seconds: float
    traffic: list[Traffic]

    def expect(self, code: int) -> Result:
        assert self.code == code, f"exit code {self.code}, not {code}, after {self.seconds:.1f} s:\n{self.text}"
        return self


class Job:
    """A started job. Use it as a context manager: leaving it ends what is left."""

    def __init__(self, hosts: Hosts, arguments: Sequence[str], seconds: float, environment: dict[str, str]) -> None:
        self._hosts, self._seconds = hosts, seconds
        self._output = hosts.folder / f"job-{next(_numbers)}.txt"
        self._before = hosts.traffic()
        self._started = time.monotonic()
        # A file, not a pipe: a process left behind would keep a pipe open, and reading it would never end.
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPT), "run", *arguments],
                env=environment | {"TIMEOUT": str(round(seconds))},
                cwd=hosts.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def text(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """TERM and INT end the job; USR1 and USR2 reach every rank."""
        self.process.send_signal(number)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Poll `happened`; fails if the job ends first."""
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before it could:\n{self.text}"
            time.sleep(0.02)

    def wait(self) -> Result:
        code = self.process.wait(self._seconds + _GRACE_SECONDS)
        seconds = time.monotonic() - self._started
        traffic = [after - before for after, before in zip(self._hosts.traffic(), self._before, strict=True)]
        return Result(code, self.text, seconds, traffic)


class Hosts:
    """Hosts joined by a switch. Use it as a context manager: leaving it removes them and what runs on them."""

    def __init__(self, count: int, rate: str, folder: Path) -> None:
        """Make `count` hosts.

        Args:
            rate: of each link in each direction, as in "100mbit"; "none": no limit.
            folder: where the output of jobs goes.
        """
        self.folder = folder
        self.prefix = f"fdt{os.getpid()}n{next(_numbers)}"
        self.names = [f"{self.prefix}-h{number}" for number in range(count)]
        self._script("up", str(count), rate)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self._script("down")

    def set_rate(self, rate: str) -> None:
        """Another rate for all links."""
        self._script("rate", rate)

    def traffic(self) -> list[Traffic]:
        """Bytes by host since it was made."""
        lines = [line.split() for line in self._script("bytes").splitlines()]
        return [Traffic(int(received), int(sent)) for _, received, sent in lines]

    def processes(self) -> list[int]:
        """Ids of all processes on the hosts."""
        return [int(pid) for name in self.names for pid in _checked(["ip", "netns", "pids", name]).split()]

    def start(
        self,
        argv: Sequence[str],
        ranks_per_host: int = 1,
        seconds: float = 60,
        options: Sequence[str] = (),
        extra: dict[str, str] | None = None,
    ) -> Job:
        """Start `python -m mpi4py argv` on all hosts, ranks in the order of the hosts.

        Args:
            argv: arguments of the interpreter.
            seconds: the job is ended after this time.
            options: of mpirun.
            extra: additional environment variables.
        """
        words = [*options, "--"] if options else []
        size = f"{len(self.names)}x{ranks_per_host}"
        paths = [str(ROOT), str(PROGRAMS), os.environ.get("PYTHONPATH", "")]
        environment = {
            **_environment(self.prefix),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONFAULTHANDLER": "1",
            **(extra or {}),
        }
        return Job(self, [size, *words, sys.executable, "-m", "mpi4py", *argv], seconds, environment)

    def run(
        self,
        argv: Sequence[str],
        ranks_per_host: int = 1,
        seconds: float = 60,
        options: Sequence[str] = (),
        extra: dict[str, str] | None = None,
    ) -> Result:
        """Start a job (see `start`) and wait for its end."""
        with self.start(argv, ranks_per_host, seconds, options, extra) as job:
            return job.wait()

    def _script(self, *arguments: str) -> str:
        return _checked(["bash", str(SCRIPT), *arguments], _environment(self.prefix))


@functools.cache
def obstacle() -> str:
    """Why hosts cannot be made or used here; empty if they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    command = ["bash", str(SCRIPT), "check"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment("fdt"), timeout=60, check=False)
    return done.stderr.strip() if done.returncode else ""


def require() -> None:
    """Skip the test where hosts cannot be made."""
    if reason := obstacle():
        pytest.skip(reason)


def _environment(prefix: str) -> dict[str, str]:
    environment = {**os.environ, "FEDDIP_HOSTS_PREFIX": prefix}
    beside = Path(sys.executable).with_name("mpirun")
    if "FEDDIP_MPIRUN" not in environment and beside.exists():
        environment["FEDDIP_MPIRUN"] = str(beside)
    return environment


def _checked(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
