"""Dictionaries: made from the store's own pages, used where they win, found by a successor."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import random
import struct
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.core_helpers import PAGE, opened_store
from tests.plugin_helpers import wait_for
from tests.t2_committer import System
from tests.t3_recompression import codec_of, now
from tests.t3_takeover import in_two_halves, kill_at_random
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

PAGES = 4000
ZSTD, WITH_DICTIONARY = 2, 4
ROWS = 3728  # of the table in the superblock


def phrases(rng: random.Random) -> list[bytes]:
    """What the pages of one program have in common: no page has it twice, nearly all have some."""
    return [rng.randbytes(48) for _ in range(600)]


def page_of(common: list[bytes], rng: random.Random) -> bytes:
    pieces = [piece + rng.randbytes(6) for piece in rng.sample(common, 60)]
    return b"".join(pieces)[: PAGE - 800].ljust(PAGE, b"\0")


def anonymous_kib() -> int:
    """Private memory of this process."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("Anonymous:")[1].split()[0])


def fill(store: Store, common: list[bytes], rng: random.Random, first: int = 0) -> dict[int, bytes]:
    model = {page: page_of(common, rng) for page in range(first, PAGES)}
    for page, data in model.items():
        store.put(page, data)
    return model


def test_learned_from_its_own_pages(rng: random.Random) -> None:
    """Pages that share what no page has twice: nothing for zstd alone, much with a dictionary."""
    with opened_store(PAGES * PAGE, PAGES * PAGE, allocator="zsmalloc", tidy=False) as store:
        model = fill(store, phrases(rng), rng)
        before = now(store, "pers_zbytes")
        store.recompress("zstd:3")
        store.compact()
        assert now(store, "dictionaries") == 1
        assert now(store, "dictionary_trainings") >= 1
        assert now(store, "dictionary_frames") > 4
        with_it = sum(codec_of(store, page) >= WITH_DICTIONARY for page in model)
        assert with_it > PAGES * 0.9, "and those that came before it, too"
        assert now(store, "pers_zbytes") < before * 0.7
        assert all(store.get(page) == data for page, data in model.items())
        assert store.check() == 0


def test_none_where_it_would_not_win(rng: random.Random) -> None:
    with opened_store(PAGES * PAGE, PAGES * PAGE, allocator="zsmalloc", tidy=False) as store:
        for page in range(PAGES):
            store.put(page, rng.randbytes(1500) + bytes(PAGE - 1500))
        store.recompress("zstd:3")
        assert now(store, "dictionary_trainings") == 1
        assert now(store, "dictionaries") == now(store, "dictionary_frames") == 0
        assert store.check() == 0


def test_replaced_when_it_stops_winning_and_given_up_when_nothing_needs_it(
    rng: random.Random,
) -> None:
    """Five programs one after the other, four rows: old ones go when their last page has gone.

    Of the first program some pages stay.
    """
    with opened_store(PAGES * PAGE, PAGES * PAGE, allocator="zsmalloc", tidy=False) as store:
        most = 0
        kept: dict[int, bytes] = {}
        for _ in range(5):
            store.invalidate(100, PAGES - 100)
            common = phrases(rng)
            model: dict[int, bytes] = {}
            for _ in range(3):  # twice 4096 pages, to see that it wins no more, and 2048 samples
                model = fill(store, common, rng, 100 if kept else 0)
                store.recompress("zstd:1")
                most = max(most, now(store, "dictionaries"))
            kept = kept or {page: model[page] for page in range(100)}
            assert all(store.get(page) == data for page, data in (model | kept).items())
            assert store.check() == 0
        assert now(store, "dictionary_trainings") >= 5
        assert most == 4
        assert sum(codec_of(store, page) >= WITH_DICTIONARY for page in model) > PAGES // 2


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    return "learned"


def test_a_successor_reads_with_it(name: str, rng: random.Random) -> None:
    """At once, before it has looked at the index; and goes on with the same one."""
    memory = MemoryFile.create(name, PAGES * PAGE, PAGES * PAGE)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    common = phrases(rng)
    model = fill(store, common, rng)
    store.recompress("zstd:3")
    codecs = [codec_of(store, page) for page in range(PAGES)]
    assert max(codecs) >= WITH_DICTIONARY
    frames = now(store, "dictionary_frames")
    store.stop()
    memory.close()
    memory = MemoryFile.open(name)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.set_recompress("zstd:3", 3600)
    store.start()
    assert all(store.get(page) == data for page, data in model.items())
    store.wait_ready()
    made = now(store, "dictionary_trainings")
    assert now(store, "dictionary_frames") == frames
    assert store.check() == 0
    for page in range(100):
        model[page] = page_of(common, rng)
        store.put(page, model[page])
    store.recompress("zstd:3")
    assert {codec_of(store, page) for page in range(100)} == {max(codecs)}
    assert now(store, "dictionary_trainings") == made
    assert all(store.get(page) == data for page, data in model.items())
    store.stop()
    memory.destroy()


