"""Tiny runs, and how the tests start commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_MATPLOTLIB = ROOT / "tests" / "mpi" / "programs" / "no_matplotlib"
DEVICE = os.environ.get("FEDDIP_TEST_DEVICE", "cpu")  # cuda: the same tests on a GPU
TINY = (
    "rounds=4", "clients=4", "participants=2", "local_epochs=1", "batch_size=20", "mask.every=2", "upload.regrow=0.1",
    "checkpoint.every=2", "data.name=synthetic", "data.synthetic.train_samples=160",
    "data.synthetic.test_samples=90", "eval.batch_size=40", f"device={DEVICE}",
)  # fmt: skip

Command = Callable[..., subprocess.CompletedProcess[str]]


def run(*words: str, ranks: int | None = None, pictures: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
    """`feddip-mpi` with these words, plain or under mpirun, with `more` environment variables.

    Without `pictures` as where matplotlib is not installed: a picture takes nearly a third of such a short run's time.
    """
    paths = str(ROOT) if pictures else os.pathsep.join((str(ROOT), str(NO_MATPLOTLIB)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **more}
    launcher: list[str] = []
    if ranks is not None:
        mpirun = Path(sys.executable).with_name("mpirun")
        if not mpirun.exists():
            pytest.skip("no mpirun beside this Python")
        launcher = [str(mpirun), "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
            environment |= {name: "1", f"{name}_CONFIRM": "1"}
        environment |= {"OMPI_MCA_mpi_yield_when_idle": "1"}
    command = [*launcher, sys.executable, "-m", "feddip_mpi", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def settings(*values: str) -> list[str]:
    return [word for value in (*TINY, *values) for word in ("--set", value)]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
