"""Hosts for one test; a Slurm for one module."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hosts
import pytest
import slurm as slurms
from hosts import Hosts
from slurm import Slurm

# What runs are and how they compare is the same as under mpirun.
sys.path.append(str(Path(__file__).resolve().parents[1] / "mpi"))


@pytest.fixture
def make_hosts(tmp_path: Path) -> Iterator[Callable[[int, str], Hosts]]:
    """`make_hosts(4, "100mbit")` makes hosts that are removed after the test; skips it where that is not possible."""
    hosts.require()
    with contextlib.ExitStack() as made:
        yield lambda count, rate: made.enter_context(Hosts(count, rate, tmp_path))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A Slurm of four nodes for the whole module; skips its tests where that is not possible."""
    slurms.require()
    # Short, because sockets with at most 107 characters in their path live there.
    folder = Path(tempfile.mkdtemp(prefix="fds"))
    # A third of a short run's time goes into its picture: these runs have none, as where matplotlib is not installed.
    (folder / "matplotlib.py").write_text("raise ImportError('hidden')\n")
    paths = [str(slurms.ROOT), str(slurms.PROGRAMS), str(folder), os.environ.get("PYTHONPATH", "")]
    extra = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMPI_MCA_pml": "ob1",  # looking for fast networks takes a second a launch
        "OMPI_MCA_btl": "self,tcp",
        "OMPI_MCA_mpi_yield_when_idle": "1",  # the nodes share the cores of this one
        **{f"{tool}_ALLOW_RUN_AS_ROOT{tail}": "1" for tool in ("OMPI", "PRTE") for tail in ("", "_CONFIRM")},
    }
    try:
        with Slurm(4, folder, extra) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
