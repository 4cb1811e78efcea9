#!/usr/bin/env bash
# A real Slurm cluster for tests: N nodes on this machine, thrown away afterwards.
#
#   mini_slurm.sh check          can it run here? exit status 3, and a line that says why not
#   mini_slurm.sh install        Debian's packages of Slurm, where they are missing
#   mini_slurm.sh start N        start node1 ... nodeN; prints what `env` prints
#   mini_slurm.sh env            shell lines that lead Slurm's commands to it: eval "$(tests/slurm/mini_slurm.sh env)"
#   mini_slurm.sh status         processes, nodes and queue; exit status 0 if all nodes are usable
#   mini_slurm.sh stop           end what `start` began; only the logs stay
#
#   mini_slurm.sh exec NODE ...  run a command on a node
#   mini_slurm.sh kill NODE      power cut: every process of the node dies at once
#   mini_slurm.sh stopd NODE     its slurmd dies; a job's processes live on
#   mini_slurm.sh boot NODE      the node, or its slurmd, comes back; waits until it is usable
#   mini_slurm.sh unplug NODE    its network cable is out; its processes live on
#   mini_slurm.sh plug NODE      ... and in again
#   mini_slurm.sh ctl stop|kill|start    the controller goes and comes; jobs run on
#   mini_slurm.sh ssh            an sshd on every node, and the folder of an `ssh` that reaches them by name, without a password;
#                                installs Debian's packages of sshd and pdsh, where they are missing
#
# MINI_SLURM_DIR: everything is kept there (default /tmp/mini_slurm). One cluster runs on a machine.
# MINI_SLURM_OWNER: a process id; when that process has ended, so does the cluster.
# MINI_SLURM_DOWN_S: seconds until a silent node is down (default 10).
#
# A node is a set of namespaces (network, host name, processes, mounts, IPC, time) with its own slurmd, address (10.231.77.K),
# /etc/hosts and /dev/shm; the rest of the file system is shared, as on a cluster with a shared home. The controller and the
# commands run in the caller's namespaces, which are the login node. Nodes claim more cores, memory and GPUs than there are.
#
# Nothing outside MINI_SLURM_DIR is written but packages and three kinds of kernel object that `stop` removes: the network
# namespaces mslurm-*, the device mslurm, and mounts inside the nodes. Only processes that `start` recorded by id and time of
# start are ever signalled; /etc/slurm and the machine's own munged are left alone. Needs root and Debian or Ubuntu (tried:
# Debian 12, Slurm 22.05.8); no systemd, cgroups or database.
set -euo pipefail

DIR=$(realpath -m "${MINI_SLURM_DIR:-/tmp/mini_slurm}")
DOWN_S=${MINI_SLURM_DOWN_S:-10}
ID=mslurm NET=10.231.77 PORT=16817
CPUS=16 MEMORY_MIB=64000 GPUS=4
PACKAGES=(slurmctld slurmd slurm-client munge iproute2 procps util-linux)
CONF=$DIR/slurm.conf
SELF=$(readlink -f "${BASH_SOURCE[0]}")
HOST=$(hostname)
HOST=${HOST%%.*}
BOOT=$(cat /proc/sys/kernel/random/boot_id)
PATH=$PATH:/usr/sbin:/sbin

say() { printf 'mini_slurm.sh: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }
cannot_run() { say "$@"; exit 3; }

# ------------------------------------------------------------------------------------------------------------- packages

lacking() {
    local command
    for command in slurmctld slurmd sbatch srun munged ip nsenter unshare pgrep setsid flock; do
        command -v "$command" >/dev/null || printf '%s ' "$command"
    done
}

check() {
    [ "$(id -u)" = 0 ] || cannot_run "a Slurm cluster of tests needs root"
    [ -z "$(lacking)" ] || command -v apt-get >/dev/null || cannot_run "no apt-get to install Slurm with; missing: $(lacking)"
    unshare --net --uts --ipc --mount --pid --fork --mount-proc true 2>/dev/null \
        || cannot_run "this machine allows no namespaces (a container without CAP_SYS_ADMIN and CAP_NET_ADMIN?)"
}

install() {
    check
    [ -n "$(lacking)" ] || return 0
    mkdir -p "$DIR/log"
    local log=$DIR/log/apt.log
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}")
    "${apt[@]}" >"$log" 2>&1 || { apt-get update -qq >>"$log" 2>&1 && "${apt[@]}" >>"$log" 2>&1; } \
        || fail "apt-get cannot install ${PACKAGES[*]}: $(tail -n 1 "$log")"
}

