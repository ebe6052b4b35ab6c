"""The disk tier, without nbdkit, against what the disk itself can do.

writeback   a full pool goes down: logical bytes a second, beside
            raw     each page decompressed and written alone, 4 KiB after 4 KiB, as zram writes back
            plain   a sequential O_DIRECT write of as many bytes as writeback wrote, 1 MiB at a time
reads       one page that lies on the disk only, beside a bare O_DIRECT pread of the same blocks
company     4 KiB requests to RAM while writeback runs, beside the same without it
give back   from a full pool to an empty one: frames are the system's again

All sides run in turn in every round, on files in the same folder.  What writing costs
when the disk is nearly full is measured by disk_full.py.
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.report import Goal, Section, figure
from bench.setup import Setup
from zcache_core import counters
from zcache_core.codec import Codec
from zcache_core.counters import CELL, CELLS
from zcache_core.device import Device
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store
from zcache_core.tiers import Cooling

MIB = 1 << 20
PAGE_BYTES = 4096
REQUEST_BYTES = 128 << 10
RAW_PAGES = 1000
READS = 1500
HOT_PAGES = 500
LIMIT_S = 60.0
RESERVE_FRAMES = 3072
"""Frames that a small pool keeps committed ahead of use, with some to spare."""


class Rig:
    """A store over a disk file of its own; nothing goes down until it is told to."""

    def __init__(
        self, folder: Path, size_bytes: int, pool_bytes: int, disk_bytes: int, encrypt: bool = False
    ) -> None:
        self.path = folder / "disk"
        self.path.unlink(missing_ok=True)
        self.fd = open_direct(self.path)
        os.ftruncate(self.fd, disk_bytes)
        self.memory = MemoryFile.create(None, size_bytes, pool_bytes)
        self.store = Store(self.memory)
        self.cooling = Cooling(self.store, self.fd, disk_bytes, False, 100, 100, encrypt)
        self.store.start()
        self.cooling.start()
        self.device = Device(self.store)

    def close(self) -> None:
        self.cooling.stop()
        self.store.stop()
        self.memory.close()
        os.close(self.fd)
        self.path.unlink()

    def fill(self, pages: memoryview, size_bytes: int) -> None:
        """Write the corpus over the first size_bytes of the device, again and again."""
        for offset in range(0, size_bytes, REQUEST_BYTES):
            at = offset % len(pages)
            self.device.pwrite(None, pages[at : at + REQUEST_BYTES], offset, 0)

    def go_down(self, on: bool = True) -> None:
        """Everything that is only in RAM goes to the disk, or nothing any more."""
        self.cooling.set_watermarks(*((1, 1) if on else (100, 100)))
        self.cooling.drain(False)  # wakes the cooling thread

    def cell(self, name: str) -> int:
        """One counter, without the others."""
        cells = memoryview(self.memory.counter_cells()).cast("Q")
        return sum(cells[CELL[name] :: CELLS]) & (1 << 64) - 1

    def wait(self, done: Callable[[], bool]) -> None:
        end_s = time.monotonic() + LIMIT_S
        while not done():
            if time.monotonic() > end_s:
                raise AssertionError("the cooling thread does not come to an end")
            time.sleep(0.001)

    def is_down(self) -> bool:
        """At the low watermark of 1 %."""
        return self.cell("pers_pageframes") * 100 <= self.cell("pool_limit_frames")

    def counted(self) -> dict[str, int]:
        return counters.read(self.memory)


@contextmanager
def rig(
    folder: Path, size_bytes: int, pool_bytes: int, disk_bytes: int, encrypt: bool = False
) -> Iterator[Rig]:
    made = Rig(folder, size_bytes, pool_bytes, disk_bytes, encrypt)
    try:
        yield made
    finally:
        made.close()


def open_direct(path: Path) -> int:
    """A new file, O_DIRECT where the file system has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(path, flags, 0o600)


def aligned(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes))


# ---- writeback ---------------------------------------------------------------------------


def plain_bytes_per_s(folder: Path, size_bytes: int) -> float:
    """Sequential writes of 1 MiB into a new file."""
    block = aligned(MIB)
    block[:] = os.urandom(MIB)
    path = folder / "plain"
    fd = open_direct(path)
    os.ftruncate(fd, size_bytes)
    start_s = time.perf_counter()
    for offset in range(0, size_bytes, MIB):
        os.pwrite(fd, block[: min(MIB, size_bytes - offset)], offset)
    spent_s = time.perf_counter() - start_s
    os.close(fd)
    path.unlink()
    return size_bytes / spent_s


