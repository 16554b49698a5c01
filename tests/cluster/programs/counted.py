"""Trains a small run in each of several exchanges; what each round counted beside what its interfaces did.

    counted.py SETTINGS.json RESULT.json      SETTINGS: a list of argument lists for `feddip-mpi train`

RESULT: for each run a list of rounds {"counted": bytes received by MPI as counted, "interfaces": bytes received by all
eth0, "record": the round's record}, summed over the ranks, one rank a host. MPI's own start-up lies before the first
round; checkpoints and the like between rounds are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor, nn

from feddip_mpi import cli, rounds
from feddip_mpi.collectives import Communicator

sys.modules["matplotlib"] = None  # type: ignore[assignment]  # no picture: it takes longer than the run


class Wide(nn.Module):
    """A million weights that train in no time."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 6000), nn.Linear(6000, classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(images.flatten(1)).relu())
        return out


def wide(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return Wide(in_channels * image_size[0] * image_size[1], classes)


def received_by_interface() -> int:
    """Bytes that eth0 of this host has received, headers included."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:")]
    return int(line.split(":")[1].split()[0])


def run(argv: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    play = rounds.play

    def watched(federation: Any, state: Any, plan: Any, life: Any) -> Any:
        comm: Communicator = federation.comm
        comm.barrier()
        before = received_by_interface(), sum(comm.received.values())
        record = play(federation, state, plan, life)
        comm.barrier()
        own = received_by_interface() - before[0], sum(comm.received.values()) - before[1]
        interfaces, counted = comm.gather(np.array(own, np.float64)).sum(axis=0)
        found.append({"counted": int(counted), "interfaces": int(interfaces), "record": record})
        return record

    sys.argv = ["feddip-mpi", *argv]
    with mock.patch.object(rounds, "play", watched):
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise
    return found


def main(settings: Path, result: Path) -> None:
    results = [run(argv) for argv in json.loads(settings.read_text())]
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_rank() == 0:
        result.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
