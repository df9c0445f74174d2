#!/usr/bin/env bash
# A federation over Flower on this machine alone: a SuperLink with TLS, and registered nodes that each have a shard.
#
#   launch/flower_local.sh CONFIG [KEY=VALUE ...]
#   launch/flower_local.sh resume RUN
#
# Its exit status is that of `fedsim serve`. It ends all that it starts, also at Ctrl-C and SIGTERM; serve then leaves a
# checkpoint, which `resume` continues if STATE was set. These may be set, and are explained in launch/README.md:
#   N PORT STATE OUT STOCK WAIT FEDSIM
set -euo pipefail

number=${N:-3} port=${PORT:-8000} seconds=${WAIT:-60} fedsim=${FEDSIM:-fedsim}
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
no_proxy=${no_proxy:-${NO_PROXY:-}} # all that is here is on loopback
export no_proxy=${no_proxy:+$no_proxy,}127.0.0.1,localhost
export NO_PROXY=$no_proxy

fail() {
    echo "flower_local: $1" >&2
    exit "${2:-1}"
}

usage="usage: flower_local.sh CONFIG [KEY=VALUE ...] | resume RUN"
case ${1:-} in
"" | -*) fail "$usage" 2 ;;
resume)
    [[ $# -eq 2 && -n ${STATE:-} && -z ${STOCK:-} ]] || fail "$usage; resume needs the STATE of the first run, and no STOCK" 2
    [[ -d ${STATE:-}/shards ]] || fail "STATE: ${STATE:-} has no shards; it should be the STATE of the run" 2
    ;;
*) [[ -f $1 ]] || fail "$1: no such file; $usage" 2 ;;
esac
[[ $number =~ ^[1-9][0-9]{0,2}$ ]] || fail "N: $number should be a number from 1 to 999" 2
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "PORT: $port should be a number from 1 to 99999" 2
for program in "$fedsim" flower-superlink flwr ${STOCK:+flower-supernode}; do
    command -v "$program" >/dev/null || fail "no command $program; pip install -e '.[flower]' in fedsim's folder installs Flower's" 2
done

# taken PORT: whether a process listens there.
taken() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}
taken "$port" && fail "port $port is in use; set PORT to another" 2

if [[ -n ${STATE:-} ]]; then
    mkdir -p "$STATE"
    state=$(cd "$STATE" && pwd)
else
    state=$(mktemp -d "${TMPDIR:-/tmp}/fedsim-flower.XXXXXX")
fi
started=() names=() run='' stopped=''

# family PID ...: these processes and their descendants.
family() {
    local all=" $* " before='' pid parent
    until [[ $all == "$before" ]]; do
        before=$all
        while read -r pid parent; do
            [[ $all != *" $parent "* || $all == *" $pid "* ]] || all+="$pid "
        done < <(ps -eo pid=,ppid=)
    done
    echo "$all"
}

finish() {
    local status=$? pid all
    trap - EXIT
    all=$(family ${started[@]+"${started[@]}"}) # Flower's programs start others, in sessions of their own
    for pid in $all; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in $all; do
        for _ in {1..100}; do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait
    if ((status)); then
        echo "flower_local: logs, keys and shards are in $state" >&2
    elif [[ -z ${STATE:-} ]]; then
        rm -r "$state"
    fi
    exit "$status"
}
trap finish EXIT
stop() {
    stopped=yes
    [[ -n $run ]] || exit 130
    kill -TERM "$run" 2>/dev/null || true
}
trap stop INT TERM HUP

# launch NAME COMMAND ...: in the background, with a log.
launch() {
    "${@:2}" </dev/null >"$state/$1.log" 2>&1 &
    started+=($!)
}

