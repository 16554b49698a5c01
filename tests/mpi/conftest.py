"""What several files of these tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of defaults; tests override its keys."""
    path = tmp_path_factory.mktemp("config") / "empty.yaml"
    path.write_text("")
    return path