def test_damage_is_found(name: str, rng: random.Random) -> None:
    """A flipped bit in a dictionary: its pages answer EIO after the next start, none is wrong."""
    memory = MemoryFile.create(name, PAGES * PAGE, PAGES * PAGE)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    model = fill(store, phrases(rng), rng)
    store.recompress("zstd:3")
    with_it = {page for page in model if codec_of(store, page) >= WITH_DICTIONARY}
    store.stop()
    row = memory.peek(ROWS, 16)
    first = int.from_bytes(row[4:8], "little")
    at = memory.offsets()["arena"] + first * PAGE + rng.randrange(PAGE)
    memory.poke(at, bytes([memory.peek(at, 1)[0] ^ 1 << rng.randrange(8)]))
    memory.close()
    memory = MemoryFile.open(name)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    store.wait_ready()
    for page in rng.sample(sorted(model), 200):
        if page in with_it:
            with pytest.raises(OSError, match="lost or damaged"):
                store.get(page)
        else:
            assert store.get(page) == model[page]
    store.stop()
    memory.destroy()


def refuse_memory(least_bytes: int, most_bytes: int) -> None:
    """From now on the kernel has none for this process when it asks for so many bytes (madvise)."""
    number = {"x86_64": 28, "aarch64": 233}[platform.machine()]
    load, equal, at_least, above, answer = 0x20, 0x15, 0x35, 0x25, 0x06
    program = b"".join(
        struct.pack("<HBBI", *step)
        for step in [
            (load, 0, 0, 0),  # number of the call
            (equal, 0, 5, number),
            (load, 0, 0, 24),  # its second argument: length
            (at_least, 0, 3, least_bytes),
            (above, 2, 0, most_bytes),
            (answer, 0, 0, 0x00050000 | errno.ENOMEM),
            (answer, 0, 0, 0x7FFF0000),  # goes on
            (answer, 0, 0, 0x7FFF0000),
        ]
    )
    steps = ctypes.create_string_buffer(program)
    filters = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(steps))
    call = ctypes.CDLL(None, use_errno=True).prctl
    assert call(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
    assert call(22, 2, ctypes.create_string_buffer(filters), 0, 0) == 0, "PR_SET_SECCOMP"


def start_without_memory(memory_name: str, least_bytes: int, most_bytes: int) -> str:
    """What a start says, in a process of its own, when there is no memory for a dictionary."""
    ours, its = os.pipe()
    if (child := os.fork()) == 0:
        try:
            memory = MemoryFile.open(memory_name)
            refuse_memory(least_bytes, most_bytes)
            Store(memory, allocator="zsmalloc", tidy=False).start()
            os.write(its, b"it started")
        except BaseException as error:
            os.write(its, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(its)
    os.waitpid(child, 0)
    with os.fdopen(ours) as said:
        return said.read()


def test_a_start_without_memory_for_them_is_refused(name: str, rng: random.Random) -> None:
    """Not taken for damage: nothing is lost, and the next start, with memory, finds all."""
    memory = MemoryFile.create(name, PAGES * PAGE, PAGES * PAGE)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    model = fill(store, phrases(rng), rng)
    store.recompress("zstd:3")
    assert any(codec_of(store, page) >= WITH_DICTIONARY for page in model)
    store.stop()
    memory.close()
    # a copy of one as it lies in the file, and the room for reading with one
    for least, most in ((112 << 10, 112 << 10), (113 << 10, 200 << 10)):
        said = start_without_memory(name, least, most)
        assert said == (
            "MemoryFileError: no memory to read recompressed pages with; free some, and start again"
        )
    assert start_without_memory(name, 1, 2) == "it started"
    memory = MemoryFile.open(name)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    store.wait_ready()
    assert all(store.get(page) == data for page, data in model.items())
    assert now(store, "lost_pages") == 0
    assert store.check() == 0
    store.stop()
    memory.destroy()


def child_learns(memory_name: str, common: list[bytes], seed: int, ready_fd: int) -> None:
    """Writes pages that only a dictionary shrinks, and recompresses them, for ever."""
    store = Store(MemoryFile.open(memory_name), allocator="zsmalloc")
    store.start()

    def work(half: int, own: random.Random) -> None:
        while True:
            page = own.randrange(half, PAGES, 2)
            store.put(page, page_of(common, random.Random(page)))

    def dense() -> None:
        while True:
            store.recompress("zstd:1")
            store.compact()

    threading.Thread(target=dense, daemon=True).start()
    in_two_halves(work, seed, ready_fd)


@pytest.mark.timeout(300)
def test_killed_at_any_instant(name: str, rng: random.Random) -> None:
    """While pages go to it and come from it, and others are made: each is there, no frame leaks."""
    programs = [phrases(rng) for _ in range(3)]
    memory = MemoryFile.create(name, PAGES * PAGE, PAGES * PAGE)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    for page in range(PAGES):
        store.put(page, page_of(programs[0], random.Random(page)))
    store.recompress("zstd:1")
    store.stop()
    memory.close()
    for turn in range(16):
        child = partial(child_learns, name, programs[turn // 2 % 3])
        kill_at_random(child, rng, 3 if turn % 4 == 0 else 0.3)
        memory = MemoryFile.open(name)
        store = Store(memory, allocator="zsmalloc", tidy=False)
        store.start()
        store.wait_ready()
        for page in rng.sample(range(PAGES), 200):
            assert store.get(page) in [page_of(one, random.Random(page)) for one in programs]
        assert store.check() == 0
        assert now(store, "lost_pages") == 0
        assert now(store, "dictionaries") > 0
        store.stop()
        memory.close()
    MemoryFile.open(name).destroy()


def test_killed_between_frames_and_row(name: str, rng: random.Random) -> None:
    """What it left are frames that nothing names: free again, and the row is used for another."""
    memory = MemoryFile.create(name, PAGES * PAGE, PAGES * PAGE)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    fill(store, phrases(rng), rng)
    store.recompress("zstd:3")
    assert now(store, "dictionaries") == 1
    store.invalidate(0, PAGES)
    store.stop()
    assert memory.peek(ROWS, 4) != bytes(4)
    memory.poke(ROWS, bytes(4))  # written last
    memory.close()
    memory = MemoryFile.open(name)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    store.wait_ready()
    assert now(store, "dictionaries") == now(store, "dictionary_frames") == 0
    assert store.check() == 0
    model = fill(store, phrases(rng), rng)
    store.recompress("zstd:3")
    assert now(store, "dictionaries") == 1
    assert all(store.get(page) == data for page, data in model.items())
    assert store.check() == 0
    store.stop()
    memory.destroy()


def test_golden_row_and_frames() -> None:
    """Where a dictionary lies in the file, written out by hand: docs/memory-format.md."""
    rng = random.Random(1)
    with opened_store(PAGES * PAGE, PAGES * PAGE, allocator="zsmalloc", tidy=False) as store:
        fill(store, phrases(rng), rng)
        store.recompress("zstd:3")
        memory, offsets = store.memory, store.memory.offsets()
        length, frame, checksum, number = struct.unpack("<4I", memory.peek(ROWS, 16))
        assert (number, memory.peek(ROWS + 16, 48)) == (1, bytes(48))
        found = b""
        for place in range(now(store, "dictionary_frames")):
            head = memory.peek(offsets["frame_headers"] + 24 * frame, 16)
            identity, chained = struct.unpack("<2Q", head)
            assert identity == 13 | place << 4
            found += memory.peek(offsets["arena"] + frame * PAGE, PAGE)
            frame = chained
        assert frame == 0xFFFFFFFF
        assert 0 <= len(found) - length < PAGE
        assert length <= 112 << 10
        assert checksum
        assert found.startswith(b"\x37\xa4\x30\xec"), "RFC 8878, 5"


def test_an_order_without_memory_is_refused(tmp_path: Path, rng: random.Random) -> None:
    """What held before holds; with some memory pages are tried, and nothing is learned."""
    system = System(tmp_path / "zoneinfo")
    memory = MemoryFile.create(None, PAGES * PAGE, PAGES * PAGE)
    store = Store(memory, allocator="zsmalloc", zoneinfo=str(system.path))
    try:
        system.has(free=1 << 20)
        store.start()
        model = fill(store, phrases(rng), rng)
        taken = now(store, "private_table_bytes")
        system.has(free=1126 + 900)  # 3.5 MiB above what the kernel keeps
        store.set_recompress("zstd:1", 1)
        wait_for("the refusal", lambda: now(store, "refused_commands") == 1)
        assert now(store, "recompress_level") == 0
        assert now(store, "private_table_bytes") == taken
        system.has(free=1126 + 4096)
        store.set_recompress("zstd:1", 1)
        wait_for("all pages", lambda: now(store, "recompress_poor") == PAGES)
        assert now(store, "dictionary_trainings") == 0
        system.has(free=0)
        store.set_recompress("zstd:5", 7)
        wait_for("the refusal", lambda: now(store, "refused_commands") == 2)
        wait_for("the old level", lambda: now(store, "recompress_age_s") == 1)
        assert now(store, "recompress_level") == 1
        system.has(free=1 << 20)
        wait_for("a dictionary", lambda: now(store, "recompressed_pages") > PAGES // 2)
        assert all(store.get(page) == data for page, data in model.items())
        assert store.check() == 0
    finally:
        store.stop()
        memory.close()


def test_a_standby_reads_with_no_memory_of_its_own(name: str, rng: random.Random) -> None:
    """All that pages with a dictionary need is there before the file is, whoever made them."""
    memory = MemoryFile.create(name, PAGES * PAGE, PAGES * PAGE)
    store = Store(memory, allocator="zsmalloc", tidy=False)
    store.start()
    model = fill(store, phrases(rng), rng)
    expected = MemoryFile.expect(name)
    assert expected is not None
    successor = Store(expected, allocator="zsmalloc", tidy=False)
    store.recompress("zstd:3")
    store.stop()
    memory.close()
    expected.take(5)
    before = anonymous_kib()
    successor.begin()
    assert anonymous_kib() - before < 64, "a dictionary needs 251, contexts for reading 1152"
    successor.start()
    assert all(successor.get(page) == data for page, data in model.items())
    successor.stop()
    expected.destroy()