# ------------------------------------------------------------------------------------------------------------ processes

# DIR/pid/NAME holds "PID START BOOT": a process that got the number of an ended one is never touched.
start_of() {
    local stat fields
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -r -a fields <<<"${stat##*) }"  # the command's name may hold blanks
    [ "${fields[0]}" != Z ] || return 1
    echo "${fields[19]}"
}

record() { echo "$2 $(start_of "$2") $BOOT" >"$DIR/pid/$1"; }

pid_of() {
    local pid start boot
    read -r pid start boot 2>/dev/null <"$DIR/pid/$1" || return 1
    [ "$boot" = "$BOOT" ] && [ "$(start_of "$pid" || true)" = "$start" ] && echo "$pid"
}

end() {  # NAME SIGNAL: and KILL after 10 s
    local pid
    pid=$(pid_of "$1") || { rm -f "$DIR/pid/$1"; return 0; }
    kill "-$2" "$pid" 2>/dev/null || true
    for _ in $(seq 200); do
        pid_of "$1" >/dev/null || break
        sleep 0.05
    done
    ! pid=$(pid_of "$1") || kill -KILL "$pid" 2>/dev/null || true
    rm -f "$DIR/pid/$1"
}

background() {  # NAME LOG COMMAND...: in a session of its own, with none of our pipes or locks open
    local name=$1 log=$2
    shift 2
    setsid "$@" </dev/null >>"$log" 2>&1 9>&- &
    record "$name" $!
}

# --------------------------------------------------------------------------------------------------------- configuration

