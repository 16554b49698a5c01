"""The signals that ask a run to stop: they set a flag, however early they come."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from feddip_mpi.stopping import STOP_SIGNALS, StopFlag


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals, handlers: None) -> None:
    flag = StopFlag()
    flag.install()
    assert not flag.requested
    os.kill(os.getpid(), number)
    assert flag.requested
    assert flag.name == number.name


def test_a_second_interrupt_does_not_wait_for_the_round(handlers: None) -> None:
    flag = StopFlag()
    flag.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_batch_systems_can_stop_a_run() -> None:
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2} <= set(STOP_SIGNALS)


@pytest.mark.parametrize("command", [["train", "x.yaml"], ["resume", "folder"]])
def test_a_signal_while_a_command_still_imports_is_kept(command: list[str]) -> None:
    """It comes as `session` begins to import torch; without a handler the process would be gone."""
    code = f"""
import os, signal, sys
from feddip_mpi import cli
class Late:
    @staticmethod
    def find_spec(name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGUSR1)
            raise ImportError("as far as this test goes")
sys.meta_path.insert(0, Late)
sys.argv = ["feddip-mpi", *{command}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "as far as this test goes" in done.stderr, (done.returncode, done.stderr)
