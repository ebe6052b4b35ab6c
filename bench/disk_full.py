"""What cleaning costs: bytes written for each byte of new pages while 80 % of the disk is alive.

    uniform   every page as likely as any other to be written again: the worst there is, because
              nothing that one could know says which segment will lose more
    skewed    a tenth of the pages gets nine tenths of the writes
    hog, ...  the writes and trims of a recorded trace (bench/swap_trace), of as many guests
              as fill the disk: 80 % is alive when they swap most, less before and after

A small pool, so that nearly every write goes down.  Amplification is all bytes written, cleaning
included, by those that new pages took; it is counted after everything was written over, or played,
once.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Mapping

from bench import swap_trace
from bench.disk import MIB, PAGE_BYTES, Rig, rig
from bench.report import Goal, Section
from bench.setup import Setup
from bench.swap_trace import Trace, most_pages

LIVE = 0.80
POOL_BYTES = 8 * MIB
DISK_BYTES = 512 * MIB
QUICK_BYTES = 32 * MIB
DISK_HEAD_BYTES = 2 * MIB
"""Room for what a disk keeps besides pages."""
PLAYED = 2
TRIES = 20

Choice = Callable[[random.Random, int], int]


def uniform(rng: random.Random, count: int) -> int:
    return int(rng.random() * count)


def skewed(rng: random.Random, count: int) -> int:
    """Which tenth is hot is scattered: by a multiplication modulo the count."""
    tenth = count // 10
    if rng.random() < 0.9:
        rank = int(rng.random() * tenth)
    else:
        rank = tenth + int(rng.random() * (count - tenth))
    return rank * 7919 % count


def amplification(setup: Setup, disk_bytes: int, choose: Choice) -> dict[str, float]:
    with rig(setup.folder, 8 * disk_bytes, POOL_BYTES, disk_bytes) as it:
        it.cooling.set_watermarks(90, 80)
        rng = random.Random(setup.plan.seed)
        count = fill_up(it, setup.pages, rng)
        write_over(it, setup.pages, rng, count, choose, count)
        before = it.counted()
        write_over(it, setup.pages, rng, count, choose, 3 * count // 2)
        return spent(before, it.counted()) | {"pages": count}


def spent(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    names = ("disk_written_bytes", "disk_cleaned_bytes", "disk_writes", "failed_stores")
    written, cleaned, writes, refused = (after[name] - before[name] for name in names)
    return {
        "amplification": written / (written - cleaned),
        "live": after["disk_live_bytes"] / after["disk_limit_bytes"],
        "bytes_a_write": written / max(1, writes),
        "of_pool": written - cleaned,
        "refused": refused,
        "bytes_a_page": after["disk_live_bytes"] / max(1, after["disk_pages"]),
    }


def played(setup: Setup, disk_bytes: int, bytes_a_page: float, trace: Trace) -> dict[str, float]:
    """As many guests that write the trace as keep LIVE of the disk alive at their most."""
    most = most_pages(trace)
    guests = max(1, int(disk_bytes * LIVE / bytes_a_page / most))
    stride = max(request.pages.stop for request in trace) * PAGE_BYTES
    disk_bytes = int(guests * most * bytes_a_page / LIVE) + DISK_HEAD_BYTES
    with rig(setup.folder, guests * stride, POOL_BYTES, disk_bytes) as it:
        it.cooling.set_watermarks(90, 80)
        rng = random.Random(setup.plan.seed)
        play(it, setup.pages, rng, trace, guests, stride)
        before = it.counted()
        for _ in range(PLAYED):
            play(it, setup.pages, rng, trace, guests, stride)
        return spent(before, it.counted()) | {"guests": guests}


def play(
    it: Rig, pages: memoryview, rng: random.Random, trace: Trace, guests: int, stride: int
) -> None:
    for request in trace:
        first, length = request.first * PAGE_BYTES, request.count * PAGE_BYTES
        for guest in range(guests):
            if request.op == "w":
                for at in range(first, first + length, PAGE_BYTES):
                    write_in_the_end(it, one_of(pages, rng), guest * stride + at)
            elif request.op == "t":
                it.device.trim(None, length, guest * stride + first, 0)


def fill_up(it: Rig, pages: memoryview, rng: random.Random) -> int:
    """Write pages, one after the other, until LIVE of the disk is alive; how many."""
    limit = it.counted()["disk_limit_bytes"] * LIVE
    count = 0
    while it.cell("disk_live_bytes") < limit:
        for _ in range(200):
            write_in_the_end(it, one_of(pages, rng), count * PAGE_BYTES)
            count += 1
    return count


def write_over(
    it: Rig, pages: memoryview, rng: random.Random, count: int, choose: Choice, times: int
) -> None:
    for _ in range(times):
        write_in_the_end(it, one_of(pages, rng), choose(rng, count) * PAGE_BYTES)


def write_in_the_end(it: Rig, page: memoryview, offset_bytes: int) -> None:
    """A write that waited in vain for a busy disk comes again, as a kernel's does."""
    for _ in range(TRIES):
        try:
            it.device.pwrite(None, page, offset_bytes, 0)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        else:
            return
    raise AssertionError(f"refused {TRIES} times")


def one_of(pages: memoryview, rng: random.Random) -> memoryview:
    at = int(rng.random() * (len(pages) // PAGE_BYTES)) * PAGE_BYTES
    return pages[at : at + PAGE_BYTES]


def add_row(section: Section, name: str, found: Mapping[str, float]) -> None:
    size = f"{found['bytes_a_write'] / 1024:.0f}"
    alive = f"{100 * found['live']:.1f} %"
    section.rows.append([name, f"{found['amplification']:.2f}", size, alive])


def measure(setup: Setup) -> Section:
    section = Section(
        "disk-full",
        "A disk that is 80 % alive",
        ["", "amplification", "KiB a write", "alive at the end"],
        raw={},
    )
    disk_bytes = QUICK_BYTES if len(setup.pages) < 32 * MIB else DISK_BYTES
    for name, choose in (("uniform", uniform), ("skewed", skewed)):
        found = amplification(setup, disk_bytes, choose)
        section.raw[name] = found
        add_row(section, name, found)
        if name == "uniform":
            section.goals.append(
                Goal("cleaning, uniform overwrites", found["amplification"], 2.7, True,
                     "bytes written, of new pages' bytes")
            )  # fmt: skip
            bytes_a_page = found["bytes_a_page"]
    for name in swap_trace.names():
        found = played(setup, disk_bytes, bytes_a_page, swap_trace.load(name))
        section.raw[name] = found
        add_row(section, f"{name}, {found['guests']:.0f} guests", found)
        section.goals.append(
            Goal(f"cleaning, trace of {name}", found["amplification"], 1.5, True,
                 "bytes written, of new pages' bytes")
        )  # fmt: skip
    section.notes.append(f"{disk_bytes // MIB} MiB of disk, a pool of {POOL_BYTES // MIB} MiB")
    return section
