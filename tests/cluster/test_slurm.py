"""The scripts of jobs/, unchanged, on a real Slurm: whatever ends a job, the run ends with the bits of one never stopped."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import launch
import pytest
import runs
import slurm as slurms
from slurm import JOBS, Job, Slurm

from feddip_mpi import config

pytestmark = [pytest.mark.cluster, pytest.mark.mpi]

# Slowed down (see patient_models), a round takes most of a second after the first three: half a minute for what happens.
SETTINGS = runs.settings(
    model__name="patient_models:patient", rounds=40, checkpoint__every=2, checkpoint__best=False, eval__every=20
)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
SHORT = runs.settings(model__name="patient_models:patient", rounds=4)


class Started:
    """A run of one test: its folder, the settings of its script, and the brake."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.run, self.log = slurm, folder / "run", folder / "jobs.log"
        self._brake, self._config = folder / "slow", folder / "config.yaml"
        self._config.write_text("")
        self.environment = {
            "RUN": str(self.run), "CONFIG": str(self._config), "FEDDIP_TEST_SLOW": str(self._brake), "LAUNCHER": "mpirun",
            "MPIRUN": slurms.mpirun(),
        }  # fmt: skip

    def submit(
        self, script: str, *options: str, slow: bool = False, settings: list[str] = SETTINGS, **more: str
    ) -> Job:
        """`sbatch options jobs/script settings`, with more settings of the script by name."""
        self.brake(slow)
        return self.slurm.submit(*options, str(JOBS / script), *settings, extra=self.environment | more)

    def configure(self, settings: list[str]) -> None:
        """`--set` options as a configuration file instead, for scripts that take none."""
        text = json.dumps(config.to_dict(config.load(self._config, settings[1::2])))
        self._config.write_text(text)  # JSON is YAML

    def brake(self, on: bool) -> None:
        self._brake.touch() if on else self._brake.unlink(missing_ok=True)

    @property
    def saved(self) -> int:
        """The round of the newest checkpoint; 0 before there is one."""
        return max((int(path.stem[6:]) for path in self.run.glob("checkpoints/round-*.h5")), default=0)

    def saves_after(self, job: Job, round: int) -> None:
        job.wait_until(lambda: self.saved > round)


@pytest.fixture
def started(slurm: Slurm, tmp_path: Path) -> Started:
    launch.require("default")
    return Started(slurm, tmp_path)


