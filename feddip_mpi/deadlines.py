"""When a process ends because of time: a watchdog over a rank, a deadline for a block, an end that nothing holds up."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from feddip_mpi import output

_log = logging.getLogger("feddip_mpi")  # `runtime.start_log` says where it goes

# A watchdog that looks so many seconds late has been suspended with its process.
_LATE = 5.0
# Saying why a process ends must not keep it from ending.
_LAST_WORDS_SECONDS = 5.0


class Watchdog:
    """Ends the job when this rank has made no progress for too long: a hang costs the whole allocation, silently.

    A rank that is stuck in work of its own ends the job first and is named with its phase and its stacks; ranks that
    wait for others give them a quarter of the time more, so that the culprit can speak. Time in which the whole process
    did not run, as a batch system may suspend a job for another one, is no hang.
    """

    WAITING = ("wait", "exchange", "plan", "evaluate", "commit", "checkpoint", "recover")

    def __init__(self, seconds: float | None, rank: int, abort: Callable[[int, Callable[[], None]], None]) -> None:
        """Begin to watch.

        Args:
            seconds: without progress; None: never ends anything.
            rank: of this process.
            abort: ends all ranks with an exit code, after a call that says why.
        """
        self._rank, self._abort = rank, abort
        self.enter("start")
        self._closed = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, args=(seconds,), name="watchdog", daemon=True).start()

    def enter(self, phase: str, round: int | None = None) -> None:
        """Progress: this rank now begins `phase`, of round t or of no round."""
        self._entered = (phase, round, time.monotonic())

    def progress(self) -> None:
        """A part of a long phase is done."""
        phase, round, _ = self._entered
        self.enter(phase, round)

    def close(self) -> None:
        self._closed.set()

    def _watch(self, seconds: float) -> None:
        pause = min(1.0, seconds / 10)
        looked = awake = time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            if now - looked > pause + _LATE:
                awake = now
                _log.warning(
                    "this process has not run for %d s (a job that was suspended?): the watchdog begins anew",
                    now - looked,
                )
            looked = now
            phase, round, since = self._entered
            waits = phase in self.WAITING
            if now - max(since, awake) > seconds * (1.25 if waits else 1.0):
                what = "waits for another rank" if waits else "is stuck"
                where = f"phase {phase!r}" + (f" of round {round + 1}" if round is not None else "")
                words = (
                    f"watchdog: rank {self._rank} {what}: no progress for {seconds:g} s in {where}; ending all ranks. "
                    "`feddip-mpi resume` goes on from the last checkpoint; set watchdog to more seconds if this phase may "
                    "take as long"
                )
                self._abort(1, partial(_last_words, words))


def _last_words(text: str) -> None:
    """Why this process ends, and where its threads stand."""
    output.note(text)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)


def end_after(seconds: float, end: Callable[[], None]) -> None:
    """End this process then, whatever it is at: in an MPI library that is stuck, or in words that nobody reads."""
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    with contextlib.suppress(RuntimeError, MemoryError):  # no memory for a thread
        timer.start()


def die() -> None:
    """End this process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Ends this process with exit code 1 where the block takes longer than `seconds`: `what` names what it waits for."""

    def end() -> None:
        end_after(_LAST_WORDS_SECONDS, partial(os._exit, 1))  # nobody may read them
        try:
            _last_words(
                f"deadline: {what} took more than {seconds:g} s; this rank ends. `feddip-mpi resume` goes on from the last "
                "checkpoint"
            )
        finally:
            os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
