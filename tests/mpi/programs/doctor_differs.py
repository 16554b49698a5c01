"""`feddip-mpi doctor` where rank 1 has another torch, another clock and another random generator than rank 0.

    doctor_differs.py FILE

Rank 0's report goes to FILE: on the launcher's output lines of the other rank may stand in its middle.
"""

import sys
import time
from contextlib import redirect_stdout

from feddip_mpi import probes, runtime
from feddip_mpi.cli import main

if runtime.launched_rank() == 1:
    clock, versions, mask = time.time, runtime.versions, probes.mask
    time.time = lambda: clock() + 5
    runtime.versions = lambda: {**versions(), "torch": "0.1"}
    probes.mask = lambda settings: mask(settings.model_copy(update={"seed": settings.seed + 1}))

report = sys.argv[1]
sys.argv = ["feddip-mpi", "doctor", "--json"]
with (
    open(report if runtime.launched_rank() == 0 else "/dev/null", "w", encoding="utf-8") as file,
    redirect_stdout(file),
):
    main()
