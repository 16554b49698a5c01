"""Runs several feddip-mpi commands one after another in the same ranks: `import torch` is paid once.

    mpirun -n P python -m mpi4py steps.py STEPS.json RESULTS_FOLDER

STEPS.json is a list of {"argv": [...], ...}; optional keys of a step:
    "stop_after": r   the last rank gets SIGUSR1 in round r; the others must stop with it
    "abandon": true   every round is given up before its first batch, as if a signal had come long ago
    "drift": rank     that rank's weights change by one bit before replicas are compared
    "launched": n     the launcher says that it has started so many ranks
    "ranks_per_node": n   so many ranks are taken for a node
    "kept_bytes": n   residuals beyond so many bytes are written before training goes on
RESULTS_FOLDER/rank-N.json: for each step the exit code and what the rank wrote to stdout and stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mpi4py import MPI

from feddip_mpi import cli, rounds, runtime, saver
from feddip_mpi.collectives import Communicator
from feddip_mpi.server import Server
from feddip_mpi.stopping import StopFlag

sys.modules["matplotlib"] = None  # type: ignore[assignment]  # no picture of each run: it takes longer than the run

RANK, SIZE = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def execute(argv: list[str]) -> dict[str, Any]:
    """One command; like the console script, without leaving the process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["feddip-mpi", *argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception:  # the console script would end with it; here the other steps go on
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


@contextlib.contextmanager
def stopping_after(round: int) -> Iterator[None]:
    """SIGUSR1 to the last rank while it plays its `round`-th round of the run."""
    play = rounds.play

    def play_and_signal(federation: Any, state: rounds.State, plan: Any, life: Any) -> Any:
        if RANK == SIZE - 1 and plan.round + 1 == round:
            os.kill(os.getpid(), signal.SIGUSR1)
        return play(federation, state, plan, life)

    with mock.patch.object(rounds, "play", play_and_signal):
        yield


@contextlib.contextmanager
def drifting(rank: int) -> Iterator[None]:
    """One bit of one weight of a rank flips."""
    compare = rounds.compare_replicas

    def flip_and_compare(comm: Communicator, server: Server) -> None:
        if comm.rank == rank:
            server.weights.view(-1).numpy().view("uint32")[5] ^= 1
        compare(comm, server)

    with mock.patch.object(rounds, "compare_replicas", flip_and_compare):
        yield


def main() -> None:
    steps, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ended = []
    for step in steps:
        with contextlib.ExitStack() as stack:
            if "stop_after" in step:
                stack.enter_context(stopping_after(step["stop_after"]))
            if "abandon" in step:
                stack.enter_context(mock.patch.object(StopFlag, "expired", lambda *_: True))
            if "drift" in step:
                stack.enter_context(drifting(step["drift"]))
            if "kept_bytes" in step:
                stack.enter_context(mock.patch.object(saver, "_KEPT_BYTES", step["kept_bytes"]))
            if "launched" in step:
                told = step["launched"], "PMI_SIZE"
                stack.enter_context(mock.patch.object(runtime, "launched_ranks", return_value=told))
            if "ranks_per_node" in step:
                stack.enter_context(mock.patch.object(runtime, "ranks_per_node", return_value=step["ranks_per_node"]))
            ended.append(execute(step["argv"]))
        # A rank that ended early must not begin the next step, where others could take its messages for theirs.
        MPI.COMM_WORLD.Barrier()
        if RANK == 0:
            print(f"{ended[-1]['code']} {' '.join(step['argv'])}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"rank-{RANK}.json").write_text(json.dumps(ended))
    MPI.COMM_WORLD.Barrier()


if __name__ == "__main__":
    main()
