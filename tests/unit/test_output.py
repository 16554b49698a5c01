"""What a process says: what cannot be written ends nothing, and changes no exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device on which every write fails")


def run(
    code: str, stdout: int | None = None, stderr: int | None = None, **environment: str
) -> subprocess.CompletedProcess:
    program = f"import sys; from feddip_mpi import output\n{code}"
    pipe = subprocess.PIPE
    return subprocess.run(
        [sys.executable, "-c", program], stdout=stdout or pipe, stderr=stderr or pipe, text=True, timeout=60,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


@needs_full
def test_a_note_on_a_full_disk_changes_nothing() -> None:
    with FULL.open("wb") as full:
        done = run(
            "output.note('one'); output.flush(); output.settle(); print('goes on'); sys.exit(3)", stderr=full.fileno()
        )
    assert (done.returncode, done.stdout) == (3, "goes on\n"), "Python alone would end with 120"


@pytest.mark.parametrize("stream", ["None", "open('/dev/null')"])
def test_an_stderr_that_was_closed_or_cannot_be_written(stream: str) -> None:
    done = run(f"sys.stderr = {stream}; output.note('one'); output.flush(); output.settle(); sys.exit(3)")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
