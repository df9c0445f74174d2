#!/usr/bin/env bash
# A federation over Flower on machines that ssh reaches: a SuperLink on one, a node on each other, the rounds from here.
#
#   launch/flower_ssh.sh start SERVER NODE [NODE ...]      hosts; - is this machine
#   launch/flower_ssh.sh serve CONFIG [KEY=VALUE ...]      as `fedsim serve`, with its options and its exit status
#   launch/flower_ssh.sh resume RUN [KEY=VALUE ...]
#   launch/flower_ssh.sh status
#   launch/flower_ssh.sh stop
#
# Each node's host has a NODE.yaml with its name, data and state. Keys are made here and go to their hosts over ssh.
# No port is opened: the SuperLink listens on loopback, and nodes and this machine reach it through ssh, unless BIND is
# set. These may be set, and are explained in launch/README.md: BIND ADDRESS PORT NODE SSH FEDSIM WAIT STATE
set -euo pipefail

port=${PORT:-8000}
fedsim=${FEDSIM:-$(command -v fedsim || true)}
node=${NODE:-fedsim-node.yaml}
state=${STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/fedsim/flower-$port}
seconds=${WAIT:-60}
there=.cache/fedsim/flower-$port # on the other machines, in the home folder
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes}"

fail() {
    echo "flower_ssh: $1" >&2
    exit "${2:-1}"
}

# on HOST COMMAND ...: run it there, in the home folder; "-" is this machine.
on() {
    local host=$1 command
    shift
    command="cd && $(printf '%q ' "$@")"
    if [[ $host == - ]]; then bash -c "$command"; else "${ssh[@]}" "$host" "$command"; fi
}

# put HOST FILE ...: copy files there, to a folder that only its owner can read.
put() {
    local host=$1 file
    on "$host" bash -c "umask 077 && mkdir -p $there" </dev/null
    for file in "${@:2}"; do
        on "$host" bash -c "umask 077 && cat >$there/${file##*/}" <"$file" || fail "$host: cannot copy ${file##*/} there"
    done
}

# launch HOST NAME COMMAND ...: start it there, to run on after this script, and record its process.
launch() {
    local host=$1 name=$2 pid
    shift 2
    # shellcheck disable=SC2016 # the other shell is to expand it
    pid=$(on "$host" bash -c 'log=$1; shift; nohup setsid "$@" </dev/null >"$log" 2>&1 & echo $!' - "$there/$name.log" \
        env FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 "PATH=${fedsim%/*}:/usr/local/bin:/usr/bin:/bin" \
        "$@" </dev/null) || fail "$host: cannot start $name there"
    [[ $pid =~ ^[0-9]+$ ]] || fail "$host: should have printed a process id, but printed ${pid:-nothing}"
    echo "$host $pid $name $there/$name.log on $host" >>"$state/processes"
}

# tunnel HOST NAME OPTION ...: keep ssh to a host open, with these forwarded ports, after this script, too.
tunnel() {
    # shellcheck disable=SC2016 # the other shell is to expand it
    nohup bash -c 'trap "kill \$! 2>/dev/null; exit" TERM; while :; do "$@" & wait; sleep 2 & wait; done' - \
        "${ssh[@]}" -S none -N -o ExitOnForwardFailure=yes -o ServerAliveInterval=15 "${@:3}" "$1" \
        </dev/null >"$state/$2.log" 2>&1 &
    echo "- $! $2 $state/$2.log" >>"$state/processes"
}

# reached HOST ADDRESS LOG: wait until the SuperLink's port can be reached from there.
reached() {
    local host=$1 first pid rest
    until on "$host" bash -c "exec 3<>/dev/tcp/$2/$port" </dev/null 2>/dev/null; do
        read -r first pid rest <"$state/processes"
        alive "$first" "$pid" || fail "the SuperLink has ended; see ${rest#* }, then stop"
        ((SECONDS < end)) || fail "$host: $2:$port cannot be reached from there after $seconds s; see $3, then stop"
        sleep 0.2
    done
}

# alive HOST PROCESS: whether it runs, and is not a zombie.
alive() {
    [[ $(on "$1" ps -o stat= -p "$2" </dev/null) == [!Z]* ]]
}

