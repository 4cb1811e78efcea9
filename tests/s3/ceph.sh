#!/usr/bin/env bash
# A real S3 server for tests: Ceph's RADOS Gateway over one monitor and one OSD that keeps its data in memory.
#
#   ceph.sh fetch     unpack Debian's packages into the cache folder, once; nothing is installed
#   ceph.sh start     fetch, start on free ports, print what `env` prints
#   ceph.sh env       shell lines with the endpoint and the keys: eval "$(tests/s3/ceph.sh env)"
#   ceph.sh busy N    at most N requests at once, and a 503 SlowDown for those beyond; 0 for no limit
#   ceph.sh kill      SIGKILL to the gateway; what is stored stays
#   ceph.sh restart   start the gateway again, at the same address
#   ceph.sh stop      end what `start` began, and delete its folder
#
# MEGADIFF_CEPH_RUN: the folder of one server (by default one per user in $TMPDIR); several may run, each in its own.
# MEGADIFF_CEPH_OWNER: a process id; when that process has ended, so does the server.
# XDG_CACHE_HOME: packages are kept in its megadiff/ceph (by default in ~/.cache, or in $TMPDIR where that cannot be written).
#
# Needs Debian 12; exit status 3 where the packages cannot be had. Only processes whose recorded id still runs one of our
# daemons on our configuration are ever signalled.
set -euo pipefail

RUN=$(realpath -m "${MEGADIFF_CEPH_RUN:-${TMPDIR:-/tmp}/megadiff-ceph-$(id -u)}")
CACHE=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/megadiff/ceph
mkdir -p "$CACHE" 2>/dev/null && [ -w "$CACHE" ] || CACHE=${TMPDIR:-/tmp}/megadiff-cache-$(id -u)/ceph
RELEASE=$(. /etc/os-release 2>/dev/null && printf '%s' "${VERSION_CODENAME:-unknown}" || printf unknown)-$(uname -m)
ROOT=$CACHE/$RELEASE
CONF=$RUN/ceph.conf
PACKAGES=(ceph-mon ceph-osd radosgw ceph-common)
DAEMONS=(ceph-mon ceph-osd radosgw)
ACCESS_KEY=AKIDMEGADIFF SECRET_KEY=kept-out-of-messages-9fQ2

# Only Debian's own programs, whatever environment this is called from: the ceph command is a Python program.
LIBRARIES=$ROOT/usr/lib/$(uname -m)-linux-gnu
SEARCHED=$LIBRARIES:$LIBRARIES/ceph:$ROOT/lib/$(uname -m)-linux-gnu
unset PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV
export PATH=$ROOT/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONNOUSERSITE=1 LC_ALL=C.UTF-8
with_packages() { LD_LIBRARY_PATH=$SEARCHED PYTHONPATH=$ROOT/usr/lib/python3/dist-packages "$@"; }
ceph_command() { with_packages timeout 30 python3 "$ROOT/usr/bin/ceph" -c "$CONF" "$@"; }

fail() { printf 'ceph.sh: %s\n' "$*" >&2; exit 1; }
cannot_be_had() { printf 'ceph.sh: %s\n' "$*" >&2; exit 3; }

# ------------------------------------------------------------------------------------------------------------- packages

is_whole() {
    [ -e "$ROOT/.whole" ] || return 1
    local daemon
    for daemon in "${DAEMONS[@]}"; do  # a library that was installed at the time may be gone
        ! with_packages ldd "$ROOT/usr/bin/$daemon" 2>/dev/null | grep -q 'not found' || return 1
    done
}

download() {
    # Without locks: nothing but the folder given is written, and another apt-get need not be waited for.
    apt-get install -y -qq --no-install-recommends --download-only -o Dir::Cache::archives="$1" -o Debug::NoLocking=1 \
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=3 "${PACKAGES[@]}" >"$1/log" 2>&1
}

