"""`feddip-mpi doctor` where rank 1 has another torch, another clock and another random generator than rank 0."""

import sys
import time

from feddip_mpi import probes, runtime
from feddip_mpi.cli import main

if runtime.launched_rank() == 1:
    clock, versions, mask = time.time, runtime.versions, probes.mask
    time.time = lambda: clock() + 5
    runtime.versions = lambda: {**versions(), "torch": "0.1"}
    probes.mask = lambda settings: mask(settings.model_copy(update={"seed": settings.seed + 1}))

sys.argv = ["feddip-mpi", "doctor", "--json"]
main()
