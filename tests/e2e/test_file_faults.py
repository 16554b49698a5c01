"""A small part of benchmarks/file_faults.py: runs that are killed while they write, two jobs in one folder, clocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import ROOT


def test_runs_survive_what_happens_to_their_files(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    words = ["--folder", str(tmp_path), "--only", "killed", "two_jobs", "clock", "--kills", "5", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "file_faults.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for fault in json.loads(out.read_text())["faults"].values() for row in fault["rows"]]
    assert [row["tries"] for row in rows if "SIGKILL" in row["fault"]] == [5]
    assert all(row["tries"] and not row["bad"] for row in rows), rows
