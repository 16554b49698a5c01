"""The bytes that a run reports are those that cross the hosts' interfaces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hosts import PROGRAMS, Hosts

pytestmark = pytest.mark.cluster

SETTINGS = {
    "rounds": 3, "clients": 6, "participants": 5, "local_epochs": 1, "batch_size": 32, "learning_rate": 0.05,
    "mask.every": 2, "mask.initial": "erk", "upload.regrow": 0.1, "eval.every": 3, "checkpoint.every": 3, "device": "cpu",
    "data.name": "synthetic", "data.synthetic.shape": [1, 12, 12], "data.synthetic.train_samples": 192,
    "data.synthetic.test_samples": 100, "model.name": "counted:wide",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "allgatherv": {"upload.residual": "in_mask_only"},
    "at once": {"upload.residual": "in_mask_only", "overlap": False},
    "sharded": {"exchange": "sharded", "upload.residual": "drop"},
    "download": {"exchange": "sharded", "download.values": "int8", "upload.values": "int8"},
    "node": {"exchange": "node", "upload.residual": "drop"},
    "residuals": {"upload.values": "int8"},
}


def test_interfaces_count_what_the_run_counts(make_hosts: Callable[[int, str], Hosts], tmp_path: Path) -> None:
    """Within 5 % and 64 KiB a round: packet headers, acknowledgements and MPI's own words are what is left."""
    config = tmp_path / "empty.yaml"
    config.write_text("")
    argv = []
    for name, changes in RUNS.items():
        words = [
            word for key, value in {**SETTINGS, **changes}.items() for word in ("--set", f"{key}={json.dumps(value)}")
        ]
        argv.append(["train", str(config), "--out", str(tmp_path / name), *words])
    (tmp_path / "runs.json").write_text(json.dumps(argv))
    program = [str(PROGRAMS / "counted.py"), str(tmp_path / "runs.json"), str(tmp_path / "result.json")]
    make_hosts(4, "none").run(program, seconds=240).expect(0)
    for name, played in zip(RUNS, json.loads((tmp_path / "result.json").read_text()), strict=True):
        assert len(played) == 3
        for round in played:
            counted, interfaces = round["counted"], round["interfaces"]
            assert counted > 1_000_000, (name, round)
            assert counted <= interfaces <= 1.05 * counted + 64 * 1024, (name, round)
