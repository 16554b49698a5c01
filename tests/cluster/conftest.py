"""Hosts for one test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Hosts, require


@pytest.fixture
def make_hosts(tmp_path: Path) -> Iterator[Callable[[int, str], Hosts]]:
    """`make_hosts(4, "100mbit")` makes hosts that are removed after the test; skips it where that is not possible."""
    require()
    with contextlib.ExitStack() as made:
        yield lambda count, rate: made.enter_context(Hosts(count, rate, tmp_path))