write_configuration() {  # N
    local n=$1 k version
    mkdir -p "$DIR"/{munge,state,spool,log,pid,dev,local,scratch}
    (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/munge.key")  # munged takes no key that others can read
    chmod 0755 "$DIR" "$DIR/munge"
    {   # A node's own name must not be 127.0.0.1: gloo and NCCL would tell the others that address.
        echo "127.0.0.1 localhost"
        echo "$NET.254 $HOST"
        for ((k = 1; k <= n; k++)); do echo "$NET.$k node$k"; done
    } >"$DIR/hosts"
    : >"$DIR/resolv.conf"  # nodes reach no name server, and each question to one would take 10 s
    for ((k = 0; k < GPUS; k++)); do
        [ -c "$DIR/dev/gpu$k" ] || mknod -m 666 "$DIR/dev/gpu$k" c 1 3  # as /dev/null
    done
    printf '%s\n' "AutoDetect=off" "NodeName=node[1-$n] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
    version=$(slurmd -V | awk '{split($2, a, "."); print a[1] * 100 + a[2]}')
    [ "$version" -lt 2405 ] || echo "CgroupPlugin=disabled" >"$DIR/cgroup.conf"
    cat >"$CONF" <<CONFIGURATION
ClusterName=$ID
SlurmctldHost=$HOST($NET.254)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits for cred_expire, by default 120 s.
AuthInfo=socket=$DIR/munge/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/pid/slurmctld.own
SlurmdPidFile=$DIR/pid/%n.own
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
MpiDefault=none

SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Else the first job takes all memory of a node.
DefMemPerCPU=1000
GresTypes=gpu

SlurmdTimeout=$DOWN_S
SlurmctldTimeout=30
# 1 and not 2, with which nobody notices a quick reboot and the job waits for ever.
ReturnToService=1
KillWait=5
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
MessageTimeout=10
TCPTimeout=2
UnkillableStepTimeout=60
JobRequeue=1
TreeWidth=50

NodeName=node[1-$n] NodeAddr=$NET.[1-$n] CPUs=$CPUS RealMemory=$MEMORY_MIB Gres=gpu:$GPUS State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP OverSubscribe=NO
CONFIGURATION
}

# ---------------------------------------------------------------------------------------------------------------- network

switch_up() {
    # A bridge in a namespace of its own, so that no firewall of this machine stands between the nodes.
    ip netns add "$ID-sw"
    ip -n "$ID-sw" link set lo up
    ip -n "$ID-sw" link add br0 type bridge
    ip -n "$ID-sw" link set br0 up
    ip link add "$ID" type veth peer name host netns "$ID-sw"
    ip addr add "$NET.254/24" dev "$ID"
    ip link set "$ID" up
    ip -n "$ID-sw" link set host master br0 up
}

switch_down() {
    local namespace
    for namespace in $(ip netns list | awk '{print $1}' | grep -E "^$ID-(sw|node[0-9]+)$" || true); do
        ip netns del "$namespace"
    done
    ip link del "$ID" 2>/dev/null || true
}

# ------------------------------------------------------------------------------------------------------------------ nodes

node_up() {  # K
    local k=$1 name=node$1 namespace=$ID-node$1 child clock=()
    ! pid_of "$name.init" >/dev/null || return 0
    ip netns del "$namespace" 2>/dev/null || true
    ip netns add "$namespace"
    ip -n "$namespace" link set lo up
    # Always the same MAC, or what others remember of it leads a rebooted node's packets astray for seconds.
    ip -n "$namespace" link add eth0 address "$(printf 02:4d:53:00:00:%02x "$k")" type veth peer name "$name" netns "$ID-sw"
    ip -n "$namespace" addr add "$NET.$k/24" dev eth0
    ip -n "$namespace" link set eth0 up
    ip -n "$namespace" route add default via "$NET.254"
    ip -n "$ID-sw" link set "$name" master br0 up
    mkdir -p "$DIR/spool/$name" "$DIR/local/$name"
    # The node's clock of uptime starts at 0: the controller tells a reboot by it.
    [ ! -e /proc/self/ns/time ] || clock=(--time --boottime "-$(cut -d. -f1 /proc/uptime)")
    # Not `ip netns exec`, which mounts a fresh /sys.
    background "$name.wrap" "$DIR/log/init.$name.log" nsenter --net="/run/netns/$namespace" \
        unshare --uts --ipc --mount --pid --fork --kill-child=KILL --mount-proc "${clock[@]}" bash "$SELF" __init "$name"
    for _ in $(seq 100); do
        child=$(pgrep -P "$(pid_of "$name.wrap")" 2>/dev/null || true)
        [ -z "$child" ] || break
        sleep 0.05
    done
    [ -n "$child" ] || fail "$name does not start: see $DIR/log/init.$name.log"
    record "$name.init" "$child"
}

node_init() {  # NAME: the node's first process
    local name=$1 variable waiting
    hostname "$name"
    mount --bind "$DIR/hosts" /etc/hosts
    mount --bind "$DIR/resolv.conf" "$(readlink -f /etc/resolv.conf)"
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount --bind "$DIR/local/$name" "$DIR/scratch"
    for variable in ${!SLURM_@}; do unset "$variable"; done
    export SLURM_CONF=$CONF
    start_slurmd() {
        ! pgrep -x slurmd >/dev/null || return 0
        slurmd -D -N "$name" -f "$CONF" >/dev/null 2>&1 &
    }
    trap start_slurmd USR1  # from `boot`, where slurmd alone has ended
    start_slurmd
    sleep infinity &
    waiting=$!
    while kill -0 "$waiting"; do wait "$waiting" || true; done
}

node_boot() {  # K
    local k=$1 name=node$1 pid node since
    export SLURM_CONF=$CONF
    pid=$(pid_of "$name.init") || pid=
    [ -z "$pid" ] || ! pgrep -P "$pid" -x slurmd >/dev/null || return 0
    sleep 1  # SlurmdStartTime counts whole seconds
    since=$(date +%s)
    if [ -n "$pid" ]; then kill -USR1 "$pid"; else node_up "$k"; fi
    for _ in $(seq 150); do
        node=$(scontrol -o show node "$name" 2>/dev/null || true)
        if [[ $node =~ SlurmdStartTime=([^ ]+) && ${BASH_REMATCH[1]} != None ]] \
            && [ "$(date -d "${BASH_REMATCH[1]}" +%s)" -ge "$since" ]; then
            case $node in
                *State=*NOT_RESPONDING*) ;;
                *State=DOWN*) scontrol update "nodename=$name" state=resume ;;  # after a reboot it waits for an operator
                *) return 0 ;;
            esac
        fi
        sleep 0.1
    done
    fail "$name has not registered within 15 s: see $DIR/log/slurmd.$name.log"
}

