#!/bin/sh
# Installs those of the named Debian packages that are missing; asks and changes nothing else.
#
#   deploy/packages.sh nbdkit gcc ...
#
# With sudo when not root.  An install that was cut off is finished first.  A package
# list that cannot be refreshed (a third party's, say) does not stop the rest: apt-get
# install then says what is really missing.
set -eu

missing() {
    installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null |
        sed -n 's/^installed //p')
    for package in "$@"; do
        printf '%s\n' "$installed" | grep -qxF "$package" || printf '%s ' "$package"
    done
}

if ! command -v dpkg-query >/dev/null; then
    echo "zcache: no Debian here (dpkg-query is missing); provide yourself: $*" >&2
    exit 1
fi

wanted=$(missing "$@")
[ -n "$wanted" ] || exit 0

as_root=
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "zcache: missing Debian packages, and neither root nor sudo to install them." >&2
        echo "        As root: apt-get install $wanted" >&2
        exit 1
    fi
    as_root=sudo
fi

apt() {
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -q \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@" </dev/null
}

echo "zcache: installing Debian packages: $wanted"
$as_root dpkg --configure -a </dev/null
apt update || echo "zcache: some package lists could not be refreshed; going on with the rest" >&2
# shellcheck disable=SC2086  # a list of words
apt install --no-install-recommends $wanted
