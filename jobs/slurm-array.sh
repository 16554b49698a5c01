#!/usr/bin/env bash
# An array of runs, every seed with every sparsity, each on one node with its own folder, time limit and requeue.
#
#   sbatch jobs/slurm-array.sh
#   SEEDS="1 2" SPARSITIES="0.9 0.98" sbatch --array=0-3%2 jobs/slurm-array.sh       two at a time
#
#SBATCH --job-name=feddip-array
# From 0 to (number of seeds) x (number of sparsities) - 1.
#SBATCH --array=0-8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=60
# B: sends USR1 to this script, 120 s before the limit (up to 60 s earlier than that). Make it longer than a round.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

# ---- settings: edit them here, or set them in the environment of sbatch ----
SEEDS=${SEEDS:-1 2 3}
SPARSITIES=${SPARSITIES:-0.9 0.95 0.98}
CONFIG=${CONFIG:-configs/fashion-mnist-lenet5.yaml}
RUNS=${RUNS:-runs/array}     # each run gets a folder in it: seed-1-sparsity-0.9, ...
LAUNCHER=${LAUNCHER:-mpirun} # or srun
PMI=${PMI:-pmix}             # for srun: pmix (Open MPI), pmi2 (MPICH), or what docs/clusters.md says
MODULES=${MODULES:-}         # e.g. "gcc openmpi"
VENV=${FEDDIP_VENV:-}        # virtual environment; empty: the python on PATH
THREADS=${THREADS:-1}
REQUEUE=${REQUEUE:-1}
SURVIVE=${SURVIVE:-0}        # 1: a run goes on without ranks that die (docs/clusters.md); mpirun of Open MPI >= 5 only
LAUNCH_OPTIONS=()            # more options of the launcher, e.g. (--bind-to core) or (--cpu-bind=cores)
# ---- end of the settings ----

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=jobs/lib.sh
source jobs/lib.sh || exit 2
read -ra seeds <<<"$SEEDS"
read -ra sparsities <<<"$SPARSITIES"
runs=$((${#seeds[@]} * ${#sparsities[@]}))
index=${SLURM_ARRAY_TASK_ID:-$runs}
if ((index >= runs)); then
    die 2 "task $index: there are $runs runs, so submit with --array=0-$((runs - 1))"
fi
seed=${seeds[index / ${#sparsities[@]}]}
sparsity=${sparsities[index % ${#sparsities[@]}]}
RUN=$RUNS/seed-$seed-sparsity-$sparsity
prepare_environment
run_job "$@" --set "seed=$seed" --set "sparsity.final=$sparsity"
exit