start() {
    (($# >= 2)) || fail "$usage" 2
    [[ -x $fedsim ]] || fail "no fedsim command; set FEDSIM to its path, which must be the same on every host" 2
    [[ ! -e $state/processes ]] || fail "a federation with port $port is running already; \`flower_ssh.sh stop\` ends it"
    local server=$1 address=127.0.0.1 bind=${BIND:-127.0.0.1} host name names=() hosts=("${@:2}") end=$((SECONDS + seconds))
    if [[ -n ${BIND:-} ]]; then
        [[ $server != - ]] && address=${server##*@} || address=$(hostname -I | cut -d' ' -f1)
        address=${ADDRESS:-$address}
        echo "flower_ssh: whoever reaches $address:$port can drive these nodes; only they and this machine should" >&2
    else
        [[ -z ${ADDRESS:-} ]] || fail "ADDRESS: needs BIND, what the SuperLink listens on; without both all goes through ssh" 2
        ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || fail "port $port is in use here; set PORT to another" 2
    fi
    mkdir -p "$state"
    for host in "${hosts[@]}"; do
        name=$(on "$host" sed -n 's/^name: *"\{0,1\}\([A-Za-z0-9._-]*\).*/\1/p' "$node" </dev/null) ||
            fail "$host: has no $node"
        [[ -n $name ]] || fail "$host: $node has no line \`name: NAME\`"
        names+=("$name")
        [[ -e $state/keys/nodes/$name ]] || "$fedsim" certificates "$state/keys" --node "$name" >/dev/null
    done
    if [[ ! -e $state/keys/ca.crt ]]; then
        "$fedsim" certificates "$state/keys" --server "$address" >/dev/null
    elif [[ $address != $(cat "$state/address" 2>/dev/null) ]]; then
        "$fedsim" certificates "$state/keys" --renew --server "$address" >/dev/null
    fi
    echo "$address" >"$state/address"
    (IFS=, && echo "${names[*]}" >"$state/names")

    put "$server" "$state"/keys/{ca.crt,server.pem,server.key}
    launch "$server" superlink "${fedsim%/*}/flower-superlink" --host "$bind" --port "$port" \
        --isolation process --enable-supernode-auth --disable-runtime-dependency-installation \
        --ssl-ca-certfile "$there/ca.crt" --ssl-certfile "$there/server.pem" --ssl-keyfile "$there/server.key" \
        --database "$there/superlink.db"
    [[ -n ${BIND:-} ]] || reached "$server" "$address" "$there/superlink.log" # a tunnel takes connections before it does
    [[ -n ${BIND:-} || $server == - ]] || tunnel "$server" "tunnel-$server" -L "127.0.0.1:$port:127.0.0.1:$port"
    reached - "$address" "$state/tunnel-$server.log"
    # Only nodes with registered keys can join; the SuperLink's database keeps them.
    export FLWR_HOME=$state/flwr
    mkdir -p "$FLWR_HOME"
    printf '[superlink.hosts]\naddress = "%s"\nroot-certificates = "%s"\n' "$address:$port" "$state/keys/ca.crt" \
        >"$FLWR_HOME/config.toml"
    for ((k = 0; k < ${#hosts[@]}; k++)); do
        no_proxy='*' NO_PROXY='*' "${fedsim%/*}/flwr" supernode register "$state/keys/nodes/${names[k]}.pub" hosts --name "${names[k]}" \
            >"$state/register.log" 2>&1 || grep -q "already in use" "$state/register.log" ||
            fail "${names[k]} could not be registered; see $state/register.log"
        put "${hosts[k]}" "$state/keys/ca.crt" "$state/keys/nodes/${names[k]}"
        if [[ -z ${BIND:-} && ${hosts[k]} != - && ${hosts[k]} != "$server" ]]; then
            tunnel "${hosts[k]}" "tunnel-${names[k]}" -R "127.0.0.1:$port:127.0.0.1:$port"
        fi
        reached "${hosts[k]}" "$address" "$state/tunnel-${names[k]}.log"
        launch "${hosts[k]}" "${names[k]}" "$fedsim" node "$node" --superlink "$address:$port" --ca "$there/ca.crt" \
            --key "$there/${names[k]}"
    done
    echo "nodes ${names[*]}: flower_ssh.sh serve CONFIG"
}

# find_superlink: set `superlink` to the options with its address and authority.
find_superlink() {
    [[ -e $state/processes ]] || fail "no federation of port $port was started on this machine"
    superlink=(--superlink "$(<"$state/address"):$port" --ca "$state/keys/ca.crt")
}

serve() {
    find_superlink
    exec "$fedsim" serve "$@" "${superlink[@]}" --nodes "$(<"$state/names")" --keys "$state/keys/nodes"
}

status() {
    find_superlink
    local host pid name log
    while read -r host pid name log <&3; do
        alive "$host" "$pid" || echo "$name has ended; see $log"
    done 3<"$state/processes"
    "$fedsim" nodes "${superlink[@]}"
}

stop() {
    [[ -e $state/processes ]] || fail "no federation of port $port was started on this machine"
    local host pid name log
    # Nodes first, so that they can leave the SuperLink.
    while read -r host pid name log <&3; do
        on "$host" bash -c "kill -TERM $pid 2>/dev/null; for _ in {1..100}; do [[ \$(ps -o stat= -p $pid) == [!Z]* ]] || exit 0; sleep 0.1; done; kill -KILL -- -$pid" </dev/null ||
            echo "flower_ssh: $host: $name, process $pid, could not be ended" >&2
    done 3< <(sed '1!G;h;$!d' "$state/processes")
    rm "$state/processes"
}

usage="usage: flower_ssh.sh start SERVER NODE [NODE ...] | serve CONFIG [KEY=VALUE ...] | resume RUN | status | stop"
case ${1:-} in
start) start "${@:2}" ;;
serve) serve "${@:2}" ;;
resume) exec "$fedsim" "$@" ;;
status) status ;;
stop) stop ;;
*) fail "$usage" 2 ;;
esac
