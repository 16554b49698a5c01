#!/usr/bin/env bash
# Runs a command on NP ranks of this machine, with the environment and the options that it needs (see jobs/setup-env.sh):
# more ranks than cores, root, fast start. On a cluster use its own mpirun or srun.
#
#   NP=4 bash jobs/mpirun.sh feddip-mpi train configs/quickstart.yaml --out runs/mine
#   SURVIVE=1 NP=4 bash jobs/mpirun.sh feddip-mpi train ...       # ranks that die do not end the run (Open MPI >= 5)

set -euo pipefail
# shellcheck source=jobs/setup-env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup-env.sh"
(($#)) || die "no command given: NP=4 bash jobs/mpirun.sh feddip-mpi train CONFIG"
[[ ${SURVIVE:-0} == 1 ]] && MPI_OPTIONS+=(--with-ft ulfm)
exec "$MPIRUN" -n "$NP" "${MPI_OPTIONS[@]}" "$@"
