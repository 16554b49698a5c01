"""A real Slurm for the tests: munged, slurmctld and one slurmd a node as plain processes in a temporary folder."""

from __future__ import annotations

import ctypes
import functools
import glob
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "jobs"
PROGRAMS = Path(__file__).resolve().parent / "programs"

_PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
_SBIN = ("/usr/sbin", "/usr/local/sbin")
# The daemons, their step daemons and the jobs inherit it: by it are found those that are left.
_MARK = "FEDDIP_TEST_SLURM"
_ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING")
_COMMAND_SECONDS = 30
_START_SECONDS = 30
_STOP_SECONDS = 20
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG

# What was needed for several nodes on one host is explained where it stands.
_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
# A folder of its own for each node, or the PMIx servers of two nodes make the same one.
TmpFS={folder}/tmp.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=30
SlurmctldTimeout=30
InactiveLimit=0
KillWait=10
MinJobAge=600
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
NodeName=node[1-{nodes}] NodeAddr=127.0.0.1 NodeHostname={host} Port=[{first}-{last}] CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=node[1-{nodes}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


class Slurm:
    """A running Slurm. Use it as a context manager: leaving it ends all jobs, daemons and what they left."""

    def __init__(self, nodes: int, folder: Path, extra: dict[str, str] | None = None) -> None:
        """Start it and wait until all nodes are idle.

        Args:
            nodes: virtual nodes on this host, two cores and two (pretended) GPUs each.
            folder: for its configuration, logs and state, and for the output of jobs.
            extra: environment variables of all jobs.
        """
        self.folder, self._nodes = folder, nodes
        self._mark = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            _MARK: self._mark,
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"], *_SBIN)),
            "PYTHONFAULTHANDLER": "1",
            **(extra or {}),
        }
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Slurm:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.folder.chmod(0o711)  # munged refuses a socket that others could not reach
        for name in ("state", *(f"{kind}.node{n}" for kind in ("spool", "tmp") for n in range(1, self._nodes + 1))):
            (self.folder / name).mkdir()
        ports = _free_ports(2 + self._nodes)
        text = _CONFIGURATION.format(
            host=socket.gethostname(),
            folder=self.folder,
            ports=ports,
            nodes=self._nodes,
            first=ports[2],
            last=ports[-1],
        )
        (self.folder / "slurm.conf").write_text(text)
        # Two devices that exist everywhere stand for the GPUs: nothing opens them.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", *(f"--{name}={self.folder}/munge.{end}" for name, end in own.items()))
        self._await(lambda: (self.folder / "munge.socket").exists(), "munged does not listen", _START_SECONDS)
        self._daemon("slurmctld", "-D", "-c")
        for number in range(1, self._nodes + 1):
            self._daemon("slurmd", "-D", "-N", f"node{number}")
        self._await(
            lambda: self.query("sinfo", "-h", "-t", "idle", "-o", "%D") == str(self._nodes),
            "the nodes are not idle", _START_SECONDS,
        )  # fmt: skip

    def _daemon(self, program: str, *arguments: str) -> None:
        with open(self.folder / f"{program}-{len(self._daemons)}.out", "wb") as output:
            process = subprocess.Popen(
                [_find(program) or program, *arguments],
                env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        self._daemons.append(process)

    def stop(self) -> None:
        """End every job, then the daemons in reverse order, then whatever still carries the mark."""
        if len(self._daemons) > 1:
            self.query("scancel", "--full", "--signal=KILL", "--user=root")
            self.query("scancel", "--user=root")
            with suppress(AssertionError):
                self._await(lambda: not self.query("squeue", "-h"), "jobs do not end", _STOP_SECONDS)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Everything that this Slurm has started and that is still there: daemons, jobs, ranks."""
        mark = f"{_MARK}={self._mark}"
        return [pid for pid in _pids() if mark in _variables(pid)]

    def ranks(self) -> list[int]:
        """Processes of the program itself."""
        return [pid for pid in self.processes() if b"feddip_mpi" in _read(f"/proc/{pid}/cmdline")]

    def run(self, *words: str, extra: dict[str, str] | None = None) -> str:
        """A command of Slurm; its output. Fails if it does."""
        done = self._call(words, extra)
        assert done.returncode == 0, f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def query(self, *words: str) -> str:
        """The same, but what fails (an id that is forgotten, a daemon that does not answer yet) says nothing."""
        done = self._call(words)
        return done.stdout.strip() if done.returncode == 0 else ""

    def submit(self, *words: str, extra: dict[str, str] | None = None) -> Job:
        """`sbatch words` from the top of the repository; `extra`: settings for the script."""
        output = self.folder / f"job-{next(self._numbers)}.log"
        number = self.run("sbatch", "--parsable", f"--output={output}", "--time=10", *words, extra=extra)
        return Job(self, number, output)

    def bash(self, *words: str, extra: dict[str, str] | None = None) -> str:
        """A script that submits jobs by itself."""
        return self.run("bash", *words, extra=extra)

    def log(self) -> str:
        """What the daemons wrote last, for messages."""
        files = [*sorted(self.folder.glob("slurm*.log")), *self.folder.glob("munged*.out")]
        return "\n".join(f"--- {path.name}\n{_read(path).decode(errors='replace')[-800:]}" for path in files)

    def _call(self, words: Sequence[str], extra: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                words, env=self.environment | (extra or {}), cwd=ROOT, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, "", "does not answer")

    def _await(self, happened: Callable[[], bool], otherwise: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                raise AssertionError(f"{otherwise} within {seconds} s\n{self.log()}")
            time.sleep(0.05)


class Job:
    """A submitted job."""

    def __init__(self, slurm: Slurm, number: str, output: Path) -> None:
        self._slurm, self.id, self.output = slurm, number, output
        self._hurried: set[str] = set()  # restarts that need not wait

    @property
    def text(self) -> str:
        """What the job has written, all starts together."""
        return _read(self.output).decode(errors="replace")

    def shows(self, name: str) -> str:
        """A field of `scontrol show job`; of the first task for an array."""
        words = self._slurm.query("scontrol", "--oneliner", "show", "job", self.id).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def wait_until(self, happened: Callable[[], object], seconds: float = 120) -> None:
        """Poll; fails if the time is over, or the job is (so it cannot happen any more)."""
        deadline = time.monotonic() + seconds
        while not happened():
            state = self.shows("JobState")
            if (state not in _ALIVE and not happened()) or time.monotonic() > deadline:
                raise AssertionError(f"job {self.id} ({state}): did not happen\n{self.text}\n{self._slurm.log()}")
            time.sleep(0.05)

    def wait(self, seconds: float = 180) -> Job:
        """Wait for the end; a job that is put back into the queue is started at once."""
        deadline = time.monotonic() + seconds
        # A cancelled job is CANCELLED at once, but listed until the last of its processes is gone.
        while self.shows("JobState") in _ALIVE or self._slurm.query("squeue", "-h", "-j", self.id):
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"job {self.id} is {self.shows('JobState')} after {seconds} s\n{self.text}\n{self._slurm.log()}"
                )
            self.start_now()
            time.sleep(0.1)
        return self

    def start_now(self) -> None:
        """Slurm lets a job that was requeued wait for two minutes; not here.

        Its nodes refuse a job for a second after they have killed it ("Job credential revoked"), so not at once either.
        """
        restart = self.shows("Restarts")
        if restart not in self._hurried and self.shows("JobState") == "PENDING" and self.shows("Reason") == "BeginTime":
            self._hurried.add(restart)
            self._slurm.query("scontrol", "update", f"JobId={self.id}", "StartTime=now+2seconds")

    def expect(self, state: str, code: int) -> Job:
        """Fails unless the job ended like this."""
        found = self.shows("JobState"), self.shows("ExitCode")
        assert found == (state, f"{code}:0"), f"job {self.id}: {found}\n{self.text}\n{self._slurm.log()}"
        return self


@functools.cache
def obstacle() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if sys.platform != "linux":
        return "Slurm's daemons run on Linux"
    missing = [package for program, package in _PROGRAMS.items() if not _find(program)]
    if not glob.glob("/usr/lib/*/pmix*/lib/libpmix.so") and not glob.glob("/usr/lib*/libpmix.so"):
        missing.append("libpmix-dev")
    if missing:
        return f"no Slurm: these Debian packages are missing: {', '.join(missing)} (jobs/test.sh installs them as root)"
    return "" if os.geteuid() == 0 else "Slurm's daemons start jobs as root only"


def require() -> None:
    """Skip the test where there can be no Slurm."""
    if reason := obstacle():
        pytest.skip(reason)


def mpirun() -> str:
    """The launcher of the environment's own MPI."""
    beside = Path(sys.executable).with_name("mpirun")
    return os.environ.get("FEDDIP_MPIRUN") or (str(beside) if beside.exists() else "mpirun")


def require_open_mpi() -> None:
    """Skip the test where the environment's own MPI is another one: `srun --mpi=pmix` is for Open MPI."""
    shown = subprocess.run(
        [mpirun(), "--version"], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
    )
    if "Open MPI" not in shown.stdout:
        pytest.skip("the environment's MPI is not Open MPI")


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", ""), *_SBIN)))


def _free_ports(count: int) -> list[int]:
    """Two ports, then a range of adjacent ones, all free at this moment."""
    for first in range(20000 + os.getpid() % 5000, 32000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise AssertionError("no free ports")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _variables(pid: int) -> list[str]:
    return _read(f"/proc/{pid}/environ").decode(errors="replace").split("\0")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