def raw_bytes_per_s(folder: Path, pages: memoryview) -> float:
    """Pages decompressed and written one by one; what Python adds (about 3 us a page) is in it."""
    codec = Codec()
    blobs = []
    for at in range(0, len(pages), PAGE_BYTES):
        blob = codec.compress(bytes(pages[at : at + PAGE_BYTES]))
        if blob is not None:
            blobs.append(blob)
    block = aligned(PAGE_BYTES)
    path = folder / "raw"
    fd = open_direct(path)
    os.ftruncate(fd, len(blobs) * PAGE_BYTES)
    start_s = time.perf_counter()
    for number, blob in enumerate(blobs):
        block[:] = codec.decompress(blob)
        os.pwrite(fd, block, number * PAGE_BYTES)
    spent_s = time.perf_counter() - start_s
    os.close(fd)
    path.unlink()
    return len(blobs) * PAGE_BYTES / spent_s


def writeback(setup: Setup, size_bytes: int, encrypt: bool) -> dict[str, float]:
    """One round: bytes a second, and bytes written for each compressed byte."""
    with rig(setup.folder, size_bytes, size_bytes, size_bytes + 64 * MIB, encrypt) as it:
        it.fill(setup.pages, size_bytes)
        before = it.counted()
        start_s = time.perf_counter()
        it.go_down()
        it.wait(it.is_down)
        spent_s = time.perf_counter() - start_s
        after = it.counted()
    left = {name: after[name] - before[name] for name in after}
    return {
        "logical": left["written_back_pages"] * PAGE_BYTES / spent_s,
        "physical": left["disk_written_bytes"] / spent_s,
        "written": left["disk_written_bytes"],
        "per_byte": left["disk_written_bytes"] / -left["pers_zbytes"],
    }


