"""What the batch scripts share, without a scheduler; tests/cluster runs them on one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = """trap 'exit 75' USR1; while :; do sleep 0.05; done"""


def bash(script: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Its output; half a minute at most, after which nothing of it is left."""
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told, complaints = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(script, process.returncode, told, complaints)


@pytest.mark.parametrize("rounds", [1, 50_000])
def test_a_signal_reaches_the_launcher_however_long_the_log_is(tmp_path: Path, rounds: int) -> None:
    """2 MB of rounds: whoever looks for the first one stops reading there."""
    (tmp_path / "run.log").write_text("2026-01-01 00:00:00 INFO round 1, all is well\n" * rounds)
    script = f"""RUN={tmp_path}
        source jobs/lib.sh
        (sleep 1; kill -USR1 $$) &
        wait_for bash -c '{LAUNCHER.replace("'", '"')}'
        echo "code $CODE after $STOP"
    """
    done = bash(script)
    assert "code 75 after USR1" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "killed"),
    [
        ("stopped: stopped by a signal after round 2; `feddip-mpi resume runs/a` goes on", True),
        ("error: runs/a: cannot be saved (No space left on device)", True),
        ("round 3, all is well", False),
    ],
)
def test_a_launcher_that_stays_when_the_run_is_over_is_ended(tmp_path: Path, line: str, killed: bool) -> None:
    """After a death mpirun may; what earlier starts have logged is no end of this one."""
    log = tmp_path / "run.log"
    log.write_text("2026-01-01 00:00:00 rank 0 INFO stopped: stopped by a signal after round 1\n")
    script = f"""RUN={tmp_path} SURVIVE=1 LAUNCHER=mpirun
        source jobs/lib.sh
        LOG_BYTES=$(wc -c <"$RUN/run.log") PATIENCE=1
        echo '2026-01-01 00:00:01 rank 0 INFO {line}' >>{log}
        wait_for sleep 4
        echo "code $CODE"
    """
    done = bash(script)
    assert f"code {137 if killed else 0}" in done.stdout, done.stdout + done.stderr
    assert ("is over, but mpirun has not ended" in done.stdout) == killed


def test_a_signal_before_the_first_round_waits_for_it(tmp_path: Path) -> None:
    """A rank that still imports its modules would be killed by it; what earlier starts have logged is no round of this one."""
    log = tmp_path / "run.log"
    log.write_text("2026-01-01 00:00:00 INFO round 1, of an earlier start\n")
    script = f"""RUN={tmp_path}
        source jobs/lib.sh
        LOG_BYTES=$(wc -c <"$RUN/run.log")
        (sleep 0.5; kill -USR1 $$; sleep 1; echo "INFO: no round yet" >>{log}; touch {tmp_path}/later
         echo "2026-01-01 00:00:01 INFO round 2, of this one" >>{log}) &
        wait_for bash -c 'trap "[[ -e {tmp_path}/later ]] && exit 75; exit 1" USR1; while :; do sleep 0.05; done'
        echo "code $CODE"
    """
    done = bash(script)
    assert "code 75" in done.stdout, done.stdout + done.stderr


def test_a_task_of_an_array_asks_for_itself(tmp_path: Path) -> None:
    """Its SLURM_JOB_ID may be that of the whole array, of which squeue lists every task."""
    script = """
        SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=3
        source jobs/lib.sh
        squeue() { [[ $3 == 7_3 ]] && echo RUNNING || printf '%s\n' RUNNING PENDING; }
        scontrol() { echo "scontrol $*"; }
        REQUEUE=1
        requeue
    """
    done = bash(script)
    assert "scontrol requeue 7_3\n" in done.stdout, done.stdout + done.stderr


# A job whose launcher ends with 7, as the program does where another job has the run folder; $1 is its start.
BUSY = """
    mkdir -p {folder}/run/checkpoints
    touch {folder}/run/config.yaml {folder}/run/checkpoints/round-000004.h5
    printf '#!/bin/sh\\nexit 7\\n' >{folder}/launcher
    chmod +x {folder}/launcher
    start() (
        RUN={folder}/run CONFIG=none LAUNCHER=mpirun MPIRUN={folder}/launcher LAUNCH_OPTIONS=() REQUEUE=1
        SLURM_JOB_ID=7 SLURM_RESTART_COUNT=$1
        source jobs/lib.sh
        squeue() {{ echo RUNNING; }}
        scontrol() {{ echo "scontrol $*"; }}
        run_job
        exit
    )
"""


