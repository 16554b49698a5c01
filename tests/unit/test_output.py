"""What a process says: what cannot be written ends nothing, and changes no exit code."""

import os
import pty
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


@needs_full
@pytest.mark.parametrize("words", ["output.say('one')", "print('one', file=output.stdout())"])
def test_what_cannot_be_shown_is_said_once_on_stderr(words: str) -> None:
    with FULL.open("wb") as full:
        done = run(f"{words}; {words}; output.settle(); sys.exit(3)", stdout=full.fileno())
    assert done.returncode == 3
    assert done.stderr.count("stdout: cannot be written ([Errno 28] No space left on device)") == 1, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "output.say('one')",
        "from feddip_mpi.report import terminal; bar = terminal.RichProgress(3); output.say('one'); bar.close()",
        "from feddip_mpi.report import terminal; terminal.print_tables('one', terminal.table('two'))",
    ],
)
def test_a_terminal_that_is_gone_ends_nothing(words: str) -> None:
    master, slave = pty.openpty()
    os.close(master)
    done = run(f"{words}; output.settle(); sys.exit(3)", stdout=slave, TERM="xterm")
    os.close(slave)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr


@pytest.mark.parametrize("words", ["output.say('café')", "print('café', file=output.stdout())"])
def test_a_letter_that_stdout_lacks_is_shown_as_its_escape(words: str) -> None:
    assert run(words, PYTHONIOENCODING="ascii").stdout == "caf\\xe9\n"
    assert run(words, PYTHONIOENCODING="utf-8").stdout == "café\n"