# up NAME PORT: wait until the process that was started last listens.
up() {
    local pid=${started[${#started[@]} - 1]} end=$((SECONDS + seconds))
    until taken "$2"; do
        kill -0 "$pid" 2>/dev/null || fail "$1 did not start; see $state/$1.log"
        ((SECONDS < end)) || fail "$1 did not start in $seconds s; see $state/$1.log"
        sleep 0.1
    done
}

keys=$state/keys shards=$state/shards
if [[ $1 != resume ]]; then
    rm -rf "$shards"
    "$fedsim" partition "$@" "data.clients=$number" --shards "$shards" >"$state/partition.log"
    for ((k = 0; k < number; k++)); do
        cat >>"$shards/$k.yaml" <<NODE
state: ../nodes
superlink: 127.0.0.1:$port
ca: ../keys/ca.crt
NODE
    done
fi
number=0
while [[ -e $shards/$number.yaml ]]; do
    names+=("$(sed -n 's/^name: //p' "$shards/$number.yaml")")
    number=$((number + 1))
done
((number > 0)) || fail "$shards: has no shards"
[[ -d $keys ]] || "$fedsim" certificates "$keys" --server 127.0.0.1 "${names[@]/#/--node=}" >/dev/null

# In a fast run, fedsim serve takes the place of Flower's SuperExec.
[[ -n ${STOCK:-} ]] && isolation=subprocess || isolation=process
launch superlink flower-superlink --host 127.0.0.1 --port "$port" --isolation "$isolation" --enable-supernode-auth \
    --ssl-ca-certfile "$keys/ca.crt" --ssl-certfile "$keys/server.pem" --ssl-keyfile "$keys/server.key" \
    --disable-runtime-dependency-installation
up superlink "$port"

# Only nodes with registered keys can join.
export FLWR_HOME=$state/flwr
mkdir -p "$FLWR_HOME"
printf '[superlink.local]\naddress = "127.0.0.1:%s"\nroot-certificates = "%s"\n' "$port" "$keys/ca.crt" \
    >"$FLWR_HOME/config.toml"
for name in "${names[@]}"; do
    no_proxy='*' NO_PROXY='*' flwr supernode register "$keys/nodes/$name.pub" local --name "$name" >"$state/register.log" 2>&1 ||
        fail "$name could not be registered; see $state/register.log"
done

superlink=(--superlink "127.0.0.1:$port" --ca "$keys/ca.crt")
if [[ $1 == resume ]]; then
    command=("$fedsim" resume "$2")
elif [[ -z ${STOCK:-} ]]; then
    joined=$(IFS=, && echo "${names[*]}")
    command=("$fedsim" serve "$@" "${superlink[@]}" --nodes "$joined" --keys "$keys/nodes" ${OUT:+--out "$OUT"})
else
    rm -rf "$state/app"
    "$fedsim" app "$@" "data.clients=$number" --out "$state/app" >/dev/null
    command=(stock)
fi

# stock: like `fedsim serve`, with Flower's own commands, whose exit status does not show how a run ended.
stock() {
    local pid
    flwr run "$state/app" local --stream ${OUT:+-c "out=\"$OUT\""} &
    pid=$!
    trap 'kill -TERM "$pid"' TERM
    wait "$pid" || return 130
    flwr ls local --format json | grep -q '"status": "finished:completed"'
}

for ((k = 0; k < number; k++)); do
    if [[ -z ${STOCK:-} ]]; then
        launch "${names[k]}" "$fedsim" node "$shards/$k.yaml" --key "$keys/nodes/${names[k]}"
    else
        launch "${names[k]}" flower-supernode "--superlink=127.0.0.1:$port" "--root-certificates=$keys/ca.crt" \
            "--auth-supernode-private-key=$keys/nodes/${names[k]}" "--port=$((port + 1 + k))" \
            "--node-config=config=\"$shards/$k.yaml\""
    fi
done

# In the background, so that a signal reaches it while this shell waits.
run=starting
"${command[@]}" &
run=$!
started=("$run" "${started[@]}")
[[ -z $stopped ]] || stop
said=' '
while kill -0 "$run" 2>/dev/null; do
    for ((k = 0; k < number; k++)); do
        pid=${started[$((k + 2))]}
        kill -0 "$pid" 2>/dev/null || [[ -n $stopped || $said == *" $k "* ]] || {
            echo "flower_local: ${names[k]} has ended: $(tail -n 1 "$state/${names[k]}.log")" >&2
            said+="$k "
        }
    done
    { sleep 0.2 || true; } 2>/dev/null # a signal to all of the process group, as timeout(1) sends it, ends it, too
done
status=0
wait "$run" || status=$?
exit "$status"
