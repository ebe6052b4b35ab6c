"""What the disk promises beside the suite of every tier: damage, failure, documented bytes.

Every damage is found at the object it hits and at no other, encrypted or not.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cold_helpers import (
    DISK_BYTES,
    DISKS,
    EPOCH,
    SEGMENT,
    Model,
    head,
    make_disk,
    make_object,
    refused,
    room,
)
from tests.core_helpers import PAGE
from tests.tiers_helpers import open_file, wait_for
from zcache_core import counters
from zcache_core.coldprobe import BATCH_MOST, ColdProbe
from zcache_core.crypt import CIPHER_NAMES, aead
from zcache_core.diskfile import open_disk
from zcache_core.memfile import MemoryFile

MIB = 1 << 20
GOLDEN_CHECK = 0x62  # of the golden object's header, from docs/disk-format.md


@pytest.fixture
def memory() -> Iterator[MemoryFile]:
    memory = MemoryFile.create(None, PAGE, PAGE)
    yield memory
    memory.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = open_file(tmp_path / "disk", DISK_BYTES)
    yield fd
    os.close(fd)


@pytest.fixture
def plain_fd(fd: int) -> Iterator[int]:
    """The same file through the page cache: for reading and damaging single bytes."""
    plain = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    yield plain
    os.close(plain)


@pytest.fixture(params=sorted(DISKS))
def disk(request: pytest.FixtureRequest, memory: MemoryFile, fd: int, rng: random.Random) -> Model:
    return Model(DISKS[request.param](memory, fd), memory, rng)


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
        at = (where & ~7) + disk.rng.randrange(head(where) + len(thing[3]))
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
    for bit in range(head(where) * 8):
        at = (where & ~7) + bit // 8
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
        elif where + room(where, PAGE) <= last // PAGE * PAGE:
            assert disk.get(thing, where) == thing[3]


def test_damage_does_not_stop_cleaning(disk: Model, plain_fd: int) -> None:
    """A segment that cannot be emptied waits; the others get their turn."""
    disk.fill(PAGE)
    hit, where = disk.alive[disk.rng.choice(sorted(disk.alive))]
    number = where // SEGMENT
    os.pwrite(plain_fd, b"\xff" * 16, where & ~7)
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
    small = sorted(disk.alive)
    disk.put(300, PAGE)
    hit = disk.alive[disk.rng.choice(small)]
    for version in small:
        if version != hit[0][1] and disk.rng.random() < 0.5:
            disk.drop(version)
    os.pwrite(plain_fd, b"\xff" * 30, (hit[1] & ~7) + 4)
    os.fdatasync(plain_fd)
    number = hit[1] // SEGMENT
    for version in list(disk.alive):
        if version not in small:
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
    assert {errno.EBADF} <= {error for _, error in answers} <= {errno.EBADF, errno.EAGAIN}
    assert probe.reason == errno.EBADF
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


def test_the_days_limit_is_never_exceeded(disk: Model, memory: MemoryFile) -> None:
    """What would go beyond it is not begun; all counts, cleaning too; the next day begins anew."""
    limit = disk.probe.limit_bytes = 3 * MIB
    assert disk.probe.takes()
    for _ in range(40):
        batch = [make_object(disk.rng, 1, disk.next_version + i, 2000) for i in range(200)]
        answers = disk.probe.put(batch)
        for thing, (where, error) in zip(batch, answers, strict=True):
            assert error in (0, errno.EDQUOT, errno.EAGAIN)
            if not error:
                disk.alive[thing[1]] = thing, where
        disk.next_version += 200
    now = counters.read(memory)
    assert limit - MIB < now["disk_written_bytes"] == now["writeback_day_bytes"] <= limit
    assert now["disk_degraded"] == now["disk_write_errors"] == 0, "no failure of the disk"
    disk.assert_exact()
    disk.assert_readable()
    disk.drop_some(0.8)
    disk.probe.tick()
    assert not disk.resort(), "cleaning writes too"
    assert disk.probe.reason == errno.EDQUOT
    assert counters.read(memory)["writeback_limit_reached"] == 1
    yesterday = int.from_bytes(memory.peek(496, 8), "little") - 1
    memory.poke(496, yesterday.to_bytes(8, "little"))
    assert disk.probe.takes()
    assert disk.probe.reason == 0
    assert disk.resort()
    written = counters.read(memory)["disk_written_bytes"] - now["disk_written_bytes"]
    assert 0 < counters.read(memory)["writeback_day_bytes"] <= written
    disk.probe.limit_bytes = 0
    assert disk.put(200) > 100


def golden_identity(version: int, device: int, place: int) -> int:
    """version (52) check (8) device (4): with the place an extended Hamming code word (128,120)."""
    bits = place | (version << 12 | device) << 64
    data = [bit for bit in range(128) if not 68 <= bit < 76]
    numbers = [number for number in range(1, 128) if number & (number - 1)]
    check = 0
    for bit, number in zip(data, numbers, strict=True):
        check ^= number if bits >> bit & 1 else 0
    # parities by the powers of two, and one more for all 128 bits
    parities = sum((check >> power & 1) << power for power in range(7))
    odd = (bits.bit_count() + parities.bit_count()) & 1
    return version << 12 | device | (parities | odd << 7) << 4


def test_golden_object(memory: MemoryFile, fd: int, plain_fd: int) -> None:
    """Header: version (52) check (8) device (4) | page, checksum (32) | epoch (48) length codec."""
    blob = bytes(range(100))
    checksum = 0x54C9EFB3
    place = (EPOCH & (1 << 48) - 1) << 16 | 99 << 4 | 1
    identity = golden_identity(0x56789, 0, place)
    assert identity == 0x56789000 | GOLDEN_CHECK << 4
    probe = make_disk(memory, fd)
    ((where, error),) = probe.put([(0x1234, 0x56789, 99 << 4 | 1, blob)])
    assert (where, error) == (SEGMENT, 0)
    raw = os.pread(plain_fd, PAGE, SEGMENT)
    golden = struct.pack("<QQQ", identity, 0x1234 << 32 | checksum, place) + blob
    assert raw[: len(golden)].hex() == golden.hex()
    assert raw[len(golden) :] == bytes(PAGE - len(golden)), "padded with zeros to a block"


@pytest.mark.parametrize("cipher", CIPHER_NAMES)
def test_golden_encrypted_object(memory: MemoryFile, fd: int, plain_fd: int, cipher: int) -> None:
    """The cipher's number in place of the checksum; counter, tag, ciphertext."""
    blob = bytes(range(100))
    place = (EPOCH & (1 << 48) - 1) << 16 | 99 << 4 | 1
    probe = ColdProbe(memory, fd, DISK_BYTES, epoch=EPOCH, encrypt=True, cipher=cipher)
    ((where, error),) = probe.put([(0x1234, 0x56789, 99 << 4 | 1, blob)])
    assert (where, error) == (SEGMENT | cipher, 0)
    raw = os.pread(plain_fd, PAGE, SEGMENT)
    golden = struct.pack("<QQQ", golden_identity(0x56789, 0, place), 0x1234 << 32 | cipher, place)
    assert raw[:24].hex() == golden.hex()
    nonce = raw[24:32] + b"\1\0\0\0"
    about = struct.pack("<QQIHBB", EPOCH, 0x56789, 0x1234, 99 << 4 | 1, 0, 1)
    assert aead(cipher, memory.peek(4096, 32), nonce, about, raw[48:148], raw[32:48]) == blob
    assert raw[148:] == bytes(PAGE - 148), "padded with zeros to a block"


