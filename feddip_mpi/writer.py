"""One checkpoint at a time is written by a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from feddip_mpi import hdf5
from feddip_mpi.errors import FeddipError


class Writer:
    """A thread that writes. It is a daemon: a process that is ended does not wait for it, and the file stays absent."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[], FeddipError | None]) -> None:
        """Start `work`; `wait` comes before the next one."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> FeddipError | None:
        """Wait until nothing is being written; returns what went wrong, once.

        Raises whatever else the work raised: an error of this program.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is None or isinstance(error, FeddipError):
            return error
        raise error

    def _run(self, work: Callable[[], FeddipError | None]) -> None:
        try:
            self._error = work()
        except BaseException as caught:
            self._error = caught


@contextmanager
def saving(path: Path) -> Iterator[list[FeddipError]]:
    """Gives a list that holds, after the block, the readable error of a file that could not be written, or nothing."""
    failed: list[FeddipError] = []
    try:
        yield failed
    except (OSError, RuntimeError, MemoryError) as caught:
        failed.append(
            FeddipError(
                f"{path}: cannot be saved ({hdf5.reason(caught)}); earlier checkpoints are untouched: free space, resume"
            )
        )
