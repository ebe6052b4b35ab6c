"""What is in RAM is not dropped for copies below that may be gone: empty donors, a disk cut short.

The copies of ephemeral pages are taken away below the store, in all ways; then room is needed.
What was in RAM at that moment is read right afterwards, page by page, and counts stay exact.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.peer_helpers import FakeNode, wait_until
from tests.t5_peerstore import PEER, Below, content
from tests.tiers_helpers import Cold, open_file, wait_for
from zcache_core import counters
from zcache_core.diskfile import open_disk
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.ringside import where_of_rows
from zcache_core.store import Store
from zcache_core.tiers import Cooling

PAGES, POOL, DISK = 1024, 256, 16 << 20
EPHEMERAL = 3


@pytest.fixture
def memory() -> Iterator[MemoryFile]:
    memory = MemoryFile.create(None, PAGES * PAGE, POOL * PAGE)
    yield memory
    memory.close()


@pytest.fixture
def below(memory: MemoryFile) -> Iterator[Below]:
    below = Below(memory)
    yield below
    below.stop()


class Model:
    """What each page is; `lost` were at donors alone when these were emptied."""

    def __init__(self, below: Below, rng: random.Random) -> None:
        self.below, self.rng = below, rng
        self.pages: dict[int, bytes] = {}
        self.lost: set[int] = set()

    def write(self, page: int) -> None:
        data = content(self.rng)
        try:
            self.below.store.put(page, data)
        except OSError as error:
            if error.errno != errno.ENOSPC:  # with that its old content stays
                raise
        else:
            self.pages[page] = data
            self.lost.discard(page)

    def step(self) -> None:
        page = self.rng.randrange(900)
        dice = self.rng.random()
        if dice < 0.7:
            self.write(page)
        elif dice < 0.9:
            self.check(page)
        else:
            self.below.store.invalidate(page)
            self.pages.pop(page, None)
            self.lost.discard(page)

    def check(self, page: int) -> None:
        try:
            assert self.below.store.get(page) == self.pages.get(page, bytes(PAGE)), page
        except OSError as error:
            if error.errno != errno.EIO or page not in self.lost:
                raise  # (some of those may just have been fetched)

    def empty_all_donors(self) -> None:
        """What is at donors alone is lost; nothing else."""
        with self.below.node.lock:
            states = {page: self.below.state(page) for page in self.pages}
        self.below.node.restart_donors_empty()
        # (pages that left RAM in between are looked at again: the donors lived then)
        after = {page for page in self.pages if self.below.state(page) == PEER}
        self.lost |= {page for page, state in states.items() if state == PEER} | after


@pytest.mark.parametrize("told", [False, True])
def test_all_donors_come_back_empty(below: Below, rng: random.Random, told: bool) -> None:
    """Again and again, with and without the node's word that nothing there counts."""
    model = Model(below, rng)
    for _ in range(6):
        for _ in range(900):
            model.step()
        wait_until(lambda: below.now()["eph_zpages"] > 20, "some are in both")
        model.empty_all_donors()
        if told:
            below.node.tell_gone()
            wait_until(below.node.ring.heard, "it is heard")
        else:
            below.cooling.drain()  # all RAM is wanted
            wait_until(lambda: below.now()["rescued_pages"] > 0, "some are kept")
            below.cooling.drain(False)
        for page in range(900):
            model.check(page)
    assert below.now()["rescued_pages"] > 0
    wait_until(lambda: below.store.check() == 0, "index and pool agree")
    below.store.invalidate(0, PAGES)
    wait_until(lambda: not below.node.held, "everything is dropped at the donors")
    assert below.now()["pers_pages_remoted"] == below.now()["remote_bytes"] == 0


def test_no_room_is_made_of_pages_whose_donors_are_away(below: Below, rng: random.Random) -> None:
    """They are in RAM alone then; when the donors are back all go on."""
    model = Model(below, rng)
    while below.now()["eph_zpages"] < 20:
        model.step()
    with below.node.lock:
        below.node.absent |= {0, 1, 2}
        below.node.put_error = errno.ENOSPC
        for row in range(3):
            below.node.ring.tell_row(row, False)
    in_ram = [page for page in model.pages if below.state(page) != PEER]
    below.cooling.drain()  # all RAM is wanted
    # (one that compaction has put beside a page that must stay is in nobody's way)
    wait_until(lambda: below.now()["eph_pageframes"] == 0, "none is called safe")
    assert below.now()["rescued_pages"] > 0
    below.cooling.drain(False)
    for page in in_ram:
        model.check(page)
    with below.node.lock:
        below.node.absent.clear()
        below.node.put_error = 0
    for _ in range(1000):
        model.step()
    for page in range(900):
        model.check(page)
    wait_until(lambda: below.store.check() == 0, "index and pool agree")


