"""What the outside has to do with a round, or with what clients measure before the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from feddip_mpi.errors import FeddipError


@dataclass(frozen=True)
class Life:
    """Questions and news of work that goes on; the default asks nobody and tells nobody.

    Attributes:
        give_up: whether a round that is still training is to be abandoned; asked before every batch.
        enter: told of every phase that begins, with its round t.
        stopped: asked on each rank before each client that measures something for the opening; an error that it returns
            is raised on all ranks.
    """

    give_up: Callable[[], bool] = lambda: False
    enter: Callable[[str, int], None] = lambda phase, round: None
    stopped: Callable[[], FeddipError | None] = lambda: None