node_down() {  # K: the cable first, or its dying sockets would say goodbye
    ip -n "$ID-sw" link set "node$1" down 2>/dev/null || true
    end "node$1.init" KILL  # the kernel ends all processes of the node with it
    end "node$1.wrap" TERM
    ip -n "$ID-sw" link del "node$1" 2>/dev/null || true  # at once; netns del takes its time
    ip netns del "$ID-node$1" 2>/dev/null || true
}

node_of() {  # NAME -> K
    [[ ${1:-} =~ ^node([0-9]+)$ ]] && grep -qs " $1\$" "$DIR/hosts" || fail "there is no node '${1:-}'"
    echo "${BASH_REMATCH[1]}"
}

slurmd_down() {  # NAME
    local init
    init=$(pid_of "$1.init") || fail "$1 is off"
    pkill -KILL -P "$init" -x slurmd || true
    for _ in $(seq 100); do
        pgrep -P "$init" -x slurmd >/dev/null || return 0
        sleep 0.05
    done
    fail "slurmd of $1 does not end"
}

# ---------------------------------------------------------------------------------------------------------------- cluster

start() {
    local n=${1:-2} k usable
    [[ $n =~ ^[1-9][0-9]?$ ]] || fail "start needs a number of nodes, at most 99"
    [ ! -e "$CONF" ] || fail "there is a cluster in $DIR; stop it first"
    [ ! -e "/sys/class/net/$ID" ] || fail "this machine has a cluster already (device $ID)"
    install
    trap give_up EXIT
    write_configuration "$n"
    switch_up
    # In the foreground, so that its number is known. A socket in the file system serves all nodes.
    background munged "$DIR/log/munged.log" munged --foreground --force --key-file="$DIR/munge/munge.key" \
        --socket="$DIR/munge/munge.sock" --pid-file="$DIR/munge/munged.pid" \
        --seed-file="$DIR/munge/munged.seed" --log-file="$DIR/log/munged.log" --num-threads=4
    for _ in $(seq 100); do
        [ ! -S "$DIR/munge/munge.sock" ] || break
        sleep 0.05
    done
    controller_up
    for ((k = 1; k <= n; k++)); do node_up "$k"; done
    for _ in $(seq 300); do
        usable=$(SLURM_CONF=$CONF sinfo -h -N -o %T 2>/dev/null | grep -cx idle || true)
        [ "$usable" != "$n" ] || break
        sleep 0.1
    done
    [ "$usable" = "$n" ] || fail "$usable of $n nodes came up; see $DIR/log"
    trap - EXIT
    if [ -n "${MINI_SLURM_OWNER:-}" ]; then
        (exec </dev/null >/dev/null 2>&1 9>&-; stop_after_owner) &
    fi
    print_env
}

give_up() {
    tail -n 5 "$DIR"/log/*.log >&2 || true
    stop
}

controller_up() {
    ! pid_of slurmctld >/dev/null || return 0
    SLURM_CONF=$CONF background slurmctld "$DIR/log/slurmctld.err" slurmctld -D -f "$CONF"
}

stop() {
    local file name
    for file in "$DIR"/pid/node*.wrap; do
        [ -e "$file" ] || continue
        name=${file##*/node}
        node_down "${name%.wrap}"
    done
    end slurmctld TERM
    end munged TERM
    ! command -v ip >/dev/null || switch_down
    rm -rf "${DIR:?}"/{munge,state,spool,pid,dev,scratch,local,ssh,hosts,resolv.conf,slurm.conf,gres.conf,cgroup.conf}
}

stop_after_owner() {
    local munged
    munged=$(pid_of munged)
    trap '' HUP INT TERM
    while kill -0 "$MINI_SLURM_OWNER" 2>/dev/null; do
        sleep 1
        [ "$(pid_of munged)" = "$munged" ] || return 0  # stopped already
    done
    lock
    stop
}

# ------------------------------------------------------------------------------------------------------------------ ssh