def test_a_run_folder_that_another_job_has_is_tried_once_more(tmp_path: Path) -> None:
    """A file server may keep the lock of a node that died for some minutes. That is not what `no progress` means."""
    script = BUSY.format(folder=tmp_path) + "for n in 0 1; do start $n; echo code $?; done"
    done = bash(script)
    assert done.stdout.count("scontrol requeue 7\n") == 1 and done.stdout.count("code 7\n") == 2, (
        done.stdout + done.stderr
    )
    assert "as at the last start" in done.stderr and "no progress" not in done.stderr


def test_a_chain_outlives_a_lock_that_is_not_free_yet(tmp_path: Path) -> None:
    script = (
        BUSY.format(folder=tmp_path)
        + f"""
        printf '#!/bin/sh\\necho 8\\n' >{tmp_path}/sbatch
        printf '#!/bin/sh\\necho scancel $*\\n' >{tmp_path}/scancel
        chmod +x {tmp_path}/sbatch {tmp_path}/scancel
        export PATH={tmp_path}:$PATH RUN={tmp_path}/run MPIRUN={tmp_path}/launcher
        SLURM_JOB_ID=6 CHAIN_LINK=2 CHAIN_PREVIOUS=5 bash jobs/slurm-chain.sh; echo code $?
        SLURM_JOB_ID=7 CHAIN_LINK=3 CHAIN_PREVIOUS=6 bash jobs/slurm-chain.sh; echo code $?
    """
    )
    done = bash(script)
    first, second, _ = done.stdout.split("code 7\n")
    assert "scancel" not in first and "scancel 8" in second, done.stdout + done.stderr


def test_a_chain_of_pbs_keeps_the_resources_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "qsub").write_text(f'#!/bin/sh\necho "qsub $* for $CHAIN_OPTIONS" >>{tmp_path}/said\necho 8\n')
    (tmp_path / "launcher").write_text(f"""#!/bin/bash
        mkdir -p {tmp_path}/run/checkpoints
        touch {tmp_path}/run/config.yaml
        trap 'touch {tmp_path}/run/checkpoints/round-000002.h5; exit 75' USR1
        echo "2026-01-01 00:00:01 INFO round 2, of this one" >>{tmp_path}/run/run.log
        while :; do sleep 0.05; done
    """)
    script = f"""
        chmod +x {tmp_path}/qsub {tmp_path}/launcher
        export PATH={tmp_path}:$PATH RUN={tmp_path}/run MPIRUN={tmp_path}/launcher WALL_SECONDS=11 GRACE_SECONDS=10
        bash jobs/pbs.sh -l select=4:ncpus=16 -A us
        PBS_JOBID=7 CHAIN_OPTIONS="-l select=4:ncpus=16 -A us" bash jobs/pbs.sh
    """
    done = bash(script)
    options = "-l select=4:ncpus=16 -A us"
    assert (tmp_path / "said").read_text().splitlines() == [
        f"qsub -V {options} jobs/pbs.sh for {options}",
        f"qsub -V {options} -W depend=afterany:7 jobs/pbs.sh for {options}",
    ], done.stdout + done.stderr


# On one machine, with an environment and a launcher that do nothing.


