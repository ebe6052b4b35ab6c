"""Pages held for others: a model in lockstep, restarts, kills at any instant, damage, limits."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.peerwire import RECORD_BYTES, Code, Page, pack, pieces, unpack
from tests.donor_helpers import create_memory, make_pages, make_sealed, opened_donation
from zcache_core import counters
from zcache_core.donation import LEAST_BYTES, OWNERS_MOST, Donation, sizes
from zcache_core.errors import MemoryFileError
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

Key = tuple[int, int, int]  # device, page, version
PAGES = 400


def put(donation: Donation, row: int, pages: list[Page], sealed: list[bytes]) -> list[int]:
    return list(donation.put(row, pack(pages), b"".join(sealed), 1_000_000))


def get(donation: Donation, row: int, pages: list[Page]) -> list[bytes | None]:
    records = pack(pages)
    codes, payload = donation.get(row, records)
    return list(pieces(records, codes, payload))


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))


class Model:
    """What the donation should hold: by owner's name its epoch, by key its page and bytes."""

    def __init__(self, donation: Donation, rng: random.Random) -> None:
        self.donation, self.rng = donation, rng
        self.epochs: dict[str, int] = {}
        self.held: dict[str, dict[Key, tuple[Page, bytes]]] = {}
        self.rows: dict[str, int] = {}
        self.version = 0

    def step(self) -> None:
        name = self.rng.choice("abc")
        if name not in self.rows or self.rng.random() < 0.01:
            self.new_epoch(name)
        self.rng.choice([self.put, self.put, self.get, self.drop, self.list, self.sweep])(name)

    def new_epoch(self, name: str) -> None:
        # now and then one that there was before: its old pages must not come back
        epoch = self.rng.choice([self.rng.getrandbits(64) | 1, self.epochs.get(name, 5), 5])
        if epoch != self.epochs.get(name):
            self.held[name] = {}
        self.epochs[name] = epoch
        row = self.donation.owner(name, epoch, 0)
        assert row is not None
        self.rows[name] = row

    def batch(self, name: str) -> list[Page]:
        known = [page for page, _ in self.held[name].values()]
        some = self.rng.sample(known, min(len(known), self.rng.randrange(20)))
        return [*some, *make_pages(self.rng, 2, self.rng.randrange(PAGES), 1 << 50)]

    def put(self, name: str) -> None:
        self.version += 40
        pages = make_pages(self.rng, self.rng.randrange(1, 33), 0, self.version)
        if self.held[name] and self.rng.random() < 0.2:  # sent again, sealed anew
            pages.append(self.rng.choice(list(self.held[name].values()))[0])
        sealed = [make_sealed(self.rng, page) for page in pages]
        codes = put(self.donation, self.rows[name], pages, sealed)
        for page, data, code in zip(pages, sealed, codes, strict=True):
            assert code in (Code.OK, Code.FULL)
            if code == Code.OK:
                self.held[name][page[:3]] = (page, data)

    def get(self, name: str) -> None:
        pages = self.batch(name)
        for page, data in zip(pages, get(self.donation, self.rows[name], pages), strict=True):
            assert data == self.held[name].get(page[:3], (None, None))[1]

    def drop(self, name: str) -> None:
        pages = self.batch(name)
        there = [page for page in pages if self.held[name].pop(page[:3], None)]
        assert self.donation.drop(self.rows[name], pack(pages)) == len(there)

    def list(self, name: str) -> None:
        cursor: int | None = 0
        found: list[Page] = []
        while cursor is not None:
            cursor, records = self.donation.listing(self.rows[name], cursor, 50)
            found += unpack(records)
        assert sorted(found) == sorted(page for page, _ in self.held[name].values())

    def sweep(self, name: str) -> None:
        self.donation.sweep(self.rng.randrange(1, 2000))

    def verify(self) -> None:
        assert self.donation.check() == 0
        for name, row in self.rows.items():
            self.list(name)
            pages = [page for page, _ in self.held[name].values()]
            if pages:
                assert get(self.donation, row, pages) == [d for _, d in self.held[name].values()]
        told = {name: pages for _, name, _, _, pages, *_ in self.donation.owners()}
        assert told == {name: len(held) for name, held in self.held.items()}


def lives(rng: random.Random, count: int, steps: int) -> None:
    """Lives of one memory file, each ended in order, its successor finding all again."""
    memory = create_memory("model")
    model: Model | None = None
    for _ in range(count):
        donation = Donation(memory)
        donation.start()
        model = model or Model(donation, rng)
        model.donation = donation
        model.verify()
        for _ in range(steps):
            model.step()
        model.verify()
        donation.stop()
        memory.close()
        memory = MemoryFile.open("model")
    memory.destroy()


@pytest.mark.usefixtures("runtime")
def test_model_with_restarts(rng: random.Random) -> None:
    lives(rng, 8, 120)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("runtime")
def test_model_with_many_restarts(rng: random.Random) -> None:
    for _ in range(40):
        lives(rng, 20, 400)


