"""Ranks die one after the other, each while the others are in another call. Without torch: ranks start in a moment.

    mpirun --with-ft ulfm -n 6 python deaths.py

The rank that was called k at the start dies in the k-th check, so that the last one is alone in the end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import numpy as np

from feddip_mpi import collectives, runtime
from feddip_mpi.collectives import Communicator
from feddip_mpi.errors import RankLost


def check_gather(comm: Communicator) -> None:
    for _ in range(3):
        comm.gather(np.array([1.0]))


def check_background(comm: Communicator) -> None:
    """A message that another thread sends: the error comes out where its result is asked for."""
    comm.open_background()
    payload = np.zeros(300_000, np.uint8)
    sent = [comm.post(lambda: comm.allgatherv([payload], [1] * comm.size)) for _ in range(3)]
    for one in sent:
        one.result()


def check_move(comm: Communicator) -> None:
    """A receiver whose sender is dead; who has nothing to do with it learns it at the next call."""
    last = comm.size - 1
    comm.move([(7, 0, last)], lambda key: np.zeros(5, np.uint8))
    comm.barrier()


def check_poll(comm: Communicator) -> None:
    """A rank that only computes, and looks up between two batches."""
    while True:
        comm.poll()


def check_commit(comm: Communicator) -> None:
    comm.commit()


CHECKS: list[Callable[[Communicator], None]] = [check_gather, check_background, check_move, check_poll, check_commit]


def main() -> None:
    runtime.prepare_mpi()
    assert runtime.fault_tolerant()
    comm = collectives.world(None, True)
    name, size = comm.rank, comm.size
    assert comm.fault_tolerant and not comm.damaged and size == len(CHECKS) + 1
    shared = comm.shared_arrays({"images": np.arange(1000)} if comm.node_rank == 0 else None)["images"]
    for victim, check in enumerate(CHECKS):
        assert comm.agree(True) and comm.rank == name - victim
        sent = comm.sent["control"]
        if name == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            check(comm)
        except RankLost as lost:
            assert "a rank died" in str(lost), lost
        else:
            raise AssertionError(f"rank {name}: no error in {check.__name__}")
        assert comm.shrink() == list(range(1, size - victim))
        assert comm.damaged and comm.lost_ranks == list(range(victim + 1))
        assert comm.world_ranks == list(range(victim + 1, size))
        assert comm.sent["control"] >= sent
        # The memory belonged to a rank that is dead; nobody may notice.
        assert np.array_equal(shared, np.arange(1000))
        assert np.array_equal(comm.gather(np.array([float(name)]))[:, 0], np.arange(victim + 1.0, size))
        if comm.rank == 0:
            print(f"passed {check.__name__}", flush=True)
    assert comm.size == 1
    comm.leave(0)


if __name__ == "__main__":
    main()
    sys.exit("leave() came back")