@pytest.mark.parametrize("back", [True, False])
def test_no_room_is_made_while_donors_are_under_suspicion(
    below: Below, rng: random.Random, back: bool
) -> None:
    """Nothing is dropped for them, nor given up; when it is known all goes on."""
    model = Model(below, rng)
    while below.now()["eph_zpages"] < 20:
        model.step()
    with below.node.lock:
        below.node.suspect |= {0, 1, 2}
        for row in range(3):
            below.node.ring.tell_row(row, None)
    with_below = {page for page in model.pages if below.state(page) == EPHEMERAL}
    before = below.now()
    below.cooling.drain()  # all RAM is wanted
    ticks = below.node.ring.ticks
    wait_until(lambda: below.node.ring.ticks > ticks + 5, "there was time")
    assert all(below.state(page) == EPHEMERAL for page in with_below)
    assert not below.tier.holds(where_of_rows([0, 1]))
    for name in ("evicted_eph_pageframes", "rescued_pages"):
        assert below.now()[name] == before[name], name
    with below.node.lock:
        if not back:
            below.node.absent |= {0, 1, 2}
            below.node.put_error = errno.ENOSPC
        below.node.suspect.clear()
    wait_until(lambda: below.now()["eph_pageframes"] == 0, "it is known")
    gone, kept = ("evicted_eph_pageframes", "rescued_pages")[:: 1 if back else -1]
    assert below.now()[gone] > before[gone]
    assert below.now()[kept] == before[kept]


def test_who_is_believed_to_live(memory: MemoryFile) -> None:
    """The node's word, and for a while its predecessor's, whichever process began anew."""
    below = Below(memory)
    both, one = where_of_rows([0, 1]), where_of_rows([2])
    try:
        assert not below.tier.holds(where_of_rows([50])), "nobody knows of it"
        wait_until(lambda: below.tier.holds(both) and below.tier.holds(one), "all live")
        wait_until(lambda: below.now()["live_peers"] == 3, "it is noted")
        with below.node.lock:
            below.node.absent |= {1, 2}
        wait_until(lambda: not below.tier.holds(one), "one is away")
        assert below.tier.holds(both), "one of two is enough"
        ticks = below.node.ring.ticks
        wait_until(lambda: below.node.ring.ticks > ticks + 1, "it is noted")
        below.node.die()
        assert below.tier.holds(both)
        below.node = FakeNode(below.tier, memory, absent={1, 2})
        assert below.tier.holds(both)
        assert not below.tier.holds(one), "who was away is not back because nobody knows"
    finally:
        below.stop()
    tier = PeerTier(memory)  # the next server, whose node has met nobody
    assert tier.holds(both)
    assert not tier.holds(one)


def cut(fd: int, size_bytes: int, long_again: bool) -> None:
    os.ftruncate(fd, size_bytes)
    if long_again:
        os.ftruncate(fd, DISK)


def test_a_disk_that_is_cut_short(memory: MemoryFile, tmp_path: Path, rng: random.Random) -> None:
    """What was in RAM when it was noticed stays; also after the file has been made long again."""
    fd = open_file(tmp_path / "disk", DISK)
    cold = Cold(memory, fd, DISK, 50, 40)
    try:
        pages = {page: rng.randbytes(PAGE) for page in range(400)}
        for page, data in pages.items():
            cold.store.put(page, data)
        cold.settle()
        in_both = [page for page in pages if cold.state(page) == "ephemeral"]
        assert len(in_both) > 20
        os.ftruncate(fd, 300 << 10)
        wait_for(lambda: cold.counters()["disk_errno"] == errno.ENODATA)
        wait_for(lambda: cold.counters()["disk_errno"] == 0)
        kept = [page for page in in_both if cold.state(page) == "ephemeral"]
        cold.drain()  # all of it is written anew, and no RAM copy left
        assert cold.counters()["rescued_pages"] > 0
        for page in kept:
            assert cold.store.get(page) == pages[page], page
        assert cold.store.check() == 0
    finally:
        cold.stop()
        os.close(fd)


