"""A server killed at any instant: its successor finds every acknowledged page, and no leak.

A child opens the memory file and works on it with two threads; it notes in shared
memory what it is about to write and what was acknowledged.  It is killed (SIGKILL)
after a random moment, hundreds of times, and each time the parent takes the file
over, and compares every page with the notes.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from zcache_core import counters
from zcache_core.memfile import MemoryFile
from zcache_core.several import ALLOCATORS
from zcache_core.store import Store

PAGES = 600
POOL = 400 * PAGE
ROUNDS = 120  # of each


def content(page: int, turn: int) -> bytes:
    """What turn `turn` writes: of every kind, told by page and turn; turn 0 is a trim."""
    rng = random.Random(page << 32 | turn)
    kind = rng.randrange(5) if turn else 0
    if kind == 0:
        return bytes(PAGE)
    if kind == 1:
        return rng.randbytes(8) * 512
    if kind == 2:
        return rng.randbytes(PAGE)
    noise = rng.randrange(8, 3000)
    return rng.randbytes(noise) + bytes(PAGE - noise)


class Notes:
    """Two 32-bit numbers a page, shared with the child: acknowledged turn, turn in flight."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, PAGES * 8)

    def get(self, page: int) -> tuple[int, int]:
        acknowledged, flying = struct.unpack_from("<II", self.memory, page * 8)
        return acknowledged, flying

    def begin(self, page: int, turn: int) -> None:
        struct.pack_into("<I", self.memory, page * 8 + 4, turn)

    def acknowledge(self, page: int, turn: int) -> None:
        struct.pack_into("<I", self.memory, page * 8, turn)


def write(store: Store, notes: Notes, page: int, turn: int) -> None:
    """What the turn says, noted before and after."""
    acknowledged, _ = notes.get(page)
    notes.begin(page, turn)
    try:
        if turn:
            store.put(page, content(page, turn))
        else:
            store.invalidate(page)
    except OSError:  # full: the old content stays
        notes.begin(page, acknowledged)
    else:
        notes.acknowledge(page, turn)


def in_two_halves(work: Callable[[int, random.Random], None], seed: int, ready_fd: int) -> None:
    """In the child, for ever: a thread for the even pages and one for the odd."""
    for half in range(2):
        threading.Thread(target=work, args=(half, random.Random(seed + half)), daemon=True).start()
    os.write(ready_fd, b"r")
    signal.pause()


def child_works(
    name: str, notes: Notes, allocators: Sequence[str], seed: int, ready_fd: int
) -> None:
    """Puts and trims for ever, each thread on its own half of the pages; a third moves them.

    The third chooses among the allocators too.
    """
    rng = random.Random(seed)
    store = Store(MemoryFile.open(name), allocator=rng.choice(allocators))
    store.start()

    def work(first: int, own: random.Random) -> None:
        while True:
            page = own.randrange(first, PAGES, 2)
            turn = 0 if own.random() < 0.25 else own.getrandbits(31) | 1
            write(store, notes, page, turn)

    def compact() -> None:
        while True:
            store.compact()
            if len(allocators) > 1:
                store.set_allocator(rng.choice(allocators))

    threading.Thread(target=compact, daemon=True).start()
    in_two_halves(work, seed, ready_fd)


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    MemoryFile.create("killed", PAGES * PAGE, POOL).close()
    yield "killed"
    MemoryFile.open("killed").destroy()


def kill_at_random(
    child_lives: Callable[[int, int], None], rng: random.Random, most_s: float
) -> None:
    """One life of a child: from fork to SIGKILL at a random moment of its work.

    It is given a seed, and the descriptor to write to when it has begun.
    """
    ready, ready_fd = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            child_lives(rng.getrandbits(32), ready_fd)
        finally:
            os._exit(1)
    os.close(ready_fd)
    assert os.read(ready, 1) == b"r", "the child could not take the file over"
    os.close(ready)
    time.sleep(rng.random() ** 2 * most_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the child found a page wrong"


def assert_nothing_lost(name: str, notes: Notes, allocator: str = "zbud") -> int:
    """Take the file over and compare it with the notes; how many pages are stored."""
    memory = MemoryFile.open(name)
    store = Store(memory, allocator=allocator)
    store.start()
    try:
        for page in range(PAGES):
            acknowledged, flying = notes.get(page)
            data = store.get(page)  # before the rebuild may be done: reads need not wait
            if data == content(page, flying):
                notes.acknowledge(page, flying)
            else:
                assert data == content(page, acknowledged), f"page {page}"
                notes.begin(page, acknowledged)
        assert store.check() == 0
        now = counters.read(memory)
        assert now["lost_pages"] == 0
        assert now["committed_frames"] <= now["pool_limit_frames"]
        return now["pers_zpages"]
    finally:
        store.stop()
        memory.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("allocators", [*((one,) for one in ALLOCATORS), ALLOCATORS])
def test_killed_at_any_instant(name: str, rng: random.Random, allocators: tuple[str, ...]) -> None:
    """Each allocator, and all of them in turns: what one laid out, another finds again."""
    notes = Notes()
    stored = 0
    for _ in range(ROUNDS):
        kill_at_random(partial(child_works, name, notes, allocators), rng, 0.03)
        stored = max(stored, assert_nothing_lost(name, notes, rng.choice(allocators)))
    assert stored > PAGES // 4, "the children did real work"
    memory = MemoryFile.open(name)
    assert counters.read(memory)["moved_pages"] > 0, "and compacted"
    memory.close()


def test_versions_are_never_used_again(name: str, rng: random.Random) -> None:
    """A successor starts above every version that its predecessor may have used."""
    highest = 0
    for _ in range(5):
        kill_at_random(partial(child_works, name, Notes(), ["zbud"]), rng, 0.03)
        memory = MemoryFile.open(name)
        store = Store(memory)
        store.start()
        store.wait_ready()
        versions = [store.entry(page)[1] >> 12 for page in range(PAGES)]
        store.put(0, b"n" * PAGE)
        new = store.entry(0)[1] >> 12
        assert new > max(versions)
        assert new > highest
        highest = new
        store.stop()
        memory.close()


def test_damaged_entries_cost_only_their_pages(name: str, rng: random.Random) -> None:
    """Found at the takeover: those pages are lost (EIO), all others are there."""
    memory = MemoryFile.open(name)
    store = Store(memory)
    store.start()
    for page in range(200):
        store.put(page, content(page, 2 * page + 1))
    store.stop()
    hit = rng.sample(range(200), 20)
    for page in hit:
        at = memory.offsets()["index"] + page * 16 + rng.randrange(16)
        memory.poke(at, bytes([memory.peek(at, 1)[0] ^ 1 << rng.randrange(8)]))
    memory.close()
    memory = MemoryFile.open(name)
    store = Store(memory)
    store.start()
    store.wait_ready()
    for page in range(200):
        if page in hit:
            with pytest.raises(OSError, match="lost or damaged"):
                store.get(page)
        else:
            assert store.get(page) == content(page, 2 * page + 1)
    assert counters.read(memory)["lost_pages"] == 20
    store.invalidate(0, PAGES)
    assert counters.read(memory)["lost_pages"] == 0
    assert store.check() == 0
    store.stop()
    memory.close()