fetch() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null \
        || is_whole || cannot_be_had "needs Debian's packages of Ceph, and there is no apt-get here"
    mkdir -p "$CACHE" 2>/dev/null || cannot_be_had "the cache folder $CACHE cannot be written; see XDG_CACHE_HOME"
    exec 9>"$CACHE/lock"
    flock 9
    if ! is_whole; then
        local aside package
        aside=$(mktemp -d "$CACHE/fetching.XXXXXX")
        trap 'rm -rf "$aside"' EXIT
        mkdir -p "$aside/archives/partial" "$aside/root"
        if ! download "$aside/archives"; then  # no package lists yet, or old ones
            [ "$(id -u)" = 0 ] || cannot_be_had "apt-get cannot fetch ${PACKAGES[*]}; run 'apt-get update' as root"
            apt-get update -qq >"$aside/archives/log" 2>&1 && download "$aside/archives" \
                || cannot_be_had "apt-get cannot fetch ${PACKAGES[*]}: $(tail -n 1 "$aside/archives/log")"
        fi
        for package in "$aside"/archives/*.deb; do
            dpkg -x "$package" "$aside/root"
        done
        touch "$aside/root/.whole"
        rm -rf "$ROOT"
        mv "$aside/root" "$ROOT"
        rm -rf "$aside"
        trap - EXIT
        is_whole || cannot_be_had "the packages of $RELEASE lack a library: $(lacking)"
    fi
    exec 9>&-
}

lacking() {
    with_packages ldd "${DAEMONS[@]/#/$ROOT/usr/bin/}" 2>/dev/null | grep 'not found' | sort -u | head -n 1 || true
}

# --------------------------------------------------------------------------------------------------------------- daemons

pid_of() {  # the recorded process of a daemon (mon.a, osd.0, client.rgw.a), if it still runs on our configuration
    local pid
    pid=$(cat "$RUN/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return 1
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "-c $CONF" || return 1
    printf '%s' "$pid"
}

signal() {  # a signal to a daemon, and wait until it is gone
    local pid
    pid=$(pid_of "$2") || return 0
    kill "-$1" "$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do
        pid_of "$2" >/dev/null || return 0
        sleep 0.05
    done
    kill -KILL "$pid" 2>/dev/null || true
}

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

free_ports() {
    # Below the ports that outgoing connections are given: a gateway that is down must not find its own taken.
    python3 - "$1" <<'PYTHON'
import random, socket, sys
ports = []
while len(ports) < int(sys.argv[1]):
    port = random.SystemRandom().randrange(20000, 32000)
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
    if port not in ports:
        ports.append(port)
print(*ports)
PYTHON
}

write_configuration() {
    local fsid=$1 mon_v2=$2 mon_v1=$3 gateway=$4
    cat >"$CONF" <<CONFIGURATION
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$mon_v2,v1:127.0.0.1:$mon_v1]
mon initial members = a
keyring = $RUN/keyring
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon max pg per osd = 1000
erasure code dir = $LIBRARIES/ceph/erasure-code
plugin dir = $LIBRARIES/ceph
osd class dir = $LIBRARIES/rados-classes
run dir = $RUN
admin socket = $RUN/\$name.asok
log file = $RUN/log/\$name.log
mon cluster log file = $RUN/log/cluster.log
pid file = $RUN/\$name.pid
crash dir = $RUN/crash
auth allow insecure global id reclaim = false
mon warn on pool no redundancy = false
[mon.a]
mon data = $RUN/mon
# A change of the cluster's maps (each pool is one) otherwise waits for a second.
paxos propose interval = 0.02
paxos min wait = 0.01
[osd]
osd objectstore = memstore
osd data = $RUN/osd
memstore device bytes = 4294967296
osd memory target = 1073741824
osd crush update on start = false
[client.rgw.a]
rgw data = $RUN/rgw
rgw frontends = beast endpoint=127.0.0.1:$gateway tcp_nodelay=1
# With a cache it tells other gateways of each new bucket, and waits half a minute for one that was killed.
rgw cache enabled = false
CONFIGURATION
    printf '%s\n' "$gateway" >"$RUN/port"
}

start_gateway() {
    local port
    port=$(cat "$RUN/port" 2>/dev/null) || fail "no server was started in $RUN"
    with_packages timeout 60 radosgw -n client.rgw.a -c "$CONF" >>"$RUN/log/start.log" 2>&1
    for _ in $(seq 600); do
        ! answers "$port" || return 0
        sleep 0.1
    done
    fail "the gateway does not answer"
}

start() {
    [ ! -e "$RUN/port" ] || fail "there is a server in $RUN; stop it first, or set MEGADIFF_CEPH_RUN"
    fetch
    mkdir -p "$RUN"/{mon,osd,rgw,log,crash} 2>/dev/null || fail "the folder $RUN cannot be written; see MEGADIFF_CEPH_RUN"
    [ "${#RUN}" -le 80 ] || fail "MEGADIFF_CEPH_RUN ($RUN) is too long for the path of a socket; take at most 80 characters"
    trap give_up EXIT
    bring_up >>"$RUN/log/start.log" 2>&1
    start_gateway
    with_packages timeout 60 radosgw-admin -n client.admin -c "$CONF" user create --uid=tests --display-name=tests \
        --access-key="$ACCESS_KEY" --secret-key="$SECRET_KEY" >>"$RUN/log/start.log" 2>&1
    trap - EXIT
    if [ -n "${MEGADIFF_CEPH_OWNER:-}" ]; then
        stop_after_owner "$(cat "$RUN/port")" </dev/null >/dev/null 2>&1 &
    fi
    print_env
}

give_up() {  # only where a command has failed
    printf 'ceph.sh: Ceph does not start: %s\n' "$(tail -n 1 "$RUN/log/start.log")" >&2
    stop
    exit 1
}

bring_up() {
    local fsid osd mon_v2 mon_v1 gateway
    fsid=$(cat /proc/sys/kernel/random/uuid)
    osd=$(cat /proc/sys/kernel/random/uuid)
    read -r mon_v2 mon_v1 gateway < <(free_ports 3)
    write_configuration "$fsid" "$mon_v2" "$mon_v1" "$gateway"
    with_packages ceph-authtool -C "$RUN/keyring" --gen-key -n mon. --cap mon 'allow *'
    local key=(with_packages ceph-authtool "$RUN/keyring" --gen-key)
    "${key[@]}" -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    "${key[@]}" -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd'
    "${key[@]}" -n client.rgw.a --cap mon 'allow rw' --cap osd 'allow rwx'
    cp "$RUN/keyring" "$RUN/rgw/keyring"
    with_packages monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:127.0.0.1:$mon_v2,v1:127.0.0.1:$mon_v1]" "$RUN/monmap"
    with_packages ceph-mon --mkfs -i a --monmap "$RUN/monmap" --keyring "$RUN/keyring" -c "$CONF"
    with_packages ceph-mon -i a -c "$CONF"
    with_packages ceph-osd -i 0 --mkfs --osd-uuid "$osd" -c "$CONF"
    ceph_command osd new "$osd" 0
    ceph_command osd crush add-bucket h1 host root=default
    ceph_command osd crush add osd.0 1.0 host=h1 root=default
    with_packages ceph-osd -i 0 -c "$CONF"
}

stop_after_owner() {
    trap '' HUP INT TERM
    while kill -0 "$MEGADIFF_CEPH_OWNER" 2>/dev/null; do
        sleep 1
        [ "$(cat "$RUN/port" 2>/dev/null)" = "$1" ] || return 0  # stopped already
    done
    stop
}

stop() {
    signal KILL client.rgw.a  # nothing here is worth an orderly end
    signal KILL osd.0
    signal KILL mon.a
    [ ! -e "$CONF" ] || rm -rf "$RUN"
}

print_env() {
    local port
    port=$(cat "$RUN/port" 2>/dev/null) || fail "no server was started in $RUN"
    printf 'export AWS_ENDPOINT_URL=http://127.0.0.1:%s AWS_ACCESS_KEY_ID=%s AWS_SECRET_ACCESS_KEY=%s AWS_REGION=us-east-1\n' \
        "$port" "$ACCESS_KEY" "$SECRET_KEY"
}

case ${1:-} in
    fetch) fetch ;;
    start) start ;;
    env) print_env ;;
    busy)
        [[ ${2:-} =~ ^[0-9]+$ ]] || fail "busy needs a number of requests"
        [ -e "$RUN/client.rgw.a.asok" ] || fail "no server was started in $RUN"
        ceph_command --admin-daemon "$RUN/client.rgw.a.asok" config set rgw_max_concurrent_requests "$2" >/dev/null
        ;;
    kill) signal KILL client.rgw.a ;;
    restart) start_gateway ;;
    stop) stop ;;
    *)
        sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