@pytest.mark.parametrize("cipher", CIPHER_NAMES)
def test_both_kinds_on_one_disk(
    memory: MemoryFile, fd: int, rng: random.Random, cipher: int
) -> None:
    """encrypt= changed: each object says how it was written; cleaning writes it as is said now."""
    plain = Model(ColdProbe(memory, fd, DISK_BYTES, epoch=EPOCH), memory, rng)
    plain.put(400)
    plain.drop_some(0.4)
    again = MemoryFile.create(None, PAGE, PAGE)
    again.poke(4096, memory.peek(4096, 64))
    probe = ColdProbe(again, fd, DISK_BYTES, epoch=EPOCH, encrypt=True, cipher=cipher)
    both = Model(probe, again, rng)
    for thing, where in plain.alive.values():
        assert probe.adopt(where, len(thing[3]))
    probe.adopted()
    both.alive, both.next_version = plain.alive, plain.next_version
    both.put(400)
    both.assert_exact()
    both.assert_disjoint()
    both.assert_readable()
    assert {where & 7 for _, where in both.alive.values()} == {0, cipher}
    for _ in range(12):
        both.resort()
    both.assert_exact()
    both.assert_readable()
    assert {where & 7 for _, where in both.alive.values()} == {cipher}
    again.close()


def test_golden_header_block(tmp_path: Path) -> None:
    disk = open_disk(str(tmp_path / "disk"), 17 * MIB + 5)
    disk.take(0x1122334455667788, 64 * MIB)
    assert not disk.ours
    disk.close()
    with open(tmp_path / "disk", "rb") as file:
        block = file.read(PAGE)
    golden = b"ZCACHEDK" + bytes.fromhex("02000000 00000400 8877665544332211 0000100100000000")
    assert block == golden + bytes(PAGE - len(golden))
    again = open_disk(str(tmp_path / "disk"), 17 * MIB)
    again.take(0x1122334455667788, 64 * MIB)
    assert again.ours
    again.close()


def test_large_batches_make_large_writes(disk: Model, memory: MemoryFile) -> None:
    """Whole segments, neighbours together; what is left of a batch is held back."""
    for length, n in ((PAGE, 400), (1400, 400), (300, 1000)):
        before = counters.read(memory)
        taken = sum(disk.put(n, length) for _ in range(3))
        now = counters.read(memory)
        written = now["disk_written_bytes"] - before["disk_written_bytes"]
        assert written % SEGMENT == 0
        where = next(iter(disk.alive.values()))[1]
        assert taken * room(where, length) <= written < taken * room(where, length) * 1.02
        assert now["disk_writes"] - before["disk_writes"] <= -(-written // MIB) + 3
        disk.drop_some(1.1)
        disk.probe.tick()
    disk.put(3, PAGE)
    assert counters.read(memory)["disk_written_bytes"] % SEGMENT == 4 * PAGE, "less than a segment"


def test_small_batches_share_a_segment(disk: Model) -> None:
    """Each is written at once, behind the one before; a segment is filled before the next."""
    for _ in range(40):
        disk.put(5, 1500)
    wheres = sorted(where for _, where in disk.alive.values())
    assert wheres[0] // SEGMENT == 1
    assert {where // SEGMENT for where in wheres} == {1, 2}
    disk.assert_exact()
    disk.assert_disjoint()
    disk.assert_readable()
