#!/usr/bin/env bash
# Strong and weak scaling: short runs on a list of rank counts; what they say goes into STUDY/scaling.csv and beside it, as
# from `feddip-mpi study`, which also writes a script that sets the settings below and calls this one (--scripts).
#
#   bash jobs/slurm-scaling.sh --time=30           one job a rank count, with options of sbatch; a last job collects
#   sbatch --nodes=4 jobs/slurm-scaling.sh         one job for all, one rank count after the other
#   bash jobs/slurm-scaling.sh collect             the report again, from what is there
#
# strong: the same run on more ranks. weak: each rank has the same number of participants, so a round has more of them.
# Submitted again, it runs what is still missing.
#
#SBATCH --job-name=feddip-scaling
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=240
# B: sends USR1 to this script, 120 s before the limit (up to 60 s earlier than that). Make it longer than a round.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# ---- settings: edit them here, or set them in the environment ----
RANK_COUNTS=${RANK_COUNTS:-1 2 4 8}
RANKS_PER_NODE=${RANKS_PER_NODE:-4}    # as in --ntasks-per-node
KINDS=${KINDS:-strong weak}
REPEATS=${REPEATS:-1}                  # runs of each point
ROUNDS=${ROUNDS:-12}
WARM_UP=${WARM_UP:-2}                  # first rounds that do not count
STRONG_PARTICIPANTS=${STRONG_PARTICIPANTS:-8}
WEAK_PARTICIPANTS=${WEAK_PARTICIPANTS:-1} # of each rank
CONFIG=${CONFIG:-configs/cifar10-alexnet.yaml} # its `clients` must cover the participants of the largest run
STUDY=${STUDY:-runs/scaling}
LAUNCHER=${LAUNCHER:-mpirun}           # or srun
PMI=${PMI:-pmix}                       # for srun: pmix (Open MPI), pmi2 (MPICH), or what docs/clusters.md says
MODULES=${MODULES:-}                   # e.g. "gcc openmpi"
VENV=${FEDDIP_VENV:-}                  # virtual environment on a shared file system; empty: the python on PATH
THREADS=${THREADS:-1}
REQUEUE=${REQUEUE:-1}
LAUNCH_OPTIONS=()                      # more options of the launcher, e.g. (--bind-to core) or (--cpu-bind=cores)
# ---- end of the settings ----

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=jobs/lib.sh
source jobs/lib.sh || exit 2

nodes_for() { echo $((($1 + RANKS_PER_NODE - 1) / RANKS_PER_NODE)); }

# The runs of one point: kind, ranks, then options of `train`.
point() {
    local repeat outcome=0
    for ((repeat = 1; repeat <= REPEATS; repeat++)); do
        repeat_point "$repeat" "$@" || outcome=$?
        ((outcome != 75)) || break # stopped: this job goes on when it has been requeued
    done
    return "$outcome"
}

repeat_point() {
    local kind=$2 participants=$STRONG_PARTICIPANTS
    RANKS=$3
    RUN=$STUDY/$kind-$RANKS
    (($1 == 1)) || RUN+=.$1
    [[ $kind == strong ]] || participants=$((WEAK_PARTICIPANTS * RANKS))
    # As few nodes as hold the ranks; mpirun fills them in this way by itself.
    [[ $LAUNCHER == srun ]] && LAUNCH_OPTIONS=("${launch_options[@]}" "--nodes=$(nodes_for "$RANKS")")
    run_job "${@:4}" --set "rounds=$ROUNDS" --set "participants=$participants"
}

collect() {
    python -m feddip_mpi study "$STUDY" --collect --warm-up "$WARM_UP" --ranks-per-node "$RANKS_PER_NODE" --per-rank "$WEAK_PARTICIPANTS"
}

# One job for every point, and one that collects when all have ended.
submit_all() {
    local kind ranks job options=("$@") jobs=
    for kind in $KINDS; do
        for ranks in $RANK_COUNTS; do
            job=$(sbatch --parsable "--nodes=$(nodes_for "$ranks")" "--ntasks=$ranks" "--ntasks-per-node=$RANKS_PER_NODE" \
                "${options[@]}" \
                jobs/slurm-scaling.sh point "$kind" "$ranks") || die 2 "sbatch refused $kind, $ranks ranks"
            say "$kind, $ranks ranks: job $job"
            jobs+=:$job
        done
    done
    job=$(sbatch --parsable --nodes=1 --ntasks=1 "${options[@]}" "--dependency=afterany$jobs" jobs/slurm-scaling.sh collect) ||
        die 2 "sbatch refused the job that collects"
    say "collects into $STUDY/scaling.csv: job $job"
}

launch_options=("${LAUNCH_OPTIONS[@]}")
if [[ ${1:-} == collect ]]; then
    prepare_environment
    collect
elif [[ $JOB == none ]]; then
    submit_all "$@"
elif [[ ${1:-} == point ]]; then
    prepare_environment
    point "${@:2}"
else
    prepare_environment
    for kind in $KINDS; do
        for ranks in $RANK_COUNTS; do
            code=0
            point "$kind" "$ranks" "$@" || code=$?
            ((code != 75)) || exit 75
            ((code == 0)) || failed=$code # the others are run all the same
        done
    done
    collect && exit "${failed:-0}"
fi
exit
