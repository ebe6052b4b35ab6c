"""backup=disk below a store: one copy at a peer, one on the disk; either may fail, in turn.

The node and its donors are a thread and dicts (peer_helpers), the disk is a file with a tier above
it that fails on command.  Real ones are in t7_backup.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.peer_helpers import FakeNode, Key, wait_until
from tests.tiers_helpers import open_file
from zcache_core import counters, ringside
from zcache_core.errors import ConfigError
from zcache_core.faulty import FaultyTier
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.ringside import is_backed, rows_of_where
from zcache_core.store import Store
from zcache_core.tiers import Cooling

PAGES, POOL = 1024, 256
DISK_BYTES = 8 << 20
DISK_PART = (1 << 39) - 1
DISK, PEER, LOST = 4, 5, 6


class Backed:
    """A store over peers and a disk with a fault switch, backup=disk."""

    def __init__(self, memory: MemoryFile, fd: int, held: dict[Key, bytes] | None = None) -> None:
        self.memory = memory
        self.store = Store(memory)
        self.tier = PeerTier(memory)
        self.cooling = Cooling(
            self.store, fd, DISK_BYTES, False, 50, 40, peers=self.tier, backup=True
        )
        self.disk = self.cooling.wrap_disk(lambda below: FaultyTier(below, 1))
        self.node = FakeNode(self.tier, memory, held=held)
        self.store.start()
        self.cooling.start()

    def stop(self) -> None:
        self.cooling.stop()
        self.store.stop()
        self.node.die()

    def now(self) -> dict[str, int]:
        return counters.read(self.memory)

    def state(self, page: int) -> int:
        return self.store.entry(page)[1] & 0xF

    def copies(self) -> list[tuple[int, int, int, int]]:
        """(page, version, where, length_codec) of all that have one at peers."""
        return ringside.pages_on_peers(self.memory, 0, PAGES, PAGES)[0]

    def only_below(self) -> list[int]:
        return [page for page in range(PAGES) if self.state(page) in (DISK, PEER)]

    def is_backed_up(self) -> bool:
        """Whether every page that left RAM has both copies."""
        now = self.now()
        return now["backup_missing_pages"] == 0 and now["disk_pages"] == now["backed_pages"]

    def is_safe(self) -> bool:
        """Whether every page that left RAM has two copies somewhere."""
        alone = self.node.ring.alone
        return self.now()["backup_missing_pages"] == 0 and alone == 0 and self.has_settled()

    def at_one_peer(self) -> int:
        """Pages that have a copy there and no other."""
        return sum(not is_backed(w) and len(rows_of_where(w)) < 2 for _, _, w, _ in self.copies())

    def has_settled(self) -> bool:
        now = self.now()
        return self.at_one_peer() == 0 and now["disk_pages"] == now["backed_pages"]

    def assert_sound(self) -> None:
        """What is counted is what there is, at donors and in the index."""
        wait_until(lambda: self.is_exact(), "all is counted")
        # while pages leave RAM, one may be counted at one end only; what is wrong stays wrong
        wait_until(lambda: self.store.check() == 0, "index and pool agree")

    def is_exact(self) -> bool:
        with self.node.lock:
            held = set(self.node.held)
            copies, now = self.copies(), self.now()
            known = {(row, p, v) for p, v, where, _ in copies for row in rows_of_where(where)}
            backed = sum(is_backed(where) for _, _, where, _ in copies)
            return known == held and now["backed_pages"] == backed == self.node.ring.backed


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = open_file(tmp_path / "disk", DISK_BYTES)
    yield fd
    os.close(fd)


@pytest.fixture
def backed(fd: int) -> Iterator[Backed]:
    memory = MemoryFile.create(None, PAGES * PAGE, POOL * PAGE)
    below = Backed(memory, fd)
    yield below
    below.stop()
    memory.close()


def fill(backed: Backed, rng: random.Random, pages: int = 700) -> dict[int, bytes]:
    """Far more than the pool holds; every page that left has both copies when it returns."""
    model = {page: rng.randbytes(3000).ljust(PAGE, b"z") for page in range(pages)}
    for page, data in model.items():
        backed.store.put(page, data)
    wait_until(backed.is_backed_up, "all have both copies")
    assert len(backed.only_below()) > pages // 3
    return model


def check(backed: Backed, model: dict[int, bytes]) -> None:
    for page, data in model.items():
        assert backed.store.get(page) == data, page


def test_a_page_has_one_copy_at_a_peer_and_one_on_the_disk(
    backed: Backed, rng: random.Random
) -> None:
    model = fill(backed, rng)
    for _, _, where, _ in backed.copies():
        assert is_backed(where)
        assert len(rows_of_where(where)) == 1
        assert 0 < where & DISK_PART < DISK_BYTES
    check(backed, model)
    backed.assert_sound()
    assert backed.now()["remote_pers_pages_succ_get"] > 0
    backed.store.invalidate(0, PAGES)
    wait_until(lambda: not backed.node.held, "everything is dropped at the donors")
    now = backed.now()
    assert now["backed_pages"] == now["disk_pages"] == now["pers_pages_remoted"] == 0
    assert now["disk_live_bytes"] == now["remote_bytes"] == backed.node.ring.alone == 0


def test_reads_with_every_donor_away_come_from_the_disk(backed: Backed, rng: random.Random) -> None:
    model = fill(backed, rng)
    backed.node.absent = {0, 1, 2}
    check(backed, model)
    assert backed.now()["backup_loads"] > 0
    backed.node.absent = set()
    backed.node.silent = True  # and bounded where nobody answers at all
    check(backed, model)
    backed.node.silent = False
    assert backed.now()["lost_pages"] == 0


def test_reads_with_the_disk_failing_come_from_peers(backed: Backed, rng: random.Random) -> None:
    model = fill(backed, rng)
    backed.disk.set(get_fail=1000)
    check(backed, model)
    backed.disk.set(get_delay_us=2000)  # a slow one is not asked
    check(backed, model)
    assert backed.now()["lost_pages"] == 0
    assert backed.now()["remote_pers_pages_succ_get"] > 0


def test_a_wrong_copy_of_a_peer_is_told_and_the_disk_read(
    backed: Backed, rng: random.Random
) -> None:
    model = fill(backed, rng)
    backed.node.spoil = {0, 1, 2}
    check(backed, model)
    assert backed.now()["remote_corrupt_pages"] > 0
    assert backed.node.wrong_seen > 0, "the node hears who lies"


def test_a_damaged_copy_on_the_disk_is_given_up(backed: Backed, rng: random.Random) -> None:
    """The peer's is the only one then, and the node is told that it needs another."""
    model = fill(backed, rng)
    backed.disk.set(spoil=1000)
    for _ in range(20):
        check(backed, model)
        if backed.node.ring.alone:
            break
    assert backed.now()["disk_corrupt_pages"] == backed.node.ring.alone > 0
    backed.disk.set()
    check(backed, model)
    backed.assert_sound()


