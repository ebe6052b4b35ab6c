#!/bin/sh
# Compiles zcache_core and what is compiled of cluster in place, as little as is needed.
#
#   deploy/core.sh            the compiler's warnings are printed
#   deploy/core.sh strict     they are errors (development, `make lint`, `make test`)
#
# build/core-MODE says what was built from what, in two lines:
#
#   hash of what all share: headers, .pxd, setup.py, the counter table, the lock file
#   hash of the .pyx files, written when all of them are compiled
#
# When only the second is old, setup.py compiles what is newer than its result.  When
# the first is, or a build was cut off (build/core-unfinished is there), it starts from
# nothing.  A strict build serves the plain mode too, not the other way round.
set -eu
cd "$(dirname "$0")/.."
exec 9<Makefile && flock 9 # one setup at a time

mode=${1:-plain}
unfinished=build/core-unfinished

sources() { find zcache_core cluster -name "$1" ! -name counter_ids.pxd 2>/dev/null | sort; }
hash_of() { xargs -r sha256sum | sha256sum; }
shared=$({ echo setup.py zcache_core/counters.py requirements.lock && sources '*.h' && sources '*.pxd'; } |
    hash_of)
own=$({ echo plugin/relay.c && sources '*.pyx'; } | hash_of)

complete() { # every .pyx has its compiled module
    for source in $(sources '*.pyx'); do
        set -- "${source%.pyx}".*.so
        [ -e "$1" ] || return 1
    done
    [ -e plugin/zcache-relay ]
}

line() { sed -n "$1p" "build/core-$mode" 2>/dev/null || :; }

if [ "$mode" = plain ] && [ -e build/core-strict ]; then
    mode=strict
fi
if [ ! -e $unfinished ] && [ "$(line 1)" = "$shared" ]; then
    [ "$(line 2)" != "$own" ] || ! complete || exit 0
else
    for source in $(sources '*.pyx'); do
        rm -f "${source%.pyx}".*.so "${source%.pyx}.c"
    done
    rm -f plugin/zcache-relay
    rm -rf build/core-* build/lib.* build/temp.*
fi

echo "zcache: compiling the core ($mode); all of it takes about two minutes on two cores"
mkdir -p build
touch $unfinished
printf '%s\n' "$shared" >"build/core-$mode"
if [ "$mode" = strict ]; then
    export ZCACHE_WERROR=1
else
    unset ZCACHE_WERROR
fi
if .venv/bin/python setup.py -q build_ext --inplace -j "$(nproc)" >build/core.log 2>&1; then
    printf '%s\n' "$own" >>"build/core-$mode"
    ! grep -q 'warning:' build/core.log || cat build/core.log >&2
else
    cat build/core.log >&2
    rm $unfinished # an error is no cut: what did compile is good
    exit 1
fi
rm $unfinished
