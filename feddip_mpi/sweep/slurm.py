"""A batch script with one array task a cell, on the conventions of jobs/slurm-array.sh."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from feddip_mpi import hdf5
from feddip_mpi.sweep import labels, runner
from feddip_mpi.sweep.grid import Cell

_SCRIPT = """\
#!/usr/bin/env bash
# The cells of a sweep that were not finished when this was written, one array task each, with its own time limit and requeue.
# Submit it from the folder that holds jobs/ (or set JOBS to that folder); `feddip-mpi sweep` shows what is done.
#
#   sbatch @SCRIPT@
#   sbatch --array=@ARRAY@%4 --time=240 @SCRIPT@       four at a time
#
#SBATCH --job-name=feddip-sweep
#SBATCH --array=@ARRAY@
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=60
# B: sends USR1 to this script, 120 s before the limit (up to 60 s earlier than that). Make it longer than a round.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=@LOGS@/%x-%A-%a.log

# shellcheck disable=SC2034 # lib.sh reads them
# ---- settings: edit them here, or set them in the environment of sbatch ----
RUNS=${RUNS:-@RUNS@}
JOBS=${JOBS:-jobs}           # the folder with lib.sh
LAUNCHER=${LAUNCHER:-mpirun} # or srun
PMI=${PMI:-pmix}             # for srun: pmix (Open MPI), pmi2 (MPICH), or what docs/clusters.md says
MODULES=${MODULES:-}         # e.g. "gcc openmpi"
VENV=${FEDDIP_VENV:-}        # virtual environment; empty: the python on PATH
THREADS=${THREADS:-1}
REQUEUE=${REQUEUE:-1}
LAUNCH_OPTIONS=()            # more options of the launcher, e.g. (--bind-to core) or (--cpu-bind=cores)
# ---- end of the settings ----

CELLS=(
@CELLS@
)

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=/dev/null
source "$JOBS/lib.sh" || exit 2
index=${SLURM_ARRAY_TASK_ID:-${#CELLS[@]}}
if ((index >= ${#CELLS[@]})); then
    die 2 "task $index: there are ${#CELLS[@]} cells, so submit with --array=@ARRAY@"
fi
RUN=$RUNS/${CELLS[index]}
CONFIG=$RUNS/@BESIDE@/${CELLS[index]}.yaml
prepare_environment
run_job
exit
"""


def write(cells: Sequence[Cell], out: Path) -> Path:
    """Write the script and each cell's configuration beside the run folders; returns the script's path.

    Args:
        cells: what is not finished, at least one.
        out: the folder of the run folders.
    """
    for cell in cells:
        runner.write_config(cell, out)
    path = out / labels.BESIDE / "array.sh"
    array = f"0-{len(cells) - 1}"
    places = {
        "SCRIPT": shlex.quote(str(path)),
        "ARRAY": array,
        "LOGS": str(out / labels.BESIDE).replace("%", "%%"),
        "RUNS": shlex.quote(str(out)),
        "CELLS": "\n".join(f"    {shlex.quote(cell.name)}" for cell in cells),
        "BESIDE": labels.BESIDE,
    }
    text = _SCRIPT
    for name, value in places.items():
        text = text.replace(f"@{name}@", value)
    hdf5.write_text(path, text)
    path.chmod(0o755)
    return path