def test_parts_on_a_disk_that_is_cut_are_given_up(
    backed: Backed, fd: int, rng: random.Random
) -> None:
    """The next server does not know of the cut: it must not take them for copies."""
    model = fill(backed, rng)
    at_peers = [page for page in range(PAGES) if backed.state(page) == PEER]
    os.ftruncate(fd, 0)
    wait_until(lambda: backed.node.ring.alone > 0, "parts are given up")
    wait_until(lambda: backed.now()["disk_errno"] == 0, "the disk is taken again")
    where = {page: where for page, _, where, _ in backed.copies()}
    assert at_peers
    assert not any(is_backed(where[page]) for page in at_peers)
    wait_until(lambda: backed.node.ring.alone == backed.at_one_peer(), "the node is told of all")
    assert backed.now()["disk_corrupt_pages"] == 0
    check(backed, model)
    assert backed.now()["lost_pages"] == 0
    backed.assert_sound()


class Stuck:
    """A reader of pages, one after the other, until one is inside of a disk that stands."""

    def __init__(self, backed: Backed, pages: list[int]) -> None:
        self._backed, self._pages, self.page = backed, pages, -1
        backed.disk.set(get_delay_us=60_000_000)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        wait_until(lambda: backed.disk.counts()["delays"] > 0, "a read is inside of the disk")

    def _read(self) -> None:
        while self._pages and not self._backed.disk.counts()["delays"]:
            self.page = self._pages.pop()
            self.data = self._backed.store.get(self.page)

    def end(self, **faults: int) -> None:
        """The disk goes on, as it is told; the read is over."""
        self._backed.disk.set(**faults)
        self._thread.join()


