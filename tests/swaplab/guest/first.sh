#!/bin/sh
# PID 1 until systemd is: a root of tmpfs with the host's /usr, what was installed for this guest
# in its /usr/local, an /etc of its own, and the folder it is spoken to through.
#
#   zguest=FOLDER on the kernel's command line: FOLDER/root/{usr/local,etc}, FOLDER/share
set -eu
mount -t proc proc /proc
folder=$(sed 's/.*zguest=\([^ ]*\).*/\1/' /proc/cmdline)
mount -t tmpfs tmpfs /mnt
cd /mnt
mkdir usr etc var run proc sys dev tmp root home share
for name in bin sbin lib lib64; do ln -s usr/$name $name; done
mount --bind /usr usr
mount --bind "$folder/root/usr/local" usr/local
cp -a "$folder/root/etc/." etc/
mount -t hostfs share share -o "$folder/share"
# There is no modprobe, nor a /lib/modules of this kernel.
busybox insmod "$(find "/usr/lib/uml/modules/$(uname -r)" -name nbd.ko)" nbds_max=4
mount -n --move /mnt /
exec chroot . /lib/systemd/systemd --log-target=console --show-status=no
