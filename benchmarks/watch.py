"""Shared by the scripts of this folder: run a command, watch its memory."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path


def proportional_bytes(root: int) -> int:
    """Summed PSS of a process and its descendants: memory that several share counts once."""
    import psutil

    total = 0
    try:
        family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


def watched(command: list[str], log: Path, extra: dict[str, str] | None = None) -> int:
    """Run a command to its end, with `extra` in its environment, and return the peak of `proportional_bytes`."""
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1", **(extra or {})}
        )
    peak = 0
    while process.poll() is None:
        peak = max(peak, proportional_bytes(process.pid))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return peak


def mpirun(ranks: int) -> list[str]:
    return ["mpirun", "--bind-to", "none", "-n", str(ranks), "--mca", "mpi_yield_when_idle", "1"]
