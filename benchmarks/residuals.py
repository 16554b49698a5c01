"""Residuals of many clients in one checkpoint: bytes, seconds, and the memory that rank 0 needs besides its own state.

    mpirun -n 2 python -m mpi4py benchmarks/residuals.py --folder SCRATCH --out docs/results/residuals.json

A federation of `--clients` clients with AlexNet (23 M prunable weights), every client with a residual, held as in a run:
client k by rank k modulo the number of ranks. The checkpoint is written by the code of a run (`FolderSaver`),
verified, and read back to its holders by the code of `resume`; what arrives is compared with what was held. Once with
residuals of normal random numbers, which no sparse form shortens, and once with 95 % zeros. Memory is the kernel's
highest resident set since it was reset just before (VmHWM), minus the resident set of rank 0's own state: that before
saving, or that after restoring. One client's worth is 4 bytes a prunable weight. Needs all clients' worths in memory,
over all ranks, and as much on disk.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from feddip_mpi import checkpoint, collectives, config, recovery, rounds, runtime, server, session
from feddip_mpi.collectives import Communicator
from feddip_mpi.federation import Federation
from feddip_mpi.residuals import Residual
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.saver import FolderSaver


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measured(work: Callable[[], Any], own: str = "before") -> tuple[float, int, Any]:
    """Seconds, bytes of the highest resident set above that `own` ("before", "after") the work, and what it returns."""
    # The program keeps freed blocks (runtime.keep_big_blocks): what is free must not count as the state's own.
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status("VmRSS"), time.perf_counter()
    result = work()
    seconds, peak = time.perf_counter() - started, status("VmHWM")
    libc.malloc_trim(0)
    return seconds, peak - (before if own == "before" else status("VmRSS")), result


def residual(client: int, size: int, zeros: float) -> Residual:
    """A client's residual: normal random numbers, a share of which is replaced by zeros."""
    generator = torch.Generator().manual_seed(client)
    values = torch.randn(size, generator=generator)
    if zeros:
        values.masked_fill_(torch.rand(size, generator=generator) < zeros, 0.0)
    return Residual(values, client % 7)


def checksum(found: dict[int, Residual]) -> list[tuple[int, int, float]]:
    return [(client, r.round, float(r.values.double().sum())) for client, r in sorted(found.items())]


def play(comm: Communicator, built: Federation, folder: Path, zeros: float) -> dict[str, Any]:
    """Save and restore; the row of the table, on every rank."""
    clients, size = built.config.clients, built.layout.prunable
    state = rounds.initial_state(built)
    for client, holder in enumerate(state.holders):
        if holder == comm.rank:
            state.held[client] = residual(client, size, zeros)
    state.server = server.Server.of(7, state.server.weights, state.server.mask)
    run = RunFolder(folder)
    if comm.rank == 0:
        run.checkpoints.mkdir(parents=True)
    saver = FolderSaver(built, run, "2026-01-01T00:00:00+0000")
    comm.barrier()

    waited, peak_before, _ = measured(lambda: saver.save(state, []))
    behind, peak_behind, _ = measured(saver.wait)
    path = checkpoint.path_of(run.checkpoints, 7)
    held = checksum(state.held)
    row = {
        "zeros": zeros,
        "clients": clients,
        "prunable_weights": size,
        "ranks": comm.size,
        "client_bytes": 4 * size,
        "all_clients_bytes": 4 * size * clients,
        "file_bytes": path.stat().st_size,
        "seconds_training_waits": waited,
        "seconds_behind_training": behind,
        "peak_bytes_above_own_state": max(peak_before, peak_behind),
    }
    state.held.clear()
    comm.barrier()
    left = checkpoint.residual_rounds(path)
    stored = checkpoint.read_residuals(path) if comm.rank == 0 else None
    seconds, peak, _ = measured(lambda: recovery.hand_out(comm, left, state.holders, stored, state.held), "after")
    row |= {
        "restore_seconds": seconds,
        "restore_peak_bytes_above_own_state": peak,
        "equal": checksum(state.held) == held,
    }
    state.held.clear()
    if comm.rank == 0:
        row["verify_seconds"] = measured(lambda: checkpoint.verify(path))[0]
        shutil.rmtree(folder)
    for name in ("peak_bytes_above_own_state", "restore_peak_bytes_above_own_state"):
        row[name.replace("bytes_above_own_state", "in_clients")] = round(row[name] / row["client_bytes"], 2)
    comm.barrier()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="scratch on a disk; a folder is made in it and removed"
    )
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.0, 0.95])
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    given = parser.parse_args()
    comm = collectives.world()
    settings = config.validate({
        "clients": given.clients, "model": {"name": "alexnet"}, "device": "cpu",
        "data": {"name": "synthetic", "min_samples": 1,
                 "synthetic": {"shape": [3, 32, 32], "train_samples": 10 * given.clients, "test_samples": 10}},
    })  # fmt: skip
    built = session.build(comm, settings)
    rows = [play(comm, built, given.folder / f"residuals-{zeros}", zeros) for zeros in given.zeros]
    everywhere = comm.gather_json(rows)
    if comm.rank == 0:
        assert all(row["equal"] for own in everywhere for row in own)
        words = [
            f"--clients {given.clients}",
            *(["--zeros", *map(str, given.zeros)] if given.zeros != [0.0, 0.95] else []),
        ]
        result = {
            "command": f"mpirun -n {comm.size} python -m mpi4py benchmarks/residuals.py {' '.join(words)} --folder SCRATCH",
            "hardware": {name: value for name, value in runtime.hardware().items() if name != "host"},
            "versions": runtime.versions(),
            "mpi": comm.library(),
            "rows": rows,
        }
        text = json.dumps(result, indent=1) + "\n"
        print(text)
        if given.out:
            given.out.write_text(text)
    comm.barrier()
    comm.free()


if __name__ == "__main__":
    main()