def measure_writeback(setup: Setup, size_bytes: int, section: Section) -> None:
    found: dict[str, list[float]] = {}
    pages = setup.pages[: RAW_PAGES * PAGE_BYTES]
    for _ in range(setup.plan.rounds):
        ours = writeback(setup, size_bytes, False)
        sealed = writeback(setup, size_bytes, True)
        plain = plain_bytes_per_s(setup.folder, int(ours["written"]) // PAGE_BYTES * PAGE_BYTES)
        raw = raw_bytes_per_s(setup.folder, pages)
        for name, value in (
            ("logical", ours["logical"]), ("physical", ours["physical"]), ("plain", plain),
            ("raw", raw), ("sealed", sealed["logical"]), ("per_byte", ours["per_byte"]),
            ("of raw", ours["logical"] / raw), ("of plain", ours["logical"] / plain),
            ("physical of plain", ours["physical"] / plain),
            ("sealed of ours", sealed["logical"] / ours["logical"]),
        ):  # fmt: skip
            found.setdefault(name, []).append(value)
    middle = {name: statistics.median(values) for name, values in found.items()}
    section.raw["writeback"] = found
    for label, name in (
        ("writeback, logical", "logical"), ("writeback, as written", "physical"),
        ("writeback with encrypt=yes, logical", "sealed"),
        ("raw: page after page, decompressed", "raw"), ("plain: sequential, 1 MiB", "plain"),
    ):  # fmt: skip
        section.rows.append([label, f"{middle[name] / MIB:.0f} MiB/s"])
    section.rows.append(["encrypted / plain text, speed", f"{middle['sealed of ours']:.2f}"])
    section.rows.append(["as written / plain, speed", f"{middle['physical of plain']:.2f}"])
    section.goals += [
        Goal("writeback", middle["of raw"], 2, False, "logical bytes/s, of raw 4 KiB writeback"),
        Goal(
            "writeback", middle["of plain"], 1, False, "logical bytes/s, of a plain O_DIRECT write"
        ),
        Goal("writeback", middle["per_byte"], 1.1, True, "bytes written per compressed byte"),
    ]


# ---- reads ----------------------------------------------------------------------------------


def measure_reads(setup: Setup, size_bytes: int, section: Section) -> None:
    """Each page once, in random order; store and bare pread in turn, on pages of their own."""
    ours: list[float] = []
    bare: list[float] = []
    with rig(setup.folder, size_bytes, size_bytes, size_bytes + 64 * MIB) as it:
        it.fill(setup.pages, size_bytes)
        it.cooling.drain()
        it.wait(lambda: it.cell("pers_zpages") + it.cell("eph_zpages") == 0)
        it.cooling.drain(False)
        places = [(page, it.store.entry(page)) for page in range(size_bytes // PAGE_BYTES)]
        below = [(page, location) for page, (location, word) in places if word & 0xF == 4]
        random.Random(setup.plan.seed).shuffle(below)
        data, block = bytearray(PAGE_BYTES), aligned(4 * PAGE_BYTES)
        clock, read = time.perf_counter, it.device.pread
        for (page, _), (_, location) in zip(
            below[: 2 * READS : 2], below[1 : 2 * READS : 2], strict=False
        ):
            start_s = clock()
            read(None, data, page * PAGE_BYTES, 0)
            ours.append(clock() - start_s)
            start, end = _blocks(location)
            start_s = clock()
            os.preadv(it.fd, [block[: end - start]], start)
            bare.append(clock() - start_s)
    section.raw["reads"] = {"ours_s": ours, "bare_s": bare}
    medians = statistics.median(ours), statistics.median(bare)
    for label, value in zip(("read of a page on the disk", "bare pread"), medians, strict=True):
        section.rows.append([f"{label}, median", f"{figure(1e6 * value)} us"])
    ratio = medians[0] / medians[1]
    section.goals.append(Goal("read from disk", ratio, 1.3, True, "median, of a bare pread's"))


def _blocks(location: int) -> tuple[int, int]:
    """Byte range of the blocks around an object."""
    where, length = location >> 16 & ~7, (location >> 4 & 0xFFF) + 1
    return where // 4096 * 4096, (where + 24 + length + 4095) // 4096 * 4096


# ---- company ----------------------------------------------------------------------------------


def latencies_s(it: Rig, pages: memoryview, go_on: Callable[[int], bool]) -> dict[str, list[float]]:
    """4 KiB writes and reads of hot pages, in turn."""
    found: dict[str, list[float]] = {"write": [], "read": []}
    data = bytearray(PAGE_BYTES)
    clock, read, write = time.perf_counter, it.device.pread, it.device.pwrite
    number = 0
    while go_on(number):
        for _ in range(100):
            at = number % HOT_PAGES * PAGE_BYTES
            start_s = clock()
            write(None, pages[at : at + PAGE_BYTES], at, 0)
            middle_s = clock()
            read(None, data, at, 0)
            found["read"].append(clock() - middle_s)
            found["write"].append(middle_s - start_s)
            number += 1
    return found


def measure_company(setup: Setup, size_bytes: int, section: Section) -> None:
    found: dict[str, list[float]] = {}
    for _ in range(setup.plan.rounds):
        with rig(setup.folder, size_bytes, size_bytes, size_bytes + 64 * MIB) as it:
            it.fill(setup.pages, size_bytes)
            latencies_s(it, setup.pages, lambda n: n < HOT_PAGES)
            it.go_down()
            busy = latencies_s(it, setup.pages, lambda n: not it.is_down())
            it.go_down(False)
            count = len(busy["read"])
            alone = latencies_s(it, setup.pages, lambda n, count=count: n < count)  # type: ignore[misc]
        for kind in ("write", "read"):
            p99 = [statistics.quantiles(side[kind], n=100)[98] for side in (busy, alone)]
            p50 = [statistics.median(side[kind]) for side in (busy, alone)]
            for name, value in (
                (f"{kind} p99 busy", p99[0]), (f"{kind} p99", p99[1]),
                (f"{kind} median busy", p50[0]), (f"{kind} median", p50[1]),
                (f"{kind} p99 ratio", p99[0] / p99[1]), (f"{kind} median ratio", p50[0] / p50[1]),
            ):  # fmt: skip
                found.setdefault(name, []).append(value)
    middle = {name: statistics.median(values) for name, values in found.items()}
    section.raw["company"] = found
    for kind in ("write", "read"):
        for part in ("median", "p99"):
            quiet_s, busy_s = middle[f"{kind} {part}"], middle[f"{kind} {part} busy"]
            text = f"{figure(1e6 * quiet_s)} / {figure(1e6 * busy_s)} us"
            section.rows.append([f"4 KiB {kind}, {part}: without / with writeback", text])
    section.goals += [
        Goal("write beside writeback", middle["write p99 ratio"], 2, True, "p99, of that without"),
        Goal("read beside writeback", middle["read median ratio"], 1.1, True,
             "median of pages in RAM, of that without"),
    ]  # fmt: skip


# ---- give back ----------------------------------------------------------------------------------


def measure_giving_back(setup: Setup, size_bytes: int, section: Section) -> None:
    spent: list[float] = []
    for _ in range(setup.plan.rounds):
        with rig(setup.folder, size_bytes, size_bytes, size_bytes + 64 * MIB) as it:
            it.fill(setup.pages, size_bytes)
            held = it.cell("committed_frames")
            start_s = time.perf_counter()
            it.cooling.drain()
            left = held // 8 + RESERVE_FRAMES
            it.wait(lambda left=left: it.cell("committed_frames") < left)  # type: ignore[misc]
            given = held - it.cell("committed_frames")
            spent.append((time.perf_counter() - start_s) / (given * PAGE_BYTES) * 2**30)
    section.raw["give back"] = spent
    section.rows.append(
        ["1 GiB of pool given back to the system", f"{statistics.median(spent):.2f} s"]
    )


def measure(setup: Setup) -> Section:
    raw: dict[str, Any] = {}
    section = Section("disk", "Disk tier, without nbdkit", ["", "measured"], raw=raw)
    size_bytes = max(64 * MIB, min(256 * MIB, 4 * len(setup.pages)))
    measure_writeback(setup, size_bytes, section)
    measure_reads(setup, size_bytes, section)
    measure_company(setup, size_bytes, section)
    measure_giving_back(setup, size_bytes, section)
    section.notes.append(f"{size_bytes >> 20} MiB of pages in the temporary folder's file system")
    return section
