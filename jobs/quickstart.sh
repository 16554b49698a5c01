#!/usr/bin/env bash
# Trains LeNet-5 on Fashion-MNIST to sparsity 0.9 with 4 ranks on this machine.
#
#   bash jobs/quickstart.sh                      first run: also makes the environment (see jobs/setup-env.sh)
#   bash jobs/quickstart.sh --set rounds=2       further arguments go to `feddip-mpi train`
#   NP=2 bash jobs/quickstart.sh                 another number of ranks; the result is the same
#
# Exit code: that of the training command (75: stopped by a signal, state saved).

set -euo pipefail
# shellcheck source=jobs/setup-env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup-env.sh"

OUT=runs/quickstart-$(date +%Y%m%d-%H%M%S)
OUT_OPTIONS=(--out "$OUT")
previous=
for argument in "$@"; do
    case $previous:$argument in
        --out:*) OUT=$argument OUT_OPTIONS=() ;;
        *:--out=*) OUT=${argument#--out=} OUT_OPTIONS=() ;;
    esac
    previous=$argument
done

# mpirun hides from the ranks whether a person is watching.
[[ -t 1 ]] && export FEDDIP_PROGRESS=${FEDDIP_PROGRESS:-rich}
say "$NP ranks, $(basename "$MPIRUN") ($MPI_KIND); run folder: $OUT"
# In a process group of its own: Ctrl-C reaches this script alone, mpirun would kill its ranks within half a second.
set -m
"$MPIRUN" -n "$NP" "${MPI_OPTIONS[@]}" python -m feddip_mpi train configs/quickstart.yaml \
    "${OUT_OPTIONS[@]}" "${DATA_OPTIONS[@]}" "$@" &
mpirun_pid=$!
set +m
# shellcheck disable=SC2317  # called by the trap
stop() {
    say "stopping after this round, with everything saved (again: at once)"
    trap 'kill -TERM "$mpirun_pid"' INT TERM
    kill -USR1 "$mpirun_pid"
}
trap stop INT TERM
# A trapped signal ends `wait` early: wait until mpirun is really gone.
while :; do
    status=0
    wait "$mpirun_pid" || status=$?
    kill -0 "$mpirun_pid" 2>/dev/null || break
done
trap - INT TERM

if ((status == 75)); then
    say "stopped and saved; go on with: $VENV/bin/feddip-mpi resume $OUT"
elif ((status != 0)); then
    say "training ended with exit code $status" >&2
else
    newest=$(find "$OUT/checkpoints" -name 'round-*.h5' 2>/dev/null | sort | tail -n 1)
    cat <<END

Run folder  $OUT
Pictures    $(find "$OUT" -maxdepth 1 -name '*.png' 2>/dev/null | sort | paste -sd ' ')
Numbers     $OUT/metrics.jsonl (one line a round)
Model       ${newest:-none saved}

Try next:
  . $VENV/bin/activate
  feddip-mpi inspect $newest
  feddip-mpi export $newest pruned.safetensors
  bash jobs/quickstart.sh --set sparsity.final=0.98
  feddip-mpi plan configs/fashion-mnist-lenet5.yaml
END
fi
exit "$status"