# ---- killed -----------------------------------------------------------------------------


def content(page: int, turn: int) -> tuple[Page, bytes]:
    """What turn `turn` puts for a page, told by both."""
    rng = random.Random(page << 32 | turn)
    length = rng.choice([100, 2000, 4096, rng.randrange(1, 4097)])
    made = Page(0, page, turn, (length - 1) << 4)
    return made, make_sealed(rng, made)


def child_works(notes: mmap.mmap, seed: int, ready_fd: int) -> None:
    """Puts a newer version of a page and drops the one before, for ever; notes each step."""
    donation = Donation(MemoryFile.open("killed"))
    donation.start()
    row = donation.owner("owner", 9, 0)
    assert row is not None
    rng = random.Random(seed)
    os.write(ready_fd, b"r")
    while True:
        page = rng.randrange(PAGES)
        acknowledged, _ = struct.unpack_from("<II", notes, page * 8)
        turn = rng.getrandbits(31) | 1
        struct.pack_into("<I", notes, page * 8 + 4, turn)
        made, sealed = content(page, turn)
        assert put(donation, row, [made], [sealed]) == [Code.OK]
        struct.pack_into("<I", notes, page * 8, turn)
        if acknowledged:
            donation.drop(row, pack([content(page, acknowledged)[0]]))


def one_life(notes: mmap.mmap, rng: random.Random) -> None:
    ready, ready_fd = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            child_works(notes, rng.getrandbits(32), ready_fd)
        finally:
            os._exit(1)
    os.close(ready_fd)
    assert os.read(ready, 1) == b"r", "the child could not take the file over"
    os.close(ready)
    time.sleep(rng.random() ** 2 * 0.03)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the child found something wrong"


def assert_nothing_lost(notes: mmap.mmap) -> int:
    """Every acknowledged page is there; what was under way or dropped late may be. How many."""
    donation = Donation(MemoryFile.open("killed"))
    donation.start()
    try:
        row = donation.owner("owner", 9, 0)
        assert row is not None
        assert donation.check() == 0
        live = {}
        for page in range(PAGES):
            for turn in struct.unpack_from("<II", notes, page * 8):
                if turn:
                    made, sealed = content(page, turn)
                    live[made] = sealed
            if acknowledged := struct.unpack_from("<I", notes, page * 8)[0]:
                made, sealed = content(page, acknowledged)
                assert get(donation, row, [made]) == [sealed], f"page {page}"
        _, records = donation.listing(row, 0, 4 * PAGES)
        dead = []
        for made in unpack(records):  # what the owner's reconcile does
            if live.get(made) is None or made.version != acknowledged_turn(notes, made.page):
                dead.append(made)
            else:
                assert get(donation, row, [made]) == [live[made]]
        if dead:
            assert donation.drop(row, pack(dead)) == len(dead)
        return len(live)
    finally:
        donation.stop()
        donation.memory.close()


def acknowledged_turn(notes: mmap.mmap, page: int) -> int:
    turn: int = struct.unpack_from("<I", notes, page * 8)[0]
    struct.pack_into("<I", notes, page * 8 + 4, turn)
    return turn


@pytest.mark.usefixtures("runtime")
def test_killed_at_any_instant(rng: random.Random) -> None:
    create_memory("killed").close()
    notes = mmap.mmap(-1, PAGES * 8)
    most = 0
    try:
        for _ in range(60):
            one_life(notes, rng)
            most = max(most, assert_nothing_lost(notes))
        assert most > PAGES // 4, "the children did real work"
    finally:
        MemoryFile.open("killed").destroy()


# ---- damage, limits --------------------------------------------------------------------------


def test_damaged_ram_costs_that_page_and_is_told(rng: random.Random) -> None:
    with opened_donation() as donation:
        row = donation.owner("owner", 3, 0)
        assert row is not None
        pages = make_pages(rng, 64)
        sealed = [make_sealed(rng, page) for page in pages]
        assert not any(put(donation, row, pages, sealed))
        memory = donation.memory
        hit = rng.sample([i for i in range(64) if len(sealed[i]) >= 24 + 64], 10)
        arena = memory.peek(memory.offsets()["arena"], 8 << 20)
        for i in hit:
            # the blob's first bytes, wherever it lies
            at = memory.offsets()["arena"] + arena.index(sealed[i][24:][:64])
            memory.poke(at, bytes([memory.peek(at, 1)[0] ^ 1 << rng.randrange(8)]))
        for i, data in enumerate(get(donation, row, pages)):
            assert data == (None if i in hit else sealed[i])
        assert counters.read(memory)["foreign_damaged_pages"] == 10
        assert donation.check() == 0


