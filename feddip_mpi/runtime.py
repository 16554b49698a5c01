"""The only module that reads the environment: launch, device, threads, signals, log."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feddip_mpi.deadlines import die, end_after
from feddip_mpi.errors import InputError
from feddip_mpi.settings import Config

if TYPE_CHECKING:
    import torch

log = logging.getLogger("feddip_mpi")

_NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse.glusterfs",
    "fuse.sshfs", "fuse.ceph", "panfs", "pvfs2", "orangefs", "wekafs", "afs", "9p", "virtiofs",
}  # fmt: skip


def launched_ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """How many ranks the launcher says it has started, and the variable that says so; (1, "") where none does.

    mpirun and mpiexec come first: inside a Slurm step their ranks carry the variables of the daemon's own srun.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environment.get(name, "").isdigit():
            return int(environment[name]), name
    in_step = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    # The step's own number first: the shell of an interactive step, one task, still has the allocation's SLURM_NTASKS.
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"):
        if in_step and environment.get(name, "").isdigit():
            return int(environment[name]), name
    return 1, ""


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank as the launcher calls it, for what happens before MPI starts; 0 where none says."""
    names = ["OMPI_COMM_WORLD_RANK", "PMI_RANK"] + (["SLURM_PROCID"] if "SLURM_STEP_ID" in environment else [])
    told = [environment[name] for name in names if environment.get(name, "").isdigit()]
    return int(told[0]) if told else 0


def ranks_per_node(environment: Mapping[str, str] = os.environ) -> int | None:
    """FEDDIP_RANKS_PER_NODE: so many ranks of a machine are taken for a node of their own (docs/sharp-bits.md)."""
    told = environment.get("FEDDIP_RANKS_PER_NODE", "")
    if not told:
        return None
    if not told.isascii() or not told.isdigit() or int(told) < 1:
        raise InputError(f"FEDDIP_RANKS_PER_NODE: got {told!r}; a whole number from 1, or unset: a node is a machine")
    return int(told)


def fault_tolerant(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Open MPI was started with ULFM (`mpirun --with-ft ulfm`, which sets this parameter for the ranks)."""
    return environment.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes", "on", "enabled", "t", "y")


FAULT_PHASES = (
    "setup", "opening", "plan", "train", "encode", "wait", "exchange", "decode", "server", "evaluate", "commit", "checkpoint",
    "recover", "finish",
)  # fmt: skip


@dataclass
class Fault:
    """For tests: kills this process, as the kernel does when memory runs out, when it enters a phase of a round.

    Attributes:
        phase, round: when; rounds are counted from 1, and so are recoveries where the phase is `recover`.
        delay: milliseconds after that.
    """

    phase: str
    round: int
    delay: float

    def enter(self, phase: str, round: int) -> None:
        """The process enters `phase` of round t, counted from 0."""
        if (phase, round + 1) != (self.phase, self.round):
            return
        if self.delay:
            end_after(self.delay / 1000, die)
        else:
            die()


def faults(rank: int, environment: Mapping[str, str] = os.environ) -> list[Fault]:
    """FEDDIP_FAULT="rank=2 phase=exchange round=5 delay=3": this rank's faults; several are divided by `;`.

    Raises:
        InputError: FEDDIP_FAULT is wrong, or set without FEDDIP_TEST_FAULTS=1: no production run has it by accident.
    """
    text = environment.get("FEDDIP_FAULT", "").strip()
    if text and environment.get("FEDDIP_TEST_FAULTS") != "1":
        raise InputError(
            f"FEDDIP_FAULT={text!r} kills ranks, for tests only: unset it, or set FEDDIP_TEST_FAULTS=1 as well"
        )
    found = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        words = dict(word.partition("=")[::2] for word in part.split())
        try:
            fault = Fault(words["phase"], int(words["round"]), float(words.get("delay", 0)))
            valid = fault.phase in FAULT_PHASES and fault.round >= 1 and 0 <= fault.delay < float("inf")
            if not valid or not words.keys() <= {"rank", "phase", "round", "delay"}:
                raise ValueError
            if int(words["rank"]) == rank:
                found.append(fault)
        except (KeyError, ValueError):
            raise InputError(
                f"FEDDIP_FAULT: got {part!r}; expected rank=R phase=PHASE round=N, N from 1, and perhaps delay=MILLISECONDS; "
                f"PHASE is one of {', '.join(FAULT_PHASES)}"
            ) from None
    return found


