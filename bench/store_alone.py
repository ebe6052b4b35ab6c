"""The store without nbdkit: requests of 128 KiB into the compiled Device, against a bare loop.

    bare    compress (decompress) page after page, nothing else
    store   Device.pwrite (pread): the same pages, and checksum, allocation, copy, index, counters

One thread, then two threads that each have pages of their own.  `put` finds the range empty,
`overwrite` frees the old page each time.  All of it is done with one MiB before the next one, so
that a ratio compares what stands milliseconds apart, and whoever interrupts it spoils few of them.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bench.report import Goal, Section, figure
from bench.setup import Setup
from zcache_core.codec import Codec
from zcache_core.device import Device
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

PAGE_BYTES = 4096
REQUEST_BYTES = 128 << 10
PART_BYTES = 1 << 20
PARTS = 32
REPEATS = 16
"""Of the decompressing sides in one measurement.  The bare loop compresses its pages first, under
the GIL, so that two of them start 1.3 ms apart: they have to run for longer than that."""

Work = Callable[[], float]


class Part:
    """What one thread works on: its pages, its range of the device, a codec of its own."""

    def __init__(
        self,
        device: Device,
        pages: memoryview,
        start_bytes: int,
        request_bytes: int = REQUEST_BYTES,
    ) -> None:
        self._device = device
        self._pages = pages
        self._codec = Codec()
        self._start_bytes = start_bytes
        spots = range(0, len(pages), request_bytes)
        self._out = [(start_bytes + n, pages[n : n + request_bytes]) for n in spots]
        room = memoryview(bytearray(len(pages)))
        self._in = [(start_bytes + n, room[n : n + request_bytes]) for n in spots]
        self._room = room

    def put(self) -> float:
        write = self._device.pwrite
        start_s = time.perf_counter()
        for offset, piece in self._out:
            write(None, piece, offset, 0)
        return time.perf_counter() - start_s

    def get(self) -> float:
        read = self._device.pread
        start_s = time.perf_counter()
        for _ in range(REPEATS):
            for offset, piece in self._in:
                read(None, piece, offset, 0)
        return (time.perf_counter() - start_s) / REPEATS

    def compress(self) -> float:
        return self._codec.time_compress(self._pages)

    def decompress(self) -> float:
        return self._codec.time_decompress(self._pages, REPEATS) / REPEATS

    def forget(self) -> None:
        self._device.trim(None, len(self._pages), self._start_bytes, 0)

    def came_back(self) -> bool:
        return self._room == self._pages


def at_once(work: Sequence[Work]) -> float:
    """Each of the work in a thread; seconds for one of them at the speed of all together."""
    if len(work) == 1:
        return work[0]()
    spent = [0.0] * len(work)
    gate = threading.Barrier(len(work))

    def run(number: int) -> None:
        gate.wait()
        spent[number] = work[number]()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1 / sum(1 / seconds for seconds in spent)


@contextmanager
def device(
    size_bytes: int, pool_bytes: int, codec: str = "lz4", allocator: str = "zbud", tidy: bool = True
) -> Iterator[tuple[Device, Store]]:
    """A Device over a private memory file of its own."""
    memory = MemoryFile.create(None, size_bytes, pool_bytes)
    store = Store(memory, allocator=allocator, codec=codec, tidy=tidy)
    store.start()
    try:
        yield Device(store), store
    finally:
        store.stop()
        memory.close()


def measure(setup: Setup) -> Section:
    head = ["", "bare loop", "store", "ratio", "middle half of the ratios"]
    section = Section("store", "Store alone, 128 KiB requests: us per page", head)
    count = min(PARTS, len(setup.pages) // PART_BYTES)
    spent: dict[tuple[int, str], list[float]] = {}
    with device(256 << 20, 128 << 20) as (target, _):
        spots = range(0, count * PART_BYTES, PART_BYTES)
        parts = [Part(target, setup.pages[at : at + PART_BYTES], at) for at in spots]
        for part in parts:  # warm: frames committed, buffers touched
            part.put()
            part.get()
        for _ in range(setup.plan.rounds):
            for first, second in zip(parts[::2], parts[1::2], strict=False):
                for threads in (1, 2):
                    for name, seconds in _one_round([first, second][:threads]).items():
                        spent.setdefault((threads, name), []).append(seconds)
        if not all(part.came_back() for part in parts):
            raise AssertionError("the store gave other bytes than it was given")
    pages = PART_BYTES // PAGE_BYTES
    for threads, least in ((1, 0.85), (2, 0.90)):
        for name, bare in (("put", "compress"), ("overwrite", "compress"), ("get", "decompress")):
            sides = spent[threads, bare], spent[threads, name]
            ratios = [alone / stored for alone, stored in zip(*sides, strict=True)]
            label = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            times = [figure(1e6 * statistics.median(side) / pages) for side in sides]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            section.rows.append([label, *times, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"])
            if name != "overwrite":
                text = f"speed, of {threads} bare {bare} loop{'s' if threads > 1 else ''}"
                section.goals.append(Goal(f"store {label}", ratio, least, False, text))
    section.raw = {f"{name}, {threads}": times for (threads, name), times in spent.items()}
    section.notes.append("time of all threads together; ratio: of the speeds, median over all MiB")
    return section


def _one_round(parts: Sequence[Part]) -> dict[str, float]:
    """Seconds per `part`, of all threads together."""
    spent = {"compress": at_once([part.compress for part in parts])}
    for part in parts:
        part.forget()
    spent["put"] = at_once([part.put for part in parts])
    spent["overwrite"] = at_once([part.put for part in parts])
    spent["decompress"] = at_once([part.decompress for part in parts])
    spent["get"] = at_once([part.get for part in parts])
    return spent
