"""A memory file damaged on purpose: only the damaged pages are lost, and nothing else happens.

The file of a stopped server gets bits flipped in its index, its frame headers, its
arena, its counters and the words of its superblock that no checksum covers.  From the
index as it was, a plain model says which pages that costs.  The successor must answer
EIO for exactly those, everything else right, go on storing, and end without a leak.

    flipped                          what it costs
    an entry (1 to 3 bits)           that page, known at the takeover: lost_pages
    a blob, or its header            that page, found by the read: corrupt_loads
    an ephemeral page's blob         nothing: the copy below is read (mended_loads)
    a header's lower place or check  nothing; an ephemeral page is then in RAM only
    room that no entry points to, counters, owner, reserved versions, generations   nothing
    geometry, device table           the file is refused, with a sentence

Whole lines and pages of rubbish go beyond what the check bits promise (an entry of
random bits looks sound once in 256 times): there only what was not hit is compared.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.core_helpers import PAGE, make_page
from tests.tiers_helpers import Cold, errno_of, open_file, wait_for
from zcache_core import counters
from zcache_core.errors import MemoryFileError
from zcache_core.index import unpack_entry
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

PAGES = 500
HEADER_BYTES = 24
EPHEMERAL = 3
IN_RAM = (2, EPHEMERAL)
DISK_BYTES = 16 << 20
# Superblock words without a checksum whose damage must cost nothing (docs/memory-format.md).
UNCOVERED = {
    "owner_pid": 80, "owner_start_ticks": 88, "created_s": 104,
    "versions_reserved": 176 + 16, "write_day": 496, "write_day_bytes": 504,
}  # fmt: skip


class Entry(NamedTuple):
    """One page's entry, as it was before the damage."""

    state: int
    where: int
    length: int


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    MemoryFile.create("damaged", PAGES * PAGE, PAGES * PAGE).close()
    yield "damaged"
    MemoryFile.open("damaged").destroy()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A pool of a quarter of the pages: the rest is on the disk."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    MemoryFile.create("damaged", PAGES * PAGE, PAGES // 4 * PAGE).close()
    yield "damaged"
    MemoryFile.open("damaged").destroy()


