"""Small runs for the tests: configurations, commands, and what two runs must have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import launch
import numpy as np

BASE = {
    "rounds": 5, "clients": 8, "participants": 4, "local_epochs": 1, "batch_size": 32, "learning_rate": 0.05,
    "sparsity.initial": 0.5, "sparsity.final": 0.9, "mask.every": 2, "penalty.maximum": 0.001, "penalty.steps": 3,
    "upload.regrow": 0.1, "eval.batch_size": 32, "checkpoint.every": 2,
    "device": os.environ.get("FEDDIP_TEST_DEVICE", "cpu"),
    "data.name": "synthetic", "data.synthetic.shape": [1, 12, 12], "data.synthetic.train_samples": 800,
    "data.synthetic.test_samples": 200, "model.name": "lenet5",
}  # fmt: skip


def settings(**changes: Any) -> list[str]:
    """`--set` options of the base configuration with `changes` (`__` stands for a dot)."""
    values = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def train(config: Path, out: Path, **changes: Any) -> list[str]:
    return ["train", str(config), *settings(**changes), "--out", str(out)]


def play(
    steps: Sequence[dict[str, Any]],
    folder: Path,
    ranks: int | None,
    library: str = "default",
    seconds: float = 240,
    extra: dict[str, str] | None = None,
) -> list[list[dict[str, Any]]]:
    """Run programs/steps.py; returns for each step what each rank reports (code, out, err)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.json").write_text(json.dumps(list(steps)))
    argv = [str(launch.PROGRAMS / "steps.py"), str(folder / "steps.json"), str(folder / "results")]
    done = launch.run(argv, ranks, library, seconds, extra).expect(0)
    assert done.orphans == 0
    reports = [json.loads((folder / "results" / f"rank-{rank}.json").read_text()) for rank in range(ranks or 1)]
    return [list(step) for step in zip(*reports, strict=True)]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("round-*.h5"))


def lines(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl; none before there is one."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def contents(checkpoint: Path) -> dict[str, tuple[Any, ...]]:
    """Every array of a checkpoint, with its attributes, that the configuration alone decides: to compare for equality."""
    found: dict[str, tuple[Any, ...]] = {}

    def add(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.attrs.get("depends_on", "config") == "config":
            array = np.asarray(node[()])
            attributes = {key: np.asarray(value).tolist() for key, value in node.attrs.items()}
            found[name] = (array.shape, array.dtype.str, array.tobytes(), attributes)

    with h5py.File(checkpoint) as file:
        file.visititems(add)
        found["round"] = (int(file.attrs["round"]),)
        found["config"] = (json.loads(file.attrs["config"]),)
    return found


def assert_equal(one: Path, other: Path) -> None:
    """The newest checkpoints of two runs are equal in all bits of `contents`."""
    ours, theirs = contents(newest(one)), contents(newest(other))
    assert list(ours) == list(theirs)
    differing = [name for name in ours if ours[name] != theirs[name]]
    assert not differing, f"{newest(one)} and {newest(other)} differ in {', '.join(differing)}"
