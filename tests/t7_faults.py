"""A real server over a medium that fails: errors from the kernel, stalls, flipped bits, no room.

The medium is `FaultyDisk`: a file whose reads and writes go through nbdkit's error filter, below
FUSE.  What is demanded, whatever it does:

    read    the content last acknowledged, or EIO for a page whose only copy the medium holds back
    write   done, or ENOSPC with the old content in place
    counts  as many damaged pages found as were damaged
    after   with the medium well again everything is there that was not damaged on it
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests import faulty_disk
from tests.faulty_disk import FaultyDisk
from tests.plugin_helpers import Server, wait_for
from tests.t7_disk import (
    MIB,
    PAGE,
    PIECE,
    assert_holds,
    broken_pages,
    fill,
    in_ram,
    piece,
    read_page,
)

pytestmark = pytest.mark.skipif(bool(faulty_disk.missing()), reason=faulty_disk.missing())

DISK_BYTES = 64 * MIB
SEGMENT = 1 << 18
HEADER = struct.Struct("<QIIQ")
# A disk too small to promise anything: no room is taken ahead, and a write may be refused.
SMALL = ("size=64M", "pool=4M", "disk_size=64M")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    folder = tmp_path / "medium"
    folder.mkdir()
    with FaultyDisk(folder, DISK_BYTES) as disk:
        yield disk


@pytest.fixture
def server(tmp_path: Path, disk: FaultyDisk) -> Iterator[Server]:
    with Server(tmp_path, *SMALL, f"disk={disk.path}") as server:
        yield server


def errno_of_write(handle: Any, data: bytes, offset: int) -> str:
    """ "" when it was written."""
    try:
        handle.pwrite(data, offset)
    except nbd.Error as error:
        return str(error.errno)
    return ""


def write_in_the_end(handle: Any, data: bytes, page: int) -> None:
    """The disk is well again: it may take a moment until that is found out."""
    wait_for("room", lambda: not errno_of_write(handle, data, page * PAGE))


def go_down(server: Server) -> int:
    """Everything to the disk, nothing left in RAM; how many pages that is."""
    server.rpc("drain")
    wait_for("an empty RAM", lambda: in_ram(server) == 0)
    server.rpc("drain", False)
    return int(server.rpc("stats")["disk_pages"])


def reasons(server: Server) -> str:
    return "; ".join(reason["what"] for reason in server.rpc("health")["reasons"])


# ---- one fault at a time -------------------------------------------------------------------------


def write_until_refused(handle: Any, rng: random.Random, pages: range) -> dict[int, bytes]:
    """Pages of noise, until the third that is refused; those that were acknowledged."""
    written = {}
    refused = 0
    for page in pages:
        data = rng.randbytes(PAGE)
        error = errno_of_write(handle, data, page * PAGE)
        assert error in ("", "ENOSPC")
        refused += bool(error)
        if not error:
            written[page * PAGE] = data
        elif refused == 3:
            return written
    raise AssertionError("all of these pages have found room")


def test_writes_fail_and_work_again(server: Server, disk: FaultyDisk, rng: random.Random) -> None:
    handle = server.connect()
    written = fill(handle, rng, 16 * MIB)
    disk.fail_writes(True)
    more = write_until_refused(handle, rng, range(4096, 4096 + 2048))
    stats = server.rpc("stats")
    assert stats["disk_degraded"] == 1
    assert os.strerror(stats["disk_errno"]) == "Input/output error"
    assert stats["disk_write_errors"] > 0
    assert "Input/output error" in reasons(server)
    assert_holds(handle, written | more)  # reads work all the while
    disk.fail_writes(False)
    for page in range(4096, 4096 + 2048):
        write_in_the_end(handle, more.setdefault(page * PAGE, rng.randbytes(PAGE)), page)
    assert_holds(handle, written | more)
    stats = server.rpc("stats")
    assert stats["disk_degraded"] == stats["disk_errno"] == 0
    assert stats["disk_read_errors"] == stats["disk_corrupt_pages"] == stats["lost_pages"] == 0
    assert "Input/output error" not in reasons(server)


def test_reads_fail_and_work_again(server: Server, disk: FaultyDisk, rng: random.Random) -> None:
    """EIO for exactly the pages that only the disk has, each counted; none of them is lost."""
    handle = server.connect()
    written = fill(handle, rng, 24 * MIB)
    on_disk = go_down(server)
    disk.fail_reads(True)
    assert broken_pages(handle, written) == on_disk == server.rpc("stats")["disk_read_errors"]
    assert server.rpc("health")["status"] == "critical"
    first = next(at for at in written if read_page(handle, at) is None)
    assert errno_of_write(handle, b"half a page" * 100, first) == "EIO"  # its other half is unknown
    written[PIECE] = piece(rng)
    handle.pwrite(written[PIECE], PIECE)  # whole pages need nothing from below
    disk.fail_reads(False)
    assert_holds(handle, written)
    assert server.rpc("stats")["disk_corrupt_pages"] == 0


Place = tuple[int, int]  # offset and bytes of an object on the medium


def objects(disk: FaultyDisk) -> dict[int, list[Place]]:
    """Page -> its newest version on the medium, by docs/disk-format.md; twice if it was moved."""
    medium = disk.backing.read_bytes()
    epoch = struct.unpack_from("<Q", medium, 16)[0] & (1 << 48) - 1
    newest: dict[int, tuple[int, list[Place]]] = {}
    for start in range(SEGMENT, len(medium), SEGMENT):
        at = start
        while at + HEADER.size <= start + SEGMENT:
            identity, _, page, place = HEADER.unpack_from(medium, at)
            if not identity or place >> 16 != epoch:
                at = at // PAGE * PAGE + PAGE  # padding; the next write begins at a block
                continue
            length = HEADER.size + (place >> 4 & 0xFFF) + 1
            version, places = newest.get(page, (0, []))
            if identity >> 12 >= version:
                same = places if identity >> 12 == version else []
                newest[page] = identity >> 12, [*same, (at, length)]
            at += (length + 7) // 8 * 8
    return {page: places for page, (_, places) in newest.items()}


def flip_one(disk: FaultyDisk, rng: random.Random, places: list[Place]) -> None:
    """One bit of each of these objects."""
    for at, length in places:
        bit = rng.randrange(length * 8)
        disk.flip(at + bit // 8, bit % 8)


def test_as_many_are_found_as_were_damaged(
    server: Server, disk: FaultyDisk, rng: random.Random
) -> None:
    handle = server.connect()
    written = fill(handle, rng, 24 * MIB)
    on_disk = go_down(server)
    found = objects(disk)
    assert len(found) == on_disk, "the medium holds what the server says"
    hit = rng.sample(sorted(found), 100)
    with disk.frozen():
        for page in hit:
            flip_one(disk, rng, found[page])
    assert broken_pages(handle, written) == len(hit)
    assert server.rpc("stats")["disk_corrupt_pages"] == len(hit)
    assert {page for page in found if read_page(handle, page * PAGE) is None} == set(hit)
    for page in hit:
        at = page * PAGE // PIECE * PIECE
        handle.pwrite(written[at], at)
    assert_holds(handle, written)
    assert server.rpc("stats")["disk_read_errors"] == server.rpc("stats")["lost_pages"] == 0


def test_a_stalled_disk_stops_only_who_needs_it(
    server: Server, disk: FaultyDisk, rng: random.Random
) -> None:
    """Every answer below comes while the disk hangs, but for the one that only it can give."""
    handle = server.connect()
    written = fill(handle, rng, 16 * MIB)
    go_down(server)
    recent = {24 * MIB: rng.randbytes(PIECE)}
    handle.pwrite(recent[24 * MIB], 24 * MIB)  # in RAM
    read: list[bytes] = []
    # one word that fills a page needs no disk
    below = next(at for at, data in written.items() if data[:8] != data[8:16])
    waiting = threading.Thread(target=lambda: read.append(server.connect().pread(PIECE, below)))
    with disk.frozen():
        waiting.start()
        assert_holds(handle, recent)
        assert server.ping()
        more = write_until_refused(handle, rng, range(8192, 8192 + 1200))
        assert_holds(handle, recent | more)
        # It waits, unless what it asks for was still in a cache between us and the disk.
        assert waiting.is_alive() or read == [written[below]]
        wait_for("a stall", lambda: server.rpc("stats")["disk_stalled_us"] > 2_000_000)
        assert any("not finished its writes" in r["what"] for r in server.rpc("health")["reasons"])
    waiting.join()
    assert read == [written[below]]
    assert_holds(handle, written | recent | more)
    write_in_the_end(handle, rng.randbytes(PAGE), 8192)
    assert server.rpc("stats")["disk_degraded"] == server.rpc("stats")["disk_read_errors"] == 0


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB and a bit, so that the last write to it is cut short."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12596k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_file_system_and_room_again(tmp_path: Path, full: Path, rng: random.Random) -> None:
    """Real ENOSPC, behind a write that the kernel cuts short."""
    with Server(tmp_path, *SMALL, f"disk={full / 'disk'}") as server:
        handle = server.connect()
        written = write_until_refused(handle, rng, range(6000))
        assert len(written) * PAGE > 14 * MIB, "both are full"
        stats = server.rpc("stats")
        assert (stats["disk_degraded"], os.strerror(stats["disk_errno"])) == (
            1, "No space left on device",
        )  # fmt: skip
        assert_holds(handle, written)
        subprocess.run(["mount", "-o", "remount,size=100m", str(full)], check=True)
        for page in range(6000):
            write_in_the_end(handle, written.setdefault(page * PAGE, rng.randbytes(PAGE)), page)
        assert_holds(handle, written)
        stats = server.rpc("stats")
        assert stats["disk_degraded"] == stats["disk_corrupt_pages"] == stats["lost_pages"] == 0


# ---- all of them, with clients at work -----------------------------------------------------------


class Client(threading.Thread):
    """Writes, reads and trims its own pages, and knows what each may hold."""

    def __init__(self, server: Server, weather: Weather, pages: range, seed: int) -> None:
        super().__init__()
        self.handle = server.connect()
        self.weather, self.pages, self.rng = weather, pages, random.Random(seed)
        # Content that a page may have: one, or, after a refused write, the old or the new.
        self.may_be: dict[int, list[bytes]] = {page: [bytes(PAGE)] for page in pages}
        self.stopping = threading.Event()
        self.problem = ""
        self.unreadable = self.refused = 0

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.step()
        except BaseException as error:  # told by the test
            self.problem = repr(error)

    def step(self) -> None:
        many = self.rng.choice((1, 1, 8, 32))
        first = self.rng.randrange(self.pages.start, self.pages.stop - many)
        dice = self.rng.random()
        if dice < 0.5:
            self.write(first, many)
        elif dice < 0.95:
            self.read(self.rng.choice(self.pages))
        else:
            doubts = self.weather.doubts(first, many)
            self.handle.trim(many * PAGE, first * PAGE)
            self.wrote(first, [bytes(PAGE)] * many, doubts)

    def write(self, first: int, many: int) -> None:
        content = [self.rng.randbytes(self.rng.choice((500, 2000, PAGE))) for _ in range(many)]
        content = [data.ljust(PAGE, b"\0") for data in content]
        doubts = self.weather.doubts(first, many)
        refused = errno_of_write(self.handle, b"".join(content), first * PAGE)
        assert refused in ("", "ENOSPC"), refused
        if not refused:
            self.wrote(first, content, doubts)
            return
        self.refused += 1
        for page, data in enumerate(content, first):
            self.may_be[page].append(data)

    def wrote(self, first: int, content: list[bytes], doubts: dict[int, int]) -> None:
        for page, data in enumerate(content, first):
            self.may_be[page] = [data]
        self.weather.mended(doubts)

    def read(self, page: int) -> None:
        before = self.weather.now()
        data = read_page(self.handle, page * PAGE)
        if data is None:
            self.unreadable += 1
            excused = self.weather.reads_failed_since(before) or self.weather.doubts(page, 1)
            assert excused, f"page {page} cannot be read, and nobody damaged it"
        else:
            assert data in self.may_be[page], f"page {page} is wrong"
            self.may_be[page] = [data]


class Weather:
    """Which faults there are and were: set before the fault, taken back after it."""

    def __init__(self) -> None:
        self._damaged: dict[int, int] = {}  # page -> when
        self._serial = 0
        self._lock = threading.Lock()
        self._reads_fail = False
        self._changes = 0

    def set_reads_fail(self, now: bool) -> None:
        with self._lock:
            self._reads_fail = now
            self._changes += 1

    def damage(self, page: int) -> None:
        with self._lock:
            self._serial += 1
            self._damaged[page] = self._serial

    def doubts(self, first: int, many: int) -> dict[int, int]:
        """Those of these pages that may be damaged, and since when."""
        with self._lock:
            return {p: self._damaged[p] for p in range(first, first + many) if p in self._damaged}

    def mended(self, doubts: dict[int, int]) -> None:
        """Pages written anew, unless they were damaged while that was going on."""
        with self._lock:
            for page, since in doubts.items():
                if self._damaged.get(page) == since:
                    del self._damaged[page]

    def now(self) -> tuple[int, bool]:
        return self._changes, self._reads_fail

    def reads_failed_since(self, before: tuple[int, bool]) -> bool:
        return before != (self._changes, False)


def storm(disk: FaultyDisk, weather: Weather, rng: random.Random) -> None:
    """One fault for a moment, and an end of it."""
    moment = threading.Event()
    kind = rng.choice(("writes", "reads", "both", "stall", "flips", "none"))
    if kind == "stall":
        with disk.frozen():
            moment.wait(rng.random())
    elif kind == "flips":
        with disk.frozen():
            found = objects(disk)
            for page in rng.sample(sorted(found), min(len(found), 30)):
                weather.damage(page)
                flip_one(disk, rng, found[page])
    else:
        if kind in ("reads", "both"):
            weather.set_reads_fail(True)
            disk.fail_reads(True)
        disk.fail_writes(kind in ("writes", "both"))
    moment.wait(rng.random())
    disk.fail_reads(False)
    disk.fail_writes(False)
    weather.set_reads_fail(False)


def test_everything_at_once(server: Server, disk: FaultyDisk, rng: random.Random) -> None:
    weather = Weather()
    clients = [
        Client(server, weather, range(start, start + 2048), rng.getrandbits(32))
        for start in (0, 4096, 8192)
    ]
    for client in clients:
        client.start()
    try:
        for _ in range(12):
            storm(disk, weather, rng)
    finally:
        for client in clients:
            client.stopping.set()
        for client in clients:
            client.join()
    assert [client.problem for client in clients if client.problem] == []
    stats = server.rpc("stats")
    unreadable = sum(client.unreadable for client in clients)
    # Cleaning reads too, and counts what it cannot.
    assert unreadable <= stats["disk_read_errors"] + stats["disk_corrupt_pages"]
    assert stats["lost_pages"] == stats["corrupt_loads"] == 0
    # Every try may have met a storm: the next one, within 10 s, does not.
    wait_for("writeback", lambda: server.rpc("stats")["disk_written_bytes"] > 0)
    for client in clients:
        for page in client.pages:
            client.read(page)
    for client in clients:  # and all of it can be written again
        for page in client.pages:
            data = client.rng.randbytes(PAGE)
            doubts = client.weather.doubts(page, 1)
            write_in_the_end(client.handle, data, page)
            client.wrote(page, [data], doubts)
    for client in clients:
        for page in client.pages:
            client.read(page)
    assert not any(weather.doubts(client.pages.start, 2048) for client in clients)