def check_launch(size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch that falls into several: every process believes that it is alone, or some believe so together.

    `srun` without the right PMI, or the mpirun of another MPI, starts P programs of one rank each; all exit 0 and
    each overwrites the other's files (measured with Open MPI and MPICH, docs/sharp-bits.md). More ranks than the launcher
    tells of are none of its failures: a heterogeneous step of Slurm counts its parts one by one.
    """
    launched, variable = launched_ranks(environment)
    if size >= launched:
        return
    seen = f"MPI sees {size} rank{'s' * (size > 1)}"
    if variable.startswith("SLURM_"):
        raise InputError(
            f"srun started {launched} tasks, but {seen}: the PMI of srun does not fit this MPI library; use "
            "srun --mpi=pmix (Open MPI) or srun --mpi=pmi2 (MPICH), or mpirun inside the allocation"
        )
    raise InputError(
        f"the launcher started {launched} ranks ({variable}), but {seen}: the launcher does not fit the MPI "
        "library that mpi4py loads (`feddip-mpi doctor` names it); use the mpirun or mpiexec that belongs to it"
    )


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in a job of Slurm."""
    return "SLURM_JOB_ID" in environment


def in_batch_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in a job of Slurm, PBS or LSF: nobody waits at a terminal."""
    return any(name in environment for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"))


def launcher_words(launcher: str) -> list[str]:
    """A `--launcher` as words. Raises InputError where a shell could not read it."""
    try:
        return shlex.split(launcher)
    except ValueError as error:
        raise InputError(f"--launcher {launcher!r}: {error}; quote it as a shell would want it") from None


def default_launcher(crowded: bool, environment: Mapping[str, str] = os.environ) -> str:
    """The command that starts {ranks} ranks here: srun in an allocation, else the mpirun of this Python or of PATH.

    Args:
        crowded: more ranks than cores will be started; those that wait must let others work.

    Raises:
        InputError: there is none.
    """
    if in_allocation(environment) and shutil.which("srun"):
        return "srun --mpi=pmix --ntasks={ranks}"
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun") or shutil.which("mpiexec")
    if not found:
        raise InputError('no mpirun on PATH: load the MPI module, or say --launcher "COMMAND -n {ranks}"')
    shown = subprocess.run([found, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    command = f"{shlex.quote(found)} -n {{ranks}}"
    if "Open MPI" in shown:
        # Its slots are cores, and it would bind ranks with several threads to one of them.
        command += " --oversubscribe --bind-to none" + " --mca mpi_yield_when_idle 1" * crowded
    return command


def launch_environment(threads: int, ours: bool) -> dict[str, str]:
    """The environment of a launcher that this process starts; what the user has set stays.

    Args:
        threads: OpenMP threads a rank.
        ours: the launcher is `default_launcher`'s: where this is root, Open MPI is told that this is meant, as
            jobs/mpirun.sh does.
    """
    # As in jobs/lib.sh, which says why.
    chosen = {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "9223372036854775807",
    }
    if ours and os.geteuid() == 0:
        chosen |= {f"{tool}_ALLOW_RUN_AS_ROOT{end}": "1" for tool in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    return chosen | dict(os.environ)


def prepare_mpi() -> None:
    """Set what MPI reads when it starts, and what its threads must find.

    The Open MPI wheel prints an error for its UCX window component on every node without such hardware; the windows
    used here are shared memory only, so that component is left out.
    """
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    share_one_arena()


def local_rank(rank: int, node_rank: int, environment: Mapping[str, str] = os.environ) -> int:
    """This rank's place on its node, by the rule that held for every launcher tried (docs/sharp-bits.md)."""
    return local_rank_and_rule(rank, node_rank, environment)[0]


def local_rank_and_rule(rank: int, node_rank: int, environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """This rank's place on its node, and what told it."""
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]), "OMPI_COMM_WORLD_LOCAL_RANK"
    if environment.get("SLURM_PROCID") == str(rank) and "SLURM_LOCALID" in environment:
        return int(environment["SLURM_LOCALID"]), "SLURM_LOCALID"
    if "MPI_LOCALRANKID" in environment:
        return int(environment["MPI_LOCALRANKID"]), "MPI_LOCALRANKID"
    return node_rank, "place among the ranks that share memory"


