"""Recompression: the same page in less room, whoever reads, writes and trims it meanwhile."""

from __future__ import annotations

import random
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tests.core_helpers import PAGE, make_page, opened_store, try_put
from tests.plugin_helpers import wait_for
from tests.t2_committer import System
from tests.t3_takeover import (
    PAGES as KILLED_PAGES,
)
from tests.t3_takeover import (
    Notes,
    assert_nothing_lost,
    in_two_halves,
    kill_at_random,
    name,
    write,
)
from zcache_core import counters
from zcache_core.errors import ConfigError
from zcache_core.index import unpack_entry
from zcache_core.memfile import MemoryFile
from zcache_core.several import ALLOCATORS
from zcache_core.store import Store

__all__ = ["name"]  # a fixture
PAGES = 3000
LZ4, ZSTD = 1, 2
WORDS = [b"swap", b"page", b"frame", b"zspage", b"entry", b"index", b"store", b"tier", b"cold"]


def text(rng: random.Random) -> bytes:
    """Words, on which zstd gains much over LZ4."""
    return b" ".join(rng.choice(WORDS) for _ in range(1200))[:PAGE]


def now(store: Store, counter: str) -> int:
    return counters.read(store.memory)[counter]


def codec_of(store: Store, page: int) -> int:
    return int(unpack_entry(*store.entry(page))["codec"])


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_fewer_frames_for_the_same_pages(allocator: str, rng: random.Random) -> None:
    with opened_store(PAGES * PAGE, PAGES * PAGE, allocator=allocator, tidy=False) as store:
        model = {page: text(rng) if page % 4 else rng.randbytes(PAGE) for page in range(PAGES)}
        for page, data in model.items():
            store.put(page, data)
        before = counters.read(store.memory)
        versions = [store.entry(page)[1] >> 12 for page in range(PAGES)]
        store.recompress("zstd:3")
        store.compact()
        after = counters.read(store.memory)
        assert after["recompressed_pages"] == PAGES * 3 // 4
        assert after["recompress_poor"] == PAGES // 4, "random pages win nothing"
        assert after["recompress_saved_bytes"] > after["recompressed_pages"] * 256
        assert after["recompress_us"] > 0
        share = after["pers_pageframes"] / before["pers_pageframes"]
        assert share <= (1 if allocator == "zbud" else 0.9), "zbud had two in each already"
        assert versions == [store.entry(page)[1] >> 12 for page in range(PAGES)]
        assert all(store.get(page) == data for page, data in model.items())
        assert store.check() == 0


def test_what_wins_no_room_is_left_and_not_tried_again(rng: random.Random) -> None:
    """By class: some bytes fewer are nothing.  A page that is written again is tried again."""
    with opened_store(PAGES * PAGE, PAGES * PAGE, allocator="zsmalloc", tidy=False) as store:
        for page in range(100):
            store.put(page, rng.randbytes(1990) + bytes(PAGE - 1990))
        store.recompress()
        assert now(store, "recompressed_pages") == 0
        assert now(store, "recompress_poor") == 100
        assert all(codec_of(store, page) == LZ4 for page in range(100))
        store.recompress()
        assert now(store, "recompress_poor") == 100
        store.put(7, text(rng))
        store.put(8, rng.randbytes(1990) + bytes(PAGE - 1990))
        store.invalidate(9)
        store.recompress()
        assert now(store, "recompressed_pages") == 1
        assert now(store, "recompress_poor") == 101
        assert codec_of(store, 7) == ZSTD


def test_a_full_pool_gets_room_by_it(rng: random.Random) -> None:
    with opened_store(2 * PAGES * PAGE, 500 * PAGE, allocator="zsmalloc", tidy=False) as store:
        model: dict[int, bytes] = {}
        for page in range(2 * PAGES):
            data = text(rng)
            if not try_put(store, page, data):
                break
            model[page] = data
        full = len(model)
        for page in range(50):
            store.invalidate(page)
            del model[page]
        store.compact()  # the first of the smaller ones need some frames
        store.recompress()
        store.compact()
        assert now(store, "recompressed_pages") > 0
        for page in range(full, 2 * PAGES):
            data = text(rng)
            if not try_put(store, page, data):
                break
            model[page] = data
        assert len(model) > full * 1.1
        assert all(store.get(page) == data for page, data in model.items())
        assert store.check() == 0


def test_the_thread_takes_what_is_cold(rng: random.Random) -> None:
    """Pages that are read now and then stay as they are; what nobody asks for is recompressed."""
    hot = range(0, 60, 3)
    with opened_store(PAGES * PAGE, PAGES * PAGE, allocator="zsmalloc") as store:
        model = {page: text(rng) for page in range(300)}
        for page, data in model.items():
            store.put(page, data)
        assert now(store, "recompress_level") == 0
        before = now(store, "private_table_bytes")
        store.set_recompress("zstd:5", 2)
        wait_for("the order", lambda: now(store, "recompress_level") == 5)
        assert now(store, "recompress_age_s") == 2

        def all_but_the_hot() -> bool:
            assert all(store.get(page) == model[page] for page in hot)
            return now(store, "recompressed_pages") >= 300 - len(hot)

        wait_for("recompression", all_but_the_hot)
        assert sum(codec_of(store, page) == LZ4 for page in hot) > len(hot) // 2
        store.set_recompress("none", 2)
        wait_for("the order", lambda: now(store, "recompress_level") == 0)
        assert all(store.get(page) == data for page, data in model.items())
        assert store.check() == 0
        assert now(store, "private_table_bytes") > before + (1 << 20), "what it takes is counted"


