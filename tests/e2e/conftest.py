"""One tiny trained run for all tests here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import Command, run, settings

# Several commands in one process: as the tests of ranks do it.
sys.path.append(str(Path(__file__).resolve().parents[1] / "mpi"))


@pytest.fixture(scope="session")
def feddip() -> Command:
    return run


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of nothing but comments: the defaults, to be overridden."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text("# defaults\n")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """The folder of a finished run; tests read it, copies may be changed."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    done = run("train", str(tiny_config), *settings(), "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder
