"""What a checkpoint costs training: written behind it, and before it goes on. In one run, in turns.

    python benchmarks/background.py --folder SCRATCH --out docs/results/background.json
    mpirun -n 2 python -m mpi4py benchmarks/background.py --folder SCRATCH --out docs/results/background-2-ranks.json

Rounds of FedAvg with AlexNet (23 M weights, a checkpoint of 93 MB), with no checkpoint after a round, with one that is written
behind the next round, and with one that is waited for, in turns. The cost of a checkpoint is what `save` takes, plus
how much longer the next round takes than a round after which nothing was saved, plus what is left to wait for then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from feddip_mpi import collectives, config, rounds, runtime, session
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.saver import FolderSaver
from feddip_mpi.schedules import plan_round

WAYS = ("none", "behind", "before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="scratch on a disk; a folder is made in it and removed"
    )
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--images", type=int, default=640, help="of a client, in a round")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    given = parser.parse_args()
    comm = collectives.world()
    settings = config.validate({
        "clients": comm.size, "participants": comm.size, "local_epochs": 1, "batch_size": 64, "learning_rate": 1e-3,
        "method": "fedavg", "upload": {"values": "int8", "residual": "drop"}, "rounds": 1000, "device": "cpu",
        "model": {"name": "alexnet"}, "checkpoint": {"keep": 1, "best": False},
        "data": {"name": "synthetic", "synthetic": {
            "shape": [3, 32, 32], "train_samples": given.images * comm.size, "test_samples": 10}},
    })  # fmt: skip
    built = session.build(comm, settings)
    run = RunFolder(given.folder / "background")
    if comm.rank == 0:
        run.checkpoints.mkdir(parents=True)
    comm.barrier()
    saver, state, history = FolderSaver(built, run, "2026-01-01T00:00:00+0000"), rounds.initial_state(built), []

    def play() -> float:
        comm.barrier()
        started = time.perf_counter()
        history.append(rounds.play(built, state, plan_round(settings, state.server.round)))
        comm.barrier()
        return time.perf_counter() - started

    play()
    seconds: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(given.repeats):
        for way in WAYS:
            comm.barrier()
            started = time.perf_counter()
            if way != "none":
                saver.save(state, history)
            if way == "before":
                saver.wait()
            saved = time.perf_counter() - started
            played, started = play(), time.perf_counter()
            saver.wait()
            seconds[way].append((saved, played, time.perf_counter() - started))
    rows: dict[str, Any] = {}
    for way, measured in seconds.items():
        saved, played, left = (statistics.median(column) for column in zip(*measured, strict=True))
        rows[way] = {"save_seconds": saved, "next_round_seconds": played, "left_to_wait_seconds": left}
        rows[way]["next_round_seconds_all"] = [round(row[1], 3) for row in measured]
        rows[way]["save_seconds_all"] = [round(row[0], 3) for row in measured]
    base = rows["none"]["next_round_seconds"]
    for way in WAYS[1:]:
        row = rows[way]
        row["cost_seconds"] = row["save_seconds"] + row["next_round_seconds"] - base + row["left_to_wait_seconds"]
    if comm.rank == 0:
        words = f"--repeats {given.repeats} --images {given.images} --folder SCRATCH"
        launcher = "python" if comm.size == 1 else f"mpirun -n {comm.size} python -m mpi4py"
        result = {
            "command": f"{launcher} benchmarks/background.py {words}",
            "hardware": {name: value for name, value in runtime.hardware().items() if name != "host"},
            "versions": runtime.versions(),
            "mpi": comm.library(),
            "ranks": comm.size,
            "file_bytes": max(run.checkpoints.iterdir()).stat().st_size,
            "ways": rows,
        }
        text = json.dumps(result, indent=1) + "\n"
        print(text)
        if given.out:
            given.out.write_text(text)
        shutil.rmtree(run.path)
    comm.barrier()
    comm.free()


if __name__ == "__main__":
    main()