def test_what_it_needs_goes_back_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    """And is had again for the next cold page, which waits until there is memory for it."""
    rng = random.Random(1)
    system = System(tmp_path / "zoneinfo")
    memory = MemoryFile.create(None, PAGES * PAGE, PAGES * PAGE)
    store = Store(memory, allocator="zsmalloc", zoneinfo=str(system.path))
    try:
        system.has(free=1 << 20)
        store.start()
        nothing = now(store, "private_table_bytes")
        store.set_recompress("zstd:15", 1)
        wait_for("the order", lambda: now(store, "recompress_level") == 15)
        model = {page: text(rng) for page in range(300)}
        for page, data in model.items():
            store.put(page, data)
        seen = [now(store, "private_table_bytes")]

        def all_done() -> bool:
            seen.append(now(store, "private_table_bytes"))
            return now(store, "recompressed_pages") == 300

        wait_for("recompression", all_done)
        taken = max(seen)
        wait_for("giving back", lambda: now(store, "private_table_bytes") < taken - (400 << 10))
        assert now(store, "private_table_bytes") > nothing + (1 << 20), "what readers need stays"
        system.has(free=0)
        for page in range(300, 400):
            model[page] = text(rng)
            store.put(page, model[page])
        time.sleep(2)  # it is long cold: time for what must not happen
        assert now(store, "recompressed_pages") == 300
        system.has(free=1 << 20)
        wait_for("the others", lambda: now(store, "recompressed_pages") == 400)
        assert now(store, "refused_commands") == 0
        assert now(store, "recompress_level") == 15
        wait_for("giving back", lambda: now(store, "private_table_bytes") < taken - (400 << 10))
        store.set_recompress("zstd:3", 1)
        wait_for("the order", lambda: now(store, "recompress_level") == 3)
        store.set_recompress("none", 1)
        wait_for("the order", lambda: now(store, "recompress_level") == 0)
        wait_for("giving back", lambda: now(store, "private_table_bytes") < taken - (400 << 10))
        assert all(store.get(page) == data for page, data in model.items())
        assert store.check() == 0
    finally:
        store.stop()
        memory.close()


@pytest.mark.parametrize("words", ["lz4", "zstd:20", "brotli"])
def test_other_codecs_are_refused(words: str) -> None:
    with opened_store(PAGES * PAGE, PAGES * PAGE) as store:
        with pytest.raises(ConfigError, match="use "):
            store.set_recompress(words, 60)
        with pytest.raises(ConfigError, match="use 1 to"):
            store.set_recompress("zstd", 0)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_while_everybody_works(allocator: str, rng: random.Random) -> None:
    """Readers, writers and trims against recompression and compaction: each page as last put."""
    with opened_store(PAGES * PAGE, PAGES * PAGE, allocator=allocator) as store:
        model = {page: text(rng) for page in range(PAGES)}
        for page, data in model.items():
            store.put(page, data)
        stop = threading.Event()
        problems: list[str] = []

        def recompressing() -> None:
            while not stop.is_set():
                store.recompress("zstd:1")
                store.compact()

        def work(first: int, own: random.Random) -> None:
            for _ in range(8000):
                page = own.randrange(first, PAGES, 2)
                dice = own.random()
                if dice < 0.3:
                    data = text(own) if own.random() < 0.7 else make_page(own)
                    if try_put(store, page, data):
                        model[page] = data
                elif dice < 0.4:
                    store.invalidate(page)
                    model[page] = bytes(PAGE)
                elif store.get(page) != model[page]:
                    problems.append(f"page {page} is not what was written")

        threads = [
            threading.Thread(target=work, args=(n, random.Random(rng.getrandbits(32))))
            for n in range(2)
        ]
        mover = threading.Thread(target=recompressing)
        for thread in [mover, *threads]:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        mover.join()
        assert not problems, problems[:3]
        assert now(store, "recompressed_pages") > PAGES // 8
        assert all(store.get(page) == data for page, data in model.items())
        assert store.check() == 0


def child_recompresses(memory: str, notes: Notes, seed: int, ready_fd: int) -> None:
    """Puts and trims for ever; a third thread recompresses and moves all that goes."""
    rng = random.Random(seed)
    store = Store(MemoryFile.open(memory), allocator=rng.choice(ALLOCATORS))
    store.start()

    def work(half: int, own: random.Random) -> None:
        while True:
            page = own.randrange(half, KILLED_PAGES, 2)
            write(store, notes, page, 0 if own.random() < 0.25 else own.getrandbits(31) | 1)

    def dense() -> None:
        while True:
            store.recompress(rng.choice(["zstd:1", "zstd"]))
            store.compact()

    threading.Thread(target=dense, daemon=True).start()
    in_two_halves(work, seed, ready_fd)


@pytest.mark.timeout(300)
def test_killed_at_any_instant(name: str, rng: random.Random) -> None:
    notes = Notes()
    for _ in range(80):
        kill_at_random(partial(child_recompresses, name, notes), rng, 0.03)
        assert_nothing_lost(name, notes, rng.choice(ALLOCATORS))
    memory = MemoryFile.open(name)
    assert counters.read(memory)["recompressed_pages"] > 100
    memory.close()