def test_a_disk_that_was_found_shorter(tmp_path: Path, rng: random.Random) -> None:
    """Cut while no server ran: what the memory file holds in RAM stays."""
    fd = open_file(tmp_path / "disk", DISK)
    name = f"t5rescue{os.getpid()}x{rng.getrandbits(32)}"
    memory = MemoryFile.create(name, PAGES * PAGE, POOL * PAGE)
    try:
        cold = Cold(memory, fd, DISK, 50, 40)
        pages = {page: rng.randbytes(PAGE) for page in range(400)}
        for page, data in pages.items():
            cold.store.put(page, data)
        cold.settle()
        in_both = [page for page in pages if cold.state(page) == "ephemeral"]
        cold.stop()
        memory.close()
        cut(fd, 300 << 10, True)
        memory = MemoryFile.open(name)
        store = Store(memory)
        cooling = Cooling(store, fd, DISK, False, 50, 40, found_bytes=300 << 10)
        store.start()
        cooling.start()
        cooling.drain()
        wait_for(lambda: counters.read(memory)["eph_zpages"] == 0)
        wait_for(lambda: counters.read(memory)["pers_zpages"] == 0)
        for page in in_both:
            assert store.get(page) == pages[page], page
        cooling.stop()
        store.stop()
    finally:
        memory.destroy()
        os.close(fd)


@pytest.mark.parametrize("when", ["while it runs", "before the walk", "between two starts"])
def test_a_cut_outlives_who_noticed_it(tmp_path: Path, rng: random.Random, when: str) -> None:
    """Noticed, or only found, by one server, and room is needed by the next: RAM copies stay."""
    path = tmp_path / "disk"
    name = f"t5rescue{os.getpid()}x{rng.getrandbits(32)}"
    memory = MemoryFile.create(name, PAGES * PAGE, POOL * PAGE)
    disk = open_disk(str(path), DISK)
    parts: list[Cold | Store | Cooling] = []
    try:
        disk.take(memory.epoch, memory.device_bytes)
        cold = Cold(memory, disk.fd, DISK, 50, 40)
        parts.append(cold)
        pages = {page: rng.randbytes(PAGE) for page in range(400)}
        for page, data in pages.items():
            cold.store.put(page, data)
        cold.settle()
        if when == "while it runs":
            os.truncate(path, 300 << 10)
            wait_for(lambda: cold.counters()["disk_errno"] == errno.ENODATA)
            wait_for(lambda: cold.counters()["disk_errno"] == 0)
            assert path.stat().st_size == DISK
            cold.settle()
        in_ram = [page for page in pages if cold.state(page) in ("ram", "ephemeral")]
        cold.stop()
        if when != "while it runs":  # it ended before it noticed
            os.truncate(path, 300 << 10)
        memory.close()
        disk.close()
        if when == "between two starts":  # the first is refused after it has opened the disk
            open_disk(str(path), DISK).close()
            disk = open_disk(str(path), DISK)
            disk.allocate(4 << 20)
            disk.close()
        memory = MemoryFile.open(name)
        disk = open_disk(str(path), DISK)
        disk.take(memory.epoch, memory.device_bytes)
        assert path.stat().st_size == (DISK if when == "while it runs" else 300 << 10)
        found = disk.found_bytes if disk.is_cut else 0
        store = Store(memory)
        cooling = Cooling(store, disk.fd, DISK, False, 50, 40, found_bytes=found)
        parts += [store, cooling]
        store.start()
        cooling.start()
        wait_for(lambda: path.stat().st_size == DISK)
        cooling.drain()
        wait_for(lambda: counters.read(memory)["eph_zpages"] == 0)
        wait_for(lambda: counters.read(memory)["pers_zpages"] == 0)
        for page in in_ram:
            assert store.get(page) == pages[page], page
        assert counters.read(memory)["rescued_pages"] > 20
        cooling.drain(False)
        wait_for(lambda: store.check() == 0)  # (what was read twice may just be moving up)
    finally:
        for part in reversed(parts):
            part.stop()
        memory.destroy()
        disk.close()
