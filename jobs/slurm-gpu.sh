#!/usr/bin/env bash
# Several nodes, one GPU a rank. Submit it from the top of the repository; submitted again, it goes on.
#
#   sbatch jobs/slurm-gpu.sh --set participants=8
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 jobs/slurm-gpu.sh --set participants=32
#
# More ranks than participants in a round (K, 5 in the configuration below) have nothing to train.
#
# Every rank sees all GPUs of its node and takes number (local rank) modulo (GPUs seen). Do not ask for --gpus-per-task:
# it shows each rank one GPU only, and an MPI or NCCL that wants to reach a neighbour's memory directly no longer can.
#
#SBATCH --job-name=feddip-gpu
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=240
# B: sends USR1 to this script, 120 s before the limit (up to 60 s earlier than that). Make it longer than a round.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# ---- settings: edit them here, or set them in the environment of sbatch ----
CONFIG=${CONFIG:-configs/cifar100-resnet18.yaml}
RUN=${RUN:-runs/gpu}
DEVICE=${DEVICE:-cuda}       # cuda also means AMD's GPUs; a run that finds none ends at once
LAUNCHER=${LAUNCHER:-mpirun} # or srun
PMI=${PMI:-pmix}             # for srun: pmix (Open MPI), pmi2 (MPICH), or what docs/clusters.md says
MODULES=${MODULES:-}         # e.g. "gcc cuda openmpi"
VENV=${FEDDIP_VENV:-}        # virtual environment on a file system that all nodes share; empty: the python on PATH
THREADS=${THREADS:-1}
REQUEUE=${REQUEUE:-1}
SURVIVE=${SURVIVE:-0}        # 1: a run goes on without ranks that die (docs/clusters.md); mpirun of Open MPI >= 5 only
LAUNCH_OPTIONS=()            # more options of the launcher, e.g. (--bind-to none) or (--cpu-bind=cores)
# ---- end of the settings ----

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=jobs/lib.sh
source jobs/lib.sh || exit 2
prepare_environment
# srun's own binding, also of the srun that starts mpirun's daemons: all GPUs of the node for everyone.
export SLURM_GPU_BIND=none
[[ $LAUNCHER == srun ]] && LAUNCH_OPTIONS+=(--gpu-bind=none)
run_job --set "device=$DEVICE" "$@"
exit
