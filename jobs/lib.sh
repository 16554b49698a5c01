# shellcheck shell=bash
# What the batch scripts of this folder share. A script sets the variables below and calls `run_job`; nothing here names a
# site or a scheduler's partition.
#
#   RUN             run folder: resumed where there is one, made where there is none
#   CONFIG          configuration of a new run
#   LAUNCHER        mpirun or srun
#   MPIRUN          the mpirun or mpiexec that belongs to the MPI library                            (mpirun)
#   PMI             what srun speaks: pmix (Open MPI), pmi2 (MPICH), cray_shasta, pspmix, ...        (pmix)
#   LAUNCH_OPTIONS  more options of the launcher, an array
#   SURVIVE         1: ranks that die do not end the run, the others go on (on_rank_failure); Open MPI >= 5, mpirun only
#   RANKS           number of ranks; empty: as many as the allocation has tasks
#   REQUEUE         1: after a stop that was saved (or where another job has RUN) the job is put back into the queue; 0: it just ends
#   MODULES, VENV   modules to load and virtual environment to use; empty: as they are
#   THREADS         OpenMP threads a rank                                                            (1)
#
# Outcomes: 0 RUN/finished.json exists; 75 stopped and saved, a later start goes on; 7 RUN is another job's, or a file server
# keeps the lock of one whose node died: a later start may go on; others: failed, with a message. The launcher's own exit code
# is not believed for an end: mpirun ends with 0 when its daemons are killed, srun with 137 where MPICH's ranks end with 75.
#
# There is no `set -e`: a signal makes `wait` fail, and that is not an error.

set -uo pipefail

JOB=${SLURM_JOB_ID:-${PBS_JOBID:-none}}
# One task of an array has the id of the array itself, and squeue and scontrol would take it for all tasks.
[[ -n ${SLURM_ARRAY_JOB_ID:-} ]] && JOB=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
STOP=         # USR1, USR2 or TERM once this script has received it
LAUNCHER_PID= # of the launcher that runs in the background
LOG_BYTES=0   # of RUN/run.log when it was started
LAST_START=   # what this job's last start found: a checkpoint, none or busy
PATIENCE=30   # seconds that a launcher may stay when the run is over
INTERRUPTED=  # 1: a signal has come since `wait` began

say() { printf '[job %s] %s %s\n' "$JOB" "$(date '+%F %T')" "$*"; }
die() {
    local code=$1
    shift
    say "error: $*" >&2
    exit "$code"
}

# USR1 comes from the scheduler ahead of the time limit (--signal=B:USR1@120), USR2 from people: save, end, stay away.
# Both go on as USR1, which every launcher passes to all ranks and which kills nobody. TERM is not passed on: Slurm has
# sent it to the ranks already, and srun would take a second one for an order to kill them.
on_signal() {
    STOP=$1 INTERRUPTED=1
    say "received $1"
    if [[ $1 != TERM || ${FORWARD_TERM:-0} == 1 ]]; then
        forward
    fi
}

# Waits for the first round of this start: USR1 would kill a rank that is still importing its modules, and a run that stops
# before its first round gets nowhere.
forward() {
    local pid=$LAUNCHER_PID
    [[ -n $pid ]] || return 0
    while kill -0 "$pid" 2>/dev/null; do
        # No pipe: grep ends at its first match, and pipefail would call that tail's failure.
        if grep -q ' INFO round ' < <(tail -c "+$((LOG_BYTES + 1))" "$RUN/run.log" 2>/dev/null); then
            kill -USR1 "$pid"
            return
        fi
        sleep 0.2
    done &
}

trap 'on_signal USR1' USR1
trap 'on_signal USR2' USR2
trap 'on_signal TERM' TERM

