"""What a rank does in Python where there are thousands of ranks and a hundred thousand clients; one core, no MPI.

    python benchmarks/many_ranks.py [--out docs/results/many_ranks.json]

2,048 ranks, 4,096 participants of 100,000 clients, two a rank; a model of ResNet-50's size at 90 % zeros, int8, and a regrow
message of 2 % of the kept weights, as in rounds that renew the mask. Processor seconds of this process, the best of some
tries: no network, no training, no GPU. Residuals have 100 values, so that their number is what is seen; so has the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from feddip_mpi import besides, checkpoint, codec, evaluate, exchange, hdf5, metrics, placement, runtime
from feddip_mpi.data import partition
from feddip_mpi.exchange import Exchange, Task
from feddip_mpi.federation import _crc
from feddip_mpi.residuals import Residual
from feddip_mpi.settings import DataConfig
from feddip_mpi.support import Support

RANKS, PARTICIPANTS, CLIENTS, OWN = 2048, 4096, 100_000, 2
IMAGES, TEST_IMAGES, CLASSES = 1_281_167, 50_000, 10
PRUNABLE, OTHER, KEPT, REGROW = 25_500_000, 60_000, 0.1, 0.02
STORED = 2000


class Table:
    """Rows that are printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def time(self, what: str, when: str, work: Callable[[], Any], tries: int = 3, times: float = 1.0) -> Any:
        """Note the processor seconds of `work`, `times` of which happen; returns what it returned last."""
        found, result = [], None
        for _ in range(tries):
            result, started = None, time.process_time()
            result = work()
            found.append(time.process_time() - started)
        self.rows.append({"what": what, "when": when, "seconds": float(f"{times * min(found):.3g}")})
        print(self.rows[-1], flush=True)
        return result


def start(table: Table, generator: np.random.Generator) -> partition.Partition:
    train, test = (generator.integers(CLASSES, size=count) for count in (IMAGES, TEST_IMAGES))
    made: dict[str, partition.Partition] = {}
    for rule in ("iid", "dirichlet", "pathological"):
        settings = DataConfig(name="synthetic", partition=rule, min_samples=2)

        def deal(settings: DataConfig = settings) -> partition.Partition:
            return partition.make(settings, CLIENTS, train, test, CLASSES, 1)

        made[rule] = table.time(f"partition, {rule}", "every start, every rank", deal, tries=1)
    parts = made["dirichlet"]
    table.time("CRC-32 of the partition", "every start, every rank", lambda: _crc([*parts.train, *parts.test]), tries=1)
    return parts


def play(table: Table, generator: np.random.Generator, parts: partition.Partition) -> None:
    always = "every round, every rank"
    samples = [len(part) for part in parts.train]
    holders = [client % RANKS for client in range(CLIENTS)]
    chosen = sorted(generator.choice(CLIENTS, PARTICIPANTS, replace=False).tolist())
    placed = table.time("placement", always, lambda: placement.assign(chosen, samples, holders, RANKS))
    table.time("plan and placement as JSON", always, lambda: json.dumps([chosen, placed]))
    support = Support.of(torch.from_numpy(generator.random(PRUNABLE) < KEPT))
    size, upload = PRUNABLE + OTHER, codec.Upload("int8", regrow=round(REGROW * KEPT * PRUNABLE))
    task = Task("sharded", False, 0, support, size, upload, placed, besides.shares(samples, chosen))
    comm: Any = SimpleNamespace(size=RANKS, rank=0)
    table.time("slices and waves", always, lambda: Exchange(comm, task))
    bounds = exchange.slices(support, size, RANKS, "int8")
    update = torch.from_numpy(generator.standard_normal(size).astype(np.float32))
    for message in codec.encode(update, support, upload, 0, chosen[0], np.random.default_rng(0)):
        name = "regrow message" if message.kind == codec.REGROW else "message"
        when = "rounds with regrow, every rank" if message.kind == codec.REGROW else always

        def cut(message: codec.Message = message) -> list[np.ndarray]:
            return [message.frame(lo, hi) for lo, hi in itertools.pairwise(bounds)]

        frames = table.time(f"{OWN} clients' {name} cut for {RANKS} ranks", when, cut, times=OWN)

        def read(frames: list[np.ndarray] = frames) -> list[codec.Piece]:
            return [codec.read(frame, support, size, 0) for frame in frames]

        table.time(f"slices of {PARTICIPANTS} clients' {name} read", when, read, times=PARTICIPANTS / RANKS)
    scores = evaluate.BatchScores(np.ones(100), generator.integers(0, 4, TEST_IMAGES).astype(np.uint8))
    table.time("eval.clients: accuracies", "every evaluation, every rank", lambda: evaluate.merge([scores], parts.test))
    kinds = {
        "int": 3,
        "float": 0.123456789,
        "ints": chosen,
        "floats": None,
        "layers": {f"layer{i}": 0.9 for i in range(54)},
    }
    record = {name: kinds[field.kind] for name, field in metrics.FIELDS.items()}
    line = table.time("line of metrics.jsonl", "every round, rank 0", lambda: metrics.to_line(record))
    print(f"a line has {len(line)} bytes")


def store(table: Table, folder: Path) -> None:
    """A checkpoint with many residuals, taken times as many as there are clients."""
    path, times = folder / "round-000001.h5", CLIENTS / STORED
    values = torch.randn(100, generator=torch.Generator().manual_seed(1))
    draft = hdf5.Draft(path)

    def write() -> None:
        for client in range(STORED):
            checkpoint.add_residual(draft, client, Residual(values, 3))

    def read() -> None:
        checkpoint.residual_rounds(path)
        for _ in checkpoint.read_residuals(path):
            pass

    table.time(f"{CLIENTS} residuals written", "every checkpoint, rank 0", write, 1, times)
    table.time(
        "their file finished", "every checkpoint, a thread of rank 0", lambda: draft.finish({"round": 1}), 1, times
    )
    table.time(f"{CLIENTS} residuals read", "every resume, rank 0", read, 1, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table, generator = Table(), np.random.default_rng(0)
    play(table, generator, start(table, generator))
    with tempfile.TemporaryDirectory() as folder:
        store(table, Path(folder))
    result = {
        "command": "python benchmarks/many_ranks.py",
        "clock": "processor seconds of one thread",
        "ranks": RANKS, "participants": PARTICIPANTS, "clients": CLIENTS, "prunable": PRUNABLE,
        "versions": runtime.versions(),
        "hardware": {key: value for key, value in runtime.hardware().items() if key != "host"},
        "load_average": os.getloadavg()[0], "rows": table.rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
