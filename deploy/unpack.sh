#!/bin/sh
# Unpacks Debian packages into build/unpacked, without installing them: for programs that
# tests need and whose packages would start a service on this machine.
#
#   deploy/unpack.sh prometheus      -> build/unpacked/usr/bin/prometheus, promtool
#
# Nothing is done when it is there; a package is complete when its note is written.
set -eu
cd "$(dirname "$0")/.."
exec 9<Makefile && flock 9 # one setup at a time

for package in "$@"; do
    note=build/unpacked/$package.note
    [ ! -e "$note" ] || continue
    echo "zcache: unpacking the Debian package $package into build/"
    rm -rf build/download
    mkdir -p build/download build/unpacked
    fetch() { (cd build/download && apt-get -q -o Acquire::Retries=3 download "$package" >&2); }
    if ! fetch; then # no package list yet, or one that is too old
        as_root=
        [ "$(id -u)" -eq 0 ] || as_root=sudo
        $as_root apt-get -q update || :
        fetch
    fi
    dpkg-deb -x build/download/*.deb build/unpacked
    rm -rf build/download
    touch "$note"
done
