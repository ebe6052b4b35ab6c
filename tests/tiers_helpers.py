"""A store with a small pool over a disk: what the tests of the tiers share."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.core_helpers import PAGE
from zcache_core import counters
from zcache_core.faulty import FaultyTier
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store
from zcache_core.tiers import Cooling

STATES = ("empty", "same", "ram", "ephemeral", "disk", "peer", "lost")


def open_file(path: Path, size_bytes: int) -> int:
    """A disk file of that size, O_DIRECT where the file system has it."""
    path.touch()
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        fd = os.open(path, os.O_RDWR)
    os.ftruncate(fd, size_bytes)
    return fd


class Cold:
    """A started store with its cooling thread, and a faulty tier between it and the disk."""

    def __init__(
        self,
        memory: MemoryFile,
        fd: int,
        disk_bytes: int,
        high: int = 90,
        low: int = 80,
        seed: int = 0,
        allocator: str = "zbud",
        tidy: bool = True,
    ) -> None:
        self.memory = memory
        self.store = Store(memory, allocator=allocator, tidy=tidy)
        self.cooling = Cooling(self.store, fd, disk_bytes, False, high, low)
        self.faulty = self.cooling.wrap(lambda below: FaultyTier(below, seed))
        self.store.start()
        self.cooling.start()

    def stop(self) -> None:
        """Stop the threads; harmless when done before."""
        self.cooling.stop()
        self.store.stop()

    def counters(self) -> dict[str, int]:
        return counters.read(self.memory)

    def state(self, page: int) -> str:
        """In which state the entry of a page is."""
        return STATES[self.store.entry(page)[1] & 0xF]

    def where(self, page: int) -> int:
        return self.store.entry(page)[0] >> 16

    def settle(self) -> None:
        """Wait until the cooling thread has nothing more to do (bounded)."""
        watched = ("written_back_pages", "evicted_eph_pageframes", "disk_written_bytes")
        quiet = 0
        before: list[int] = []
        for _ in range(1600):
            counters = self.counters()
            now = [counters[name] for name in watched]
            under_way = counters["outstanding_writeback_pages"] > 0
            quiet = quiet + 1 if now == before and not under_way else 0
            if quiet == 12:
                return
            before = now
            time.sleep(0.025)
        raise AssertionError("the cooling thread never comes to rest")

    def drain(self) -> None:
        """Everything below, no RAM copy; then back to normal."""
        self.cooling.drain()
        wait_for(lambda: self.counters()["pers_zpages"] + self.counters()["eph_zpages"] == 0)
        self.cooling.drain(False)

    def live_bytes(self) -> int:
        """Bytes of the disk that the index counts on."""
        total = 0
        for page in range(self.memory.device_bytes // PAGE):
            location, version = self.store.entry(page)
            if STATES[version & 0xF] in ("ephemeral", "disk"):
                total += (24 + (location >> 4 & 0xFFF) + 1 + 7) // 8 * 8
        return total

    def assert_sound(self) -> None:
        """Every invariant and the exact accounting, at a quiet moment.

        What is still on its way may be counted at one end only; what is lost stays wrong.
        """
        self.settle()
        with contextlib.suppress(AssertionError):
            wait_for(self.is_sound)
        self.assert_sound_now()

    def is_sound(self) -> bool:
        exact = self.counters()["disk_live_bytes"] == self.live_bytes()
        return exact and self.store.check() == 0

    def assert_sound_now(self) -> None:
        """The same, when nothing can be going on."""
        assert self.store.check() == 0
        assert self.counters()["disk_live_bytes"] == self.live_bytes()


def wait_for(done: Callable[[], bool], seconds: float = 30) -> None:
    """Poll until it is so; fail when it never is."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@contextmanager
def cold_store(
    folder: Path,
    device_bytes: int,
    pool_bytes: int,
    disk_bytes: int,
    high: int = 90,
    low: int = 80,
    seed: int = 0,
    allocator: str = "zbud",
    tidy: bool = True,
) -> Iterator[Cold]:
    """All of it on a fresh memory file and disk file; gone after."""
    fd = open_file(folder / "disk", disk_bytes)
    memory = MemoryFile.create(None, device_bytes, pool_bytes)
    cold = Cold(memory, fd, disk_bytes, high, low, seed, allocator, tidy)
    try:
        yield cold
    finally:
        cold.stop()
        memory.close()
        os.close(fd)


def noise(rng: random.Random) -> bytes:
    """A page that does not compress."""
    return rng.randbytes(PAGE)


def errno_of(call: Callable[..., object], *arguments: object) -> int:
    """0, or the errno that a call fails with: ENOSPC or EIO; anything else is raised."""
    try:
        call(*arguments)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        return error.errno
    return 0
