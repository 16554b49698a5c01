#!/usr/bin/env bash
# Trains LeNet-5 on Fashion-MNIST to sparsity 0.9 with 4 ranks on this machine: one to two minutes on 2 cores.
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
# With `-m mpi4py` an exception on one rank ends all of them instead of leaving the others waiting.
status=0
"$MPIRUN" -n "$NP" "${MPI_OPTIONS[@]}" python -m mpi4py -m feddip_mpi train configs/quickstart.yaml \
    "${OUT_OPTIONS[@]}" "${DATA_OPTIONS[@]}" "$@" || status=$?

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
