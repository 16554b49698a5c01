"""Two clients at once on one rank against one after another, and against two ranks; interleaved, on the CPU.

    python benchmarks/at_once.py [--rows FedAvg "FedDIP 0.95"] [--rounds 8] [--append] [--out docs/results/at-once.json]

The workload of benchmarks/round.py, in its turns of a second. On a GPU the same question is asked by benchmarks/gpu.py.
Also what a rank could do in advance while it waits: a client's batches, against its training, in CPU time.
`--append` adds rows to what the result file has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import round as workload
import torch
from watch import mpirun

from feddip_mpi import config, federation, runtime

# Ranks and clients at once.
WAYS = {
    "1 rank, one after another": (1, 1),
    "1 rank, 2 clients at once": (1, 2),
    "2 ranks, one after another": (2, 1),
}


def start(name: str, ranks: int, settings: list[str], folder: Path) -> workload.Contender:
    """A run that goes on for more rounds than anybody waits for."""
    source = folder / "round.yaml"
    source.write_text("{}\n")
    chosen = [*workload.COMMON, "rounds=1000", "checkpoint.every=1000", *settings]
    program = [sys.executable, "-m", "feddip_mpi", "train", str(source), "--out", str(folder / "run")]
    command = [*mpirun(ranks), *program, *(x for item in chosen for x in ("--set", item))]
    with open(folder / "log", "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return workload.Contender(name, job, folder / "run" / "metrics.jsonl")


def measure(row: str, rounds: int, scratch: Path) -> dict:
    """Seconds of each round and peak bytes of each way, which take turns; their losses must be equal."""
    found: dict = {"load_average": os.getloadavg()[0]}
    contenders: list[workload.Contender] = []
    try:
        for number, (name, (ranks, at_once)) in enumerate(WAYS.items()):
            folder = scratch / str(number)
            folder.mkdir(parents=True)
            settings = [*workload.ROWS[row], f"clients_at_once={at_once}"]
            contenders.append(start(name, ranks, settings, folder))
            while len(contenders[-1].ends) < workload.WARM_UP:
                contenders[-1].turn(0.5)
        while any(len(contender.round_seconds()) < rounds for contender in contenders):
            for contender in contenders:
                contender.turn(1.0)
        losses = set()
        for contender in contenders:
            lines = [
                json.loads(line) for line in contender.rounds.read_text().splitlines()[: workload.WARM_UP + rounds]
            ]
            losses.add(tuple(line["train_loss"] for line in lines))
            found[contender.name] = {"seconds": contender.round_seconds(), "bytes": contender.peak}
        if len(losses) != 1:
            raise SystemExit(f"the ways do not train alike: {losses}")
    finally:
        for contender in contenders:
            contender.end()
    return found


def in_advance(clients: int = 6) -> dict:
    """Median CPU milliseconds of a client's order of batches and normalised images, and of all of its round."""
    comm = SimpleNamespace(
        rank=0, size=1, node_rank=0, check=lambda error: None, gather=lambda row: row[None], node_broadcast=lambda x: x,
        shared_arrays=lambda arrays: arrays,
    )  # fmt: skip
    torch.set_num_threads(1)
    built = federation.build(config.parse("{}"), comm, torch.device("cpu"))
    mask = torch.ones(built.layout.prunable, dtype=torch.bool)
    times: dict[str, list[float]] = {"batches": [], "whole round": []}
    for client in range(clients):
        samples = built.partition.train[client]
        for name, work in (
            ("batches", lambda s=samples, c=client: built.trainer._batches(s, 0, c)),
            ("whole round", lambda s=samples, c=client: built.trainer.train(built.initial, mask, s, 0.1, 0.0, 0, c)),
        ):
            started = time.process_time()
            work()
            times[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(own[1:]) for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(workload.ROWS), default=["FedAvg", "FedDIP 0.95"])
    parser.add_argument("--rounds", type=int, default=8, help="of each way, after two that do not count")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/results/at-once.json"))
    options = parser.parse_args()
    hardware = {key: value for key, value in runtime.hardware().items() if key != "host"}
    result: dict = {"command": "python benchmarks/at_once.py", "versions": runtime.versions(), "hardware": hardware}
    if options.append and options.out.exists():
        result |= json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        result["a client, CPU ms"] = in_advance()
        for number, row in enumerate(options.rows):
            result[row] = measure(row, options.rounds, Path(scratch) / str(number))
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("| | s a round | against one rank | memory, GB |\n|---|---|---|---|")
    for row in options.rows:
        base = statistics.median(result[row][next(iter(WAYS))]["seconds"])
        for name in WAYS:
            seconds = statistics.median(result[row][name]["seconds"])
            print(f"| {row}, {name} | {seconds:.2f} | {seconds / base:.2f} | {result[row][name]['bytes'] / 1e9:.2f} |")


if __name__ == "__main__":
    main()
