"""The store against a dict: every page, every order, many threads, and damage on purpose."""

from __future__ import annotations

import errno
import random
import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.core_helpers import PAGE, make_page, opened_store, try_put
from zcache_core import counters
from zcache_core.memfile import MemoryFile
from zcache_core.several import ALLOCATORS
from zcache_core.store import Store

ZEROS = bytes(PAGE)


@pytest.mark.parametrize(
    ("allocator", "codec"),
    [*((name, "lz4") for name in ALLOCATORS), ("zbud", "zstd:1"), ("zbud", "none")],
)
def test_against_a_dict(allocator: str, codec: str, rng: random.Random) -> None:
    """Puts, gets and trims at random, with a pool that is full at times."""
    pages = 3000
    with opened_store(pages * PAGE, 600 * PAGE, codec=codec, allocator=allocator) as store:
        model: dict[int, bytes] = {}
        refused = 0
        for step in range(30000):
            page = rng.randrange(pages)
            dice = rng.random()
            if dice < 0.55:
                data = make_page(rng)
                if try_put(store, page, data):
                    model[page] = data
                else:
                    refused += 1
            elif dice < 0.97:
                assert store.get(page) == model.get(page, ZEROS)
            else:
                n = min(rng.choice([1, 1, 1, 1, 60]), pages - page)
                store.invalidate(page, n)
                for gone in range(page, page + n):
                    model.pop(gone, None)
            if step % 5000 == 0:
                assert store.check() == 0
        for page in range(pages):
            assert store.get(page) == model.get(page, ZEROS)
        assert store.check() == 0
        now = counters.read(store.memory)
        assert now["failed_stores"] == refused > 0
        assert now["logical_bytes"] == len(model) * PAGE
        assert now["committed_frames_max"] <= now["pool_limit_frames"] == 600
        store.invalidate(0, pages)
        assert store.check() == 0
        assert counters.read(store.memory)["logical_bytes"] == 0


class StoreMachine(RuleBasedStateMachine):
    """Hypothesis looks for the shortest way to break a tiny store."""

    pages = st.integers(0, 15)

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryFile.create(None, 16 * PAGE, 4 * PAGE)
        self.store = Store(self.memory)
        self.store.start()
        self.model: dict[int, bytes] = {}

    @rule(page=pages, kind=st.integers(0, 2**32))
    def put(self, page: int, kind: int) -> None:
        data = make_page(random.Random(kind))
        if try_put(self.store, page, data):
            self.model[page] = data

    @rule(page=pages, n=st.integers(1, 16))
    def trim(self, page: int, n: int) -> None:
        n = min(n, 16 - page)
        self.store.invalidate(page, n)
        for gone in range(page, page + n):
            self.model.pop(gone, None)

    @rule()
    def victims_belong_to_pages(self) -> None:
        for frame in self.store.victims(4):
            assert self.store.pages_in_frame(frame)

    @invariant()
    def reads_as_the_model(self) -> None:
        for page in range(16):
            assert self.store.get(page) == self.model.get(page, ZEROS)
        assert self.store.check() == 0

    def teardown(self) -> None:
        self.store.stop()
        self.memory.close()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def stamped(page: int, turn: int, rng: random.Random) -> bytes:
    """A page that tells whose it is: number, turn, and content made from both."""
    head = page.to_bytes(4, "little") + turn.to_bytes(4, "little")
    body = random.Random(page << 32 | turn)
    return (head + body.randbytes(body.choice([0, 8, 300, 2500, 4088])) + bytes(PAGE))[:PAGE]


