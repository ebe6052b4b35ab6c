"""The device: byte ranges against a bytearray, and requests that overlap in time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core_helpers import PAGE, make_page, opened_store
from tests.plugin_helpers import wait_for
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

MAY_TRIM = 1


def test_ranges_against_a_bytearray(rng: random.Random) -> None:
    size = 64 * PAGE
    with opened_store(size, 4 * size) as store:
        device, model = Device(store), bytearray(size)
        for _ in range(4000):
            offset = rng.randrange(size)
            length = rng.randrange(min(5 * PAGE, size - offset) + 1)
            what = rng.randrange(5)
            if what == 0:
                data = (make_page(rng) * 6)[:length]
                device.pwrite(None, data, offset)
                model[offset : offset + length] = data
            elif what == 1:
                device.zero(None, length, offset, rng.choice([0, MAY_TRIM]))
                model[offset : offset + length] = bytes(length)
            elif what == 2:
                device.trim(None, length, offset)
                first, end = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
                if first < end:
                    model[first:end] = bytes(end - first)
            else:
                got = bytearray(length)
                device.pread(None, memoryview(got), offset, 0)
                assert got == model[offset : offset + length]
        assert store.check() == 0


@pytest.mark.parametrize("big", ["write", "zero"])
def test_a_long_write_is_not_undone_by_a_short_one(big: str) -> None:
    """512 bytes written into the last page while 16 MiB fly: both are there afterwards."""
    pages = 4096
    with opened_store(pages * PAGE, 64 << 20) as store:
        device = Device(store)
        noise = random.Random(1).randbytes(2048)
        old, new = b"o" * 2048 + noise, b"N" * 2048 + noise[::-1]
        for turn in range(12):
            device.pwrite(None, old * pages, 0)
            flying = threading.Thread(
                target=lambda: (
                    device.pwrite(None, new * pages, 0)
                    if big == "write"
                    else device.zero(None, pages * PAGE, 0, MAY_TRIM)
                )
            )
            flying.start()
            time.sleep(0.0003 * turn)
            device.pwrite(None, b"P" * 512, (pages - 1) * PAGE)
            flying.join()
            assert store.get(pages - 1)[512:] == (new if big == "write" else bytes(PAGE))[512:]
        assert store.check() == 0


def test_partial_writes_to_one_page_from_many_threads() -> None:
    """Eight threads own 512 bytes each of the same pages; nobody's last word is lost."""
    with opened_store(4 * PAGE, 64 * PAGE) as store:
        device = Device(store)

        def work(sector: int) -> None:
            for turn in range(1, 801):
                where = turn % 4 * PAGE + sector * 512
                device.pwrite(None, bytes([turn % 251, sector]) * 256, where)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for page in range(4):
            last = max(turn for turn in range(1, 801) if turn % 4 == page)
            assert store.get(page) == b"".join(bytes([last % 251, n]) * 256 for n in range(8))
        assert store.check() == 0


def test_a_writer_that_waits_does_not_stop_the_one_it_waits_for() -> None:
    """The committer, about to punch, waits for requests; a writer waits for the committer."""
    pool = 128 << 20
    noise = random.Random(1).randbytes(16 << 20)
    with opened_store(pool, pool) as store:
        device = Device(store)
        for _ in range(5):
            for i in range(4):
                device.pwrite(None, noise, i * len(noise))
            device.trim(None, 4 * len(noise), 0)
            device.pwrite(None, noise, 0)  # at once: most frames are on their way back
            device.trim(None, len(noise), 0)
        assert counters.read(store.memory)["failed_stores"] == 0


def resident_bytes(shmid: int) -> int:
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()]
    at = rows[0].index("rss")
    return next(int(row[at]) for row in rows[1:] if row[1] == str(shmid))


def test_memory_is_committed_ahead_and_given_back() -> None:
    """What the kernel says, not our counters: index and reserve at start, the rest as used."""
    pool = 64 << 20
    with opened_store(pool, pool) as store:
        device, shmid = Device(store), store.memory.shmid
        at_start = resident_bytes(shmid)
        assert store.memory.overhead_bytes + (4 << 20) <= at_start < 8 << 20
        noise = random.Random(1).randbytes(32 << 20)
        device.pwrite(None, noise, 0)
        assert resident_bytes(shmid) >= at_start - (4 << 20) + len(noise)
        device.trim(None, len(noise), 0)
        deadline = time.monotonic() + 30
        while resident_bytes(shmid) > at_start + (8 << 20) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident_bytes(shmid) <= at_start + (8 << 20)


def test_commit_all_commits_all() -> None:
    memory = MemoryFile.create(None, 16 << 20, 16 << 20)
    store = Store(memory, commit="all")
    store.start()
    assert resident_bytes(memory.shmid) >= 16 << 20
    store.stop()
    memory.close()