prepare_environment() {
    if [[ -n ${MODULES:-} ]]; then
        # shellcheck disable=SC2086 # a list of names
        module load $MODULES || die 2 "MODULES='$MODULES': cannot be loaded"
    fi
    if [[ -n ${VENV:-} ]]; then
        [[ -x $VENV/bin/python ]] || die 2 "VENV=$VENV: has no bin/python; name your environment, or leave it empty"
        PATH=$(cd "$VENV/bin" && pwd):$PATH
        export PATH
    fi
    # One thread a rank: OpenMP threads that share cores spin and lose badly.
    export OMP_NUM_THREADS=${THREADS:-1}
    # glibc returns big blocks to the system at once by default; fetching them again costs page faults in every step.
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-9223372036854775807}
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
    [[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    return 0
}

newest_checkpoint() {
    local newest
    newest=$(find "$RUN/checkpoints" -maxdepth 1 -name 'round-*.h5' 2>/dev/null | sort | tail -n 1)
    basename "${newest:-none}"
}

# A job that starts by itself, requeued or as the next one of a chain, must have got somewhere since it last did, or it
# would go round in circles with nobody looking. RUN.starts has a line a start: job, restarts, newest checkpoint (and one more
# where another job had RUN: job, restarts, busy); it lies beside RUN because a new run's folder is empty.
check_progress() {
    if ((${SLURM_RESTART_COUNT:-0} == 0 && ${CHAIN_LINK:-1} == 1)) || [[ ! -e $RUN.starts ]]; then
        return
    fi
    LAST_START=$(awk -v job="${CHAIN_PREVIOUS:-$JOB}" '$1 == job {found = $3} END {print found}' "$RUN.starts")
    [[ $LAST_START != "$NEWEST" ]] ||
        die 1 "no progress: this start of $RUN and the last one found the same newest checkpoint ($NEWEST), so this is the" \
            "end. Allow more time, save more often (checkpoint.every, checkpoint.minutes), or look above for what" \
            "went wrong; submitting the job again tries again"
}

record_start() {
    mkdir -p "$(dirname "$RUN")"
    printf '%s %s %s\n' "$JOB" "${SLURM_RESTART_COUNT:-0}" "$1" >>"$RUN.starts" ||
        die 2 "RUN=$RUN: cannot write $RUN.starts"
}

# Sets COMMAND, the launcher with its options.
launcher_command() {
    case $LAUNCHER in
        mpirun)
            COMMAND=("${MPIRUN:-mpirun}")
            [[ ${SURVIVE:-0} == 1 ]] && COMMAND+=(--with-ft ulfm)
            ;;
        # A rank that dies ends the others, but not at once: at a stop all ranks leave with 75 within moments, and srun
        # would report the one that it had killed.
        srun) COMMAND=(srun "--mpi=${PMI:-pmix}" --kill-on-bad-exit=0 --wait=60) ;;
        *) die 2 "LAUNCHER=$LAUNCHER: must be mpirun or srun" ;;
    esac
    [[ ${SURVIVE:-0} == 1 && $LAUNCHER != mpirun ]] &&
        die 2 "SURVIVE=1: srun ends all ranks when one dies; use LAUNCHER=mpirun, or SURVIVE=0"
    [[ -n ${RANKS:-} ]] && COMMAND+=(-n "$RANKS")
    COMMAND+=("${LAUNCH_OPTIONS[@]}")
    command -v "${COMMAND[0]}" >/dev/null || die 2 "${COMMAND[0]}: not on PATH; load the MPI module, or set MODULES or VENV"
}

# Is the run over, by its folder: finished, or its log says that this start stopped or failed?
is_over() {
    [[ -e $RUN/finished.json ]] ||
        grep -qE ' rank 0 INFO (stopped|error): ' < <(tail -c "+$((LOG_BYTES + 1))" "$RUN/run.log" 2>/dev/null)
}

# mpirun may stay for ever after a death, though all ranks have ended: the folder says that nothing is left to wait for.
end_when_over() {
    local pid=$1 patience=$PATIENCE
    while kill -0 "$pid" 2>/dev/null && ((patience > 0)); do
        is_over && ((patience -= 1))
        sleep 1
    done
    ((patience > 0)) || { say "the run of $RUN is over, but $LAUNCHER has not ended: killed" && kill -KILL "$pid"; }
}

