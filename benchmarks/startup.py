"""Seconds until something happens: import, --help, first round; and processor seconds of processes that do little.

    python benchmarks/startup.py [--repeats 5] [--out docs/results/startup.json]

The first round begins when its first line of metrics is there less the seconds that this line says the round took; the
data (Fashion-MNIST) and the program are in the page cache from the first repeat, which is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from watch import mpirun

from feddip_mpi import runtime

RANKS = 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def wall(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return time.perf_counter() - started


def processor(command: list[str]) -> float:
    """Processor seconds, user and system, of a command that is no launcher: beside other work they say more than the clock."""

    def used() -> float:
        times = resource.getrusage(resource.RUSAGE_CHILDREN)
        return times.ru_utime + times.ru_stime

    before = used()
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return used() - before


def one_round() -> float:
    """Processor seconds of a whole run of one round on one rank, on 60 images."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.yaml"
        source.write_text("{}\n")
        small = ("rounds=1", "local_epochs=1", "clients=4", "participants=1", "data.name=synthetic",
                 "data.synthetic.train_samples=60", "data.synthetic.test_samples=100")  # fmt: skip
        settings = [x for item in small for x in ("--set", item)]
        return processor(
            [sys.executable, "-m", "feddip_mpi", "train", str(source), *settings, "--out", f"{folder}/run"]
        )


def first_round() -> float:
    """Seconds from mpirun to the beginning of the first round."""
    with tempfile.TemporaryDirectory() as folder:
        source, run = Path(folder) / "empty.yaml", Path(folder) / "run"
        source.write_text("{}\n")
        settings = [x for item in ("rounds=1", "local_epochs=1", "participants=4") for x in ("--set", item)]
        program = [sys.executable, "-m", "feddip_mpi", "train", str(source), *settings, "--out", str(run)]
        started = time.time()
        subprocess.run([*mpirun(RANKS), "--oversubscribe", *program], env=ENVIRONMENT, check=True, capture_output=True)
        written = (run / "metrics.jsonl").stat().st_mtime
        record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        return written - started - record["round_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/startup.json"))
    options = parser.parse_args()
    measured = {
        "import feddip_mpi": lambda: wall([sys.executable, "-c", "import feddip_mpi"]),
        "feddip-mpi --help": lambda: wall([sys.executable, "-m", "feddip_mpi", "--help"]),
        f"first round, {RANKS} ranks": first_round,
        "processor: import torch": lambda: processor([sys.executable, "-c", "import torch"]),
        "processor: one round, 1 rank": one_round,
    }
    hardware = {key: value for key, value in runtime.hardware().items() if key != "host"}
    result: dict = {"command": "python benchmarks/startup.py", "versions": runtime.versions(), "hardware": hardware}
    result["load_average"] = os.getloadavg()[0]
    for name, work in measured.items():
        times = [work() for _ in range(options.repeats + 1)][1:]
        result[name] = {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}
        print(name, {key: round(value, 3) for key, value in result[name].items()})
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