def test_a_disk_that_stands_holds_no_further_read(backed: Backed, rng: random.Random) -> None:
    """Now and then the slower one is tried, and so a read is in there: later ones notice."""
    model = fill(backed, rng)
    pages = backed.only_below()
    reader = Stuck(backed, pages)
    time.sleep(0.3)  # so long it may take
    inside = backed.disk.counts()["delays"]
    rest = sorted(pages, reverse=True)  # (as nobody reads ahead)
    assert len(rest) > 128, "the slower one's turn comes, twice"
    for page in rest:
        assert backed.store.get(page) == model[page]
    assert backed.disk.counts()["delays"] == inside
    reader.end()
    assert reader.data == model[reader.page]
    check(backed, model)


def test_a_page_that_changes_while_it_is_read_is_no_damage(
    backed: Backed, rng: random.Random
) -> None:
    model = fill(backed, rng)
    reader = Stuck(backed, backed.only_below())
    with backed.node.lock:  # its donors have not heard yet that the old one is to be dropped
        model[reader.page] = b"n" * PAGE
        backed.store.put(reader.page, model[reader.page])
        backed.disk.set(spoil=1000)
        time.sleep(0.2)  # it finds that wrong, and asks them
    reader.end()
    assert reader.data == model[reader.page]
    assert backed.now()["disk_corrupt_pages"] == 0
    check(backed, model)
    backed.assert_sound()


def test_a_page_that_neither_has_is_lost_and_counted(backed: Backed, rng: random.Random) -> None:
    fill(backed, rng)
    page = backed.only_below()[0]
    backed.disk.set(get_fail=1000)
    backed.node.absent = {0, 1, 2}
    with pytest.raises(OSError):  # noqa: PT011
        backed.store.get(page)
    assert backed.state(page) == PEER, "a disk that cannot be read may have it"
    backed.disk.set(spoil=1000)
    with pytest.raises(OSError) as error:  # noqa: PT011
        backed.store.get(page)
    assert error.value.errno == errno.EIO
    assert backed.state(page) == LOST
    assert backed.now()["lost_pages"] == 1
    backed.store.put(page, b"n" * PAGE)
    assert backed.store.get(page) == b"n" * PAGE


def test_what_peers_do_not_take_stays_on_the_disk_and_goes_there_later(
    backed: Backed, rng: random.Random
) -> None:
    backed.node.put_error = errno.ENOSPC
    model = {page: rng.randbytes(3000).ljust(PAGE, b"z") for page in range(700)}
    for page, data in model.items():
        backed.store.put(page, data)
    assert backed.now()["backed_pages"] == 0
    wait_until(lambda: backed.now()["backup_missing_pages"] > 300, "it is counted")
    backed.node.put_error = 0
    wait_until(backed.is_backed_up, "copies are made from the disk")
    assert backed.now()["backup_renewed_pages"] > 300
    check(backed, model)
    backed.assert_sound()


def test_a_lost_donors_copies_are_made_again_from_the_disk(
    backed: Backed, rng: random.Random
) -> None:
    model = fill(backed, rng)
    before = len(backed.copies())
    backed.node.lose(1)
    wait_until(backed.is_backed_up, "all have both copies again")
    assert len(backed.copies()) >= before
    assert not any(1 in rows_of_where(where) for _, _, where, _ in backed.copies())
    backed.disk.set(get_fail=1000)  # and they are right
    check(backed, model)
    backed.disk.set()
    backed.assert_sound()