# Runs a command in the background and sets CODE to its exit code. A signal ends `wait` early; asked again, bash still
# knows the code.
wait_for() {
    "$@" &
    LAUNCHER_PID=$!
    if [[ ${SURVIVE:-0} == 1 ]]; then
        end_when_over "$LAUNCHER_PID" &
    fi
    [[ -n $STOP ]] && forward # it came before there was anything to pass it to
    while :; do
        INTERRUPTED=
        wait "$LAUNCHER_PID"
        CODE=$?
        [[ -n $INTERRUPTED ]] || break
    done
    LAUNCHER_PID=
}

# After a stop that was saved, or where another job has RUN: back into the queue, once, where that is wanted and the scheduler
# has not done it already.
requeue() {
    if [[ ${REQUEUE:-0} != 1 || $STOP == USR2 || $STOP == TERM ]]; then
        return
    fi
    if [[ $(squeue -h -j "$JOB" -o %T 2>/dev/null) != RUNNING ]]; then
        say "not requeued: the job has been cancelled or requeued already"
    elif scontrol requeue "$JOB"; then
        say "requeued"
    else
        say "cannot be requeued here: submit it again, or use jobs/slurm-chain.sh" >&2
    fi
}

# Is the newest checkpoint that of the last round in the metrics, so that nothing is lost?
is_saved() {
    local round
    round=$(tail -n 1 "$RUN/metrics.jsonl" 2>/dev/null | grep -oE '"round": ?[0-9]+' | grep -oE '[0-9]+')
    [[ -n $round && $1 == "$(printf 'round-%06d.h5' "$round")" ]]
}

# Starts or resumes RUN and returns the outcome (see above). Arguments are options of `train`, for a new run only.
run_job() {
    local after what
    if [[ -e $RUN/finished.json ]]; then
        say "$RUN is finished already"
        return 0
    fi
    NEWEST=$(newest_checkpoint)
    check_progress
    record_start "$NEWEST"
    launcher_command
    what=(train "$CONFIG" "$@" --out "$RUN")
    if [[ -e $RUN/config.yaml || $NEWEST != none ]]; then
        what=(resume "$RUN")
    fi
    say "restarts: ${SLURM_RESTART_COUNT:-0}; nodes: ${SLURM_JOB_NODELIST:-$(hostname)}; newest checkpoint: $NEWEST"
    say "${COMMAND[*]} feddip-mpi ${what[*]}"
    LOG_BYTES=0 # a job may play several runs
    [[ -e $RUN/run.log ]] && LOG_BYTES=$(wc -c <"$RUN/run.log")
    # The program ends all ranks itself when one fails; `-m mpi4py` would call a saved stop (exit code 75) a failure too.
    wait_for "${COMMAND[@]}" python -m feddip_mpi "${what[@]}"
    after=$(newest_checkpoint)
    if [[ -e $RUN/finished.json ]]; then
        say "finished: $RUN (newest checkpoint: $after)"
        return 0
    fi
    if [[ $after != "$NEWEST" ]] && { ((CODE == 75)) || { [[ -n $STOP ]] && is_saved "$after"; }; }; then
        say "stopped${STOP:+ by $STOP} and saved: $after"
        requeue
        return 75
    fi
    if ((CODE == 7)); then
        record_start busy
        [[ $LAST_START != busy ]] || die 7 "$RUN is another job's, as at the last start (see above): this is the end"
        say "$RUN is another job's, or its lock is not free yet (see above): the next start tries again"
        requeue
        return 7
    fi
    say "error: neither finished nor saved: $LAUNCHER ended with $CODE, the newest checkpoint is $after (before: $NEWEST)." \
        "What is above says why; submitting the job again goes on from that checkpoint" >&2
    return "$((CODE == 0 || CODE == 75 ? 1 : CODE))"
}
