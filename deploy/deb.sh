#!/bin/sh
# Makes build/zcache_VERSION_ARCH.deb of what `make install PREFIX=/usr` installs.
#
# Removing it is refused while one of its devices is swap: the pages would go with the server.
set -eu
cd "$(dirname "$0")/.."
exec 9<Makefile && flock 9 # one at a time

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
architecture=$(dpkg --print-architecture)
tree=build/deb
package=build/zcache_${version}_$architecture.deb
python=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % (sys.version_info[0], sys.version_info[1] + 1))')

rm -rf $tree
DESTDIR=$PWD/$tree PREFIX=/usr deploy/install.sh install
find $tree \( -name '*.so' -o -name zcache-relay \) -exec strip --strip-unneeded {} +
gzip -9n $tree/usr/share/man/man1/*.1
mkdir -p $tree/DEBIAN

cat >$tree/DEBIAN/control <<END
Package: zcache
Version: $version
Architecture: $architecture
Maintainer: zcache <zcache@localhost>
Installed-Size: $(du -sk $tree/usr | cut -f1)
Depends: nbdkit, nbdkit-plugin-python, python3 (>= $python), python3 (<< $next), libc6, liblz4-1, libzstd1, libxxhash0, libssl3, util-linux, kmod
Recommends: fuse3
Section: admin
Priority: optional
Description: swap device that keeps pages compressed in RAM, and cold ones on a disk
 A server for the kernel's network block device: one command swaps onto it, one
 takes everything back, and the server may die, or be replaced, in between.
END
cat >$tree/DEBIAN/prerm <<'END'
#!/bin/sh
# An upgrade keeps swap on: the server goes on with the old code until 'zcache upgrade'.
set -e
swaps=${ZCACHE_SWAPS:-/proc/swaps}
if [ "$1" = remove ]; then
    if [ -z "${DPKG_ROOT:-}" ] && [ -d /run/systemd/system ]; then # this machine is meant
        if systemctl is-active --quiet 'zcache-nbd@*.service'; then
            echo "zcache: zcache-nbd@ serves another machine; end its swap there, then stop that service" >&2
            exit 1
        fi
        systemctl stop 'zcache@*.service' zcache-node.service || true
    fi
    for device in $(sed -n 's|^/dev/\(nbd[0-9]*\)[[:space:]].*|\1|p' "$swaps"); do
        case $(cat "${ZCACHE_SYS_BLOCK:-/sys/block}/$device/backend" 2>/dev/null) in
        zcache:*)
            echo "zcache: /dev/$device is swap; run 'zcache down' first (with the --name it has)" >&2
            exit 1
            ;;
        esac
    done
fi
END
cat >$tree/DEBIAN/postinst <<'END'
#!/bin/sh
set -e
if [ "$1" = configure ] && [ -z "${DPKG_ROOT:-}" ] && [ -d /run/systemd/system ]; then
    [ ! -e /usr/lib/sysusers.d/zcache.conf ] || systemd-sysusers zcache.conf || true
    systemctl daemon-reload || true
fi
END
sed 's/"$1" = configure/"$1" = remove/' $tree/DEBIAN/postinst >$tree/DEBIAN/postrm
chmod 755 $tree/DEBIAN/prerm $tree/DEBIAN/postinst $tree/DEBIAN/postrm
dpkg-deb --root-owner-group -Zgzip -z4 --build $tree "$package" >/dev/null
rm -rf $tree
echo "zcache: $package"