def test_a_disk_that_takes_nothing_leaves_it_to_replicas(
    backed: Backed, rng: random.Random
) -> None:
    backed.disk.set(put_fail=1000, put_errno=errno.EIO)
    model = {page: rng.randbytes(3000).ljust(PAGE, b"z") for page in range(700)}
    for page, data in model.items():
        backed.store.put(page, data)
    assert {len(rows_of_where(where)) for _, _, where, _ in backed.copies()} == {2}
    assert backed.now()["disk_pages"] == 0
    wait_until(lambda: backed.node.ring.disk_fails, "the node hears of it")
    check(backed, model)
    backed.disk.set()
    wait_until(lambda: not backed.node.ring.disk_fails, "and of its end")
    backed.assert_sound()


@pytest.mark.timeout(240)
def test_faults_in_turn_against_a_model(fd: int, rng: random.Random) -> None:
    """Overwrites, trims, cleaning; a donor is lost, the disk fails, the owner is restarted."""
    name = f"t5backup{os.getpid()}x{rng.getrandbits(32)}"
    memory = MemoryFile.create(name, PAGES * PAGE, POOL * PAGE)
    backed = Backed(memory, fd)
    model: dict[int, bytes] = {}
    try:
        for turn in range(8):
            for _ in range(3000):
                step(backed, model, rng)
            fault = ("peers", "donor", "disk", "owner")[turn % 4]
            backed.disk.set()
            wait_until(backed.is_safe, "the last failure is mended")
            if fault == "peers":
                backed.node.spoil, backed.node.absent = rng.choice([({0}, set()), (set(), {1})])
            elif fault == "donor":
                backed.node.spoil, backed.node.absent = set(), set()
                backed.node.lose(turn % 3)
                wait_until(backed.is_safe, "its copies are made again")
                backed.node.absent = set()
            elif fault == "disk":
                backed.disk.set(get_fail=1000, put_fail=rng.choice([0, 500, 1000]))
            else:
                held = backed.node.held
                backed.stop()
                memory.close()
                memory = MemoryFile.open(name)
                backed = Backed(memory, fd, held)
        backed.disk.set()
        for page in range(PAGES):
            assert backed.store.get(page) == model.get(page, bytes(PAGE)), page
        backed.assert_sound()
        now = backed.now()
        assert now["lost_pages"] == now["corrupt_loads"] == 0
        assert now["disk_cleaned_bytes"] > 0, "addresses on the disk have changed"
        backed.store.invalidate(0, PAGES)
        wait_until(lambda: not backed.node.held, "nothing leaks at the donors")
        now = backed.now()
        assert now["backed_pages"] == now["disk_pages"] == now["remote_bytes"] == 0
    finally:
        backed.stop()
        memory.destroy()


def step(backed: Backed, model: dict[int, bytes], rng: random.Random) -> None:
    page = rng.randrange(900)
    dice = rng.random()
    if dice < 0.6:
        model[page] = rng.randbytes(rng.choice([2000, 4000, 4000])).ljust(PAGE, b"z")
        backed.store.put(page, model[page])
    elif dice < 0.93:
        assert backed.store.get(page) == model.get(page, bytes(PAGE)), page
    else:
        backed.store.invalidate(page)
        model.pop(page, None)


def test_refused(fd: int) -> None:
    memory = MemoryFile.create(None, PAGES * PAGE, POOL * PAGE)
    store = Store(memory)
    with pytest.raises(ConfigError, match="needs a disk and peers"):
        Cooling(store, fd, DISK_BYTES, backup=True)
    with pytest.raises(ConfigError, match="at most 512 GiB"):
        Cooling(store, fd, 1 << 39, peers=PeerTier(memory), backup=True)
    memory.close()
