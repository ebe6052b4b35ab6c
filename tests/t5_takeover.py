"""A server killed at any instant while most pages are on the disk, and the promise of room.

As t3_takeover, with a pool far smaller than the data: at each SIGKILL pages are in
RAM, ephemeral, on the disk, and on their way between them.  The successor finds every
acknowledged page, counts exactly what is alive on the disk, and leaks nothing.

And with a disk of the promised size no write is ever refused, whatever the data.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.t3_takeover import PAGES, Notes, content, in_two_halves, kill_at_random, write
from tests.tiers_helpers import Cold, open_file, wait_for
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.diskfile import open_disk, promised_bytes
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store
from zcache_core.tiers import Cooling

POOL = 60 * PAGE
DISK_BYTES = 16 << 20
ROUNDS = 120


def child_works(name: str, disk: Path, notes: Notes, seed: int, ready_fd: int) -> None:
    """Puts, trims and reads for ever, each thread on its own half of the pages."""
    cold = Cold(MemoryFile.open(name), open_file(disk, DISK_BYTES), DISK_BYTES, 70, 50)
    cold.cooling.drain(seed % 4 == 0)

    def work(first: int, own: random.Random) -> None:
        while True:
            page = own.randrange(first, PAGES, 2)
            if own.random() < 0.4:  # promotes what is read again
                page = first + 2 * own.randrange(40)
                assert cold.store.get(page) == content(page, notes.get(page)[0])
                continue
            turn = 0 if own.random() < 0.15 else own.getrandbits(31) | 1
            write(cold.store, notes, page, turn)

    in_two_halves(work, seed, ready_fd)


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    MemoryFile.create("killed", PAGES * PAGE, POOL).close()
    yield "killed"
    MemoryFile.open("killed").destroy()


def assert_nothing_lost(name: str, disk: Path, notes: Notes, seen: dict[str, int]) -> None:
    """Take over and compare with the notes; `seen` gets how many pages were in which state."""
    memory = MemoryFile.open(name)
    fd = open_file(disk, DISK_BYTES)
    cold = Cold(memory, fd, DISK_BYTES, 100, 99)
    try:
        for page in range(PAGES):
            acknowledged, flying = notes.get(page)
            data = cold.store.get(page)  # before the rebuild may be done: reads need not wait
            if data == content(page, flying):
                notes.acknowledge(page, flying)
            else:
                assert data == content(page, acknowledged), f"page {page}"
                notes.begin(page, acknowledged)
            seen[cold.state(page)] = seen.get(cold.state(page), 0) + 1
        cold.store.wait_ready()
        cold.cooling.stop()
        cold.assert_sound_now()
        now = cold.counters()
        assert now["lost_pages"] == now["disk_corrupt_pages"] == now["disk_read_errors"] == 0
        assert now["committed_frames"] <= now["pool_limit_frames"]
    finally:
        cold.stop()
        memory.close()
        os.close(fd)


@pytest.mark.timeout(300)
def test_killed_at_any_instant(name: str, tmp_path: Path, rng: random.Random) -> None:
    notes = Notes()
    seen: dict[str, int] = {}
    for _ in range(ROUNDS):
        kill_at_random(partial(child_works, name, tmp_path / "disk", notes), rng, 0.1)
        assert_nothing_lost(name, tmp_path / "disk", notes, seen)
    print(f"states over {ROUNDS} lives: {seen}")
    assert seen["disk"] > seen["ram"] > 0
    assert seen["ephemeral"] > ROUNDS


def test_taken_over_without_its_disk(name: str, tmp_path: Path, rng: random.Random) -> None:
    """EIO for what lies below, the rest is served; with the disk back all is there."""
    disk = tmp_path / "disk"
    pages = {page: rng.randbytes(PAGE) for page in range(200)}
    memory = MemoryFile.open(name)
    fd = open_file(disk, DISK_BYTES)
    cold = Cold(memory, fd, DISK_BYTES, 70, 50)
    for page, data in pages.items():
        cold.store.put(page, data)
    cold.settle()
    below = {page for page in pages if cold.state(page) == "disk"}
    assert len(below) > 100
    cold.stop()
    memory.close()
    os.close(fd)

    memory = MemoryFile.open(name)
    store = Store(memory)
    store.start()
    for page, data in pages.items():
        if page in below:
            with pytest.raises(OSError, match="lost or damaged"):
                store.get(page)
        else:
            assert store.get(page) == data
    gone = min(below)
    store.put(gone, bytes(PAGE))  # overwritten meanwhile: its copy below must not come back
    store.stop()
    memory.close()

    pages[gone] = bytes(PAGE)
    memory = MemoryFile.open(name)
    fd = open_file(disk, DISK_BYTES)
    cold = Cold(memory, fd, DISK_BYTES, 70, 50)
    for page, data in pages.items():
        assert cold.store.get(page) == data
    cold.store.wait_ready()
    cold.assert_sound()
    cold.stop()
    memory.close()
    os.close(fd)


def in_ram(memory: MemoryFile) -> int:
    now = counters.read(memory)
    return now["pers_zpages"] + now["eph_zpages"]


@pytest.mark.timeout(300)
def test_promised_disk_never_refuses(tmp_path: Path, rng: random.Random) -> None:
    """The whole device full of random bytes, twice, in random order, and all of it read back."""
    pages = 20_000  # 78 MiB
    memory = MemoryFile.create(None, pages * PAGE, 2 << 20)
    disk = open_disk(str(tmp_path / "disk"), promised_bytes(pages * PAGE))
    disk.take(memory.epoch, memory.device_bytes)
    assert disk.preallocated
    store = Store(memory)
    cooling = Cooling(store, disk.fd, disk.disk_bytes, disk.preallocated)
    store.start()
    cooling.start()
    device = Device(store)
    seeds: dict[int, int] = {}
    try:
        for turn in range(2):
            order = list(range(pages))
            rng.shuffle(order)
            for page in order:
                seeds[page] = page << 1 | turn
                device.pwrite(None, random.Random(seeds[page]).randbytes(PAGE), page * PAGE, 0)
        data = bytearray(PAGE)
        for page, seed in seeds.items():
            device.pread(None, data, page * PAGE, 0)
            assert data == random.Random(seed).randbytes(PAGE)
        now = counters.read(memory)
        assert now["failed_stores"] == now["failed_requests"] == 0
        assert os.stat(tmp_path / "disk").st_blocks * 512 >= disk.disk_bytes, "never given away"
        cooling.drain()
        wait_for(lambda: in_ram(memory) == 0)
        cooling.stop()
        assert store.check() == 0
    finally:
        cooling.stop()
        store.stop()
        memory.close()
        disk.close()


def test_read_back_by_an_allocator_of_smaller_objects(
    name: str, tmp_path: Path, rng: random.Random
) -> None:
    """Blobs on the disk that are larger than what shares a frame now overrun nobody."""
    pages = {}
    for page in range(200):
        noise = rng.randrange(1000, 3960)
        pages[page] = rng.randbytes(noise) + bytes(PAGE - noise)
    for allocator in ("zbud", "zsmalloc"):
        memory = MemoryFile.open(name)
        fd = open_file(tmp_path / "disk", DISK_BYTES)
        cold = Cold(memory, fd, DISK_BYTES, 70, 50, allocator=allocator)
        if allocator == "zbud":
            for page, data in pages.items():
                cold.store.put(page, data)
        for _ in range(4):
            for page in sorted(pages, key=lambda _: rng.random()):
                assert cold.store.get(page) == pages[page], (allocator, page)
        assert allocator == "zbud" or cold.counters()["promoted_pages"] > 0
        cold.assert_sound()
        cold.drain()
        cold.assert_sound()
        cold.stop()
        memory.close()
        os.close(fd)