def fakes(folder: Path, mpirun: str, version: str = "mpirun (Open MPI) 5.0.8") -> dict[str, str]:
    """The variables under which the scripts take a virtual environment and an mpirun of these lines."""
    for path, text in (
        (folder / "venv" / "bin" / "python", "exit 0"),
        (folder / "bin" / "mpirun", f'[ "$1" = --version ] && {{ echo "{version}"; exit 0; }}\n{mpirun}'),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    return {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "FEDDIP_VENV": str(folder / "venv"),
        "FEDDIP_DATA": str(folder),
    }  # fmt: skip


OPEN_MPI = "--oversubscribe --bind-to none --mca mpi_yield_when_idle 1"


@pytest.mark.parametrize(
    ("version", "survive", "options", "transport"),
    [
        ("mpirun (Open MPI) 5.0.8", "0", OPEN_MPI, "self,sm,tcp"),
        ("mpirun (Open MPI) 4.1.6", "0", OPEN_MPI, "self,vader,tcp"),
        ("mpirun (Open MPI) 5.0.8", "1", f"{OPEN_MPI} --with-ft ulfm", "self,sm,tcp"),
        ("HYDRA build details", "0", "", ""),
    ],
)
def test_ranks_on_this_machine_get_the_options_of_their_launcher(
    version: str, survive: str, options: str, transport: str, tmp_path: Path
) -> None:
    environment = fakes(tmp_path, 'echo "asked: $*"; echo "through: $OMPI_MCA_btl"', version)
    done = bash("bash jobs/mpirun.sh program a 'b c'", {**environment, "NP": "999", "SURVIVE": survive})
    assert done.returncode == 0, done.stderr
    asked, through = done.stdout.splitlines()[-2:]
    assert asked.split() == f"asked: -n 999 {options} program a b c".split()
    assert through == f"through: {transport}"


@pytest.mark.parametrize(("words", "ranks"), [("", "2"), ("program", "0"), ("program", "two")])
def test_ranks_on_this_machine_need_a_number_and_a_command(words: str, ranks: str, tmp_path: Path) -> None:
    done = bash(f"bash jobs/mpirun.sh {words}", {**fakes(tmp_path, "echo started"), "NP": ranks})
    assert done.returncode == 1 and "started" not in done.stdout
    assert ("no command given" if ranks == "2" else f"NP is the number of ranks, got '{ranks}'") in done.stderr


@pytest.mark.parametrize(
    ("launcher", "survive", "code", "said"),
    [
        ("mpirun", 0, 0, "mpirun -n 3 --map-by node"),
        ("mpirun", 1, 0, "mpirun --with-ft ulfm -n 3 --map-by node"),
        ("srun", 1, 2, "SURVIVE=1: srun ends all ranks when one dies"),
    ],
)
def test_batch_scripts_survive_where_the_launcher_can(
    launcher: str, survive: int, code: int, said: str, tmp_path: Path
) -> None:
    script = f"""LAUNCHER={launcher} SURVIVE={survive} RANKS=3 LAUNCH_OPTIONS=(--map-by node)
        source jobs/lib.sh
        launcher_command
        echo "${{COMMAND[*]}}"
    """
    done = bash(script, fakes(tmp_path, "exit 1"))
    assert done.returncode == code and said in (done.stderr if code else done.stdout.splitlines())


@pytest.mark.parametrize(("presses", "heard", "code"), [(1, ["USR1"], 75), (2, ["USR1", "TERM"], 3)])
def test_control_c_in_the_quick_start_saves_and_twice_ends_at_once(
    presses: int, heard: list[str], code: int, tmp_path: Path
) -> None:
    """As a terminal sends it: to the process group, in which mpirun is not."""
    log = tmp_path / "heard"  # the fake's process id, then signals
    log.touch()
    environment = fakes(
        tmp_path,
        f"""trap 'echo INT >>{log}' INT
            trap 'echo TERM >>{log}; exit 3' TERM
            trap 'echo USR1 >>{log}; [[ {presses} == 1 ]] && exit 75' USR1
            echo $$ >>{log}
            while :; do sleep 0.05; done""",
    )
    # A shell that begins with the signal ignored, as in the background of a script, could not trap it.
    process = subprocess.Popen(
        ["env", "--default-signal=INT", "bash", "jobs/quickstart.sh", "--out", str(tmp_path / "run")],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        for number in range(presses):
            deadline = time.monotonic() + 30
            while len(log.read_text().split()) <= number:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            assert os.getpgid(int(log.read_text().split()[0])) != process.pid
            os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    finally:
        for left in (process.pid, *map(int, log.read_text().split()[:1])):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(left, signal.SIGKILL)
    assert (process.returncode, log.read_text().split()[1:]) == (code, heard), said
    assert said.count("stopping after this round, with everything saved") == 1
    assert ("stopped and saved; go on with:" in said) == (code == 75)
