"""The environment: launches that are wrong without saying so, local ranks, signals, threads, the log."""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import Alone
from test_methods import build

from feddip_mpi import graphs, rounds, runtime, session
from feddip_mpi.errors import InputError
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.settings import Config
from feddip_mpi.stopping import StopFlag

STEP = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("what", "size", "environment"),
    [
        ("one process, no launcher", 1, {}),
        ("mpirun -n 4", 4, {"OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "0"}),
        ("mpirun -n 1", 1, {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}),
        ("mpiexec.hydra -n 1", 1, {"PMI_SIZE": "1", "PMI_RANK": "0"}),
        ("sbatch script, no launcher", 1, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}),
        ("salloc shell, no launcher", 1, {"SLURM_NPROCS": "4", "SLURM_JOB_ID": "7"}),
        ("srun -n 1", 1, {**STEP, "SLURM_NTASKS": "1"}),
        ("the shell of salloc -n 4 in a step of its own", 1, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}),
        ("srun --mpi=pmix, Open MPI", 4, {**STEP, "PMIX_RANK": "2"}),
        ("srun --mpi=pmi2, MPICH", 4, {**STEP, "PMI_RANK": "2", "PMI_SIZE": "4"}),
        ("mpirun -n 1 on nodes of a larger job", 1, {**STEP, "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}),
        ("mpiexec -n 1 on nodes of a larger job", 1, {**STEP, "PMI_SIZE": "1", "PMI_RANK": "0"}),
        ("mpirun in sbatch: the daemon's Slurm variables", 4, {**STEP, "OMPI_COMM_WORLD_SIZE": "4"}),
        ("mpirun -n 2 inside srun -n 4", 2, {**STEP, "OMPI_COMM_WORLD_SIZE": "2"}),
        ("mpiexec -n 2 inside srun -n 4", 2, {**STEP, "PMI_SIZE": "2"}),
        ("srun of two parts with 4 tasks each, which count by themselves", 8, {**STEP, "SLURM_STEP_NUM_TASKS": "4"}),
    ],
)
def test_good_launches_are_accepted(what: str, size: int, environment: dict[str, str]) -> None:
    runtime.check_launch(size, environment)


@pytest.mark.parametrize(
    ("what", "environment"),
    [
        ("srun --mpi=none", STEP),
        ("srun, older name of the variable", {**STEP, "SLURM_NTASKS": "", "SLURM_NPROCS": "4"}),
        ("srun --mpi=pmi2 with Open MPI", {**STEP, "PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_PROCID": "3"}),
        ("srun --mpi=pmix with MPICH", {**STEP, "PMIX_RANK": "3", "SLURM_PROCID": "3"}),
        ("mpiexec.hydra with Open MPI", {"PMI_RANK": "1", "PMI_SIZE": "4"}),
        ("mpirun of Open MPI with MPICH", {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}),
    ],
)
def test_launches_of_lonely_processes_are_refused(what: str, environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="4 (tasks|ranks).* MPI sees 1 rank:.*mpirun"):
        runtime.check_launch(1, environment)


@pytest.mark.parametrize(
    "environment", [{"OMPI_COMM_WORLD_SIZE": "8"}, {"PMI_SIZE": "8"}, {**STEP, "SLURM_NTASKS": "8"}]
)
def test_a_launch_that_falls_into_two_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="8 (tasks|ranks).* MPI sees 4 ranks:.*mpirun"):
        runtime.check_launch(4, environment)


