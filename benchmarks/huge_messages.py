"""Exchanges above 2^31 bytes, for real: MPI-3 counts are 32-bit, and Open MPI refuses larger calls.

    mpirun -n 2 python -m mpi4py benchmarks/huge_messages.py [--bytes 1200000000] [--out docs/results/huge-messages.json]

Every rank contributes a payload of that many bytes (two ranks: 2.4 GB in one allgatherv, above 2^31), then the same
through alltoallv to one rank, and a message above 2^31 bytes from rank 0 to rank 1. Whatever arrives is compared with
what must arrive, in full. Needs about four times the sum of the payloads in memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np

from feddip_mpi import collectives, runtime
from feddip_mpi.collectives import Communicator


def payload(rank: int, size: int) -> np.ndarray:
    """Bytes that differ by rank and by place, with a period that divides no power of two."""
    pattern = np.random.default_rng(rank).integers(0, 256, 999_983, np.uint8)
    return np.resize(pattern, size)


def allgatherv(comm: Communicator, size: int) -> int:
    got = comm.allgatherv([payload(comm.rank, size)], [1] * comm.size)
    assert all(np.array_equal(part, payload(rank, size)) for rank, part in enumerate(got))
    return sum(part.size for part in got)


def alltoallv(comm: Communicator, size: int) -> int:
    """Everything to the last rank."""
    last, nothing = comm.size - 1, np.zeros(0, np.uint8)
    parts = [payload(comm.rank, size) if rank == last else nothing for rank in range(comm.size)]
    got = comm.alltoallv([parts], [1] * comm.size)
    assert all(
        np.array_equal(part, payload(rank, size) if comm.rank == last else nothing) for rank, part in enumerate(got)
    )
    return size * comm.size


def move(comm: Communicator, size: int) -> int:
    whole = size * comm.size
    arrived = comm.move([(7, 0, comm.size - 1)], lambda key: payload(key, whole))
    if comm.rank == comm.size - 1:
        assert np.array_equal(arrived[7], payload(7, whole))
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_200_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runtime.prepare_mpi()
    comm = collectives.world()
    rows = []
    for step in (allgatherv, alltoallv, move):
        comm.barrier()
        started = time.perf_counter()
        total = step(comm, options.bytes)
        comm.barrier()
        rows.append({"step": step.__name__, "bytes": total, "above_2_31": total > 2**31, "correct": True,
                     "seconds_with_comparison": round(time.perf_counter() - started, 2)})  # fmt: skip
        if comm.rank == 0:
            print(rows[-1], flush=True)
    result = {
        "command": f"mpirun -n {comm.size} python -m mpi4py benchmarks/huge_messages.py --bytes {options.bytes}",
        "ranks": comm.size, "mpi": comm.library(), "python": platform.python_version(), "rows": rows,
    }  # fmt: skip
    if options.out and comm.rank == 0:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    comm.free()


if __name__ == "__main__":
    main()