class Damage:
    """Flips bits of a file that nobody serves; `lost` and `corrupt` are the pages it costs."""

    def __init__(self, memory: MemoryFile, rng: random.Random) -> None:
        self.memory, self.rng = memory, rng
        self.lost: set[int] = set()  # known by the entry alone
        self.corrupt: set[int] = set()  # found by reading
        self.mended: set[int] = set()  # found by reading, and whole below
        self.offsets = memory.offsets()
        self.entries = [self._entry(page) for page in range(PAGES)]

    def _entry(self, page: int) -> Entry:
        words = self.memory.peek(self.offsets["index"] + page * 16, 16)
        found = unpack_entry(
            int.from_bytes(words[:8], "little"), int.from_bytes(words[8:], "little")
        )
        assert found["sound"]
        return Entry(found["state"], found["where"], found["length"])

    def flip(self, offset_bytes: int, bits: int = 1) -> None:
        """Different bits of the 16 bytes at `offset_bytes`, anywhere in the file."""
        for bit in self.rng.sample(range(128), bits):
            self.flip_bit(offset_bytes, bit)

    def flip_bit(self, offset_bytes: int, bit: int) -> None:
        at = offset_bytes + bit // 8
        self.memory.poke(at, bytes([self.memory.peek(at, 1)[0] ^ 1 << bit % 8]))

    def entry(self, page: int) -> None:
        self.flip(self.offsets["index"] + page * 16, self.rng.randint(1, 3))
        self.lost.add(page)

    def in_ram(self) -> list[int]:
        return [page for page in range(PAGES) if self.entries[page].state in IN_RAM]

    def blob(self, page: int) -> None:
        entry = self.entries[page]
        assert entry.state in IN_RAM
        first = 0 if entry.length == PAGE else HEADER_BYTES
        bit = self.rng.randrange(entry.length * 8)
        self.flip_bit(self.offsets["arena"] + entry.where + first, bit)
        (self.mended if entry.state == EPHEMERAL else self.corrupt).add(page)

    def header(self, page: int) -> None:
        """One bit of 24 bytes; that of the lower place and of the check bits cost nothing."""
        entry = self.entries[page]
        at = self.offsets["arena"] + entry.where
        if entry.length == PAGE:
            at = self.offsets["frame_headers"] + entry.where // PAGE * HEADER_BYTES
        bit = self.rng.randrange(HEADER_BYTES * 8)
        self.flip_bit(at, bit)
        if 64 <= bit < 96 and entry.state == EPHEMERAL:
            self.mended.add(page)  # the checksum: what says where it also is, is whole
        elif not (4 <= bit < 12 or bit >= 128 + 16):
            self.corrupt.add(page)

    def free_room(self) -> None:
        """A bit of a frame that no entry points to."""
        taken = {self.entries[page].where // PAGE for page in self.in_ram()}
        free = [frame for frame in range(self.memory.pool_bytes // PAGE) if frame not in taken]
        if free:
            self.flip(self.offsets["arena"] + self.rng.choice(free) * PAGE)

    def harmless(self) -> None:
        """Counters, and what no checksum covers."""
        self.flip(self.offsets["counters"] + self.rng.randrange(40 * 512 * 8 // 16) * 16, 3)
        self.flip_bit(self.rng.choice(list(UNCOVERED.values())), self.rng.randrange(64))

    def anything(self, spots: int) -> None:
        """`spots` different pages hit, each in one way; and what costs nothing."""
        ram = set(self.in_ram())
        for page in self.rng.sample(range(PAGES), spots):
            ways = [self.entry] if page not in ram else [self.entry, self.blob, self.header]
            self.rng.choice(ways)(page)
        self.free_room()
        self.harmless()


def damage(name: str, rng: random.Random, spots: int) -> Damage:
    memory = MemoryFile.open(name)
    try:
        done = Damage(memory, rng)
        done.anything(spots)
        return done
    finally:
        memory.close()


def assert_only(store: Store, content: dict[int, bytes], hit: set[int]) -> None:
    """EIO for the pages in `hit`, the others as they were written."""
    for page, data in content.items():
        if page in hit:
            with pytest.raises(OSError, match="lost or damaged"):
                store.get(page)
        else:
            assert store.get(page) == data, f"page {page}"


def read_again(cold: Cold, content: dict[int, bytes], rng: random.Random) -> None:
    """Some of the pages below earn a copy in RAM: they are in both places."""
    below = [page for page in range(PAGES) if cold.state(page) == "disk"]
    for page in rng.sample(below, 60) * 2:
        assert cold.store.get(page) == content[page]


def rewrite(store: Store, rng: random.Random) -> dict[int, bytes]:
    """Every page anew: what was damaged is mended by it."""
    content = {page: make_page(rng) for page in range(PAGES)}
    for page, data in content.items():
        store.put(page, data)
    return content


def test_only_damaged_pages_are_lost(name: str, rng: random.Random) -> None:
    """Twenty successors in a row, each with another damage, each mended by writing."""
    memory = MemoryFile.open(name)
    store = Store(memory)
    store.start()
    content = rewrite(store, rng)
    seen = {"lost": 0, "corrupt": 0}
    for _ in range(20):
        store.stop()
        memory.close()
        done = damage(name, rng, rng.randint(1, 60))
        memory = MemoryFile.open(name)
        store = Store(memory)
        store.start()
        if rng.random() < 0.5:  # reads need not wait for the rebuild
            store.wait_ready()
        assert_only(store, content, done.lost | done.corrupt)
        store.wait_ready()
        assert counters.read(memory)["lost_pages"] == len(done.lost)
        assert store.check() == len(done.corrupt), "the damaged blobs, and nothing else"
        seen["lost"] += len(done.lost)
        seen["corrupt"] += len(done.corrupt)
        content = rewrite(store, rng)
        assert_only(store, content, set())
        assert store.check() == 0
        assert counters.read(memory)["lost_pages"] == 0
    store.invalidate(0, PAGES)
    assert counters.read(memory)["pers_pageframes"] == 0, "no frame leaked"
    store.stop()
    memory.close()
    print(f"pages lost by their entries, by their blobs: {seen}")
    assert min(seen.values()) > 50


def test_damage_over_a_disk(small: str, tmp_path: Path, rng: random.Random) -> None:
    """The same with pages in RAM, in both places, and below: entries that name the disk too.

    After the reads all that is whole goes below: what is damaged blocks nobody.
    """
    fd = open_file(tmp_path / "disk", DISK_BYTES)
    memory = MemoryFile.open(small)
    cold = Cold(memory, fd, DISK_BYTES, 70, 50)
    content = rewrite(cold.store, rng)
    hit_states: dict[str, int] = {}
    all_mended = 0
    for _ in range(5):
        cold.settle()
        read_again(cold, content, rng)
        cold.settle()
        states = {page: cold.state(page) for page in range(PAGES)}
        assert {"disk", "ephemeral"} <= set(states.values())
        cold.stop()
        memory.close()
        done = damage(small, rng, rng.randint(10, 60))
        hit = done.lost | done.corrupt
        for page in hit | done.mended:
            hit_states[states[page]] = hit_states.get(states[page], 0) + 1
        memory = MemoryFile.open(small)
        before = counters.read(memory)["mended_loads"]  # of the past, and it may have been hit too
        cold = Cold(memory, fd, DISK_BYTES, 100, 99)
        cold.store.wait_ready()
        assert_only(cold.store, content, hit)
        now = cold.counters()
        mended = now["mended_loads"] - before
        assert (now["lost_pages"], mended) == (len(done.lost), len(done.mended))
        all_mended += mended
        cold.cooling.drain()
        wait_for_ram(cold, 2 * len(done.corrupt))  # each may keep its frame, and a neighbour in it
        cold.cooling.drain(False)
        cold.settle()
        for page, data in content.items():
            if page not in hit:
                assert cold.store.get(page) == data
        cold.stop()
        memory.close()

        memory = MemoryFile.open(small)
        cold = Cold(memory, fd, DISK_BYTES, 70, 50)
        content = rewrite(cold.store, rng)
        assert_only(cold.store, content, set())
        cold.assert_sound()
    cold.stop()
    memory.close()
    os.close(fd)
    print(f"states of the pages that were hit: {hit_states}; mended: {mended}")
    assert min(hit_states.get(state, 0) for state in ("ram", "ephemeral", "disk")) > 0
    assert all_mended > 0


def test_many_damaged_frames_do_not_hold_the_thread(
    small: str, tmp_path: Path, rng: random.Random
) -> None:
    """More frames that cannot leave than are looked at in one go: the others do, once each."""
    fd = open_file(tmp_path / "disk", DISK_BYTES)
    memory = MemoryFile.open(small)
    store = Store(memory)
    store.start()
    content = {page: rng.randbytes(PAGE) for page in range(110)}
    for page, data in content.items():
        store.put(page, data)
    store.stop()
    done = Damage(memory, rng)
    for page in range(90):
        done.blob(page)
    memory.close()
    memory = MemoryFile.open(small)
    cold = Cold(memory, fd, DISK_BYTES, 100, 99)
    cold.store.wait_ready()  # before that none is counted
    cold.cooling.drain()
    wait_for_ram(cold, 90)
    now = cold.counters()
    assert (now["written_back_pages"], now["overtaken_writeback_pages"]) == (20, 0)
    assert_only(cold.store, content, set(range(90)))
    cold.stop()
    memory.close()
    os.close(fd)


def wait_for_ram(cold: Cold, pages: int) -> None:
    """Until no more than `pages` are in RAM."""

    def in_ram() -> int:
        now = cold.counters()
        return now["pers_zpages"] + now["eph_zpages"]

    wait_for(lambda: in_ram() <= pages)


def test_rubbish_over_whole_parts(name: str, rng: random.Random) -> None:
    """Lines of 64 bytes to 8 KiB of rubbish: it serves, all that was not hit is right."""
    for _ in range(10):
        memory = MemoryFile.open(name)
        store = Store(memory)
        store.start()
        content = rewrite(store, rng)
        store.stop()
        done = Damage(memory, rng)
        hit = rubbish(memory, done, rng)
        memory.close()
        memory = MemoryFile.open(name)
        store = Store(memory)
        store.start()
        for page, data in content.items():
            if page not in hit:
                assert store.get(page) == data, f"page {page}"
            else:
                errno_of(store.get, page)  # anything, but an answer
        content = rewrite(store, rng)
        assert_only(store, content, set())
        store.stop()
        memory.close()


def rubbish(memory: MemoryFile, done: Damage, rng: random.Random) -> set[int]:
    """Overwrite a few stretches behind the superblock; every page that one of them touches."""
    hit: set[int] = set()
    parts = done.offsets
    for _ in range(6):
        length = 1 << rng.randint(6, 13)
        first = rng.randrange(PAGE, memory.size_bytes - length)
        memory.poke(first, rng.randbytes(length))
        end = first + length
        for page, entry in enumerate(done.entries):
            places = [(parts["index"] + page * 16, 16)]
            if entry.state in IN_RAM:
                places.append(
                    (parts["arena"] + entry.where, min(PAGE, entry.length + HEADER_BYTES))
                )
                header = parts["frame_headers"] + entry.where // PAGE * HEADER_BYTES
                places.append((header, HEADER_BYTES))
            if any(at < end and at + size > first for at, size in places):
                hit.add(page)
    return hit


@pytest.mark.parametrize(
    ("offset", "length", "why"),
    [
        (0, 8, "no zcache memory file"),
        (8, 4, "has format"),
        (12, 4, "geometry"),
        (16, 64, "geometry"),
        (176, 16, "device table"),
        (208, 16, "device table"),
        (512, 128, "device table"),
        (648, 8, "device table"),
    ],
)
def test_what_finds_the_pages_is_refused(
    rng: random.Random, offset: int, length: int, why: str
) -> None:
    """Without it no page can be told from another: one sentence, no guess."""
    memory = MemoryFile.create(None, PAGES * PAGE, PAGES * PAGE)
    for _ in range(20):
        bit = rng.randrange(length * 8)
        at = offset + bit // 8
        before = memory.peek(at, 1)
        memory.poke(at, bytes([before[0] ^ 1 << bit % 8]))
        with pytest.raises(MemoryFileError, match=why):
            MemoryFile.attach(memory.shmid)
        memory.poke(at, before)
    MemoryFile.attach(memory.shmid).close()
    memory.close()