@pytest.fixture(scope="module")
def never_stopped(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank, without a launcher and without Slurm."""
    folder = tmp_path_factory.mktemp("never")
    (folder / "empty.yaml").write_text("")
    argv = [*launch.FEDDIP, "train", str(folder / "empty.yaml"), *SETTINGS, "--out", str(folder / "run")]
    launch.run(argv, extra={"PYTHONPATH": slurm.environment["PYTHONPATH"]}).expect(0)
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def meanwhile(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Started, Job]]:
    """Jobs that need nobody to do anything for a while: they run beside the other tests, and have tests of their own.

    Slurm looks at time limits every 30 seconds only.
    """
    launch.require("default")
    limited, grid, study = (Started(slurm, tmp_path_factory.mktemp(name)) for name in ("limited", "grid", "study"))
    grid.environment |= {"RUNS": str(grid.run), "SEEDS": "1 2", "SPARSITIES": "0.8 0.95"}
    study.configure(SHORT)
    study.environment |= {
        "STUDY": str(study.run), "RANK_COUNTS": "1 2", "RANKS_PER_NODE": "1", "ROUNDS": "4", "WARM_UP": "1",
        "STRONG_PARTICIPANTS": "4", "WEAK_PARTICIPANTS": "2",
    }  # fmt: skip
    options = (*TWO_NODES, "--time=1", "--signal=B:USR1@30")
    jobs = {
        "limited": (limited, limited.submit("slurm-cpu.sh", *options, slow=True, FEDDIP_TEST_SLEEP="0.2")),
        "grid": (grid, grid.submit("slurm-array.sh", "--array=0-3", "--ntasks-per-node=1", settings=SHORT)),
        "sweep": sweep(slurm, tmp_path_factory.mktemp("sweep")),
    }
    options = ("--ntasks-per-node=1", "--time=10", "--open-mode=append", f"--output={study.log}")
    said = slurm.bash("jobs/slurm-scaling.sh", *options, extra=study.environment)
    return jobs | {"study": (study, Job(slurm, re.findall(r"collects into \S+: job (\d+)", said)[0], study.log))}


def sweep(slurm: Slurm, folder: Path) -> tuple[Started, Job]:
    """The array that `feddip-mpi sweep --slurm` writes for three cells."""
    started = Started(slurm, folder)
    started.configure(SHORT)
    (folder / "grid.yaml").write_text("base: config.yaml\ngrid: {method: [fedavg, feddip], seed: [5, 6]}\n"
                                      "exclude: [{method: fedavg, seed: 6}]\n")  # fmt: skip
    slurm.run(
        sys.executable, "-m", "feddip_mpi", "sweep", str(folder / "grid.yaml"), "--out", str(started.run), "--slurm"
    )
    return started, slurm.submit(str(started.run / "_sweep" / "array.sh"), extra=started.environment)


@pytest.fixture(autouse=True)
def all_nodes_serve(slurm: Slurm) -> Iterator[None]:
    yield
    slurm.query("scontrol", "update", "NodeName=node[1-4]", "State=RESUME")


def requeues(job: Job) -> int:
    """How often the script has put its job back into the queue."""
    return len(re.findall(r"^\[job .* requeued$", job.text, re.MULTILINE))


def requeue(job: Job, started: Started, then: Callable[[], object] = lambda: None) -> None:
    """`scontrol requeue`; `then` happens before the job starts again."""
    started.slurm.run("scontrol", "requeue", job.id)
    job.wait_until(lambda: job.shows("JobState") == "PENDING")
    then()


def test_a_rank_that_dies_does_not_end_the_job(started: Started, never_stopped: Path) -> None:
    launch.require("ulfm")
    fault = {"FEDDIP_FAULT": "rank=0 phase=exchange round=7", "FEDDIP_TEST_FAULTS": "1"}
    job = started.submit("slurm-cpu.sh", *TWO_NODES, SURVIVE="1", **fault).wait().expect("COMPLETED", 0)
    assert json.loads((started.run / "finished.json").read_text())["ranks_lost"] == [0], job.text
    runs.assert_equal(never_stopped, started.run)


@pytest.mark.parametrize(
    "script, options, settings",
    [
        ("slurm-cpu.sh", TWO_NODES, {"LAUNCHER": "mpirun"}),
        ("slurm-gpu.sh", (*TWO_NODES, "--gpus-per-node=2", "--cpus-per-task=1"), {"LAUNCHER": "srun", "DEVICE": "cpu"}),
    ],
    ids=["mpirun", "srun"],
)
def test_a_run_finishes(
    started: Started, never_stopped: Path, script: str, options: tuple[str, ...], settings: dict[str, str]
) -> None:
    if settings["LAUNCHER"] == "srun":
        slurms.require_open_mpi()
    job = started.submit(script, *options, **settings).wait().expect("COMPLETED", 0)
    summary = json.loads((started.run / "finished.json").read_text())
    assert summary["ranks"] == 2, job.text
    runs.assert_equal(never_stopped, started.run)
    again = started.submit(script, *options, **settings).wait().expect("COMPLETED", 0)
    assert "is finished already" in again.text


def test_a_pmi_that_does_not_fit_is_refused(started: Started) -> None:
    job = started.submit("slurm-node.sh", "--ntasks-per-node=2", LAUNCHER="srun", PMI="none")
    job.wait().expect("FAILED", 2)
    assert "srun started 2 tasks, but MPI sees 1 rank" in job.text
    assert not started.run.exists()


def test_requeued_by_people(started: Started, never_stopped: Path) -> None:
    """Under srun the ranks get TERM and time to save; the script must not put the job into the queue a second time."""
    slurms.require_open_mpi()
    job = started.submit("slurm-cpu.sh", *TWO_NODES, slow=True, LAUNCHER="srun")
    started.saves_after(job, 0)
    requeue(job, started, lambda: started.brake(False))
    job.wait().expect("COMPLETED", 0)
    assert job.shows("Restarts") == "1"
    assert "stopped by TERM and saved" in job.text and not requeues(job)
    assert re.findall(r"restarts: (\d)", job.text) == ["0", "1"], "one log for both starts"
    runs.assert_equal(never_stopped, started.run)


def test_a_drained_node_is_left(started: Started, never_stopped: Path) -> None:
    """The job goes on while its node drains, and its next start is elsewhere; mpirun leaves no time to save."""
    job = started.submit("slurm-cpu.sh", *TWO_NODES, slow=True)
    started.saves_after(job, 0)
    first = job.shows("BatchHost")
    started.slurm.run("scontrol", "update", f"NodeName={first}", "State=DRAIN", "Reason=test")
    started.saves_after(job, started.saved)
    requeue(job, started, lambda: started.brake(False))
    job.wait().expect("COMPLETED", 0)
    nodes = re.findall(r"nodes: (\S+);", job.text)
    assert len(nodes) == 2
    last = started.slurm.run("scontrol", "show", "hostnames", nodes[1]).split()
    assert len(last) == 2 and first not in last
    runs.assert_equal(never_stopped, started.run)


def test_cancelled_and_submitted_again(started: Started, never_stopped: Path) -> None:
    """Daemons killed under mpirun (which says 0 then), later the job cancelled: at most a few rounds are played again."""
    job = started.submit("slurm-cpu.sh", *TWO_NODES, slow=True)
    started.saves_after(job, 0)
    started.slurm.run("scancel", "--signal=TERM", job.id)
    job.wait()
    assert job.shows("JobState") == "FAILED" and "neither finished nor saved" in job.text, job.text
    saved = started.saved

    job = started.submit("slurm-cpu.sh", *TWO_NODES, slow=True)
    started.saves_after(job, saved)
    started.slurm.run("scancel", job.id)
    assert job.wait().shows("JobState") == "CANCELLED"
    assert not requeues(job)
    saved = started.saved

    job = started.submit("slurm-cpu.sh", *TWO_NODES).wait().expect("COMPLETED", 0)
    # Slurm calls a job cancelled before its ranks are gone: one of them may have saved once more.
    resumed = int(re.findall(r"newest checkpoint: round-(\d+)\.h5", job.text)[0])
    assert saved <= resumed < 40
    runs.assert_equal(never_stopped, started.run)


def test_no_progress(started: Started) -> None:
    """A job that gets nowhere between two starts does not go on for ever; people may try again."""
    job = started.submit("slurm-node.sh", "--ntasks-per-node=1", slow=True, FEDDIP_TEST_FREE="0", FEDDIP_TEST_SLEEP="1")
    job.wait_until((started.run / "config.yaml").exists)
    requeue(job, started)
    assert started.saved == 0
    job.wait().expect("FAILED", 1)
    assert "no progress" in job.text
    job = started.submit("slurm-node.sh", "--ntasks-per-node=1").wait().expect("COMPLETED", 0)
    assert f"feddip-mpi resume {started.run}" in job.text


def under_pmi2(started: Started, mpich: dict[str, str]) -> Job:
    """A job of MPICH that trains. MPICH 5.0.2 has sent Slurm a value without its end (1 of 15 jobs or so): all ranks hang."""
    for attempt in range(3):
        job = started.submit("slurm-cpu.sh", *TWO_NODES, slow=True, LAUNCHER="srun", PMI="pmi2", **mpich)
        try:
            started.saves_after(job, 0)
            break
        except AssertionError as error:
            if attempt == 2 or "mpi/pmi2: value not properly terminated" not in str(error):
                raise
            started.slurm.run("scancel", job.id)
            job.wait()
    return job


def test_saved_and_kept_out_of_the_queue(started: Started, never_stopped: Path) -> None:
    """USR2 is for people. MPICH: srun speaks PMI-2 with it, mpiexec finds the allocation by itself."""
    launch.require("mpich")
    prefix = Path(os.environ["FEDDIP_MPICH"])
    mpich = {"MPI4PY_LIBMPI": str(prefix / "lib" / "libmpi.so.12"), "MPIRUN": str(prefix / "bin" / "mpiexec.hydra")}
    job = under_pmi2(started, mpich)
    started.slurm.run("scancel", "--batch", "--signal=USR2", job.id)
    job.wait().expect("FAILED", 75)
    assert "stopped by USR2 and saved" in job.text and job.shows("Restarts") == "0"
    job = started.submit("slurm-cpu.sh", *TWO_NODES, **mpich).wait().expect("COMPLETED", 0)
    assert json.loads((started.run / "finished.json").read_text())["ranks"] == 2, job.text
    runs.assert_equal(never_stopped, started.run)


def test_chain(started: Started, never_stopped: Path) -> None:
    slurm, log = started.slurm, started.log
    started.brake(True)
    options = (*TWO_NODES, "--time=10", f"--output={log}")
    said = slurm.bash("jobs/slurm-chain.sh", *options, "--", *SETTINGS, extra=started.environment)
    first = Job(slurm, re.findall(r"submitted job (\d+)", said)[0], log)
    started.saves_after(first, 0)
    slurm.run("scancel", "--batch", "--signal=USR1", first.id)
    first.wait().expect("FAILED", 75)
    started.brake(False)
    second = Job(slurm, re.findall(r"job 1 of at most 50; successor: (\d+)", first.text)[0], log)
    second.wait().expect("COMPLETED", 0)
    third = Job(slurm, re.findall(r"job 2 of at most 50; successor: (\d+)", first.text)[0], log)
    assert third.wait().shows("JobState") == "CANCELLED"
    runs.assert_equal(never_stopped, started.run)


def test_array(meanwhile: dict[str, tuple[Started, Job]]) -> None:
    grid, job = meanwhile["grid"]
    job.wait()
    found = {}
    for path in grid.run.glob("*/finished.json"):
        summary = json.loads(path.read_text())
        found[path.parent.name] = summary["seed"], round(summary["sparsity"], 2)
    expected = {f"seed-{seed}-sparsity-{share}": (seed, share) for seed in (1, 2) for share in (0.8, 0.95)}
    assert found == expected, job.text


def test_every_task_of_an_array_is_requeued_for_itself(started: Started) -> None:
    """One of the tasks has the id of the whole array."""
    started.environment |= {"RUNS": str(started.run), "SEEDS": "1 2", "SPARSITIES": "0.9"}
    array = started.submit("slurm-array.sh", "--array=0-1", "--ntasks-per-node=1", slow=True)
    tasks = [Job(started.slurm, f"{array.id}_{index}", array.output) for index in (0, 1)]
    cells = [started.run / f"seed-{seed}-sparsity-0.9" for seed in (1, 2)]
    for task, cell in zip(tasks, cells, strict=True):
        task.wait_until(lambda cell=cell: any(cell.glob("checkpoints/round-*.h5")))
    assert array.id in [task.shows("JobId") for task in tasks]
    started.slurm.run("scancel", "--batch", "--signal=USR1", array.id)
    for task in tasks:
        task.wait_until(lambda task=task: task.shows("Restarts") == "1" and task.shows("JobState") == "PENDING")
    started.brake(False)
    for task, cell in zip(tasks, cells, strict=True):
        task.wait().expect("COMPLETED", 0)
        assert task.shows("Restarts") == "1" and (cell / "finished.json").exists()
    assert requeues(array) == 2, array.text


def test_sweep(meanwhile: dict[str, tuple[Started, Job]]) -> None:
    started, job = meanwhile["sweep"]
    job.wait()
    cells = ("fedavg_seed-5", "feddip_seed-5", "feddip_seed-6")
    found = {path.parent.name: json.loads(path.read_text()) for path in started.run.glob("*/finished.json")}
    assert found.keys() == set(cells), job.text
    assert [found[name]["seed"] for name in cells] == [5, 5, 6]
    again = started.slurm.run(
        sys.executable, "-m", "feddip_mpi", "sweep", str(started.run.parent / "grid.yaml"), "--out", str(started.run)
    )
    assert "all 3 cells are finished" in again


def test_scaling_study(meanwhile: dict[str, tuple[Started, Job]]) -> None:
    study, job = meanwhile["study"]
    job.wait().expect("COMPLETED", 0)
    table = study.run / "scaling.csv"
    with open(table) as file:
        rows = list(csv.DictReader(file))
    found = [(row["kind"], int(row["ranks"]), int(row["participants"]), int(row["rounds"])) for row in rows]
    assert found == [("strong", 1, 4, 3), ("strong", 2, 4, 3), ("weak", 1, 2, 3), ("weak", 2, 4, 3)], job.text
    assert all(float(row["round_seconds"]) > 0 and float(row["train_seconds"]) > 0 for row in rows)
    # In one allocation it finds everything done, and collects again.
    table.unlink()
    job = study.submit("slurm-scaling.sh", *TWO_NODES, settings=[]).wait().expect("COMPLETED", 0)
    assert job.text.count("is finished already") == 4 and table.exists()


def test_time_limit(meanwhile: dict[str, tuple[Started, Job]], never_stopped: Path) -> None:
    """Saves ahead of the limit, ends with 75, is requeued by its script exactly once, and finishes."""
    started, job = meanwhile["limited"]
    job.wait_until(lambda: "stopped by USR1 and saved" in job.text)
    job.wait_until(lambda: job.shows("JobState") == "PENDING")
    started.slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    started.brake(False)
    job.wait().expect("COMPLETED", 0)
    restarts = int(job.shows("Restarts"))  # more than one if the limit came again before it was raised
    assert restarts == requeues(job) == job.text.count("stopped by USR1 and saved") >= 1
    assert re.findall(r"restarts: (\d+);", job.text) == [str(number) for number in range(restarts + 1)]
    runs.assert_equal(never_stopped, started.run)


def test_nothing_is_left(slurm: Slurm) -> None:
    assert not slurm.query("squeue", "-h")
    deadline = time.monotonic() + 10
    while (left := slurm.ranks()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
