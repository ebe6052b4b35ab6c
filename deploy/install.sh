#!/bin/sh
# Installs zcache below PREFIX (in DESTDIR), or takes it away again.
#
#   deploy/install.sh install | uninstall        DESTDIR= PREFIX=/usr/local
#
#   PREFIX/lib/zcache/             the compiled core, cluster/, plugin/, and the Python packages that
#                                  they import, as requirements.lock has them: a folder of our own,
#                                  so that Debian's versions of them and ours never meet
#   PREFIX/bin/zcache              the command, run by Debian's Python
#   PREFIX/lib/systemd/system/     zcache@.service, zcache-server@.service, zcache-nbd@.service,
#                                  zcache-node.service
#   PREFIX/lib/sysusers.d/         the user of zcache-nbd@.service
#   PREFIX/share/                  man pages, an example of /etc/zcache/NAME.toml
#
# A running server is not touched: `zcache upgrade` replaces it by what is installed now.
# /etc/zcache is the administrator's: neither written nor removed.
set -eu
cd "$(dirname "$0")/.."

prefix=${PREFIX:-/usr/local}
case $prefix in
/*) ;;
*) echo "zcache: PREFIX=$prefix is no absolute path; write one like /usr/local" >&2 && exit 2 ;;
esac
root=${DESTDIR:-}$prefix
lib=$root/lib/zcache

units='zcache@.service zcache-server@.service zcache-nbd@.service zcache-node.service'

reload() { # systemd reads units anew, where it runs and the units are its own
    [ -z "${DESTDIR:-}" ] && [ -d /run/systemd/system ] && systemctl daemon-reload || :
}

make_user() { # the same way
    [ -z "${DESTDIR:-}" ] && [ -d /run/systemd/system ] &&
        systemd-sysusers "$root/lib/sysusers.d/zcache.conf" || :
}

remove_code() { rm -rf "$lib" "$lib.new"; }

uninstall() {
    remove_code
    for unit in $units; do
        rm -f "$root/lib/systemd/system/$unit"
    done
    rm -f "$root/bin/zcache" "$root/lib/sysusers.d/zcache.conf" \
        "$root/share/man/man1/zcache.1" "$root/share/man/man1/zcache-plugin.1"
    rm -rf "$root/share/doc/zcache"
    reload
}

install_all() {
    rm -rf "$lib.new"
    mkdir -p "$lib.new" "$root/bin" "$root/lib/systemd/system" "$root/share/man/man1" \
        "$root/share/doc/zcache"
    for package in zcache_core cluster plugin; do
        mkdir "$lib.new/$package"
        find $package -maxdepth 1 \( -name '*.py' -o -name '*.so' -o -name zcache-relay \) \
            -exec cp -p {} "$lib.new/$package/" \;
        find $package -mindepth 1 -maxdepth 1 -type d ! -name __pycache__ \
            -exec cp -rp {} "$lib.new/$package/" \;
    done
    .venv/bin/python deploy/packages.py "$lib.new"
    /usr/bin/python3 -m compileall -q -s "$lib.new" -p "$prefix/lib/zcache" "$lib.new"
    chmod -R u=rwX,go=rX "$lib.new"
    remove_old=
    [ ! -e "$lib" ] || { mv "$lib" "$lib.old" && remove_old=yes; }
    mv "$lib.new" "$lib"
    [ -z "$remove_old" ] || rm -rf "$lib.old"

    # -I: what is in the caller's environment or home folder is no part of a swap device.
    cat >"$root/bin/zcache.new" <<END
#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "$prefix/lib/zcache")
from plugin.cli import main

sys.exit(main())
END
    chmod 755 "$root/bin/zcache.new"
    mv "$root/bin/zcache.new" "$root/bin/zcache"
    for unit in $units; do
        sed "s|@BIN@|$prefix/bin|g" deploy/systemd/$unit >"$root/lib/systemd/system/$unit"
        chmod 644 "$root/lib/systemd/system/$unit"
    done
    install -d "$root/lib/sysusers.d"
    install -m 644 deploy/systemd/zcache.sysusers "$root/lib/sysusers.d/zcache.conf"
    make_user
    install -m 644 docs/man/zcache.1 docs/man/zcache-plugin.1 "$root/share/man/man1/"
    install -m 644 LICENSE README.md CHANGELOG.md deploy/zcache.toml "$root/share/doc/zcache/"
    reload
}

case ${1:-} in
install) install_all ;;
uninstall) uninstall ;;
*) echo "usage: deploy/install.sh install | uninstall" >&2 && exit 2 ;;
esac
