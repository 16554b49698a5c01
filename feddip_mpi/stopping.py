"""The signals that ask a run to stop. Without torch, MPI or anything else that takes long to import: a signal may come first."""

from __future__ import annotations

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Set by TERM, USR1, USR2 or INT; the handler does nothing else. Ranks agree on it at the end of a round.

    A second INT (Ctrl-C again) does not wait for that: it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._since = 0.0

    def expired(self, grace: float) -> bool:
        """Whether a signal came more than `grace` seconds ago. Cheap enough to be asked for every batch."""
        return self.requested and time.monotonic() - self._since > grace

    @classmethod
    def installed(cls) -> StopFlag:
        """A flag that signals set from now on: first thing in a command, because a signal may come while it still imports."""
        flag = cls()
        flag.install()
        return flag

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        if not self.requested:
            self._since = time.monotonic()
        self.requested = True
        self.name = signal.Signals(number).name
