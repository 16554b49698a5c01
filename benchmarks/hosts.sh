#!/usr/bin/env bash
# Several "hosts" with slow links on one Linux machine, and commands that run over them.
#
#   bash benchmarks/hosts.sh up 4 1gbit          makes 4 hosts; each link carries 1 Gbit/s in each direction
#   bash benchmarks/hosts.sh run 4 python -m feddip_mpi train CONFIG --out DIR
#   bash benchmarks/hosts.sh run 4x2 --mca coll_tuned_allgatherv_algorithm neighbor -- python program.py
#   bash benchmarks/hosts.sh bytes               a line a host: its name, bytes received, bytes sent
#   bash benchmarks/hosts.sh rate 100mbit        another rate for all links; "none": no limit
#   bash benchmarks/hosts.sh down                removes the hosts and ends what still runs on them
#   bash benchmarks/hosts.sh check               exit code 0 if all this is possible here; else it says why not
#
# A host is a network namespace and, while something runs on it, a host name. Its only way out is eth0, one end of a
# veth pair; the other ends hang on a bridge in a namespace of its own. Token buckets at both ends limit what the host
# sends and what it receives, as a cable to a switch does. Hosts share cores, memory and files; delay is that of the
# machine. Nothing reaches the machine's own network. Needs root and Debian's iproute2.
#
# `run HOSTSxRANKS` starts RANKS ranks on each of the first HOSTS hosts (x1 may be left out), rank by rank. Words that
# begin with "-" before the program are options of mpirun and end with "--". The settings below make links predictable;
# options override them. Exit code: mpirun's; 124 or 137 when the time is over. TERM and INT end the job, USR1 and USR2
# reach every rank. What the job left behind on the hosts is killed. "setpgid failed" is a harmless remark of mpirun.
#
# What the environment may say:
#   FEDDIP_HOSTS_PREFIX   first part of the hosts' names (default: feddip, which gives feddip-h0, feddip-h1, ...)
#   FEDDIP_HOSTS_SUBNET   first three numbers of their addresses (default: 10.77.0)
#   TIMEOUT               seconds after which `run` ends the job (default: 3600)
#   FEDDIP_MPIRUN         the launcher, Open MPI 5 (default: that of $FEDDIP_VENV or .venv, then the one on PATH)
#
# Exit codes else: 0 done, 1 not possible here, 2 wrong arguments.

set -euo pipefail

SELF=$(realpath "${BASH_SOURCE[0]}")
PREFIX=${FEDDIP_HOSTS_PREFIX:-feddip}
SUBNET=${FEDDIP_HOSTS_SUBNET:-10.77.0}
SWITCH=$PREFIX-sw
GRACE_SECONDS=5
# Set in the environment of everything that one `run` starts, which is how its leftovers are told from other people's.
MARK=FEDDIP_HOSTS_JOB

die() {
    printf '[hosts] error: %s\n' "$*" >&2
    exit 1
}
misused() {
    printf '[hosts] error: %s\n' "$*" >&2
    printf '[hosts] usage: %s\n' 'up HOSTS RATE | run HOSTS[xRANKS] [MPIRUN OPTIONS --] PROGRAM... |' \
        '        bytes | rate RATE | down | check' >&2
    exit 2
}

# Once the arguments are known to be right: is this a place for hosts at all?
need_tools() {
    [[ $(uname) == Linux ]] || die "network namespaces are Linux's; this is $(uname)"
    PATH=$PATH:/usr/sbin:/sbin
    command -v ip >/dev/null || die "no 'ip' here: apt-get install iproute2"
    command -v tc >/dev/null || die "no 'tc' here: apt-get install iproute2"
    [[ $(id -u) == 0 ]] || die "network namespaces need root"
}

# A container's root may lack the right, and a kernel the modules.
probe() {
    local name=$PREFIX-probe-$$ reason
    reason=$(
        exec 2>&1
        trap 'ip netns del "$name" >/dev/null 2>&1 || true' EXIT
        ip netns add "$name" &&
            ip -n "$name" link add bridge type bridge &&
            ip -n "$name" link add one type veth peer name other &&
            tc -n "$name" qdisc add dev one root tbf rate 1mbit burst 16kb latency 10ms
    ) || die "no hosts here, they need CAP_NET_ADMIN, CAP_SYS_ADMIN and the kernel's bridge, veth and tbf: $reason"
}