def prepare_torch(config: Config, local: int) -> torch.device:
    """Set threads, precision and determinism, and pick this rank's device (local rank modulo the number of GPUs).

    Raises:
        InputError: `device: cuda` or `precision: tf32` where torch sees no GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; needed to repeat bits
    import torch

    keep_big_blocks()
    torch.set_num_threads(config.threads)
    visible = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cuda" and visible == 0:
        raise InputError("device: cuda, but torch sees no GPU here; use device=auto or cpu, or ask for GPUs in the job")
    if visible == 0:
        if config.precision == "tf32":
            raise InputError(
                "precision: got tf32, which only GPUs have, and there is none in use here; allowed on a CPU: fp32, bf16"
            )
        return torch.device("cpu")
    device = torch.device("cuda", local % visible)
    torch.cuda.set_device(device)
    # cuDNN would take TF32 without being asked.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    if config.memory_fraction < 1:
        torch.cuda.set_per_process_memory_fraction(config.memory_fraction, device)
    # What `use_deterministic_algorithms` sets, without its import of the compiler's settings: 2 s of a core for each rank.
    torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
    # Every tensor here is written before it is read: filling fresh ones with NaN would only cost a pass over each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not config.deterministic
    return device


def keep_big_blocks(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep freed big blocks for the next batch; returns whether it was told to.

    By default it hands each back to the system, and a fresh 93 MB tensor costs 34 ms of page faults. Left alone where
    the environment says something else (jobs/lib.sh says the same), and where the C library is not glibc.
    """
    if any(name in environment for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    try:
        allow = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(allow(mmap_threshold, 2**30)) and bool(allow(trim_threshold, 2**31 - 1))


def share_one_arena(environment: Mapping[str, str] = os.environ) -> bool:
    """Let all threads allocate where the main thread does; returns whether glibc was told to. Before MPI starts any.

    The arenas that glibc gives them otherwise hold no big block, whatever it was told to keep: AlexNet's step in a thread
    (`clients_at_once`) takes 1.2 times as long. An arena that exists already may still be given to a thread. Left alone
    where the environment says something else, and where the C library is not glibc.
    """
    if "MALLOC_ARENA_MAX" in environment or "GLIBC_TUNABLES" in environment:
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(-8, 1))  # M_ARENA_MAX of malloc.h
    except (OSError, AttributeError):
        return False


def peak_memory(device: torch.device | None = None) -> tuple[int, int]:
    """(host, device) peak bytes of this process."""
    host = _peak_resident()
    if device is None or device.type != "cuda":
        return host, 0
    import torch

    # What torch took of the GPU, not only what tensors took of that: recorded steps keep theirs between two batches.
    return host, int(torch.cuda.max_memory_reserved(device))


def _peak_resident() -> int:
    """Peak resident bytes of this program. `getrusage` would count what the process was before it became this program."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_log(folder: Path | None, rank: int) -> None:
    """Messages of all ranks go to stderr, rank 0's also to `folder`/run.log (appended)."""
    logging.raiseExceptions = False  # a full disk is told once, by whoever saves, not by a dump for each line
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO)
    text = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    stream = logging.StreamHandler(sys.stderr)
    stream.setLevel(logging.WARNING)
    stream.setFormatter(text)
    log.addHandler(stream)
    if folder is not None and rank == 0:
        file = logging.FileHandler(folder / "run.log", encoding="utf-8")
        file.setFormatter(text)
        log.addHandler(file)


