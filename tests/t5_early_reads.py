"""Reads while a successor still rebuilds: answered, and nothing given up that is not counted yet.

The takeover stands still at the first copy below that it finds; meanwhile pages are read whose
copies are gone or damaged.  Then it goes on, and every count is exact.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.peer_helpers import FakeNode, Key, wait_until
from tests.t5_backup import Backed
from tests.t5_backup import fill as fill_both
from tests.t5_peerstore import LOST, PEER, Below, fill
from tests.tiers_helpers import open_file
from zcache_core import counters
from zcache_core.faulty import FaultyTier
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.store import Store
from zcache_core.tiers import Cooling

FOR_EVER_US = 1 << 30
DISK_BYTES = 8 << 20


class Rebuilding:
    """A successor whose takeover waits in the tier below until `go_on`."""

    def __init__(self, name: str, held: dict[Key, bytes], fd: int = -1) -> None:
        self.memory = MemoryFile.open(name)
        self.store = Store(self.memory)
        self.tier = PeerTier(self.memory)
        size = DISK_BYTES if fd >= 0 else 0
        self.cooling = Cooling(self.store, fd, size, False, 50, 40, peers=self.tier, backup=fd >= 0)
        wrap = self.cooling.wrap_disk if fd >= 0 else self.cooling.wrap
        self.faulty = wrap(lambda below: FaultyTier(below, 1))
        self.faulty.set(adopt_delay_us=FOR_EVER_US, spoil=1000 if fd >= 0 else 0)
        self.node = FakeNode(self.tier, self.memory, held=held)
        self.store.start()
        self.cooling.start()
        wait_until(lambda: self.faulty.counts()["delays"] > 0, "it stands still")

    def go_on(self) -> None:
        self.faulty.set()
        self.store.wait_ready()

    def now(self) -> dict[str, int]:
        return counters.read(self.memory)

    def stop(self) -> None:
        self.faulty.set()
        self.cooling.stop()
        self.store.stop()
        self.node.die()


@pytest.fixture
def name(rng: random.Random) -> Iterator[str]:
    name = f"t5early{os.getpid()}x{rng.getrandbits(32)}"
    MemoryFile.create(name, 1024 * PAGE, 256 * PAGE).close()
    yield name
    MemoryFile.open(name).destroy()


def test_a_page_that_no_donor_has(name: str, rng: random.Random) -> None:
    """EIO; it is given up, once, by a read after the takeover."""
    memory = MemoryFile.open(name)
    below = Below(memory)
    fill(below, rng)
    pages = [page for page in range(600) if below.state(page) == PEER]
    lost = rng.sample(pages, 5)
    below.stop()
    memory.close()
    held = {key: sealed for key, sealed in below.node.held.items() if key[1] not in lost}
    again = Rebuilding(name, held)
    try:
        for page in lost:
            with pytest.raises(OSError) as error:  # noqa: PT011
                again.store.get(page)
            assert error.value.errno == errno.EIO
            assert again.store.entry(page)[1] & 0xF == PEER
        assert again.now()["lost_pages"] == 0
        again.go_on()
        assert again.now()["pers_pages_remoted"] >= len(pages)
        for page in lost:
            with pytest.raises(OSError):  # noqa: PT011
                again.store.get(page)
            assert again.store.entry(page)[1] & 0xF == LOST
        assert again.now()["lost_pages"] == len(lost)
        assert again.store.check() == 0
        again.store.invalidate(0, 1024)
        assert again.now()["pers_pages_remoted"] == again.now()["remote_bytes"] == 0
        assert not any(n for _, _, n in again.tier.donors())
    finally:
        again.stop()
        again.memory.close()


def test_a_damaged_copy_on_the_disk(name: str, tmp_path: Path, rng: random.Random) -> None:
    """The peer's is answered; the disk's is given up by a read after the takeover."""
    fd = open_file(tmp_path / "disk", DISK_BYTES)
    memory = MemoryFile.open(name)
    backed = Backed(memory, fd)
    model = fill_both(backed, rng)
    pages = backed.only_below()
    backed.stop()
    memory.close()
    again = Rebuilding(name, backed.node.held, fd)
    try:
        for _ in range(4000):  # (each 64th read is tried on the disk first)
            page = rng.choice(pages)
            assert again.store.get(page) == model[page]
            if again.faulty.counts()["spoiled_gets"] > 3:
                break
        assert again.faulty.counts()["spoiled_gets"] > 3
        assert again.now()["disk_corrupt_pages"] == 0
        again.go_on()
        assert again.store.check() == 0
        again.store.invalidate(0, 1024)
        now = again.now()
        assert now["pers_pages_remoted"] == now["backed_pages"] == now["disk_pages"] == 0
        assert now["disk_live_bytes"] == now["remote_bytes"] == 0
    finally:
        again.stop()
        again.memory.close()
        os.close(fd)