check_names() {
    [[ $PREFIX =~ ^[a-z][a-z0-9]{0,19}$ ]] ||
        misused "FEDDIP_HOSTS_PREFIX is 1 to 20 small letters and digits, a letter first; got '$PREFIX'"
    [[ $SUBNET =~ ^([0-9]{1,3}\.){2}[0-9]{1,3}$ ]] ||
        misused "FEDDIP_HOSTS_SUBNET is the first three numbers of an address, as in 10.77.0; got '$SUBNET'"
}

check_rate() {
    [[ $1 =~ ^(none|[1-9][0-9]{0,8}[kmg]bit)$ ]] || misused "RATE is as in 500kbit, 100mbit, 1gbit, or none; got '$1'"
}

# Names of this prefix's hosts, h0 first.
hosts() {
    ip netns list | awk '{print $1}' | { grep -E "^$PREFIX-h[0-9]+$" || true; } | sort -V
}

existing_hosts() {
    local names
    names=$(hosts)
    [[ -n $names ]] || die "no hosts named $PREFIX: 'up' makes them"
    printf '%s\n' "$names"
}

# Bytes that may pass at once after a pause. Few, so that small messages do not pass as if there were no limit. At high
# rates large packets must pass whole (to cut them takes longer than to send them) and late timers of a busy machine
# cost throughput, so there it is what the rate carries in 2 ms: a quarter of it halved 1 Gbit/s.
burst() {
    local number=${1%[kmg]bit} kilobits
    case $1 in
        *kbit) kilobits=$number ;;
        *mbit) kilobits=$((number * 1000)) ;;
        *gbit) kilobits=$((number * 1000000)) ;;
    esac
    if ((kilobits <= 200000)); then echo 4096; else echo $((kilobits / 4)); fi
}

# limit_end NAMESPACE DEVICE RATE
limit_end() {
    if [[ $3 != none ]]; then
        tc -n "$1" qdisc replace dev "$2" root tbf rate "$3" burst "$(burst "$3")" latency 50ms
    elif [[ $(tc -n "$1" qdisc show dev "$2" root) == *tbf* ]]; then
        tc -n "$1" qdisc del dev "$2" root
    fi
}

# limit HOST RATE: at eth0 what the host sends, at the switch's port what it receives.
limit() {
    limit_end "$1" eth0 "$2"
    limit_end "$SWITCH" "e${1##*-h}" "$2"
}

make_host() {
    local number=$1 rate=$2 host=$PREFIX-h$1
    ip netns add "$host"
    ip link add "e$number" netns "$SWITCH" type veth peer name eth0 netns "$host"
    ip -n "$SWITCH" link set "e$number" master bridge up
    ip -n "$host" link set lo up
    ip -n "$host" addr add "$SUBNET.$((number + 1))/24" dev eth0
    ip -n "$host" link set eth0 up
    limit "$host" "$rate"
}

