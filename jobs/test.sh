#!/usr/bin/env bash
# Makes the environment (see jobs/setup-env.sh), adds a second MPI to test against, and runs the test suite.
#
#   bash jobs/test.sh                            everything, on two cores three files at a time
#   bash jobs/test.sh tests/unit -k mask         further arguments go to pytest

set -euo pipefail
# shellcheck source=jobs/setup-env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup-env.sh"

# One environment holds one MPI, so MPICH gets a folder of its own. Tests reach it through $FEDDIP_MPICH: its
# bin/mpiexec.hydra starts ranks that have MPI4PY_LIBMPI=$FEDDIP_MPICH/lib/libmpi.so.12.
set_up_mpich() {
    local wanted prefix=$PWD/.mpi/mpich
    wanted=$(grep '^mpich==' "$CONSTRAINTS")
    if [[ ! -e $prefix/.feddip-stamp || $(<"$prefix/.feddip-stamp") != "$wanted" ]]; then
        say "installing MPICH for the tests"
        rm -rf "$prefix"
        # --ignore-installed: a copy elsewhere on this machine must not make pip skip it.
        pip_install --no-deps --ignore-installed --prefix "$prefix" "$wanted" || return 0
        printf '%s\n' "$wanted" >"$prefix/.feddip-stamp"
    fi
    export FEDDIP_MPICH=$prefix
}

# Tests that make hosts out of network namespaces need these tools, and root.
set_up_iproute2() {
    if [[ $(id -u) != 0 ]] || { command -v ip >/dev/null && command -v tc >/dev/null; }; then
        return
    fi
    say "installing iproute2 for the tests"
    apt_install iproute2 || say "iproute2 cannot be had here: tests that make hosts are skipped"
}

# Tests of the batch scripts run a Slurm of their own, as root: its daemons, munge, and the PMIx that srun loads.
set_up_slurm() {
    local packages=(slurmctld slurmd slurm-client munge libpmix-dev)
    if [[ $(id -u) != 0 ]] || dpkg -s "${packages[@]}" >/dev/null 2>&1; then
        return
    fi
    say "installing Slurm for the tests"
    apt_install "${packages[@]}" || say "Slurm cannot be had here: tests of the batch scripts are skipped"
}

# The report's page is looked at in a browser: 113 MB, 13 s on two cores.
set_up_chromium() {
    if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then
        return
    fi
    say "installing Chromium for the tests"
    apt_install chromium || say "Chromium cannot be had here: the test that looks at the report's page is skipped"
}

# The tests want the files themselves, not a training command that fetches them.
if ((${#DATA_OPTIONS[@]})); then
    python -c 'from feddip_mpi import config, data; data.load(config.DataConfig(download=True), 1)' ||
        say "Fashion-MNIST cannot be had here: tests that need it are skipped"
fi
set_up_mpich
[[ -n ${FEDDIP_MPICH:-} ]] || say "MPICH cannot be had here: tests that need it are skipped"
set_up_iproute2
set_up_slurm
set_up_chromium
# Tests start more ranks than there are cores, with their own command lines.
export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}
export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
export FEDDIP_MPIRUN=$MPIRUN
unset PYTHONDONTWRITEBYTECODE # every rank would compile the package for itself

# One file more at a time than there are cores: ranks are started one after another, and those of Slurm are waited for. In the
# order in which files are collected, Slurm first: it takes longest.
cores=$(env -u OMP_NUM_THREADS nproc)
if (($# == 0 && cores > 1)); then
    set -- -n "$((cores < 4 ? cores + 1 : 4))" --no-loadscope-reorder --durations=25
fi
exec python -m pytest "$@"