LOCKED_AND_REALTIME = """
import os, sys, time
from zcache_core import process
from zcache_core.device import Device
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store
process.prepare()
memory = MemoryFile.create(None, 64 << 20, 64 << 20)
store = Store(memory)
store.start()
device = Device(store)
device.pwrite(None, os.urandom(32 << 20), 0)
device.trim(None, 32 << 20, 0)
def resident():
    rows = [line.split() for line in open("/proc/sysvipc/shm")]
    return next(int(r[rows[0].index("rss")]) for r in rows[1:] if r[1] == str(memory.shmid))
end = time.monotonic() + 30
while resident() >= 16 << 20 and time.monotonic() < end:
    time.sleep(0.01)
print(resident())
for task in os.listdir("/proc/self/task"):
    name = open(f"/proc/self/task/{task}/comm").read().strip()
    print("thread", int(task) == os.getpid(), os.sched_getscheduler(int(task)), name)
store.stop()
"""


def test_a_locked_process_still_gives_memory_back() -> None:
    """mlockall would forbid punching; and the core's own threads stay of the ordinary class,

    but for the crew, which a serving thread may wait for.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOCKED_AND_REALTIME], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    resident, *threads = done.stdout.split("\n")
    assert int(resident) < 16 << 20
    parts = [line.split() for line in threads if line]
    serving = {part[2] for part in parts if part[1] == "True" or part[3] == "zc-crew"}
    others = {part[2] for part in parts if part[1] == "False" and part[3] != "zc-crew"}
    assert others == {str(os.SCHED_OTHER)}
    assert len(serving) == 1


def test_every_codec_is_read_after_a_takeover(rng: random.Random) -> None:
    """The codec may change between two servers; what was stored stays readable."""
    memory = MemoryFile.create(None, 64 * PAGE, 1 << 20)
    pages = [make_page(rng) for _ in range(64)]
    for start, codec in enumerate(("zstd", "lz4", "none", "zstd:1")):
        store = Store(memory, codec=codec)
        store.start()
        store.wait_ready()
        for page in range(start, 64, 4):
            store.put(page, pages[page])
        for page in range(64):
            assert store.get(page) == (pages[page] if page % 4 <= start else bytes(PAGE))
        assert store.check() == 0
        store.stop()
    memory.close()


def test_requests_before_start_and_after_stop_are_refused() -> None:
    memory = MemoryFile.create(None, 64 * PAGE, 1 << 20)
    store = Store(memory)
    device = Device(store)
    with pytest.raises(OSError, match="shutdown") as refused:
        device.pwrite(None, bytes(PAGE), 0)
    assert refused.value.errno == errno.ESHUTDOWN
    store.start()
    device.pwrite(None, b"x" * PAGE, 0)
    store.stop()
    memory.close()
    for call in (device.pread, device.pwrite):
        with pytest.raises(OSError, match="shutdown"):
            call(None, bytearray(PAGE), 0, 0)
    for forget in (device.trim, device.zero):
        with pytest.raises(OSError, match="shutdown"):
            forget(None, PAGE, 0, 0)


@pytest.mark.parametrize(("offset", "length"), [(64 * PAGE, 1), (0, 65 * PAGE), (2**64 - 1, 2)])
def test_ranges_outside_are_refused(offset: int, length: int) -> None:
    with opened_store(64 * PAGE, 64 * PAGE) as store:
        errors: list[int] = []
        device = Device(store, errors.append)
        for call in (device.trim, device.zero, device.cache):
            with pytest.raises(OSError, match=r"argument|space"):
                call(None, length, offset, 0)
        with pytest.raises(OSError, match="argument"):
            device.pread(None, bytearray(length), offset, 0)
        with pytest.raises(OSError, match="space"):
            device.pwrite(None, bytes(length), offset, 0)
        assert errors == [errno.EINVAL, errno.ENOSPC, errno.EINVAL, errno.EINVAL, errno.ENOSPC]


def test_extents_of_a_damaged_entry_claim_nothing() -> None:
    """A page whose entry cannot be trusted must not be told to be zeros."""
    with opened_store(16 * PAGE, 1 << 20) as store:
        device = Device(store)
        store.put(1, (b"\1" + bytes(7)) * 512)
        assert device.extents(None, 3 * PAGE, 0) == [
            (0, PAGE, 3),
            (PAGE, PAGE, 0),
            (2 * PAGE, PAGE, 3),
        ]
        store.memory.poke(store.memory.offsets()["index"] + 16, b"\0")
        assert device.extents(None, PAGE, PAGE) == [(PAGE, PAGE, 0)]


def faults_of(call: Callable[[int], object], runs: int) -> int:
    """Page faults of the calling thread while it calls so often."""
    before = resource.getrusage(resource.RUSAGE_THREAD)
    for i in range(runs):
        call(i)
    after = resource.getrusage(resource.RUSAGE_THREAD)
    return after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
def test_serving_takes_no_page_fault(codec: str, rng: random.Random) -> None:
    """Neither with frames that were committed ahead, nor with those of a predecessor.

    A fault needs memory, and a server must not need any at the moment when it is asked to
    make room.  A few are Python's own here.
    """
    run, runs = 32 * PAGE, 60
    data = b"".join(make_page(rng) for _ in range(32))
    out = bytearray(run)
    memory = MemoryFile.create(f"faults-{os.getpid()}", 64 << 20, 64 << 20)
    store = Store(memory, codec=codec)
    store.start()
    try:
        device = Device(store)
        for call in (device.pwrite, device.pread):  # the test's own buffers and code
            call(None, out, 0, 0)
        assert faults_of(lambda i: device.pwrite(None, data, i * run), runs) < 16
        assert faults_of(lambda i: device.pread(None, out, i * run, 0), runs) < 16
        store.stop()
        memory.close()
        memory = MemoryFile.open(f"faults-{os.getpid()}")
        store = Store(memory, codec=codec)
        store.start()
        wait_until_sorted(store)
        device = Device(store)
        assert faults_of(lambda i: device.pread(None, out, i * run, 0), runs) < 16
        assert out == data
        assert faults_of(lambda i: device.pwrite(None, data, i * run), runs) < 16
    finally:
        store.stop()
        memory.destroy()


def wait_until_sorted(store: Store) -> None:
    store.wait_ready()
    wait_for("the frames", lambda: counters.read(store.memory)["unsorted_frames"] == 0)


def page_tables_kb() -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("VmPTE"))


def resident_pages(memory: MemoryFile) -> int:
    """Pages of the memory file that have memory, as the kernel counts them."""
    rows = [row.split() for row in Path("/proc/sysvipc/shm").read_text().splitlines()]
    at = rows[0].index("rss")
    return next(int(row[at]) for row in rows[1:] if int(row[1]) == memory.shmid) // PAGE


def test_what_faults_after_a_takeover_needs_no_memory() -> None:
    """Frames are mapped behind the first requests, into page tables that are there before them.

    Free frames are known as soon as writes are let in: one that found none would wait for nothing,
    and be refused.  And no frame's memory is given up, or taken, for it.
    """
    name, size = f"tables-{os.getpid()}", 64 << 20
    memory = MemoryFile.create(name, size, size + (32 << 20))
    store = Store(memory, codec="none")
    store.start()
    try:
        noise = random.Random(2).randbytes(1 << 20)
        device = Device(store)
        for start in range(0, size, len(noise)):
            device.pwrite(None, noise, start)
        wait_for("the reserve", lambda: counters.read(memory)["free_frames"] >= 1024)
        before = resident_pages(memory)
        store.stop()
        memory.close()
        memory = MemoryFile.open(name)
        store = Store(memory, codec="none")
        store.start()
        store.wait_ready()
        assert counters.read(memory)["free_frames"] >= 1024
        assert counters.read(memory)["unsorted_frames"] > 0, "or the machine was too slow to look"
        tables = page_tables_kb()
        Device(store).pwrite(None, noise, 0)
        wait_until_sorted(store)
        assert page_tables_kb() - tables <= 4 * 4, "48 are needed for all"
        assert counters.read(memory)["failed_stores"] == 0
        assert store.check() == 0
        frames = counters.read(memory)["free_frames"]
        assert frames >= 1024, "what was free still is"
        assert resident_pages(memory) - before < 64, "nothing is taken twice"
        assert counters.read(memory)["punched_frames"] == 0
    finally:
        store.stop()
        memory.destroy()


def test_contexts_of_a_codec_are_counted_in_ram_bytes() -> None:
    """32 contexts each way, of 70 KB and more."""
    of = {}
    for codec in ("lz4", "zstd"):
        with opened_store(64 * PAGE, 1 << 20, codec=codec) as store:
            of[codec] = counters.read(store.memory)["ram_bytes"]
    assert of["zstd"] > of["lz4"] + 32 * (70_000 + 25_000)  # of reading, what a page touches


def test_refused_writes_do_not_make_the_kernel_look_for_memory(tmp_path: Path) -> None:
    """Half of the arena is covered with an empty file: committing it fails, as without memory.

    The committer tries ten times a second, however many writes are refused meanwhile.
    """
    with opened_store(64 << 20, 64 << 20) as store:
        device = Device(store)
        rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        areas = [row[0] for row in rows if row[4] == str(store.memory.shmid)]
        end = int(areas[0].split("-")[1], 16)
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        half = (ctypes.c_void_p(end - (32 << 20)), ctypes.c_size_t(32 << 20))
        with open(tmp_path / "empty", "w+b") as file:
            flags = mmap.MAP_SHARED | 0x10  # MAP_FIXED
            assert libc.mmap(*half, mmap.PROT_WRITE, flags, file.fileno(), 0) == half[0].value
        noise = random.Random(1).randbytes(1 << 20)
        for i in range(64):
            with contextlib.suppress(OSError):
                device.pwrite(None, noise, i * len(noise))
        began = time.monotonic()
        before = counters.read(store.memory)["commit_failures"]
        for _ in range(2000):
            with pytest.raises(OSError, match="space"):
                device.pwrite(None, noise[:PAGE], 63 << 20)
        tries = counters.read(store.memory)["commit_failures"] - before
        assert tries <= 2 + 11 * (time.monotonic() - began)