up() {
    local count=${1:-} rate=${2:-} number
    [[ $# == 2 ]] || misused "up takes the number of hosts and the rate of their links"
    [[ $count =~ ^[1-9][0-9]{0,2}$ && $count -le 250 ]] || misused "HOSTS is a number from 1 to 250; got '$count'"
    check_rate "$rate"
    need_tools
    if ip netns list | grep -qE "^$PREFIX-(sw|h[0-9]+)\b"; then
        die "hosts named $PREFIX exist already: 'down' removes them, another FEDDIP_HOSTS_PREFIX leaves them alone"
    fi
    probe
    # All or nothing.
    trap remove EXIT
    ip netns add "$SWITCH"
    ip -n "$SWITCH" link add bridge type bridge
    ip -n "$SWITCH" link set bridge up
    for ((number = 0; number < count; number++)); do
        make_host "$number" "$rate"
    done
    trap - EXIT
}

# Process ids on a host; with a second argument only of processes with that word in their environment.
pids() {
    local pid
    for pid in $(ip netns pids "$1" 2>/dev/null); do
        if [[ $# == 1 ]] || grep -qzxF -- "$2" "/proc/$pid/environ" 2>/dev/null; then
            echo "$pid"
        fi
    done
}

# end_processes HOST [WORD]: kills until nothing is left; a process could fork meanwhile.
end_processes() {
    local deadline=$((SECONDS + GRACE_SECONDS)) left
    while left=$(pids "$@") && [[ -n $left ]] && ((SECONDS < deadline)); do
        # shellcheck disable=SC2086  # one word a process
        kill -KILL $left 2>/dev/null || true
        sleep 0.05
    done
    [[ -z $left ]] || printf '[hosts] processes that do not end on %s: %s\n' "$1" "${left//$'\n'/ }" >&2
}

remove() {
    local host
    for host in $(hosts); do
        end_processes "$host"
        ip netns del "$host"
    done
    if ip netns list | grep -qE "^$SWITCH\b"; then
        ip netns del "$SWITCH"
    fi
}

find_mpirun() {
    local venv_mpirun
    venv_mpirun=${FEDDIP_VENV:-$(dirname "$SELF")/../.venv}/bin/mpirun
    MPIRUN=${FEDDIP_MPIRUN:-}
    [[ -n $MPIRUN || ! -x $venv_mpirun ]] || MPIRUN=$venv_mpirun
    [[ -n $MPIRUN ]] || MPIRUN=$(command -v mpirun) ||
        die "no mpirun here: bash jobs/setup-env.sh makes an environment with one, FEDDIP_MPIRUN names another"
    [[ $("$MPIRUN" --version 2>&1) == *"Open MPI) 5."* ]] || die "$MPIRUN is not Open MPI 5"
    MPIRUN=$(cd "$(dirname "$MPIRUN")" && pwd)/$(basename "$MPIRUN")
    # So that `python` is the interpreter of the environment that the launcher belongs to.
    PATH=$(dirname "$MPIRUN"):$PATH
}

# Everything here goes through the environment, where options of mpirun override it.
set_up_mpi() {
    # Daemons: through this script instead of ssh, from one place, over eth0, without asking a name server.
    export PRTE_MCA_plm=ssh PRTE_MCA_plm_ssh_agent=$1 PRTE_MCA_plm_ssh_no_tree_spawn=1
    export PRTE_MCA_prte_if_include=eth0 PRTE_MCA_prte_do_not_resolve=1
    # Ranks: TCP only, so that nothing crosses but eth0. Two connections a pair: one loses half when both sides send.
    export OMPI_MCA_pml=ob1 OMPI_MCA_btl=tcp,self OMPI_MCA_btl_tcp_if_include=eth0 OMPI_MCA_btl_tcp_links=2
    # Rings: every link carries the same in both directions all the time. The default choices exchange with one
    # neighbour after the other and reach half of the rate. han would put its own algorithms before tuned's.
    export OMPI_MCA_coll=^han OMPI_MCA_coll_tuned_use_dynamic_rules=1
    export OMPI_MCA_coll_tuned_allgatherv_algorithm=ring OMPI_MCA_coll_tuned_allreduce_algorithm=ring
    # All hosts share this machine's cores: who waits lets others work, and nobody is bound.
    export OMPI_MCA_mpi_yield_when_idle=1 PRTE_MCA_hwloc_default_binding_policy=none
    # Every host offers as many slots as it gets ranks; they fill up in order.
    export PRTE_MCA_rmaps_default_mapping_policy=slot
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
    # As in jobs/setup-env.sh, which says why.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-9223372036854775807}
}

# agent [SSH OPTIONS] HOST COMMAND...: what Open MPI calls instead of ssh.
agent() {
    while [[ $1 == -* ]]; do shift; done
    local host=$1
    shift
    # A host name of its own: by it Open MPI tells whether two ranks share a host.
    exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
}

# After a job: kills what it left on the hosts and removes its scratch folder.
sweep() {
    local host
    for host in $(hosts); do
        end_processes "$host" "$MARK=$SCRATCH"
    done
    rm -rf "$SCRATCH"
}

# For `timeout`, which ends mpirun: TERM. For mpirun itself, as `timeout` would die of them: USR1 and USR2.
pass_on() {
    INTERRUPTED=1
    case $1 in
        USR*) [[ ! -s $SCRATCH/pid ]] || kill -s "$1" "$(<"$SCRATCH/pid")" || true ;;
        *) kill "$JOB" || true ;;
    esac
}

run() {
    local size=${1:-} options=() slots='' number count ranks
    [[ $size =~ ^([1-9][0-9]{0,2})(x([1-9][0-9]{0,2}))?$ ]] ||
        misused "run takes HOSTS or HOSTSxRANKS first; got '$size'"
    count=${BASH_REMATCH[1]} ranks=${BASH_REMATCH[3]:-1}
    shift
    if [[ ${1:-} == -* ]]; then
        while (($#)) && [[ $1 != -- ]]; do
            options+=("$1")
            shift
        done
        (($#)) || misused "options of mpirun end with --"
        shift
    fi
    (($#)) || misused "run takes a program"
    [[ ${TIMEOUT:=3600} =~ ^[1-9][0-9]*$ ]] || misused "TIMEOUT is a number of seconds; got '$TIMEOUT'"
    need_tools
    number=$(hosts | wc -l)
    ((count <= number)) || die "$count hosts asked for, $number named $PREFIX exist: 'up' makes them"
    find_mpirun

    # Not in $TMPDIR: sockets with at most 107 characters in their path live there.
    SCRATCH=$(mktemp -d "/tmp/$PREFIX.XXXXXX")
    trap sweep EXIT
    # Open MPI splits the agent's command line at blanks, which paths may contain.
    printf '#!/bin/sh\nexec bash %q agent "$@"\n' "$SELF" >"$SCRATCH/agent"
    chmod +x "$SCRATCH/agent"
    set_up_mpi "$SCRATCH/agent"
    export "$MARK=$SCRATCH" TMPDIR=$SCRATCH
    for ((number = 0; number < count; number++)); do
        slots+=,$PREFIX-h$number:$ranks
    done

    local code=0 signal
    # shellcheck disable=SC2016  # for the inner shell
    timeout -k "$GRACE_SECONDS" "$TIMEOUT" ip netns exec "$PREFIX-h0" unshare --uts \
        sh -c 'hostname "$1"; echo $$ >"$2"; shift 2; exec "$@"' sh "$PREFIX-h0" "$SCRATCH/pid" \
        "$MPIRUN" -n "$((count * ranks))" --host "${slots#,}" "${options[@]}" "$@" &
    JOB=$! INTERRUPTED=1
    for signal in TERM INT USR1 USR2; do
        # shellcheck disable=SC2064  # this signal
        trap "pass_on $signal" "$signal"
    done
    # A signal ends `wait`, not the job.
    while ((INTERRUPTED)); do
        INTERRUPTED=0 code=0
        wait "$JOB" 2>/dev/null || code=$? # without bash's remark on who was killed
    done
    exit "$code"
}

bytes() {
    [[ $# == 0 ]] || misused "bytes takes no arguments"
    need_tools
    local host names
    names=$(existing_hosts)
    for host in $names; do
        # shellcheck disable=SC2016  # fields of awk
        ip netns exec "$host" awk -v host="$host" '$1 == "eth0:" {print host, $2, $10}' /proc/net/dev
    done
}

rate() {
    [[ $# == 1 ]] || misused "rate takes the new rate"
    check_rate "$1"
    need_tools
    local host names
    names=$(existing_hosts)
    for host in $names; do
        limit "$host" "$1"
    done
}

main() {
    local command=${1:-}
    (($#)) || misused "what shall I do?"
    shift
    check_names
    case $command in
        up | run | bytes | rate | agent) "$command" "$@" ;;
        down | check)
            [[ $# == 0 ]] || misused "$command takes no arguments"
            need_tools
            if [[ $command == down ]]; then
                remove
            else
                probe
                find_mpirun
            fi
            ;;
        *) misused "no such command: '$command'" ;;
    esac
}

main "$@"
