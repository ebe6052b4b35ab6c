"""The suite that every cold tier passes, and what only the disk promises.

A dict is the model: what was put and not dropped is there, whole, at its `where`, for
exactly its page and version; the counters tell exactly what is alive.  Sorting anew,
adopting after a restart, and running full lose nothing.  On the disk, every damage is
found at the object it hits and at no other, and the bytes are the documented ones.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.tiers_helpers import wait_for
from zcache_core import counters
from zcache_core.coldprobe import BATCH_MOST, ColdProbe
from zcache_core.diskfile import open_disk
from zcache_core.faulty import FaultyTier
from zcache_core.memfile import MemoryFile

SEGMENT = 1 << 20
DISK_BYTES = 16 * SEGMENT
HEADER = 24
EPOCH = 0xFEDC_BA98_7654_3210

Object = tuple[int, int, int, bytes]  # page, version, length and codec, blob
Maker = Callable[[MemoryFile, int], ColdProbe]


def make_disk(memory: MemoryFile, fd: int) -> ColdProbe:
    return ColdProbe(memory, fd, DISK_BYTES, epoch=EPOCH)


def make_faulty(memory: MemoryFile, fd: int) -> ColdProbe:
    """The faulty tier without a fault is as good as what is below it."""
    probe = make_disk(memory, fd)
    probe.wrap(FaultyTier)
    return probe


MAKERS: dict[str, Maker] = {"disk": make_disk, "faulty": make_faulty}


@pytest.fixture(params=sorted(MAKERS))
def make(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


@pytest.fixture
def memory() -> Iterator[MemoryFile]:
    memory = MemoryFile.create(None, PAGE, PAGE)
    yield memory
    memory.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """An open disk file; O_DIRECT where the file system has it."""
    path = tmp_path / "disk"
    path.touch()
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        fd = os.open(path, os.O_RDWR)
    os.ftruncate(fd, DISK_BYTES)
    yield fd
    os.close(fd)


@pytest.fixture
def plain_fd(fd: int) -> Iterator[int]:
    """The same file through the page cache: for reading and damaging single bytes."""
    plain = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    yield plain
    os.close(plain)


def room(length: int) -> int:
    return (HEADER + length + 7) // 8 * 8


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

    def put(self, n: int, length: int = 0) -> int:
        """A batch of n new objects; how many found room."""
        batch = []
        for _ in range(n):
            batch.append(make_object(self.rng, self.rng.randrange(5000), self.next_version, length))
            self.next_version += 1
        good = 0
        for thing, (where, error) in zip(batch, self.probe.put(batch), strict=True):
            assert error in (0, errno.ENOSPC)
            if not error:
                self.alive[thing[1]] = thing, where
                good += 1
        return good

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
                assert error == 0, "there is always room for resorting"
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
            live[where // SEGMENT] += room(len(thing[3]))
        assert now["disk_live_bytes"] == sum(live)
        assert [bytes_ for bytes_, _ in self.probe.segments()] == live
        used = sum(state != 0 for _, state in self.probe.segments())
        assert now["disk_segments_used"] == used

    def assert_disjoint(self) -> None:
        end = 0
        places = ((where, room(len(thing[3]))) for thing, where in self.alive.values())
        for where, size in sorted(places):
            assert where >= max(end, SEGMENT), "objects overlap, or lie in the header"
            end = where + size
            assert where // SEGMENT == (end - 1) // SEGMENT
        assert end <= DISK_BYTES


@pytest.fixture
def model(make: Maker, memory: MemoryFile, fd: int, rng: random.Random) -> Model:
    return Model(make(memory, fd), memory, rng)


def refused(probe: ColdProbe, page: int, version: int, where: int, length_codec: int) -> int:
    """The errno of a get that must fail."""
    with pytest.raises(OSError) as error:  # noqa: PT011
        probe.get(page, version, where, length_codec)
    return error.value.errno or 0


# ---- every tier ------------------------------------------------------------------------


def test_against_a_model(model: Model) -> None:
    for step in range(250):
        dice = model.rng.random()
        if dice < 0.6:
            model.put(model.rng.choice([0, 1, 3, 40, BATCH_MOST]))
        elif dice < 0.75:
            model.drop_some(model.rng.choice([0.1, 0.6]))
        elif dice < 0.9:
            model.probe.tick()
        else:
            model.resort()
        if step % 25 == 0:
            model.assert_exact()
            model.assert_disjoint()
        model.assert_readable(0.02)
    model.assert_readable()
    model.drop_some(1.1)
    model.probe.tick()
    model.assert_exact()
    assert model.probe.reason == 0


def test_full_refuses_and_loses_nothing(model: Model) -> None:
    while model.put(200, PAGE) == 200:
        pass
    assert not model.probe.has_room(SEGMENT)
    assert model.put(10, PAGE) == 0
    assert model.probe.reason == 0, "full is no failure"
    model.assert_exact()
    model.assert_readable(0.2)
    model.drop_some(1.1)
    model.probe.tick()
    assert model.probe.has_room(SEGMENT)
    assert model.put(200, PAGE) == 200
    model.assert_exact()


@pytest.mark.parametrize("length", [PAGE, 1500, 9])
def test_resorting_makes_room_again(model: Model, length: int) -> None:
    """However thin what is left is spread, sorting gathers it; tiny objects too."""
    while model.put(BATCH_MOST, length) == BATCH_MOST:
        pass
    model.drop_some(0.5)
    model.probe.tick()
    rounds = 0
    while not model.probe.has_room(4 * SEGMENT):
        assert model.resort()
        rounds += 1
        assert rounds < 40
    model.assert_exact()
    model.assert_readable(0.1 if length < 100 else 1)


def test_resorting_comes_to_an_end(model: Model) -> None:
    """A tier where nothing is dead finds nothing to do, sooner or later."""
    while model.put(BATCH_MOST, PAGE) == BATCH_MOST:
        pass
    rounds = 0
    while model.resort():
        rounds += 1
        assert rounds < 100
    model.assert_exact()


def test_wrong_identity_is_refused(model: Model) -> None:
    model.put(100)
    other = model.alive[7]
    for (page, version, length_codec, blob), where in list(model.alive.values()):
        assert refused(model.probe, page, version + 1, where, length_codec) == errno.EILSEQ
        assert refused(model.probe, page ^ 1, version, where, length_codec) == errno.EILSEQ
        assert refused(model.probe, page, version, where, length_codec ^ 0xF) == errno.EILSEQ
        if len(blob) > 1:
            short = length_codec - 16
            assert refused(model.probe, page, version, where, short) == errno.EILSEQ
        if where != other[1]:
            assert refused(model.probe, page, version, other[1], length_codec) == errno.EILSEQ
        assert refused(model.probe, page, version, where + 4, length_codec) == errno.EILSEQ
    for where in (0, DISK_BYTES - 8, DISK_BYTES, 1 << 47):
        assert refused(model.probe, 1, 1, where, 0xFFF0) == errno.EILSEQ
    model.assert_readable()


def test_adopted_after_a_restart(
    make: Maker, memory: MemoryFile, fd: int, rng: random.Random
) -> None:
    old = Model(make(memory, fd), memory, rng)
    for _ in range(6):
        old.put(300)
        old.drop_some(0.3)
    alive = old.alive
    again = MemoryFile.create(None, PAGE, PAGE)
    new = Model(make(again, fd), again, rng)
    for thing, where in alive.values():
        assert new.probe.adopt(where, len(thing[3]))
    new.alive, new.next_version = alive, old.next_version
    for where in (0, 8, SEGMENT - 8, SEGMENT + 4, 2 * SEGMENT - 8, DISK_BYTES, 1 << 47):
        assert not new.probe.adopt(where, PAGE), where
    new.probe.adopted()
    new.assert_exact()
    new.assert_readable()
    while new.put(200) == 200:  # nothing living is written over
        pass
    new.assert_disjoint()
    new.assert_readable()
    again.close()


# ---- the disk -----------------------------------------------------------------------------


@pytest.fixture
def disk(memory: MemoryFile, fd: int, rng: random.Random) -> Model:
    return Model(make_disk(memory, fd), memory, rng)


def test_another_life_of_the_disk(disk: Model, memory: MemoryFile, fd: int) -> None:
    disk.put(50)
    for epoch in (EPOCH + 1, EPOCH ^ 1 << 47, 0):
        other = ColdProbe(memory, fd, DISK_BYTES, epoch=epoch)
        for (page, version, length_codec, _), where in disk.alive.values():
            assert refused(other, page, version, where, length_codec) == errno.EILSEQ


def test_flipped_bits_hit_their_object_only(disk: Model, plain_fd: int) -> None:
    disk.put(60)
    found = 0
    for _ in range(300):
        thing, where = disk.rng.choice(list(disk.alive.values()))
        at = where + disk.rng.randrange(HEADER + len(thing[3]))
        good = os.pread(plain_fd, 1, at)
        os.pwrite(plain_fd, bytes([good[0] ^ 1 << disk.rng.randrange(8)]), at)
        os.fdatasync(plain_fd)
        for other, place in disk.alive.values():
            if place == where:
                assert refused(disk.probe, *other[:2], place, other[2]) == errno.EILSEQ
                found += 1
            elif disk.rng.random() < 0.1:
                assert disk.get(other, place) == other[3]
        os.pwrite(plain_fd, good, at)
        os.fdatasync(plain_fd)
    assert found == 300
    disk.assert_readable()


def test_every_header_bit_counts(disk: Model, plain_fd: int) -> None:
    disk.put(1, 100)
    ((thing, where),) = disk.alive.values()
    for bit in range(HEADER * 8):
        at = where + bit // 8
        good = os.pread(plain_fd, 1, at)
        os.pwrite(plain_fd, bytes([good[0] ^ 1 << bit % 8]), at)
        os.fdatasync(plain_fd)
        assert refused(disk.probe, *thing[:2], where, thing[2]) == errno.EILSEQ, bit
        os.pwrite(plain_fd, good, at)
    os.fdatasync(plain_fd)
    disk.assert_readable()


def test_truncated_file(disk: Model, fd: int) -> None:
    disk.put(400, PAGE)
    last = max(where for _, where in disk.alive.values())
    os.ftruncate(fd, last // PAGE * PAGE)
    for thing, where in disk.alive.values():
        if where == last:
            assert refused(disk.probe, *thing[:2], where, thing[2]) == errno.EIO
        elif where + room(PAGE) <= last // PAGE * PAGE:
            assert disk.get(thing, where) == thing[3]


def test_damage_does_not_stop_cleaning(disk: Model, plain_fd: int) -> None:
    """A segment that cannot be emptied waits; the others get their turn."""
    while disk.put(200, PAGE) == 200:
        pass
    hit, where = disk.alive[disk.rng.choice(sorted(disk.alive))]
    number = where // SEGMENT
    os.pwrite(plain_fd, b"\xff" * 16, where)
    os.fdatasync(plain_fd)
    for version in list(disk.alive):
        inside = disk.alive[version][1] // SEGMENT == number
        if version != hit[1] and (inside or disk.rng.random() < 0.4):
            disk.drop(version)
    disk.probe.tick()
    rounds = 0
    while not disk.probe.has_room(4 * SEGMENT):
        disk.resort()
        rounds += 1
        assert rounds < 60, "one bad object must not keep all others from being cleaned"
    assert disk.alive[hit[1]][1] == where
    disk.assert_exact()


def test_damage_hides_no_neighbours(disk: Model, plain_fd: int) -> None:
    """Sorting finds all other objects of a segment with a damaged one."""
    disk.put(BATCH_MOST, 200)
    disk.put(300, PAGE)  # closes the first segment
    hit = disk.alive[disk.rng.randrange(1, BATCH_MOST)]
    os.pwrite(plain_fd, b"\xff" * 30, hit[1] + 4)
    os.fdatasync(plain_fd)
    number = hit[1] // SEGMENT
    for version in list(disk.alive):
        if version > BATCH_MOST:
            disk.drop(version)
    told = {o[1] for o, _ in disk.probe.resort()}
    inside = {v for v, (_, where) in disk.alive.items() if where // SEGMENT == number}
    assert told >= inside - {hit[0][1]}
    assert hit[0][1] not in told
    disk.probe.resorted()


def test_write_failure_degrades_and_recovers(memory: MemoryFile, tmp_path: Path) -> None:
    """A read-only descriptor fails every write; reads go on, and counts stay exact."""
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(DISK_BYTES)
    read_only = os.open(path, os.O_RDONLY)
    read_write = os.open(path, os.O_RDWR)
    swap = os.dup(read_write)
    probe = ColdProbe(memory, swap, DISK_BYTES, epoch=EPOCH)
    rng = random.Random(1)
    ((where, error),) = probe.put([make_object(rng, 1, 1, 500)])
    assert error == 0
    first = probe.segments()
    os.dup2(read_only, swap)
    answers = probe.put([make_object(rng, 2, 2 + i) for i in range(300)])
    assert {error for _, error in answers} == {errno.EBADF} == {probe.reason}
    assert counters.read(memory)["disk_degraded"] == 1
    assert [live for live, _ in probe.segments()] == [live for live, _ in first]
    began_s = time.monotonic()
    for _ in range(100):
        assert {error for _, error in probe.put([make_object(rng, 3, 400)])} == {errno.EBADF}
    tries_most = 2 + (time.monotonic() - began_s) / 0.1  # the first waits are 0.1 s, 0.2 s, ...
    assert counters.read(memory)["disk_write_errors"] <= tries_most, "not tried again at once"
    os.dup2(read_write, swap)
    where_after: list[int] = []

    def goes_on() -> bool:
        ((after, error),) = probe.put([make_object(rng, 3, 401, 10)])
        where_after.append(after)
        return error == 0

    wait_for(goes_on)
    after = where_after[-1]
    assert probe.reason == 0
    assert after // SEGMENT != where // SEGMENT, "a segment that failed is not written again"
    for open_fd in (read_only, read_write, swap):
        os.close(open_fd)


def test_golden_object(disk: Model, plain_fd: int) -> None:
    """header: version (52) device (8) 0 (4) | page (32) checksum (32) | epoch (48) length codec."""
    blob = bytes(range(100))
    checksum = 0x54C9EFB3
    place = (EPOCH & (1 << 48) - 1) << 16 | 99 << 4 | 1
    ((where, error),) = disk.probe.put([(0x1234, 0x56789, 99 << 4 | 1, blob)])
    assert (where, error) == (SEGMENT, 0)
    raw = os.pread(plain_fd, PAGE, SEGMENT)
    golden = struct.pack("<QQQ", 0x56789 << 12, 0x1234 << 32 | checksum, place) + blob
    assert raw[: len(golden)].hex() == golden.hex()
    assert raw[len(golden) :] == bytes(PAGE - len(golden)), "padded with zeros to a block"


def test_golden_header_block(tmp_path: Path) -> None:
    disk = open_disk(str(tmp_path / "disk"), 17 * SEGMENT + 5)
    disk.take(0x1122334455667788, 64 * SEGMENT)
    assert not disk.ours
    disk.close()
    with open(tmp_path / "disk", "rb") as file:
        block = file.read(PAGE)
    golden = b"ZCACHEDK" + bytes.fromhex("01000000 00001000 8877665544332211 0000100100000000")
    assert block == golden + bytes(PAGE - len(golden))
    again = open_disk(str(tmp_path / "disk"), 17 * SEGMENT)
    again.take(0x1122334455667788, 64 * SEGMENT)
    assert again.ours
    again.close()
