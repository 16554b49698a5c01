"""What the doctor finds only by asking all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import launch
import pytest

pytestmark = pytest.mark.mpi


def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = launch.run([str(launch.PROGRAMS / "doctor_differs.py"), str(report)], ranks=2).expect(2)
    found = json.loads(report.read_text())
    said = {verdict["check"]: (verdict["level"], verdict["text"]) for verdict in found["verdicts"]}
    level, text = said["versions"]
    assert level == "FAIL" and "torch differs between ranks" in text and "0.1 (rank 1)" in text and "(rank 0)" in text
    level, text = said["mask"]
    digests = [row["mask"]["digest"] for row in found["ranks"]]
    assert level == "FAIL" and digests[0] != digests[1] and all(digest in text for digest in digests)
    level, text = said["clocks"]
    assert level == "WARN" and "the clock of rank 1" in text and "ahead of rank 0's" in text
    assert abs(found["ranks"][1]["clock"]["offset_seconds"] - 5) <= found["ranks"][1]["clock"]["bound_seconds"]
    assert said["launch"][0] == said["disk"][0] == "PASS"
    assert "2 things to repair" in done.text
