#!/bin/sh
# Serves a swap device in the foreground and tells how to use it; `make run` calls this.
#
#   deploy/run.sh size=4G pool=20% [key=value ...]     keys: see README.md; commit=all is added
#
# The socket lies in /run/zcache (root) or the user's own runtime folder.  Ctrl-C stops
# the server, but the first one does not while a network block device is in use as swap:
# pages would be lost with it, and the processes that they belong to.
set -u
cd "$(dirname "$0")/.."
root=$(pwd -P)
swaps=${ZCACHE_SWAPS:-/proc/swaps} # a test has a file of its own

folder=$(.venv/bin/python -c 'from zcache_core.owner import runtime_dir; print(runtime_dir())') || exit
socket=$folder/zcache.sock

answers() { timeout "$1" nbdinfo --size "nbd+unix:///?socket=$socket" 2>/dev/null; }
swapped_on() { grep -q '^/dev/nbd' "$swaps"; }
alive() { kill -0 $server 2>/dev/null; }

if [ -S "$socket" ] && answers 5 >/dev/null; then
    echo "zcache: a server already answers on $socket; stop that one first." >&2
    exit 1
fi

# This machine is the one that swaps onto it: the pool must not have to grow without memory.
case " $* " in
*" commit="* | *" pressure="*) ;;
*) set -- "$@" commit=all ;;
esac

# In a session of its own: Ctrl-C comes here, not to the server.
MALLOC_ARENA_MAX=1 setsid nbdkit -f -U "$socket" \
    python "$root/plugin/zcache_plugin.py" "$@" </dev/null &
server=$!
warned=

stop() {
    if [ -z "$warned" ] && swapped_on; then
        warned=yes
        echo
        echo "zcache: a network block device is in use as swap. If it is this one, run swapoff first:"
        echo "        a server that stops now takes pages with it, and kills whose they are."
        echo "        It goes on; Ctrl-C again stops it anyway."
        return
    fi
    trap '' INT TERM HUP
    kill -TERM $server 2>/dev/null
    tries=0
    while alive && [ $tries -lt 50 ]; do # nbdkit waits for its clients: ten seconds at most
        sleep 0.2
        tries=$((tries + 1))
    done
    kill -KILL $server 2>/dev/null
    wait $server 2>/dev/null
    rm -f "$socket"
    echo "zcache: stopped."
    exit 0
}
trap stop INT TERM HUP

until size=$(answers 20); do # it listens before it has committed its pool
    if ! alive; then
        wait $server
        exit # with the server's own status; it has said why
    fi
    sleep 0.1
done
tries=0 # the node process, which answers `zcache status`, is a moment later
until [ -S "$folder/zcache.ctl" ] || [ $tries -ge 50 ]; do
    sleep 0.1
    tries=$((tries + 1))
done

looking="as root in another terminal"
[ "$(id -u)" -eq 0 ] ||
    looking="better not: this server may not lock its memory; start it as root"

cat <<END

zcache serves a swap device of $((size / 1048576)) MiB on $socket

  Swap onto it ($looking):
      sysctl -w vm.watermark_boost_factor=0 vm.min_free_kbytes=16384
      modprobe nbd
      nbd-client -unix $socket /dev/nbd0 -b 4096 -swap
      mkswap /dev/nbd0
      swapon --discard --priority 100 /dev/nbd0

  Watch it:
      $root/.venv/bin/zcache status

  Take it away again, in this order, before the server stops:
      swapoff /dev/nbd0
      nbd-client -d /dev/nbd0

Ctrl-C stops the server.

END

wait $server
status=$?
while alive; do # a signal ended the wait, not the server
    wait $server
    status=$?
done
rm -f "$socket"
echo "zcache: the server has ended by itself (exit status $status)." >&2
exit $status
