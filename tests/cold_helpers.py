"""What the tests of one cold tier share: a dict as its model, and how tiers are made."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from tests.core_helpers import PAGE
from zcache_core import counters
from zcache_core.coldprobe import BATCH_MOST, ColdProbe
from zcache_core.faulty import FaultyTier
from zcache_core.memfile import MemoryFile

SEGMENT = 1 << 18
DISK_BYTES = 32 * SEGMENT
HEADER = 24
EPOCH = 0xFEDC_BA98_7654_3210

Object = tuple[int, int, int, bytes]  # page, version, length and codec, blob
Maker = Callable[[MemoryFile, int], ColdProbe]


def make_disk(memory: MemoryFile, fd: int) -> ColdProbe:
    return ColdProbe(memory, fd, DISK_BYTES, epoch=EPOCH)


def make_encrypted(memory: MemoryFile, fd: int) -> ColdProbe:
    return ColdProbe(memory, fd, DISK_BYTES, epoch=EPOCH, encrypt=True)


def make_faulty(memory: MemoryFile, fd: int) -> ColdProbe:
    """The faulty tier without a fault is as good as what is below it."""
    probe = make_disk(memory, fd)
    probe.wrap(FaultyTier)
    return probe


DISKS: dict[str, Maker] = {"disk": make_disk, "encrypted": make_encrypted}
MAKERS: dict[str, Maker] = {**DISKS, "faulty": make_faulty}


def head(where: int) -> int:
    """Bytes before the blob: of an encrypted object, counter and tag too."""
    return HEADER + (24 if where & 7 else 0)


def room(where: int, length: int) -> int:
    return (head(where) + length + 7) // 8 * 8


def random_length(rng: random.Random) -> int:
    return rng.choice([1, 2, 7, 8, 9, 4008, 4095, PAGE, PAGE, rng.randrange(1, PAGE + 1)])


def make_object(rng: random.Random, page: int, version: int, length: int = 0) -> Object:
    length = length or random_length(rng)
    return page, version, (length - 1) << 4 | rng.randrange(3), rng.randbytes(length)


class Model:
    """What is alive: version -> object and where it is."""

    def __init__(self, probe: ColdProbe, memory: MemoryFile, rng: random.Random) -> None:
        self.probe, self.memory, self.rng = probe, memory, rng
        self.alive: dict[int, tuple[Object, int]] = {}
        self.next_version = 1
        self.is_full = False  # as the last put found

    def put(self, n: int, length: int = 0) -> int:
        """A batch of n new objects; how many were taken.

        The last of a large batch may be held back, not to make a small write.
        """
        batch = []
        for _ in range(n):
            batch.append(make_object(self.rng, self.rng.randrange(5000), self.next_version, length))
            self.next_version += 1
        good = 0
        answers = self.probe.put(batch)
        for thing, (where, error) in zip(batch, answers, strict=True):
            assert error in (0, errno.ENOSPC, errno.EAGAIN)
            if not error:
                self.alive[thing[1]] = thing, where
                good += 1
        errors = [error for _, error in answers]
        held_back = errors.count(errno.EAGAIN)
        assert errors[good:] == [errno.EAGAIN] * held_back + [errno.ENOSPC] * (n - good - held_back)
        assert held_back == 0 or good > 0, "some of a batch is always taken, if there is room"
        self.is_full = errno.ENOSPC in errors
        return good

    def fill(self, length: int = 0) -> None:
        """Put until it is full."""
        self.is_full = False
        while not self.is_full:
            self.put(BATCH_MOST, length)

    def drop(self, version: int) -> None:
        (_, _, length_codec, blob), where = self.alive.pop(version)
        assert len(blob) == (length_codec >> 4) + 1
        self.probe.drop(where, len(blob))

    def drop_some(self, share: float) -> None:
        for version in [v for v in self.alive if self.rng.random() < share]:
            self.drop(version)

    def resort(self) -> bool:
        """As the tiers do it; whether there was anything worth it."""
        found = self.probe.resort()
        if not found:
            return False
        still = [(o, at) for o, at in found if self.alive.get(o[1]) == (o, at)]
        for first in range(0, len(still), BATCH_MOST):
            piece = still[first : first + BATCH_MOST]
            new = self.probe.put([o for o, _ in piece])
            for (thing, old), (where, error) in zip(piece, new, strict=True):
                assert error in (0, errno.EAGAIN), "there is always room for resorting"
                if error:
                    continue
                self.alive[thing[1]] = thing, where
                self.probe.drop(old, len(thing[3]))
        self.probe.resorted()
        self.probe.tick()
        return True

    def assert_readable(self, share: float = 1.0) -> None:
        for thing, where in self.alive.values():
            if self.rng.random() < share:
                assert self.get(thing, where) == thing[3]

    def get(self, thing: Object, where: int) -> bytes:
        return self.probe.get(thing[0], thing[1], where, thing[2])

    def assert_exact(self) -> None:
        now = counters.read(self.memory)
        assert now["disk_pages"] == len(self.alive)
        live = [0] * (DISK_BYTES // SEGMENT)
        for thing, where in self.alive.values():
            live[where // SEGMENT] += room(where, len(thing[3]))
        assert now["disk_live_bytes"] == sum(live)
        assert [bytes_ for bytes_, _ in self.probe.segments()] == live
        used = sum(state != 0 for _, state in self.probe.segments())
        assert now["disk_segments_used"] == used

    def assert_disjoint(self) -> None:
        end = 0
        places = ((where & ~7, room(where, len(thing[3]))) for thing, where in self.alive.values())
        for where, size in sorted(places):
            assert where >= max(end, SEGMENT), "objects overlap, or lie in the header"
            end = where + size
            assert where // SEGMENT == (end - 1) // SEGMENT
        assert end <= DISK_BYTES


def refused(probe: ColdProbe, page: int, version: int, where: int, length_codec: int) -> int:
    """The errno of a get that must fail."""
    with pytest.raises(OSError) as error:  # noqa: PT011
        probe.get(page, version, where, length_codec)
    return error.value.errno or 0
