"""What denser pages cost those who use them: other requests meanwhile, and who reads one.

    recompression   MiBs read and overwritten while others are recompressed / without, in turns
    compaction      the same while frames are emptied / while that rests, in turns
    one page        read at random from three stores with the same pages, one after the other: LZ4,
                    zstd, and recompressed with a dictionary

Both have work left at the end of each round, and did some in each turn: it is checked.
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import ExitStack

from bench.store_alone import PART_BYTES, Part, device
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.store import Store

MIB = 1 << 20
PAGE_BYTES = 4096
PARTS = 32
SLICE = 8
REQUEST_BYTES = 128 << 10
READ_MIB = 64
READS = 40_000
FREED_SHARE = 0.6


def fill(target: Device, data: memoryview) -> None:
    for at in range(0, len(data), REQUEST_BYTES):
        target.pwrite(None, data[at : at + REQUEST_BYTES], at, 0)


def now(store: Store, counter: str) -> int:
    return counters.read(store.memory)[counter]


def turn(parts: list[Part]) -> float:
    return sum(part.put() + part.get() for part in parts)


def beside_recompression(data: memoryview, rounds: int) -> list[float]:
    """Speed of foreground requests while others are recompressed, of their speed without.

    Four ratios a round, in turns: with, without, without, with.  More pages are cold than the
    thread gets done meanwhile.
    """
    half = min(len(data) // 2 // MIB, 4 * PARTS) * MIB
    ratios = []
    with device(2 * half, 2 * half, allocator="zsmalloc") as (target, store):
        parts = [Part(target, data[at : at + PART_BYTES], at) for at in range(0, PARTS * MIB, MIB)]
        for _ in range(rounds):
            fill(target, data[: 2 * half])
            store.set_recompress("zstd", 1)
            done = now(store, "recompressed_pages")
            while now(store, "recompressed_pages") == done:
                time.sleep(0.05)
            done = now(store, "recompressed_pages")
            for _ in range(4):
                spent = {False: 0.0, True: 0.0}
                for paused in (False, True, True, False):
                    store.pause_background(paused)
                    time.sleep(0.02)
                    spent[paused] += turn(parts)
                ratios.append(spent[True] / spent[False])
            store.pause_background(False)
            assert now(store, "recompressed_pages") > done, "it did nothing"
            done = now(store, "recompressed_pages")
            while now(store, "recompressed_pages") == done:  # it has something left to do
                time.sleep(0.05)
            store.set_recompress("none", 1)
    return ratios


def beside_compaction(data: memoryview, rounds: int) -> tuple[list[float], list[int]]:
    """Speed of foreground requests while frames are emptied, of their speed without; pages moved.

    A ratio for each SLICE of parts, in turns: with, without, without, with.  There is more to move
    than the thread gets done meanwhile.
    """
    half = min(len(data) // 2 // MIB, 4 * PARTS) * MIB
    ratios, moved = [], []
    cold = range(PARTS * MIB, 2 * half, PAGE_BYTES)
    spots = range(0, PARTS * MIB, MIB)
    for number in range(rounds):
        gone = random.Random(number).sample(cold, int(FREED_SHARE * len(cold)))
        with device(2 * half, 2 * half, allocator="zsmalloc") as (target, store):
            parts = [Part(target, data[at : at + PART_BYTES], at) for at in spots]
            fill(target, data[: 2 * half])
            store.pause_background()
            for at in gone:
                target.trim(None, PAGE_BYTES, at, 0)
            turn(parts)
            begun = now(store, "moved_pages")
            for first in [*range(0, PARTS, SLICE)] * 2:
                spent = {False: 0.0, True: 0.0}
                for paused in (False, True, True, False):
                    store.pause_background(paused)
                    time.sleep(0.003)
                    start = now(store, "moved_pages")
                    spent[paused] += turn(parts[first : first + SLICE])
                    assert not paused or now(store, "moved_pages") == start
                ratios.append(spent[True] / spent[False])
            moved.append(now(store, "moved_pages") - begun)
            begun = now(store, "moved_pages")
            store.compact()
            assert now(store, "moved_pages") > begun, "there was not enough to do"
    return ratios, moved


def reads(data: memoryview) -> dict[str, dict[str, float]]:
    """Microseconds of a read of one page, median and 99th percentile, by how the pages are kept."""
    data = data[: READ_MIB * MIB]
    order = random.Random(2)
    room = memoryview(bytearray(PAGE_BYTES))
    spent: dict[str, list[int]] = {"lz4": [], "zstd": [], "recompressed": []}
    with ExitStack() as stack:
        sides = {}
        for name in spent:
            codec = "zstd" if name == "zstd" else "lz4"
            target, store = stack.enter_context(
                device(len(data), len(data), codec=codec, allocator="zsmalloc", tidy=False)
            )
            fill(target, data)
            if name == "recompressed":
                store.recompress("zstd")
                assert now(store, "dictionaries") == 1
            sides[name] = target.pread
        for _ in range(READS):
            at = order.randrange(len(data) // PAGE_BYTES) * PAGE_BYTES
            for name, read in sides.items():
                start_ns = time.perf_counter_ns()
                read(None, room, at, 0)
                spent[name].append(time.perf_counter_ns() - start_ns)
    return {
        name: {
            "p50": statistics.median(each) / 1e3,
            "p99": statistics.quantiles(each, n=100)[98] / 1e3,
        }
        for name, each in spent.items()
    }