@pytest.mark.parametrize(
    ("what", "rank", "environment", "expected"),
    [
        ("mpirun: Open MPI knows", 5, {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1),
        # Under mpirun inside Slurm the Slurm variables are those of the daemon, also on rank 0.
        ("mpirun in Slurm", 5, {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "0"}, 1),
        ("srun", 5, {"SLURM_PROCID": "5", "SLURM_LOCALID": "3"}, 3),
        ("hydra in Slurm", 5, {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "MPI_LOCALRANKID": "4"}, 4),
        ("hydra", 5, {"MPI_LOCALRANKID": "4"}, 4),
        ("daemon's variables only", 5, {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, 2),
        ("nothing", 5, {}, 2),
    ],
)
def test_local_rank_table(what: str, rank: int, environment: dict[str, str], expected: int) -> None:
    assert runtime.local_rank(rank, 2, environment) == expected


def test_prepare_mpi_leaves_a_choice_of_the_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_MCA_osc", raising=False)
    name = "OMPI_MCA_osc"
    runtime.prepare_mpi()
    assert os.environ[name] == "^ucx"
    monkeypatch.setenv(name, "sm")
    runtime.prepare_mpi()
    assert os.environ[name] == "sm"


def test_prepare_torch_sets_threads_and_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "mine")
    before = torch.get_num_threads()
    try:
        assert runtime.prepare_torch(Config(device="cpu", threads=2), 0) == torch.device("cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "mine"


@pytest.mark.parametrize(("local", "index"), [(0, 0), (1, 1), (2, 0), (5, 1)])
def test_ranks_share_the_gpus_in_turn(local: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "mine")
    device = runtime.prepare_torch(Config(deterministic=False), local)
    assert device == torch.device("cuda", index)
    assert chosen == [device]


def test_cuda_where_there_is_none_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "mine")
    with pytest.raises(InputError, match="device: cuda"):
        runtime.prepare_torch(Config(device="cuda"), 0)
    assert runtime.prepare_torch(Config(device="auto"), 0) == torch.device("cpu")


def test_peak_memory_is_in_bytes() -> None:
    host, device = runtime.peak_memory(torch.device("cpu"))
    assert 30e6 < host < 1e12  # an interpreter with torch takes more than 30 MB
    assert device == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere only getrusage is there")
def test_peak_memory_is_not_that_of_the_launcher() -> None:
    """A launcher with much memory starts a small program: its peak is not handed down."""
    large = torch.ones(2**27)  # 512 MB
    program = "from feddip_mpi import runtime; print(runtime.peak_memory()[0])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3e8 < 4 * large.numel()


@pytest.fixture
def own_log() -> Iterator[None]:
    log = runtime.log
    before = (list(log.handlers), log.propagate, log.level)
    yield
    for handler in log.handlers:
        handler.close()
    log.handlers[:], log.propagate, log.level = before


def test_rank_0_appends_to_the_run_log_and_others_do_not(
    tmp_path: Path, own_log: None, capsys: pytest.CaptureFixture
) -> None:
    for rank in (0, 1, 0):
        runtime.start_log(tmp_path, rank)
        logging.getLogger("feddip_mpi").info("quiet %d", rank)
        logging.getLogger("feddip_mpi").warning("loud %d", rank)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "rank 0 INFO quiet 0", "rank 0 WARNING loud 0", "rank 0 INFO quiet 0", "rank 0 WARNING loud 0",
    ]  # fmt: skip
    shown = capsys.readouterr().err
    assert "quiet" not in shown and shown.count("loud") == 3


def test_the_log_opens_with_words(tmp_path: Path, own_log: None) -> None:
    session._open_log(Alone(), RunFolder(tmp_path), "start: feddip")  # type: ignore[arg-type]
    first, second = (tmp_path / "run.log").read_text().splitlines()
    assert first.endswith("INFO start: feddip")
    assert " INFO with feddip_mpi " in second and f", torch {runtime.versions()['torch']}, " in second
    assert not set("{}'") & set(first + second)


def test_results_name_hardware_and_versions() -> None:
    hardware, versions = runtime.hardware(), runtime.versions()
    assert hardware["host"] and hardware["cores"] == len(os.sched_getaffinity(0))
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert set(versions) == {"feddip_mpi", "python", "torch", "numpy", "h5py", "mpi4py"}


@pytest.mark.parametrize(
    ("flags", "processor", "lacks"),
    [
        ("fpu avx2 avx512f avx512_bf16", "Some CPU, AVX-512", False),
        ("fpu avx2 avx512f", "Some CPU, AVX-512", True),
        ("fpu avx2", "Some CPU, AVX2", True),
        ("fpu", "Some CPU", True),
        (None, "Some CPU", False),  # no x86: nothing is known
    ],
)
def test_a_processor_is_named_with_its_vectors_and_asked_for_bf16(
    flags: str | None, processor: str, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"model name": "Some CPU"} | ({"flags": flags} if flags is not None else {})
    monkeypatch.setattr(runtime, "_cpu_info", lambda: told)
    assert runtime.hardware()["processor"] == processor
    assert runtime.lacks_bf16() == lacks


