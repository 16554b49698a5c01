"""Sends known numbers of bytes between ranks: `traffic.py STEP BYTES`.

Rank 0 prints JSON: `received`, the bytes each rank got, and `seconds`, from the first rank's start to the last one's end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI


def block(rank: int, size: int) -> np.ndarray:
    """What a rank sends; no two ranks send as much."""
    return np.full(size + 1000 * rank, rank + 1, np.uint8)


def ring(comm: MPI.Intracomm, size: int) -> int:
    """Everybody sends to the right and receives from the left at the same time."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    expected = block(left, size)
    got = np.zeros_like(expected)
    comm.Sendrecv(block(comm.rank, size), right, recvbuf=got, source=left)
    assert np.array_equal(got, expected)
    return got.nbytes


def gather(comm: MPI.Intracomm, size: int) -> int:
    blocks = [block(rank, size) for rank in range(comm.size)]
    expected = np.concatenate(blocks)
    got = np.zeros_like(expected)
    comm.Allgatherv(blocks[comm.rank], [got, [one.nbytes for one in blocks], None, MPI.BYTE])
    assert np.array_equal(got, expected)
    return got.nbytes - blocks[comm.rank].nbytes


def to_first(comm: MPI.Intracomm, size: int) -> int:
    """All others send to rank 0, whose link is the narrowest place."""
    if comm.rank:
        comm.Send(block(comm.rank, size), 0)
        return 0
    buffers = [np.zeros_like(block(rank, size)) for rank in range(1, comm.size)]
    MPI.Request.Waitall([comm.Irecv(buffer, rank) for rank, buffer in enumerate(buffers, 1)])
    assert all((buffer == rank + 1).all() for rank, buffer in enumerate(buffers, 1))
    return sum(buffer.nbytes for buffer in buffers)


def from_first(comm: MPI.Intracomm, size: int) -> int:
    """Rank 0 sends to all others."""
    if comm.rank:
        got = np.zeros_like(block(0, size))
        comm.Recv(got, 0)
        assert (got == 1).all()
        return got.nbytes
    MPI.Request.Waitall([comm.Isend(block(0, size), rank) for rank in range(1, comm.size)])
    return 0


STEPS: dict[str, Callable[[MPI.Intracomm, int], int]] = {
    step.__name__: step for step in (ring, gather, to_first, from_first)
}


def main(name: str, size: int) -> None:
    comm = MPI.COMM_WORLD
    # Connections are made by the first message.
    STEPS[name](comm, 1)
    before = STEPS[name](comm, 1)
    comm.Barrier()
    # The hosts share one machine and thus its clock, so times of different ranks compare.
    start = time.monotonic()
    received = STEPS[name](comm, size)
    end = time.monotonic()
    rows = comm.gather((2 * before + received, start, end))
    if rows:
        totals, starts, ends = zip(*rows, strict=True)
        print(json.dumps({"received": totals, "seconds": max(ends) - min(starts)}), flush=True)


main(sys.argv[1], int(sys.argv[2]))