def test_many_threads_on_the_same_pages(rng: random.Random) -> None:
    """Readers only ever see a whole page of the right number, and turns never go back."""
    pages, threads_each, steps = 64, 2, 4000
    with opened_store(pages * PAGE, 64 * PAGE) as store:
        turn_lock = [threading.Lock() for _ in range(pages)]
        turns = [0] * pages
        problems: list[str] = []

        def write(seed: int) -> None:
            own = random.Random(seed)
            for _ in range(steps):
                page = own.randrange(pages)
                with turn_lock[page]:  # one writer a page, so that turns have an order
                    turns[page] += 1
                    if not try_put(store, page, stamped(page, turns[page], own)):
                        turns[page] -= 1

        def read(seed: int) -> None:
            own = random.Random(seed)
            seen = [0] * pages
            for _ in range(steps * 2):
                page = own.randrange(pages)
                data = store.get(page)
                if data == ZEROS:
                    continue
                turn = int.from_bytes(data[4:8], "little")
                if data != stamped(page, turn, own):
                    problems.append(f"page {page} reads as something never written")
                if turn < seen[page]:
                    problems.append(f"page {page} went back from {seen[page]} to {turn}")
                seen[page] = turn

        jobs = [(f, rng.getrandbits(32)) for f in (write, read) for _ in range(threads_each)]
        threads = [threading.Thread(target=f, args=(seed,)) for f, seed in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        for page in range(pages):
            assert int.from_bytes(store.get(page)[4:8], "little") == turns[page]
        assert store.check() == 0


def test_racing_writers_and_trimmers_leak_nothing(rng: random.Random) -> None:
    """Everybody overwrites everybody: afterwards every page is one that was written."""
    pages = 8
    with opened_store(pages * PAGE, 256 * PAGE) as store:

        def work(seed: int) -> None:
            own = random.Random(seed)
            for turn in range(3000):
                page = own.randrange(pages)
                if own.random() < 0.2:
                    store.invalidate(page)
                else:
                    store.put(page, stamped(page, turn + 1, own))

        threads = [threading.Thread(target=work, args=(rng.getrandbits(32),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for page in range(pages):
            data = store.get(page)
            turn = int.from_bytes(data[4:8], "little")
            assert data in (ZEROS, stamped(page, turn, rng))
        assert store.check() == 0
        assert counters.read(store.memory)["lost_pages"] == 0


def test_refused_write_leaves_the_old_page(rng: random.Random) -> None:
    with opened_store(64 * PAGE, 8 * PAGE) as store:
        old = rng.randbytes(PAGE)
        store.put(0, old)
        for page in range(1, 8):
            store.put(page, rng.randbytes(PAGE))
        with pytest.raises(OSError, match="no room") as refused:
            store.put(0, rng.randbytes(PAGE))
        assert refused.value.errno == errno.ENOSPC
        assert store.get(0) == old
        store.put(0, ZEROS)  # same-filled pages need no room
        store.put(1, rng.randbytes(PAGE))


def test_second_chance_keeps_what_is_read(rng: random.Random) -> None:
    """Frames that are read between two rounds of the hand are not picked."""
    with opened_store(64 * PAGE, 64 * PAGE) as store:
        for page in range(32):
            store.put(page, rng.randbytes(PAGE))
        first = store.victims(32)  # everything is new: one round clears, the next picks
        assert sorted(first) == sorted(set(first))
        hot = set(range(0, 32, 2))
        for page in hot:
            store.get(page)
        picked = {page for frame in store.victims(16) for page in store.pages_in_frame(frame)}
        assert picked == set(range(32)) - hot


@pytest.mark.parametrize("part", ["index", "arena", "frame_headers"])
def test_damage_is_found_and_stays_where_it_is(part: str, rng: random.Random) -> None:
    """One flipped bit anywhere: EIO for the page it hits, or nothing; never wrong bytes."""
    pages = 256
    with opened_store(pages * PAGE, pages * PAGE) as store:
        model = {}
        for page in range(pages):
            model[page] = make_page(rng)
            store.put(page, model[page])
        memory, found = store.memory, 0
        start = memory.offsets()[part]
        length = {"index": pages * 16, "arena": pages * PAGE, "frame_headers": pages * 24}[part]
        for _ in range(400):
            at = start + rng.randrange(length)
            good = memory.peek(at, 1)
            memory.poke(at, bytes([good[0] ^ 1 << rng.randrange(8)]))
            bad = set()
            for page in range(pages):
                try:
                    assert store.get(page) == model[page]
                except OSError as error:
                    assert error.errno == errno.EIO  # noqa: PT017
                    bad.add(page)
            assert len(bad) <= 1
            found += len(bad)
            memory.poke(at, good)
        assert found == counters.read(memory)["corrupt_loads"]
        assert found > {"index": 399, "arena": 100, "frame_headers": 5}[part]
        assert store.check() == 0


def test_damaged_page_can_be_overwritten(rng: random.Random) -> None:
    with opened_store(4 * PAGE, 16 * PAGE) as store:
        store.put(1, rng.randbytes(100) * 40 + bytes(96))
        at = store.memory.offsets()["index"] + 16
        store.memory.poke(at, b"\xff")
        with pytest.raises(OSError, match="damaged"):
            store.get(1)
        store.put(1, b"x" * PAGE)
        assert store.get(1) == b"x" * PAGE
