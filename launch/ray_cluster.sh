#!/usr/bin/env bash
# A Ray cluster over ssh: a head on this machine, a worker on each host that is named.
#
#   launch/ray_cluster.sh start [HOST ...]    then: fedsim run CONFIG runtime=ray runtime.address=ADDRESS
#   launch/ray_cluster.sh status
#   launch/ray_cluster.sh stop
#
# It ends what it started and no other Ray. Logs: /tmp/fedsim-ray-*.log on each machine. These may be set, and are explained in launch/README.md:
#   HEAD PORT SSH RAY RAY_START_OPTIONS WAIT STATE
set -euo pipefail

port=${PORT:-6379}
head=${HEAD:-$(hostname -I | cut -d' ' -f1)}
ray=${RAY:-$(command -v ray || true)}
state=${STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/fedsim/ray-$port}
seconds=${WAIT:-120}
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes}"
read -ra options <<<"${RAY_START_OPTIONS:-}"

fail() {
    echo "ray_cluster: $*" >&2
    exit 1
}

# on HOST COMMAND ...: run it there, in this folder and with this import path; "-" is this machine.
on() {
    local host=$1 command
    shift
    command="cd $(printf %q "$PWD") 2>/dev/null; export PYTHONPATH=$(printf %q "${PYTHONPATH:-}"); $(printf '%q ' "$@")"
    if [[ $host == - ]]; then bash -c "$command"; else "${ssh[@]}" "$host" "$command"; fi
}

# launch HOST OPTION ...: start a Ray there, to run on after this script, and record its process.
launch() {
    local host=$1 pid
    shift
    # shellcheck disable=SC2016 # the other shell is to expand it
    pid=$(on "$host" bash -c 'nohup setsid "$@" </dev/null >"/tmp/fedsim-ray-$$.log" 2>&1 & echo $!' - \
        env RAY_USAGE_STATS_ENABLED=0 "$ray" start --block "$@" ${options[@]+"${options[@]}"}) ||
        fail "$host: cannot start Ray there"
    [[ $pid =~ ^[0-9]+$ ]] || fail "$host: should have printed a process id, but printed ${pid:-nothing}"
    echo "$host $pid" >>"$state/processes"
}

# The number of machines in the cluster.
machines() {
    "$ray" status --address="$head:$port" 2>/dev/null | grep -c '^ 1 node_' || true
}

start() {
    [[ -x $ray ]] || fail "no ray command; pip install -e '.[ray]' in fedsim's folder installs it, or set RAY to its path"
    [[ ! -e $state/processes ]] || fail "a cluster of port $port is running already; \`ray_cluster.sh stop\` ends it"
    mkdir -p "$state"
    launch - --head --node-ip-address="$head" --port="$port" --include-dashboard=false
    local end=$((SECONDS + seconds)) host wanted=$(($# + 1))
    until [[ $(machines) -ge 1 ]]; do
        ((SECONDS < end)) || fail "the head did not start in $seconds s; see /tmp/fedsim-ray-*.log, then stop"
    done
    for host in "$@"; do launch "$host" --address="$head:$port"; done
    until [[ $(machines) -ge $wanted ]]; do
        ((SECONDS < end)) || fail "$(machines) of $wanted machines joined in $seconds s; see /tmp/fedsim-ray-*.log there"
    done
    echo "$wanted machine$( ((wanted == 1)) || echo s): fedsim run CONFIG runtime=ray runtime.address=$head:$port"
}

stop() {
    [[ -e $state/processes ]] || fail "no cluster of port $port was started on this machine"
    local host pid
    # Workers first: without a head they would try to reach it.
    while read -r host pid <&3; do
        on "$host" bash -c "kill -TERM $pid 2>/dev/null; for _ in {1..100}; do [[ \$(ps -o stat= -p $pid) == [!Z]* ]] || exit 0; sleep 0.1; done; kill -KILL -- -$pid" ||
            echo "ray_cluster: $host: process $pid could not be ended" >&2
    done 3< <(tac "$state/processes")
    rm -r "$state"
}

case ${1:-} in
start) start "${@:2}" ;;
status) "$ray" status --address="$head:$port" ;;
stop) stop ;;
*) fail "usage: ray_cluster.sh start [HOST ...] | status | stop" ;;
esac
