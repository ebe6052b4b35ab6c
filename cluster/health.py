"""What is wrong, in sentences: rules over the counters and the configuration.

Each rule is a small function that looks at one thing and returns a Reason or
None; the whole is as bad as its worst reason.  A reason says what is the matter
and what to do about it, with the numbers that made it true.

    ok         nothing to do
    degraded   it works, something can or should be done
    critical   writes are refused, or pages are lost, now

What it is not: an alarm with memory.  A rule sees one moment; trends are the
metrics' work.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from cluster.peerhealth import (
    backup_missing,
    certificate_ends,
    etcd_silent,
    has_peers,
    peer_away,
    peer_copies_bad,
    peers_missing,
    peers_short,
    peers_twins,
)
from cluster.reasons import CRITICAL, DEGRADED, OK, Config, Reason, Rule, Stats
from zcache_core import PAGES_PER_FRAME

_ORDER = (OK, DEGRADED, CRITICAL)

PAGE_BYTES = 4096
NEARLY_FULL, FULL = 0.80, 0.99  # shares of the pool's frames in use
STALLED_US = 2_000_000  # of writes of 1 MiB, two at a time
DISK_NEARLY_FULL = 0.90  # share of the disk that is alive; cleaning gets expensive above


def health(stats: Stats, config: Config) -> dict[str, Any]:
    """{"status": level, "reasons": [{"what": sentence, "do": sentence}, ...]}, worst first."""
    reasons = [reason for rule in RULES if (reason := rule(stats, config)) is not None]
    reasons.sort(key=lambda reason: -_ORDER.index(reason.level))
    return {
        "status": reasons[0].level if reasons else OK,
        "reasons": [{"what": reason.what, "do": reason.do} for reason in reasons],
    }


def pages_lost(stats: Stats, config: Config) -> Reason | None:
    """A page whose last copy is gone: its owner gets an I/O error at the next touch."""
    if not (lost := stats["lost_pages"]):
        return None
    return Reason(
        CRITICAL,
        f"{lost} stored pages are lost and answer with an I/O error.",
        "Restart the programs that the kernel log names, then swapoff and swapon the device.",
    )


def copies_damaged(stats: Stats, config: Config) -> Reason | None:
    """A checksum did not match what was stored in RAM."""
    if not (corrupt := stats["corrupt_loads"]):
        return None
    return Reason(
        CRITICAL,
        f"{corrupt} reads found a damaged copy in RAM and were answered with an I/O error.",
        "Test this machine's memory (memtest86+, or EDAC counters), and move its work elsewhere.",
    )


def copies_mended(stats: Stats, config: Config) -> Reason | None:
    """Damage in RAM that hit pages whose copy below was still there."""
    if not (mended := stats["mended_loads"]):
        return None
    return Reason(
        DEGRADED,
        f"{mended} reads found a damaged copy in RAM and were answered from the disk instead.",
        "Test this machine's memory (memtest86+, or EDAC counters): the next damage may hit a "
        "page that is nowhere else.",
    )


def disk_copies_bad(stats: Stats, config: Config) -> Reason | None:
    """What was read back from the disk was not what had been written there, or nothing."""
    corrupt, unread = stats["disk_corrupt_pages"], stats["disk_read_errors"]
    if corrupt + unread == 0:
        return None
    return Reason(
        CRITICAL,
        f"{corrupt} copies on the disk were found wrong or damaged and {unread} could not be "
        f"read: pages without another copy answer with an I/O error, never with other "
        f"data.",
        "Check the disk (kernel log, smartctl) and what else may write to it; restart the "
        "programs that the kernel log names.",
    )


def device_unmended(stats: Stats, config: Config) -> Reason | None:
    """The attach helper and its spare are both dead; the device itself still answers."""
    if not (device := config.get("unmended")):
        return None
    return Reason(
        DEGRADED,
        f"Nobody mends the connection of {device}: its helper and the spare have ended, so a "
        f"server that ends or hangs takes the pages there with it.",
        "Run the command that attached it ('zcache up', 'zcache attach ...') once more: it gives "
        "the device a new helper and leaves everything else as it is.",
    )


def disk_stalls(stats: Stats, config: Config) -> Reason | None:
    """It neither takes what is written nor says that it fails; reads may hang as well."""
    if stats["disk_stalled_us"] < STALLED_US:
        return None
    return Reason(
        DEGRADED,
        f"The disk has not finished its writes for {stats['disk_stalled_us'] // 10**6} s: pages "
        f"stay in RAM meanwhile.",
        "See to the disk (kernel log, what else keeps it busy); writeback goes on by itself.",
    )


def disk_fails(stats: Stats, config: Config) -> Reason | None:
    """Writes to the disk fail now; the pages stay in RAM."""
    if not stats["disk_degraded"]:
        return None
    if stats["disk_errno"] == errno.ENOENT:
        return Reason(
            DEGRADED,
            "The file of the disk was removed: what lies there can be read until the server stops, "
            "nothing more is written to it, pages stay in RAM.",
            "Take the device out of use (swapoff) before the server stops, and start it with "
            "another disk=.",
        )
    if stats["disk_errno"] == errno.ENODATA:
        return Reason(
            DEGRADED,
            "The file of the disk was cut short: what was cut off answers with an I/O error, and "
            "the file cannot be made as long as it was.",
            "Free some room where it lies; writeback goes on by itself.",
        )
    why = os.strerror(stats["disk_errno"])
    return Reason(
        DEGRADED,
        f"Writing to the disk fails ({why}, {stats['disk_write_errors']} times so far): pages "
        f"stay in RAM, and it is tried again every 10 s at least.",
        "See to the disk (room where its file lies, cables, kernel log); writeback goes on by "
        "itself when it is well.",
    )


def write_limit_reached(stats: Stats, config: Config) -> Reason | None:
    """Not a fault of anything; but the pool is all there is until tomorrow."""
    if not stats["writeback_limit_reached"]:
        return None
    return Reason(
        DEGRADED,
        f"Today's writeback_limit is used up ({stats['writeback_day_bytes']} of "
        f"{stats['writeback_limit_bytes']} bytes): nothing is written to the disk until midnight "
        f"(UTC), pages stay in RAM.",
        "Wait, or set a larger writeback_limit ('zcache set writeback_limit=40G', or the key at "
        "the next start).",
    )


def disk_nearly_full(stats: Stats, config: Config) -> Reason | None:
    """A disk that has room for the whole device may be as full as it likes."""
    limit = stats["disk_limit_bytes"]
    if limit == 0 or stats["disk_bytes"] < DISK_NEARLY_FULL * limit or _all_fits(stats, config):
        return None
    return Reason(
        DEGRADED,
        f"The disk is {100 * stats['disk_bytes'] // limit} % full of living pages.",
        "End something that uses memory; restart with a larger disk_size= (with memory=NAME the "
        "pages are kept).",
    )


def pool_full(stats: Stats, config: Config) -> Reason | None:
    """Frames whose pages are in RAM only: when they are all, the next page has to wait."""
    used, limit = stats["pers_pageframes"], stats["pool_limit_frames"]
    if stats["disk_limit_bytes"]:
        return _pool_full_above_disk(stats) if limit and used >= FULL * limit else None
    if limit == 0 or used < NEARLY_FULL * limit:
        return None
    percent, is_full = 100 * used // limit, used >= FULL * limit
    if _peers_take(stats, config):
        return _pool_full_above_peers() if is_full else None
    nowhere = "no peer takes pages" if has_peers(config) else "there is no lower tier"
    if not is_full:
        return Reason(
            DEGRADED,
            f"The pool is {percent} % full, and {nowhere}.",
            "End something that uses memory, or restart with a larger pool= before it is full.",
        )
    return Reason(
        CRITICAL,
        f"The pool is full ({percent} %) and {nowhere}: writes are being refused "
        f"with ENOSPC, the kernel keeps those pages in RAM.",
        "End something that uses memory, or add another swap device of lower priority now.",
    )


def _pool_full_above_disk(stats: Stats) -> Reason:
    if (
        stats["disk_degraded"]
        or stats["writeback_limit_reached"]
        or stats["disk_bytes"] >= DISK_NEARLY_FULL * stats["disk_limit_bytes"]
    ):
        return Reason(
            CRITICAL,
            "The pool is full and the disk takes no more pages: writes are being refused with "
            "ENOSPC, the kernel keeps those pages in RAM.",
            "End something that uses memory, or add another swap device of lower priority now.",
        )
    return Reason(
        DEGRADED,
        "The pool is full: pages come faster than the disk takes them, so writes wait.",
        "If it stays so, use a faster disk or a larger pool=; lower watermarks (set) make room "
        "earlier.",
    )


def _pool_full_above_peers() -> Reason:
    return Reason(
        DEGRADED,
        "The pool is full: pages come faster than the peers take them, so writes wait.",
        "If it stays so, name more peers= or use a larger pool=; lower watermarks (set) make room "
        "earlier.",
    )


def _peers_take(stats: Stats, config: Config) -> bool:
    """Whether pages can go to peers now."""
    enough = has_peers(config) and peers_missing(stats, config) is None
    return enough and stats["remote_room_bytes"] > 0


def writes_refused(stats: Stats, config: Config) -> Reason | None:
    """It has happened; the pages stayed in the kernel, nothing was lost."""
    if not (refused := stats["failed_stores"]):
        return None
    below = stats["disk_limit_bytes"] > 0
    return Reason(
        DEGRADED,
        f"{refused} page writes have been refused since the start because the pool was full"
        + (" and the disk took nothing in time." if below else "."),
        f"Restart with a larger {'disk_size=' if below else 'pool='} or a smaller size=, or add "
        f"swap of lower priority.",
    )


def pool_can_fill(stats: Stats, config: Config) -> Reason | None:
    """Pages that do not compress take a frame each, or its room below: all may be taken."""
    device, pool = stats["device_pages"], stats["pool_limit_frames"]
    if _all_fits(stats, config):
        return None
    if stats["disk_limit_bytes"]:
        safe = int(config.get("guaranteed", 0)) // PAGE_BYTES
        if stats["writeback_limit_bytes"]:
            return Reason(
                DEGRADED,
                f"The pool can fill when a day's writeback_limit is used up: {safe} of the "
                f"device's {device} pages are safe from refused writes then.",
                "Run 'zcache set writeback_limit=none', or choose a larger pool= or a smaller "
                "size=.",
            )
        return Reason(
            DEGRADED,
            f"Pool and disk can fill: {safe} of the device's {device} pages are safe from refused "
            f"writes whatever the data; with more in use that compresses badly, they may come.",
            "Choose a larger disk_size= (1.05 times size= and 16M), or keep swap of lower "
            "priority beside it.",
        )
    return Reason(
        DEGRADED,
        f"The pool can fill: {device} pages of device, {pool} frames of pool, "
        f"{'no disk (peers may be full or away)' if has_peers(config) else 'no lower tier'}. "
        f"{_when_refused(device, pool, config)}, writes will be refused.",
        "Give it a disk= of 1.05 times size= and 16M, keep swap of lower priority beside it, or "
        "choose size= nearer to pool=.",
    )


def _when_refused(device: int, pool: int, config: Config) -> str:
    best = PAGES_PER_FRAME.get(str(config.get("allocator")), 0)
    if best and device > best * pool:
        return f"With more than {best * pool} pages in use, or fewer that compress badly"
    return f"When pages compress worse than {device / pool:.1f} to 1"


def _all_fits(stats: Stats, config: Config) -> bool:
    """Whether no write can ever be refused, whatever the data; as it was said at the start."""
    guaranteed = int(config.get("guaranteed", stats["pool_limit_frames"] * PAGE_BYTES))
    return stats["device_pages"] * PAGE_BYTES <= guaranteed


def is_draining(stats: Stats, config: Config) -> Reason | None:
    """On purpose, but not to be forgotten."""
    if not stats["draining"]:
        return None
    return Reason(
        DEGRADED,
        "The pool is drained: every page goes to the disk, and is read from there.",
        "Run 'zcache drain --off' when RAM may be used again.",
    )


def memory_short(stats: Stats, config: Config) -> Reason | None:
    """The pool is held below its limit because the machine is, or was, short of memory."""
    target, limit = stats["pool_target_frames"], stats["pool_set_frames"]
    if not stats["memory_pressure"] and target >= limit:
        return None
    now = "short" if stats["memory_pressure"] else "no longer short"
    if stats["disk_limit_bytes"]:
        what = (
            f"Memory is {now} on this machine: {100 * target // max(1, limit)} % of the pool are "
            f"used for the time being, the rest goes to the disk."
        )
    else:
        what = (
            f"Memory is {now} on this machine; without a disk the pool can give back only "
            f"what it does not use."
        )
    return Reason(
        DEGRADED,
        what,
        "Nothing, if it passes: the pool grows again 10 s after. Else end something that uses "
        "memory, or choose a smaller pool= (set pool does it now).",
    )


def pool_shrinks(stats: Stats, config: Config) -> Reason | None:
    """`set pool` asked for less than what is there; it is given back as it becomes free."""
    now, wanted = stats["pool_limit_frames"], stats["pool_set_frames"]
    if now <= wanted:
        return None
    return Reason(
        DEGRADED,
        f"The pool is being made smaller: {now} frames now, {wanted} wanted.",
        "Wait. If it does not go on, see what keeps pages from the disk (the other reasons).",
    )


def memory_not_given(stats: Stats, config: Config) -> Reason | None:
    """The kernel refused memory to the pool although its limit is not reached."""
    if not (failures := stats["commit_failures"]):
        return None
    return Reason(
        DEGRADED,
        f"The kernel gave no memory to the pool {failures} times, below its limit.",
        "Choose a smaller pool=, or commit=all, which takes the memory at start or fails there.",
    )


def server_unfit(stats: Stats, config: Config) -> Reason | None:
    """What the kernel refused at start (`process.prepare`): locking, priority, OOM score."""
    if not (refused := list(config.get("refused", ()))):
        return None
    return Reason(
        DEGRADED,
        "The server runs without what swapping onto it needs: " + "; ".join(refused) + ".",
        "Start it as root, or grant CAP_IPC_LOCK, CAP_SYS_NICE and CAP_SYS_RESOURCE "
        "('zcache check' shows what is missing).",
    )


RULES: tuple[Rule, ...] = (
    pages_lost,
    copies_damaged,
    device_unmended,
    disk_copies_bad,
    peer_copies_bad,
    peers_missing,
    peers_twins,
    etcd_silent,
    peer_away,
    peers_short,
    certificate_ends,
    backup_missing,
    copies_mended,
    pool_full,
    disk_fails,
    disk_stalls,
    write_limit_reached,
    writes_refused,
    disk_nearly_full,
    memory_not_given,
    memory_short,
    pool_shrinks,
    server_unfit,
    pool_can_fill,
    is_draining,
)