@pytest.mark.parametrize(
    ("precision", "lacks", "owner", "said"),
    [("bf16", True, True, True), ("bf16", False, True, False), ("fp32", True, True, False), ("bf16", True, False, False)],
)  # fmt: skip
def test_bf16_that_is_emulated_is_told_once(
    precision: str, lacks: bool, owner: bool, said: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(runtime, "lacks_bf16", lambda: lacks)
    monkeypatch.setattr(session, "_play_on", lambda *_: None)
    watchdog: Any = None
    run = session.Run(RunFolder(tmp_path), StopFlag(), ExitStack(), watchdog, owner)
    built = build("feddip", precision=precision)
    session._play(built, run, rounds.initial_state(built), [])
    assert ("bf16 is emulated by this CPU" in caplog.text) == said


@pytest.mark.parametrize(
    ("at_once", "recorded", "participants", "said"),
    [(2, True, 2, True), (2, True, 1, False), (2, False, 2, False), (1, True, 2, False)],
)
def test_that_clients_at_once_are_not_recorded_is_told(
    at_once: int, recorded: bool, participants: int, said: bool
) -> None:
    built = build("feddip", clients_at_once=at_once, participants=participants)
    built.trainer.recorder = graphs.Recorder() if recorded else None
    assert session._cautions(built) == [
        f"clients_at_once={at_once}: clients that train at once are not recorded (cuda_graphs): one after another LeNet-5's were "
        "five times as fast on an H200"
    ] * said  # fmt: skip


@pytest.mark.parametrize("version", [1, 2])
def test_a_batch_system_s_limit_is_the_memory_that_is_free(tmp_path: Path, version: int) -> None:
    """The job's group has the limit, the step's below it has none; file pages can be given back."""
    top = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    (tmp_path / "proc/self").mkdir(parents=True)
    line = "4:cpu,memory:/slurm/job/step" if version == 1 else "0::/slurm/job/step"
    (tmp_path / "proc/self/cgroup").write_text(f"1:name=systemd:/\n{line}\n")
    for place, most in (("slurm", 9000), ("slurm/job", 5000), ("slurm/job/step", 2**63 if version == 1 else "max")):
        folder = top / place
        folder.mkdir(parents=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("3000\n")
        pages = "inactive_file 0\ntotal_inactive_file 400\n" if version == 1 else "inactive_file 400\n"
        (folder / "memory.stat").write_text(f"anon 2500\n{pages}")
    assert min(runtime._rooms_of_groups(tmp_path)) == 5000 - 3000 + 400
    assert min(runtime._rooms_of_groups(tmp_path / "none")) == 1 << 62
    assert 0 < runtime.process()["memory_available_bytes"] <= runtime.process()["memory_bytes"]


def test_where_ranks_share_memory_and_what_is_free_there(tmp_path: Path) -> None:
    folder, free = runtime.shared_memory({"OMPI_MCA_osc_sm_backing_directory": str(tmp_path)})
    assert folder == str(tmp_path) and 0 < free < 1 << 62
    assert runtime.shared_memory({"OMPI_MCA_osc_sm_backing_directory": "/nowhere"}) == ("/nowhere", 1 << 62)
    assert runtime.shared_memory({})[0] == "/dev/shm"


def test_the_launcher_s_rank_before_mpi_starts() -> None:
    assert runtime.launched_rank({}) == 0
    assert runtime.launched_rank({"OMPI_COMM_WORLD_RANK": "3", "PMI_RANK": "1"}) == 3
    assert runtime.launched_rank({"PMI_RANK": "2"}) == 2
    assert runtime.launched_rank({"SLURM_PROCID": "2"}) == 0  # a batch script that starts no step
    assert runtime.launched_rank({"SLURM_PROCID": "2", "SLURM_STEP_ID": "0"}) == 2


def test_ranks_per_node() -> None:
    assert runtime.ranks_per_node({}) is runtime.ranks_per_node({"FEDDIP_RANKS_PER_NODE": ""}) is None
    assert runtime.ranks_per_node({"FEDDIP_RANKS_PER_NODE": "2"}) == 2
    for wrong in ("0", "-1", "two", "1.5", "²"):
        with pytest.raises(InputError, match="FEDDIP_RANKS_PER_NODE"):
            runtime.ranks_per_node({"FEDDIP_RANKS_PER_NODE": wrong})


@pytest.mark.parametrize(
    ("environment", "tolerant"),
    [({}, False), ({"OMPI_MCA_mpi_ft_enable": "0"}, False), ({"OMPI_MCA_mpi_ft_enable": "1"}, True)],
)
def test_mpirun_tells_the_ranks_that_they_may_survive(environment: dict[str, str], tolerant: bool) -> None:
    assert runtime.fault_tolerant(environment) is tolerant


def test_a_fault_names_rank_phase_and_round() -> None:
    told = {
        "FEDDIP_FAULT": "rank=2 phase=train round=3; rank=0 phase=commit round=1 delay=2.5",
        "FEDDIP_TEST_FAULTS": "1",
    }
    assert runtime.faults(2, told) == [runtime.Fault("train", 3, 0)]
    assert runtime.faults(0, told) == [runtime.Fault("commit", 1, 2.5)]
    assert runtime.faults(1, told) == runtime.faults(0, {}) == []


@pytest.mark.parametrize(
    "text",
    [
        "rank=0 phase=lunch round=1", "rank=0 phase=train round=0", "rank=x phase=train round=1", "phase=train round=1", "now",
        "rank=0 phase=train round=1 delay=-1", "rank=0 phase=train round=1 delay=nan", "rank=0 phase=train round=1 how=x",
    ],
)  # fmt: skip
def test_a_wrong_fault_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="FEDDIP_FAULT: got .*PHASE is one of setup, opening, plan"):
        runtime.faults(0, {"FEDDIP_FAULT": text, "FEDDIP_TEST_FAULTS": "1"})


def test_faults_need_a_second_word() -> None:
    with pytest.raises(InputError, match="FEDDIP_TEST_FAULTS=1"):
        runtime.faults(0, {"FEDDIP_FAULT": "rank=0 phase=train round=1"})


def test_tf32_without_a_gpu_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "mine")
    with pytest.raises(InputError, match=r"precision: got tf32.*fp32, bf16"):
        runtime.prepare_torch(Config(device="cpu", precision="tf32"), 0)


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", False)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_precision_determinism_and_memory_on_a_gpu(
    precision: str, allowed: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings only: no GPU has run this test."""
    shares = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "mine")
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
    try:
        runtime.prepare_torch(Config(precision=precision, deterministic=deterministic, memory_fraction=0.25), 0)
        assert cudnn.allow_tf32 == matmul.allow_tf32 == allowed
        assert torch.are_deterministic_algorithms_enabled() == deterministic != cudnn.benchmark
        assert shares == [0.25]
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before[:3]
        torch.use_deterministic_algorithms(before[3])


def test_big_blocks_are_kept_unless_the_environment_says_otherwise() -> None:
    assert runtime.keep_big_blocks({}) == (platform.libc_ver()[0] == "glibc")
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        assert not runtime.keep_big_blocks({name: "1"})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_freed_big_block_costs_no_new_page_faults() -> None:
    program = """
import resource, torch
from feddip_mpi import runtime
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**23)  # 32 MB, written
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults(); assert runtime.keep_big_blocks({}); faults(); print(first, faults())
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after * 10 < before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize("shared", [False, True])
def test_a_thread_keeps_big_blocks_where_it_shares_the_arena(shared: bool) -> None:
    program = f"""
from feddip_mpi import runtime
assert not {shared} or runtime.share_one_arena({{}})
assert runtime.keep_big_blocks({{}})
import resource, threading, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**25)  # 128 MB, written
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def work():
    print(faults(), faults())
thread = threading.Thread(target=work); thread.start(); thread.join()
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    faults = int(done.stdout.split()[1])
    assert (faults < 1000) == shared, faults


def test_the_arena_is_left_alone_where_the_environment_says_something_else() -> None:
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        assert not runtime.share_one_arena({name: "1"})
