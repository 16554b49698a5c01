#!/usr/bin/env bash
# PBS (OpenPBS, PBS Professional). NOT RUN on a PBS: there was none at hand. What it shares with the Slurm scripts
# (jobs/lib.sh: resume, forwarded signals, the verdict) is what those are tested with; the #PBS lines and qsub are not.
#
#   bash jobs/pbs.sh                                                           submits the first job
#   RUN=runs/other bash jobs/pbs.sh -l select=4:ncpus=16:mpiprocs=16           options of qsub, for all jobs of the chain
#
# After `qsub jobs/pbs.sh` the next jobs have the resources of the lines below: PBS does not tell a job its options.
#
# More ranks than participants in a round (K, 5 in the configuration below) have nothing to train: name a CONFIG with more.
#
# PBS sends no signal ahead of the limit, so this script has a clock of its own, and submits itself again after a stop
# that was saved. TERM (qdel, or the limit) leaves as long as the server's kill_delay.
#
#PBS -N feddip
#PBS -l select=2:ncpus=4:mpiprocs=4
#PBS -l walltime=04:00:00
#PBS -j oe
#PBS -r y

# ---- settings: edit them here, or set them in the environment ----
CONFIG=${CONFIG:-configs/cifar10-alexnet.yaml}
RUN=${RUN:-runs/pbs}
WALL_SECONDS=${WALL_SECONDS:-14400}  # of the walltime above
GRACE_SECONDS=${GRACE_SECONDS:-180}  # before its end: save and stop; longer than a round
MOST_JOBS=${MOST_JOBS:-50}           # submits itself again at most so many times
MPIRUN=${MPIRUN:-mpirun}             # or mpiexec; one that knows PBS takes hosts and ranks from the job
MODULES=${MODULES:-}                 # e.g. "gcc openmpi"
VENV=${FEDDIP_VENV:-}                # virtual environment on a file system that all nodes share; empty: python on PATH
THREADS=${THREADS:-1}
SURVIVE=${SURVIVE:-0}                # 1: a run goes on without ranks that die (docs/clusters.md); mpirun of Open MPI >= 5 only
LAUNCH_OPTIONS=()                    # where mpirun does not know PBS: (--hostfile "$PBS_NODEFILE")
# ---- end of the settings ----

LAUNCHER=mpirun
REQUEUE=0
FORWARD_TERM=1 # only this script gets PBS's TERM, not the ranks on other nodes
CHAIN_LINK=${CHAIN_LINK:-1}
cd "${PBS_O_WORKDIR:-.}" || exit 2
# shellcheck source=jobs/lib.sh
source jobs/lib.sh || exit 2

# Submits a job of the chain and prints its id.
submit() {
    # shellcheck disable=SC2086 # a list of options
    qsub -V ${CHAIN_OPTIONS:-} "$@" jobs/pbs.sh
}

if [[ $JOB == none ]]; then
    export CHAIN_LINK=1 CHAIN_PREVIOUS='' CHAIN_OPTIONS="$*"
    job=$(submit) || die 2 "qsub refused the job"
    say "submitted job $job, the first of the chain"
    exit 0
fi

# Sends USR1 to this script in good time.
clock() {
    sleep "$((WALL_SECONDS - GRACE_SECONDS))" &
    trap 'kill $!; exit' TERM
    wait $! && kill -USR1 $$
}
clock &
clock=$!
prepare_environment
run_job "$@"
outcome=$?
kill "$clock" 2>/dev/null
# Saved and stopped by its own clock, or kept out by a lock that is not free yet.
if ((CHAIN_LINK < MOST_JOBS)) && { [[ $outcome == 75 && $STOP == USR1 ]] || ((outcome == 7)); }; then
    export CHAIN_PREVIOUS=$PBS_JOBID CHAIN_LINK=$((CHAIN_LINK + 1)) CONFIG RUN WALL_SECONDS GRACE_SECONDS MOST_JOBS MPIRUN MODULES FEDDIP_VENV=$VENV
    if next=$(submit -W "depend=afterany:$PBS_JOBID"); then
        say "job $CHAIN_LINK goes on: $next"
    else
        say "cannot submit itself again: bash jobs/pbs.sh goes on" >&2
    fi
fi
exit "$outcome"
