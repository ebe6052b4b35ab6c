"""Which pages should leave RAM?  zcache's choice against others', on recorded swap traces.

    LRU, CLOCK, SIEVE, 2Q     the rules as published, pages one by one (bench/cache_rules)
    LRU second, ...           the same, but a page read from below comes in at its second read
                              only, as in zcache: so only the choice of victims differs
    clairvoyant               knows what is read next: the least that any rule can reach
    zcache                    the store itself with its cooling thread and a real disk file

All are given the same RAM: so many frames, two pages in each.  zcache keeps some of it free
for the next writes, moves whole frames, and is as late as its thread is; the others are not.
What counts is pages read from below of all pages read that had been written before.  The
traces (bench/swap_trace) are replayed as fast as they can be, so zcache's figure moves a
little from run to run: the median of three.

It is no measurement of time, and it does not depend on how busy the machine is.
"""

from __future__ import annotations

import random
import statistics
from contextlib import closing
from pathlib import Path

from bench import swap_trace
from bench.cache_rules import RULES, misses_of, misses_of_clairvoyant, reads_of
from bench.report import Goal, Section
from bench.setup import Setup
from bench.swap_trace import PAGE_BYTES, Trace, most_pages
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.diskfile import open_disk, promised_bytes
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store
from zcache_core.tiers import Cooling

SHARES = (0.5, 0.25)
"""RAM, of the most pages that were stored at once."""
PAGES_PER_FRAME = 2
NOISE_BYTES = 1500
"""Of each page; it fills half a frame, and no more fit."""
WITH_DOORMAN = ("LRU", "CLOCK", "SIEVE")
"""Rules without a way of their own to keep out what is read once."""
REPLAYS = 3
POOL_LEAST_FRAMES = 256
MOST = 1.0


def measure(setup: Setup) -> Section:
    seconds = [f"{rule} second" for rule in WITH_DOORMAN]
    head = ["trace, RAM", "reads", *RULES, *seconds, "zcache", "clairvoyant"]
    section = Section("policy", "Pages read from below, of those read", head)
    raw = {}
    for name in swap_trace.names():
        trace = swap_trace.load(name)
        reads = reads_of(trace)
        for share in SHARES:
            frames = max(POOL_LEAST_FRAMES, int(most_pages(trace) * share) // PAGES_PER_FRAME)
            capacity = frames * PAGES_PER_FRAME
            misses = {rule: misses_of(make(capacity), trace) for rule, make in RULES.items()}
            for rule in WITH_DOORMAN:
                found = misses_of(RULES[rule](capacity), trace, window=capacity)
                misses[f"{rule} second"] = found
            best = min(misses.values())
            ours = [replay(trace, frames, setup.folder) for _ in range(REPLAYS)]
            misses["zcache"] = int(statistics.median(ours))
            misses["clairvoyant"] = misses_of_clairvoyant(capacity, trace)
            row = f"{name}, {share:.0%}"
            section.rows.append([row, str(reads), *(f"{n / reads:.3f}" for n in misses.values())])
            bound = Goal(
                row, misses["zcache"] / best, MOST, True, "reads from below, of the best's"
            )
            section.goals.append(bound)
            raw[row] = {"frames": frames, "reads": reads, "zcache": ours, **misses}
    section.notes = ["RAM: of the most pages stored at once; reads: pages written before"]
    section.raw = raw
    return section


def replay(trace: Trace, frames: int, folder: Path) -> int:
    """Pages that a store of so many frames reads from its disk."""
    pages = max(request.pages.stop for request in trace)
    path = folder / "policy-disk"
    path.unlink(missing_ok=True)
    memory = MemoryFile.create(None, pages * PAGE_BYTES, frames * PAGE_BYTES)
    disk = open_disk(str(path), promised_bytes(pages * PAGE_BYTES))
    with closing(memory), closing(disk):
        disk.take(memory.epoch, memory.device_bytes)
        store = Store(memory)
        cooling = Cooling(store, disk.fd, disk.disk_bytes, disk.preallocated)
        store.start()
        cooling.start()
        try:
            ask(Device(store), trace)
            return counters.read(memory)["cold_loads"]
        finally:
            cooling.stop()
            store.stop()


def ask(device: Device, trace: Trace) -> None:
    """The requests of the trace, one after the other."""
    noise = random.Random(1).randbytes(NOISE_BYTES)
    most = max(request.count for request in trace if request.op != "t")
    content = (noise + bytes(PAGE_BYTES - NOISE_BYTES)) * most
    data = bytearray(len(content))
    for request in trace:
        offset, length = request.first * PAGE_BYTES, request.count * PAGE_BYTES
        if request.op == "w":
            device.pwrite(None, memoryview(content)[:length], offset, 0)
        elif request.op == "r":
            device.pread(None, memoryview(data)[:length], offset, 0)
        else:
            device.trim(None, min(length, device.size_bytes - offset), offset, 0)
