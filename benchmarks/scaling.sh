#!/usr/bin/env bash
# The scaling study of docs/results/scaling.md: 1 and 2 ranks on this machine, then 1, 2, 4 and 8 hosts (network
# namespaces) at 1 Gbit/s. Needs root, iproute2 and Open MPI 5; takes a quarter of an hour. Started again, it goes on.
#
#   bash benchmarks/scaling.sh [OUT]
#
# What the environment may say:
#   TIMED   command that waits until the machine is quiet and then runs its arguments; one call takes a few minutes
#   ROUNDS  of each run (default: 7, the first of which does not count)
#   REPEATS runs of each cell (default: 2)

set -euo pipefail

OUT=$(realpath -m "${1:-runs/scaling-study}")
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HOSTS=$TOP/benchmarks/hosts.sh
read -ra TIMED <<<"${TIMED:-}"
SHARED_CORES=$(env -u OMP_NUM_THREADS nproc) # which would tell the variable otherwise
STUDY=(python -m feddip_mpi study "$TOP/benchmarks/scaling.yaml" --rounds "${ROUNDS:-7}" --warm-up 1 --cores "$SHARED_CORES")
REPEATS=${REPEATS:-2}
cd "$TOP"

for ranks in 1 2; do
    ${TIMED[@]+"${TIMED[@]}"} "${STUDY[@]}" --ranks "$ranks" --repeats "$REPEATS" --out "$OUT/local" \
        --note "one machine with $SHARED_CORES shared cores, ranks connected by its memory"
done

bash "$HOSTS" up 8 1gbit
trap 'bash "$HOSTS" down' EXIT
for repeat in $(seq "$REPEATS"); do
    for cell in strong:1 strong:2 strong:4 strong:8 weak:1 weak:2 weak:4 weak:8; do
        # Kinds, rank counts and repeats join those that the folder has; one call at a time keeps each of them short.
        ${TIMED[@]+"${TIMED[@]}"} "${STUDY[@]}" --kind "${cell%:*}" --ranks "${cell#*:}" --repeats "$repeat" --out "$OUT/hosts" \
            --ranks-per-node 1 --launcher "bash benchmarks/hosts.sh run {ranks}" \
            --note "SIMULATED links: network namespaces at 1 Gbit/s, all ranks on $SHARED_CORES shared cores"
    done
done