def hardware() -> dict[str, str | int]:
    """What a result has to name: host, processor with its vector instructions, cores."""
    told = _cpu_info()
    vectors = next((name for flag, name in _VECTORS.items() if flag in told.get("flags", "").split()), "")
    processor = ", ".join(part for part in (told.get("model name", ""), vectors) if part)
    return {"host": socket.gethostname(), "processor": processor, "cores": cores()}


# Processors of one name may have other vectors, and with them other speeds and other last bits. Widest first.
_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}


@lru_cache
def _cpu_info() -> dict[str, str]:
    """What Linux says of the first core."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def lacks_bf16() -> bool:
    """Whether this is an x86 CPU without instructions for bf16, on which it is emulated."""
    flags = _cpu_info().get("flags", "").split()
    return bool(flags) and not {"avx512_bf16", "amx_bf16"} & set(flags)


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def device_name(device: torch.device) -> str:
    """What trains, as results name it: CPU, or the GPU's name."""
    if device.type != "cuda":
        return device.type.upper()
    import torch

    return str(torch.cuda.get_device_name(device))


def process() -> dict[str, Any]:
    """This process: pid, cores it may run on, OMP_NUM_THREADS, and the node's memory, shared one too, in bytes."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "pid": os.getpid(),
        "cores": sorted(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_available_bytes": min(memory.available, *_rooms_of_groups()),
        "memory_bytes": memory.total,
        "shared_memory": shared_memory(),
    }


def _rooms_of_groups(root: Path = Path("/")) -> list[int]:
    """Bytes that the control groups of this process leave it: a batch system's limit is below the node's memory.

    What can be given back at once (file pages not in use) counts as free, as in the node's own number.
    """
    kinds = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
    rooms = [1 << 62]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return rooms
    for line in lines:
        _, controllers, place = line.split(":", 2)
        for name, limit, used in kinds:
            if name not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / name
            group = top / place.strip("/")
            for folder in (group, *(parent for parent in group.parents if parent == top or top in parent.parents)):
                with contextlib.suppress(OSError, ValueError):  # no limit is the word max
                    statistics = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                    free = int((folder / limit).read_text()) - int((folder / used).read_text())
                    # The groups below are part of what is used; version 1 has another name for what they could give back.
                    pages = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
                    rooms.append(max(0, free + int(pages)))
    return rooms


def shared_memory(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """The folder in which MPI makes the memory that ranks share, and the bytes free there; 2^62 where nothing says."""
    folder = environment.get("OMPI_MCA_osc_sm_backing_directory", "/dev/shm")
    try:
        found = os.statvfs(folder)
    except OSError:
        return folder, 1 << 62
    return folder, found.f_bavail * found.f_frsize


def file_system(path: Path) -> dict[str, Any]:
    """What a folder (or the nearest parent that exists) lies on: mount point, type, whether it can be written."""
    import psutil

    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists()).resolve()
    above = {str(p) for p in (existing, *existing.parents)}
    mounts = [m for m in psutil.disk_partitions(all=True) if m.mountpoint in above]
    # Of mounts on one point the last covers the others.
    mount = max(enumerate(mounts), key=lambda pair: (len(pair[1].mountpoint), pair[0]), default=(0, None))[1]
    kind = mount.fstype if mount else "unknown"
    return {
        "path": str(path),
        "mount": mount.mountpoint if mount else "unknown",
        "type": kind,
        "network": kind.lower() in _NETWORK_FILE_SYSTEMS,
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free_bytes": psutil.disk_usage(str(existing)).free,
    }


def versions() -> dict[str, str]:
    """Versions of what computes the results."""
    from feddip_mpi import __version__

    return {"feddip_mpi": __version__, "python": sys.version.split()[0], **_library_versions()}


@cache
def _library_versions() -> dict[str, str]:
    """Each of these files is a hundred lines to parse, and every checkpoint names them."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "numpy", "h5py", "mpi4py")}