ssh_up() {
    local folder=$DIR/ssh node
    [ -e "$CONF" ] || fail "no cluster was started in $DIR"
    if ! command -v sshd >/dev/null || ! command -v pdsh >/dev/null; then
        # At this runlevel Debian starts no daemon of a package that is installed.
        RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends openssh-server pdsh \
            >"$DIR/log/apt.log" 2>&1 || fail "apt-get cannot install openssh-server and pdsh: $(tail -n 1 "$DIR/log/apt.log")"
    fi
    mkdir -p "$folder" /run/sshd
    for node in host user; do
        [ -e "$folder/$node" ] || ssh-keygen -q -t ed25519 -N "" -f "$folder/$node"
    done
    printf '%s\n' "HostKey $folder/host" "AuthorizedKeysFile $folder/user.pub" "PidFile none" "StrictModes no" "UsePAM no" \
        "PasswordAuthentication no" >"$folder/sshd_config"
    {
        awk -v net="$NET" '$2 ~ /^node/ {print "Host " $2 "\n  HostName " $1}' "$DIR/hosts"
        printf '%s\n' "Host *" "  IdentityFile $folder/user" "  StrictHostKeyChecking no" "  UserKnownHostsFile /dev/null" \
            "  LogLevel ERROR"
    } >"$folder/config"
    printf '#!/bin/sh\nexec %s -F %s "$@"\n' "$(command -v ssh)" "$folder/config" >"$folder/ssh"
    chmod 755 "$folder/ssh"
    for node in $(grep -oE 'node[0-9]+$' "$DIR/hosts"); do
        (on_node "$node" sh -c 'pgrep -x sshd >/dev/null || exec "$(command -v sshd)" -f "$0"' "$folder/sshd_config") 9>&- \
            || fail "sshd does not start on $node"
    done
    echo "$folder"
}

show_status() {
    local k process healthy=0
    [ -e "$CONF" ] || fail "no cluster was started in $DIR"
    for process in munged slurmctld $(grep -oE 'node[0-9]+$' "$DIR/hosts" | sed 's/$/.init/'); do
        if k=$(pid_of "$process"); then echo "$process: process $k"; else echo "$process: ended"; healthy=1; fi
    done
    export SLURM_CONF=$CONF
    sinfo -N -o '%10N %12T %5c %8m %12G %E'
    squeue -o '%8i %20j %10T %10M %5D %R'
    ! sinfo -h -N -o %T | grep -qE 'down|drain|fail|inval|unk|[*]' || healthy=1
    return "$healthy"
}

on_node() {  # NODE COMMAND...
    local pid clock=()
    pid=$(pid_of "$1.init") || fail "$1 is off"
    shift
    [ ! -e /proc/self/ns/time ] || clock=(--time)
    SLURM_CONF=$CONF exec nsenter -t "$pid" --net --uts --ipc --mount --pid "${clock[@]}" --wdns="$PWD" "$@"
}

print_env() {
    [ -e "$CONF" ] || fail "no cluster was started in $DIR"
    echo "export SLURM_CONF=$CONF"
}

lock() {
    mkdir -p "$DIR"
    exec 9>"$DIR/.lock"
    flock -w 120 9 || fail "another mini_slurm.sh is at work in $DIR"
}

case ${1:-} in
    check) check ;;
    install) lock; install ;;
    start) lock; start "${2:-2}" ;;
    env) print_env ;;
    status) show_status ;;
    stop) lock; stop ;;
    exec) node_of "${2:-}" >/dev/null; shift; on_node "$@" ;;
    kill) lock; k=$(node_of "${2:-}"); node_down "$k" ;;
    boot) lock; k=$(node_of "${2:-}"); node_boot "$k" ;;
    stopd) lock; node_of "${2:-}" >/dev/null; slurmd_down "$2" ;;
    unplug) node_of "${2:-}" >/dev/null; ip -n "$ID-sw" link set "$2" down ;;
    plug) node_of "${2:-}" >/dev/null; ip -n "$ID-sw" link set "$2" up ;;
    ctl)
        lock
        [ -e "$CONF" ] || fail "no cluster was started in $DIR"
        case ${2:-} in
            stop) end slurmctld TERM ;;
            kill) end slurmctld KILL ;;
            start) controller_up ;;
            *) fail "ctl stop, kill or start" ;;
        esac
        ;;
    ssh) lock; ssh_up ;;
    __init) node_init "$2" ;;
    *)
        sed -n '2,25s/^# \{0,1\}//p' "$SELF" >&2
        exit 2
        ;;
esac
