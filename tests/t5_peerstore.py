"""A store over peers, with a node in a thread: moved up, dropped below, lost and counted."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cold_helpers import DISK_BYTES
from tests.core_helpers import PAGE
from tests.gate_helpers import Gate
from tests.peer_helpers import FakeNode, Key, wait_until
from tests.tiers_helpers import open_file
from zcache_core import counters, ringside
from zcache_core.device import Device
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.ringside import rows_of_where, where_of_rows
from zcache_core.store import Store
from zcache_core.tiers import Cooling


class Below:
    """A store over peers, and a disk if there is one."""

    def __init__(
        self, memory: MemoryFile, fd: int = -1, held: dict[Key, bytes] | None = None
    ) -> None:
        self.memory = memory
        self.store = Store(memory)
        self.tier = PeerTier(memory)
        size = DISK_BYTES if fd >= 0 else 0
        self.cooling = Cooling(self.store, fd, size, False, 50, 40, peers=self.tier)
        self.node = FakeNode(self.tier, memory, held=held)
        self.store.start()
        self.cooling.start()

    def stop(self) -> None:
        self.cooling.stop()
        self.store.stop()
        self.node.die()

    def state(self, page: int) -> int:
        return self.store.entry(page)[1] & 0xF

    def now(self) -> dict[str, int]:
        return counters.read(self.memory)


def content(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([900, 2000, 4000])).ljust(PAGE, b"z")


PEER, RAM, LOST = 5, 2, 6


@pytest.mark.parametrize("with_disk", [False, True])
def test_a_store_over_peers(tmp_path: Path, rng: random.Random, with_disk: bool) -> None:
    """More than three pools; every page as a dict has it; also after a restart."""
    fd = open_file(tmp_path / "disk", DISK_BYTES) if with_disk else -1
    name = f"t5peers{os.getpid()}x{rng.getrandbits(32)}"
    memory = MemoryFile.create(name, 1024 * PAGE, 256 * PAGE)
    below = Below(memory, fd)
    model: dict[int, bytes] = {}
    try:
        for _ in range(4000):
            page = rng.randrange(900)
            dice = rng.random()
            if dice < 0.6:
                model[page] = content(rng)
                below.store.put(page, model[page])
            elif dice < 0.9:
                assert below.store.get(page) == model.get(page, bytes(PAGE))
            else:
                below.store.invalidate(page)
                model.pop(page, None)
        assert below.now()["pers_pages_remoted"] > 200
        wait_until(lambda: below.store.check() == 0, "index and pool agree")
        held = below.node.held
        below.stop()
        memory.close()
        memory = MemoryFile.open(name)
        below = Below(memory, fd, held)
        for page in range(900):
            assert below.store.get(page) == model.get(page, bytes(PAGE)), page
        wait_until(lambda: below.store.check() == 0, "index and pool agree")
        now = below.now()
        assert now["lost_pages"] == now["remote_pers_pages_unsucc_get"] == 0
        below.store.invalidate(0, 1024)
        wait_until(lambda: not below.node.held, "everything is dropped at the donors")
        assert below.now()["pers_pages_remoted"] == below.now()["remote_bytes"] == 0
    finally:
        below.stop()
        memory.destroy()
        if fd >= 0:
            os.close(fd)


@pytest.fixture
def below(rng: random.Random) -> Iterator[Below]:
    memory = MemoryFile.create(None, 1024 * PAGE, 256 * PAGE)
    below = Below(memory)
    yield below
    below.stop()
    memory.close()


def fill(below: Below, rng: random.Random, pages: int = 600) -> dict[int, bytes]:
    """Write pages that do not all fit; which are at peers alone afterwards."""
    model = {page: rng.randbytes(PAGE) for page in range(pages)}
    for page, data in model.items():
        below.store.put(page, data)
    wait_until(lambda: any(below.state(p) == PEER for p in model), "pages are at peers")
    return model


def test_read_twice_is_moved_up_and_dropped_below(below: Below, rng: random.Random) -> None:
    model = fill(below, rng, 300)
    below.store.invalidate(150, 150)  # room for them
    page = next(p for p in range(150) if below.state(p) == PEER)
    version = below.store.entry(page)[1] >> 12
    for _ in range(3):
        assert below.store.get(page) == model[page]
    assert below.state(page) == RAM
    wait_until(
        lambda: not any(key[1:] == (page, version) for key in below.node.held), "dropped below"
    )
    wait_until(lambda: below.store.check() == 0, "index and pool agree")


def test_nothing_is_put_while_somebody_may_still_tell_a_drop(
    below: Below, rng: random.Random
) -> None:
    """Who moves a page up tells last that its old copies are dropped: new ones come after that."""
    device = Device(below.store)
    with Gate(2) as gate:
        for page in range(2):
            below.store.put(page, rng.randbytes(2000).ljust(PAGE, b"z"))
        gate.open(1)
        reader = threading.Thread(target=lambda: device.pread(None, gate.memory, 0))
        reader.start()
        gate.wait_for(0)
        for page in range(2, 170):  # above `high`
            below.store.put(page, rng.randbytes(PAGE))
        time.sleep(0.3)  # nothing is measured: time for what must not happen
        assert not below.node.held
        gate.open(0)
        reader.join(20)
        wait_until(lambda: below.node.held, "pages are at peers")


def test_a_page_that_no_donor_has_is_lost_and_counted(below: Below, rng: random.Random) -> None:
    fill(below, rng)
    page = next(p for p in range(600) if below.state(p) == PEER)
    with below.node.lock:
        for key in [key for key in below.node.held if key[1] == page]:
            del below.node.held[key]
    for _ in range(2):
        with pytest.raises(OSError) as error:  # noqa: PT011
            below.store.get(page)
        assert error.value.errno == errno.EIO
    assert below.state(page) == LOST
    assert below.now()["lost_pages"] == 1
    wait_until(lambda: below.store.check() == 0, "index and pool agree")
    below.store.put(page, b"n" * PAGE)
    assert below.store.get(page) == b"n" * PAGE


def test_moved_copies_are_found_at_their_new_place(below: Below, rng: random.Random) -> None:
    model = fill(below, rng)
    node = below.node
    below.store.put(599, b"x" * PAGE)
    found, end = ringside.pages_on_peers(below.memory, 0, 1024, 4096)
    assert end == 1024
    assert len(found) == below.now()["pers_pages_remoted"]
    moved = 0
    for page, version, where, length_codec in found:
        a, b = rows_of_where(where)
        c = 3 - a - b
        with node.lock:
            node.held[c, page, version] = node.held[b, page, version]
            moved += node.ring.moved(page, version, length_codec, where, where_of_rows([b, c]))
    wait_until(lambda: below.now()["remote_moved_pages"] == moved, "all is told")
    wait_until(lambda: len(node.held) == 2 * moved, "the old copies are dropped")
    for page, version, where, _ in found:
        a, b = rows_of_where(where)
        assert ringside.is_counted_on(below.memory, page, version, b)
        assert not ringside.is_counted_on(below.memory, page, version, a)
    assert [n for _, _, n in below.tier.donors()][:3] == [
        sum(key[0] == row for key in node.held) for row in range(3)
    ]
    # told twice: what counts by now is not dropped
    page, version, where, length_codec = found[1]
    a, b = rows_of_where(where)
    with node.lock:
        assert node.ring.moved(page, version, length_codec, where, where_of_rows([b, 3 - a - b]))
    wait_until(node.ring.heard, "it is heard")
    below.store.put(599, b"y" * PAGE)
    wait_until(lambda: node.ring.drops_waiting == 0, "drops are taken")
    assert (3 - a - b, page, version) in node.held
    # what was overwritten meanwhile is not moved
    page, version, where, length_codec = found[0]
    below.store.put(page, model[page])
    with node.lock:
        assert node.ring.moved(page, version, length_codec, where, where_of_rows([0, 1]))
    wait_until(node.ring.heard, "it is heard")
    for p in range(599):
        assert below.store.get(p) == model[p]
    wait_until(lambda: below.store.check() == 0, "index and pool agree")


def test_peers_that_refuse_leave_it_to_the_disk(tmp_path: Path, rng: random.Random) -> None:
    fd = open_file(tmp_path / "disk", DISK_BYTES)
    memory = MemoryFile.create(None, 1024 * PAGE, 256 * PAGE)
    below = Below(memory, fd)
    try:
        below.node.put_error = errno.ENOSPC
        model = {page: rng.randbytes(PAGE) for page in range(600)}
        for page, data in model.items():
            below.store.put(page, data)
        assert below.now()["disk_pages"] > 0
        assert below.now()["pers_pages_remoted"] == 0
        for page, data in model.items():
            assert below.store.get(page) == data
        wait_until(lambda: below.store.check() == 0, "index and pool agree")
    finally:
        below.stop()
        memory.close()
        os.close(fd)
