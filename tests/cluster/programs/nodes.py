"""Which ranks MPI believes to share a host. Rank 0 prints JSON: a row (host, ranks there, rank there, launcher's) a rank."""

from __future__ import annotations

import json
import os

from mpi4py import MPI

comm = MPI.COMM_WORLD
node = comm.Split_type(MPI.COMM_TYPE_SHARED)
told = int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])
rows = comm.gather((MPI.Get_processor_name(), node.size, node.rank, told))
if comm.rank == 0:
    print(json.dumps(rows), flush=True)
