#!/usr/bin/env bash
# A run longer than any job may be: each job of the chain goes on where the one before it ended, until the run is done.
#
#   bash jobs/slurm-chain.sh                                               submits the first job
#   bash jobs/slurm-chain.sh --time=720 --account=...                      options of sbatch, for all jobs of the chain
#   bash jobs/slurm-chain.sh --nodes=4 -- --set participants=16            options of `train` after --
#   scancel --name=feddip-chain                                            ends it: a single job's successor would go on
#
# More ranks than participants in a round (K, 5 in the configuration below) have nothing to train.
#
# Use it where jobs may not be requeued. A job submits its successor first of all (--dependency=afterany), so that the
# chain also survives a node that dies; it cancels it when the run is finished or fails in a way that would repeat itself.
#
#SBATCH --job-name=feddip-chain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=240
# B: sends USR1 to this script, 120 s before the limit (up to 60 s earlier than that). Make it longer than a round.
#SBATCH --signal=B:USR1@120
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# ---- settings: edit them here, or set them in the environment ----
CONFIG=${CONFIG:-configs/cifar10-alexnet.yaml}
RUN=${RUN:-runs/chain}
MOST_JOBS=${MOST_JOBS:-50}   # the chain ends with this one
LAUNCHER=${LAUNCHER:-mpirun} # or srun
PMI=${PMI:-pmix}             # for srun: pmix (Open MPI), pmi2 (MPICH), or what docs/clusters.md says
MODULES=${MODULES:-}         # e.g. "gcc openmpi"
VENV=${FEDDIP_VENV:-}        # virtual environment on a file system that all nodes share; empty: the python on PATH
THREADS=${THREADS:-1}
SURVIVE=${SURVIVE:-0}        # 1: a run goes on without ranks that die (docs/clusters.md); mpirun of Open MPI >= 5 only
LAUNCH_OPTIONS=()            # more options of the launcher, e.g. (--bind-to core) or (--cpu-bind=cores)
# ---- end of the settings ----

REQUEUE=0
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=jobs/lib.sh
source jobs/lib.sh || exit 2

# Submits a job of the chain and prints its id. What this job's own allocation is called must not reach the next one.
submit() {
    (
        for name in $(compgen -e SLURM_); do
            [[ $name == SLURM_CONF ]] || unset "$name"
        done
        # shellcheck disable=SC2086 # a list of options
        sbatch --parsable --export=ALL ${CHAIN_OPTIONS:-} "$@"
    )
}

if [[ $JOB == none ]]; then
    export CHAIN_LINK=1 CHAIN_PREVIOUS='' CHAIN_OPTIONS=''
    while (($#)) && [[ $1 != -- ]]; do
        CHAIN_OPTIONS+="$1 "
        shift
    done
    job=$(submit jobs/slurm-chain.sh "${@:2}") || die 2 "sbatch refused the job"
    say "submitted job $job, the first of the chain"
    exit 0
fi

CHAIN_LINK=${CHAIN_LINK:-1}
successor=
if [[ ! -e $RUN/finished.json ]] && ((CHAIN_LINK < MOST_JOBS)); then
    successor=$(CHAIN_PREVIOUS=$JOB CHAIN_LINK=$((CHAIN_LINK + 1)) submit "--dependency=afterany:$JOB" jobs/slurm-chain.sh "$@") ||
        die 1 "sbatch refused the successor: the chain ends here, and nothing is lost"
fi
say "job $CHAIN_LINK of at most $MOST_JOBS; successor: ${successor:-none}"
trap '[[ -z $successor ]] || scancel "$successor"' EXIT # `die` also means that another try would end the same way
prepare_environment
run_job "$@"
outcome=$?
# Wrong input, a damaged file, divergence and ranks that disagree (2 to 5) repeat themselves; what else fails may not, such as
# a run folder whose lock a file server keeps for a node that died (7).
if ((outcome == 0 || (outcome >= 2 && outcome <= 5))) || [[ $STOP == USR2 ]]; then # USR2: save, end, stay away
    exit "$outcome"
fi
trap - EXIT
exit "$outcome"