@pytest.mark.usefixtures("runtime")
def test_damaged_places_cost_only_their_pages(rng: random.Random) -> None:
    """Any flip of up to three bits of a place: its page is not there or damaged, all others are."""
    memory = create_memory("damaged")
    donation = Donation(memory)
    donation.start()
    row = donation.owner("owner", 1 << 63 | 3, 0)
    assert row is not None
    pages = make_pages(rng, 300)
    sealed = [make_sealed(rng, page) for page in pages]
    assert not any(put(donation, row, pages, sealed))
    hit = set(rng.sample(range(300), 60))
    for place in hit:  # the n-th page put has the n-th place
        for _ in range(rng.randrange(1, 4)):
            at = memory.offsets()["index"] + 8192 + 32 * place + rng.randrange(32)
            memory.poke(at, bytes([memory.peek(at, 1)[0] ^ 1 << rng.randrange(8)]))

    def verify(lenient: set[int]) -> None:
        for i, data in enumerate(get(donation, row, pages)):
            assert data == sealed[i] or (data is None and i in lenient)

    verify(hit)
    donation.coldest(600)
    donation.listing(row, 0, 600)
    donation.sweep(1 << 20)
    some = set(range(0, 300, 3))
    gone = donation.drop(row, pack([pages[i] for i in some]))
    assert len(some - hit) <= gone <= len(some)
    for epoch in (8, 1 << 63 | 3):  # over, with what is damaged; and back again, empty
        assert donation.owner("owner", epoch, 0) == row
        donation.sweep(1 << 20)
        assert not any(data for i, data in enumerate(get(donation, row, pages)) if i not in hit)
    assert not any(put(donation, row, pages, sealed))
    some = set()
    donation.stop()
    memory.close()
    memory = MemoryFile.open("damaged")
    donation = Donation(memory)
    donation.start()
    assert donation.owner("owner", 1 << 63 | 3, 0) == row
    verify(hit | some)
    assert donation.drop(row, pack(pages)) >= 300 - len(hit | some)
    donation.owner("owner", 9, 0)
    assert donation.sweep(1 << 20) == 0
    assert put(donation, row, pages, sealed).count(Code.OK) == 300
    donation.stop()
    memory.destroy()


def test_quota_and_full(rng: random.Random) -> None:
    with opened_donation() as donation:
        small, large = donation.owner("small", 1, 0), donation.owner("large", 1, 0)
        assert small is not None
        assert large is not None
        donation.set_quota(small, 40 * 4096)
        pages = [Page(0, i, 1, 4095 << 4) for i in range(100)]
        sealed = [make_sealed(rng, page) for page in pages]
        codes = put(donation, small, pages, sealed)
        assert codes == [Code.OK] * 40 + [Code.FULL] * 60
        assert donation.room(small) == 0
        donation.drop(small, pack(pages[:1]))
        assert put(donation, small, pages[99:], sealed[99:]) == [Code.OK]
        taken = 0
        for first in range(0, 5000, 100):
            more = [page._replace(page=first + page.page) for page in pages]
            taken += put(donation, large, more, sealed).count(Code.OK)
        assert taken == donation.total_frames() - 40
        assert donation.room(large) == 0
        assert get(donation, small, pages[1:40]) == sealed[1:40]
        now = counters.read(donation.memory)
        assert now["committed_frames"] <= now["pool_limit_frames"]
        assert now["ram_bytes"] <= 16 << 20, "everything is in what was lent"
        assert donation.check() == 0


def test_cold_pages_are_told_first(rng: random.Random) -> None:
    with opened_donation() as donation:
        row = donation.owner("owner", 1, 0)
        assert row is not None
        pages = [Page(0, i, 1, 4095 << 4) for i in range(100)]
        assert not any(put(donation, row, pages, [make_sealed(rng, page) for page in pages]))
        donation.coldest(2)  # a whole round: all of them have had their chance
        get(donation, row, pages[:50])
        told = unpack(donation.coldest(50)[row])
        assert len([page for page in told if page.page < 50]) <= 3
        assert donation.check() == 0


def test_rows_run_out_and_come_back() -> None:
    with opened_donation() as donation:
        for i in range(OWNERS_MOST):
            assert donation.owner(f"owner{i}", 1, 0) is not None
        assert donation.owner("one more", 1, 0) is None
        donation.end(5)
        assert donation.owner("one more", 1, 0) == 5


@pytest.mark.usefixtures("runtime")
def test_memory_files_of_the_other_kind_are_refused() -> None:
    own = MemoryFile.create("own", 1 << 20, 8 << 20)
    with pytest.raises(MemoryFileError, match="name another"):
        Donation(own)
    own.destroy()
    lent = create_memory("lent")
    with pytest.raises(MemoryFileError, match="lends"):
        Store(lent)
    lent.destroy()
    with pytest.raises(MemoryFileError, match="lend"):
        sizes(LEAST_BYTES - 1)


def test_record_is_what_the_wire_says() -> None:
    assert len(pack([Page(0, 1, 2, 3)])) == RECORD_BYTES


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    names = [Path(f"/proc/self/task/{t}/comm").read_text() for t in os.listdir("/proc/self/task")]
    assert "zc-commit\n" not in names
