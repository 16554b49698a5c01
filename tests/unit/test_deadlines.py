"""The watchdog and the deadline: what ends a process, what it says, and what is no hang."""

import os
import signal
import subprocess
import sys
import time

import pytest

from feddip_mpi import deadlines


def test_a_deadline_ends_the_process_and_says_what_it_waited_for() -> None:
    code = "import time; from feddip_mpi import deadlines\nwith deadlines.deadline(0.1, 'waiting for nobody'): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "waiting for nobody took more than 0.1 s" in done.stderr and "resume" in done.stderr
    with deadlines.deadline(60, "nothing"):
        pass


@pytest.mark.parametrize("blocked", [False, True])
def test_a_deadline_ends_a_process_that_cannot_say_why(blocked: bool) -> None:
    """Its stderr is a full disk, or a pipe that nobody reads and that is full."""
    code = """
import os, time
from feddip_mpi import deadlines
deadlines._LAST_WORDS_SECONDS = 0.5
os.set_blocking(2, False)
try:
    while os.write(2, bytes(4096)): pass
except OSError: pass
os.set_blocking(2, True)
with deadlines.deadline(0.1, "waiting for nobody"): time.sleep(60)
"""
    reading, writing = os.pipe()
    with open("/dev/full", "wb") as full:
        stderr = writing if blocked else full
        done = subprocess.run([sys.executable, "-c", code], stderr=stderr, timeout=50, check=False)
    os.close(reading)
    os.close(writing)
    assert done.returncode == 1


def test_progress_within_a_phase_leaves_it_the_phase() -> None:
    dog = deadlines.Watchdog(None, 0, lambda *_: None)
    dog.enter("checkpoint", 3)
    phase, round, since = dog._entered
    time.sleep(0.01)
    dog.progress()
    assert dog._entered[:2] == (phase, round) and dog._entered[2] > since


WATCHED = """
import os, time
from feddip_mpi import deadlines
deadlines._LATE = 0.5
dog = deadlines.Watchdog(2.0, 0, lambda code, say_why: (say_why(), os._exit(code)))
dog.enter("train", 0)
print("watched", flush=True)
time.sleep(1)
dog.enter("train", 1)
time.sleep({hang})
dog.close()
print("ended", flush=True)
"""


@pytest.mark.parametrize(("hang", "code"), [(0.5, 0), (30, 1)])
def test_a_job_that_was_suspended_is_no_hang(hang: float, code: int) -> None:
    """Batch systems suspend jobs for others (Slurm: PreemptMode=SUSPEND); what hangs afterwards is still found."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED.format(hang=hang)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "watched\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    told, complaints = process.communicate(timeout=60)
    assert process.returncode == code, complaints
    assert ("watchdog: rank 0 is stuck" in complaints) == bool(code) and ("ended" in told) == (not code)
