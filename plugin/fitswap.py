"""Looks of `zcache check` at what swapping needs beside the server.

As in `fitness`: one small look at one thing each, nothing is changed; not even the nbd
module is loaded, so its netlink family can be asked for only where it is loaded.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from cluster import expiry
from cluster.link import BlockingClient
from plugin import swaparea, tlsfiles
from plugin.attachcli import SWAP_PRIORITY
from plugin.fitness import CAP_SYS_ADMIN, NOTE, OK, TODO, Finding, grant, has_capability, nbd_module
from zcache_core.errors import AttachError, ControlError

MODULE = Path("/sys/module/nbd")
SYS_BLOCK = Path("/sys/block")
ZSWAP = Path("/sys/module/zswap/parameters/enabled")
CERTIFICATE_FOLDERS = tlsfiles.DEFAULT_FOLDER, "/etc/zcache/cluster"
DISK_FOLDER = "/var/lib"  # where the documents put `disk=`
DISK_BYTES_MIN = 1 << 30


def netlink_family() -> Finding:
    """What `attach` speaks with the kernel; without it a dead server cannot be replaced."""
    subject = "nbd netlink"
    if not MODULE.exists():
        can_load = nbd_module().level == OK
        do = "modprobe nbd; check again" if can_load else ""  # what to do is said of the module
        return Finding(NOTE, subject, "unknown: nbd is not loaded", do)
    from plugin import nbdnetlink  # pyroute2 takes a third of a second

    try:
        found = nbdnetlink.family()
    except (AttachError, OSError) as error:
        return Finding(TODO, subject, str(error), "use kernel 4.12 or later, in no container")
    return Finding(OK, subject, f"family {found.family}")


def may_swapon() -> Finding:
    if has_capability(CAP_SYS_ADMIN):
        return Finding(OK, "swapon", "permitted")
    return Finding(
        NOTE, "swapon", "not permitted here", grant("CAP_SYS_ADMIN", "zcache up, attach and swapon")
    )


def certificates() -> Finding:
    """Those of `attach nbds://`, and of the place that the documents name for tls=."""
    found = {
        folder: expiry.days_left(end_s)
        for folder in CERTIFICATE_FOLDERS
        if (end_s := expiry.first_end_s(folder)) is not None
    }
    if not found:
        return Finding(OK, "certificates", f"none in {' or '.join(CERTIFICATE_FOLDERS)}")
    folder = min(found, key=lambda folder: found[folder])
    days = found[folder]
    if days >= expiry.WARN_DAYS:
        return Finding(OK, "certificates", f"{folder}: {days} days left")
    what = f"{folder}: {f'{days} days left' if days >= 0 else 'ended'}"
    do = "make a new node.pem ('zcache cluster-add') and put it there; see the guide on failures"
    return Finding(NOTE if days >= 0 else TODO, "certificates", what, do)


def disk_space() -> Finding:
    """Only told: a disk tier is a choice."""
    try:
        free = shutil.disk_usage(DISK_FOLDER).free
    except OSError as error:
        return Finding(NOTE, "disk space", f"{DISK_FOLDER}: {error.strerror}", "name another disk=")
    what = f"{free >> 20} MiB free in {DISK_FOLDER}"
    if free < DISK_BYTES_MIN:
        return Finding(
            NOTE, "disk space", what, "for disk= choose a place with 1.05 times size= and 16 MiB"
        )
    return Finding(OK, "disk space", what)


def other_swap() -> Finding:
    """Who is used first, and what compresses twice."""
    subject = "other swap"
    try:
        areas = [area for area in swaparea.areas() if not area.path.startswith("/dev/nbd")]
        zswap = ZSWAP.exists() and ZSWAP.read_text().strip() == "Y"
    except OSError as error:
        return Finding(NOTE, subject, f"cannot be seen ({error.strerror})", "look with 'swapon'")
    if zswap:
        return Finding(
            NOTE, subject, "zswap is on: every page would be compressed twice", f"echo 0 >{ZSWAP}"
        )
    first = [area for area in areas if area.priority >= SWAP_PRIORITY]
    if first:
        return Finding(
            NOTE,
            subject,
            f"{first[0].path} (priority {first[0].priority}) is filled before zcache",
            f"zcache up --priority {min(32767, max(area.priority for area in first) + 1)}, "
            f"unless you want it so",
        )
    if areas:
        return Finding(OK, subject, f"{', '.join(area.path for area in areas)}, after zcache")
    return Finding(OK, subject, "none: pages that a full pool refuses stay in RAM")


def own_swap() -> Finding:
    """Whether this machine swaps onto a server of its own whose pool still has to grow."""
    subject = "own swap"
    grows = []
    with contextlib.suppress(OSError):
        for area in swaparea.areas():
            backend = SYS_BLOCK / Path(area.path).name / "backend"
            if not backend.exists():
                continue
            kind, _, place = backend.read_text().strip().partition(":")
            with contextlib.suppress(ControlError, OSError):
                if kind == "zcache":
                    with BlockingClient(Path(f"{place}.ctl")) as client:
                        if client.call("config").get("commit") == "ahead":
                            grows.append(area.path)
    if grows:
        return Finding(
            TODO,
            subject,
            f"{', '.join(grows)} has commit=ahead: its pool may have to grow when there is no "
            f"memory, and this machine hang",
            "zcache down, then zcache up with commit=all (its default)",
        )
    return Finding(OK, subject, "no pool here has to grow under pressure")


LOOKS = (netlink_family, may_swapon, disk_space, other_swap, own_swap)
