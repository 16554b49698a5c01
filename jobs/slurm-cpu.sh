#!/usr/bin/env bash
# Several nodes without GPUs, one rank a core. Submit it from the top of the repository; submitted again, it goes on.
#
#   sbatch jobs/slurm-cpu.sh --set participants=8
#   sbatch --nodes=4 --ntasks-per-node=32 jobs/slurm-cpu.sh --set rounds=200 --set participants=128 --set clients=256
#
# More ranks than participants in a round (K, 5 in the configuration below) have nothing to train; `feddip-mpi plan CONFIG`
# shows what a run will do.
#
#SBATCH --job-name=feddip-cpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=240
# B: sends USR1 to this script, 120 s before the limit (up to 60 s earlier than that). Make it longer than a round.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# ---- settings: edit them here, or set them in the environment of sbatch ----
CONFIG=${CONFIG:-configs/cifar10-alexnet.yaml}
RUN=${RUN:-runs/cpu}
LAUNCHER=${LAUNCHER:-mpirun} # or srun
PMI=${PMI:-pmix}             # for srun: pmix (Open MPI), pmi2 (MPICH), or what docs/clusters.md says
MODULES=${MODULES:-}         # e.g. "gcc openmpi"
VENV=${FEDDIP_VENV:-}        # virtual environment on a file system that all nodes share; empty: the python on PATH
THREADS=${THREADS:-1}
REQUEUE=${REQUEUE:-1}
SURVIVE=${SURVIVE:-0}        # 1: a run goes on without ranks that die (docs/clusters.md); mpirun of Open MPI >= 5 only
LAUNCH_OPTIONS=()            # more options of the launcher, e.g. (--bind-to core) or (--cpu-bind=cores)
# ---- end of the settings ----

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=jobs/lib.sh
source jobs/lib.sh || exit 2
prepare_environment
run_job --set device=cpu "$@"
exit
