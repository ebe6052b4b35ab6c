"""The memory file: golden bytes, who owns it, what is left when its owner dies."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_helpers import PAGE, opened_store
from zcache_core import memfile, owner
from zcache_core.errors import InUseError, MemoryFileError
from zcache_core.index import pack_entry, pack_place
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

DEVICE = 64 * PAGE
POOL = 16 * PAGE


@pytest.fixture(autouse=True)
def _runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lock files of these tests stand in a folder of their own; no segment they name stays."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    yield
    ours = {int(path.read_text() or -1) for path in tmp_path.glob("*.mem")}
    assert not ours & {row.shmid for row in memfile.leftovers()}


def test_golden_superblock() -> None:
    """The format's first bytes, written out by hand; a change is a new FORMAT_VERSION."""
    memory = MemoryFile.create("golden", DEVICE, POOL)
    try:
        counters, index, headers, arena = PAGE * 2, PAGE * 42, PAGE * 44, PAGE * 45
        geometry = struct.pack(
            "<8Q", arena + POOL, memory.epoch, 16, counters, headers, arena, index, 64
        )
        start = b"ZCACHEMF" + struct.pack("<II", 4, zlib.crc32(geometry)) + geometry
        assert memory.peek(0, len(start)) == start
        assert memory.peek(112, 8) == b"golden\0\0"
        row = struct.pack("<4Q", 64, index, 1, 0)
        assert memory.peek(176, 32) == row
        assert memory.offsets() == {
            "counters": counters,
            "index": index,
            "frame_map": index + PAGE,
            "frame_headers": headers,
            "arena": arena,
        }
    finally:
        memory.destroy()


def test_golden_devices() -> None:
    """Two devices share the index, one after the other; names stand behind the rows."""
    parts = (("a", 48 * PAGE), ("swap-2", 16 * PAGE))
    memory = MemoryFile.create("golden", DEVICE, POOL, parts)
    try:
        index = PAGE * 42
        rows = struct.pack("<4Q", 48, index, 1, 0) + struct.pack("<4Q", 16, index + 48 * 16, 0, 0)
        assert memory.peek(176, 96) == rows + bytes(32)
        assert memory.peek(512, 32) == b"a".ljust(16, b"\0") + b"swap-2".ljust(16, b"\0")
        assert memory.devices() == [("a", 48 * PAGE, 0, 0), ("swap-2", 16 * PAGE, 0, 48)]
    finally:
        memory.destroy()


def test_who_only_reads_has_no_key() -> None:
    """A node process talks to the network: what it does not have, it cannot give away."""
    memory = MemoryFile.create(None, DEVICE, POOL)
    reader = MemoryFile.attach(memory.shmid)
    whole = MemoryFile.attach(memory.shmid, with_keys=True)
    try:
        keys = memory.peek(PAGE, 64)
        assert len(set(keys)) > 16
        assert whole.peek(PAGE, 64) == keys
        for first, n in ((PAGE, 32), (0, PAGE + 1), (2 * PAGE - 1, 1), (0, 3 * PAGE)):
            with pytest.raises(ValueError, match="has not the keys"):
                reader.peek(first, n)
        assert reader.peek(0, PAGE) == memory.peek(0, PAGE)
        assert reader.peek(2 * PAGE, 64) == memory.peek(2 * PAGE, 64)
        # Not by mistake either: the page cannot be read at all.
        rows = [row.split() for row in Path("/proc/self/maps").read_text().splitlines()]
        mine = [
            row for row in rows if row[5:6] and "SYSV" in row[5] and row[4] == str(memory.shmid)
        ]
        assert sum(row[1] == "---s" for row in mine) == 1
    finally:
        for file in (whole, reader, memory):
            file.close()


def test_golden_entries_and_headers() -> None:
    with opened_store(DEVICE, POOL) as store:
        store.put(3, b"\x01\x02\x03\x04\x05\x06\x07\x08" * 512)
        store.put(4, b"zcache" * 682 + b"zcac")
        memory = store.memory
        assert store.entry(3) == pack_entry(1, 1, 0x0807060504030201)
        assert store.entry(4) == pack_entry(2, 2, pack_place(0, 31, 1))
        header = memory.peek(memory.offsets()["arena"], 24)
        identity, page_checksum, place = struct.unpack("<3Q", header)
        assert identity == pack_entry(0, 2, place)[1]
        assert page_checksum >> 32 == 4
        assert place == 30 << 4 | 1


@pytest.mark.parametrize(
    ("device", "pool"),
    [(0, POOL), (DEVICE, 0), (DEVICE + 512, POOL), (DEVICE, POOL - 1), (1 << 45, POOL)],
)
def test_impossible_sizes_are_refused(device: int, pool: int) -> None:
    with pytest.raises(MemoryFileError, match="; use "):
        MemoryFile.create(None, device, pool)


def test_private_file_is_gone_with_its_last_user() -> None:
    memory = MemoryFile.create(None, DEVICE, POOL)
    reader = MemoryFile.attach(memory.shmid)
    assert reader.device_bytes == DEVICE
    memory.close()
    assert reader.peek(0, 8) == b"ZCACHEMF"
    reader.close()
    with pytest.raises(MemoryFileError, match="cannot be attached"):
        MemoryFile.attach(memory.shmid)


def test_segment_is_locked_and_mapping_is_not() -> None:
    memory = MemoryFile.create(None, DEVICE, POOL)
    assert memory.stays_locked
    row = next(
        line.split()
        for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        if line.split()[1] == str(memory.shmid)
    )
    assert int(row[2], 8) & 0o2000, "SHM_LOCKED"
    memory.close()


def test_named_file_has_one_owner() -> None:
    memory = MemoryFile.create("one", DEVICE, POOL)
    with pytest.raises(InUseError, match="running server"):
        MemoryFile.open("one")
    with pytest.raises(InUseError, match="running server"):
        MemoryFile.create("one", DEVICE, POOL)
    memory.close()
    assert memfile.exists("one")
    with pytest.raises(MemoryFileError, match="exists already"):
        MemoryFile.create("one", DEVICE, POOL)
    again = MemoryFile.open("one")
    assert (again.name, again.device_bytes, again.fresh) == ("one", DEVICE, False)
    again.destroy()
    assert not memfile.exists("one")
    with pytest.raises(MemoryFileError, match="no memory file"):
        MemoryFile.open("one")


@pytest.mark.parametrize("name", ["", "a/b", "x" * 61, "ä", "a b"])
def test_unusable_names_are_refused(name: str) -> None:
    with pytest.raises(MemoryFileError, match="not usable"):
        MemoryFile.create(name, DEVICE, POOL)


def test_killed_owner_leaves_a_file_that_is_listed_and_can_be_removed() -> None:
    name = f"killed-{os.getpid()}"  # the list is the whole machine's
    child = os.fork()
    if child == 0:
        MemoryFile.create(name, DEVICE, POOL)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    found = [row for row in memfile.leftovers() if row.name == name]
    assert len(found) == 1
    assert found[0].size_bytes > POOL
    memfile.remove(found[0].shmid)
    assert not [row for row in memfile.leftovers() if row.name == name]


def test_an_expected_file_is_read_only_until_it_is_taken() -> None:
    """Mapped with page tables and all while its owner lives; then written without another fault."""
    device, pool = 16384 * PAGE, 2048 * PAGE
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        theirs = Store(MemoryFile.create("heir", device, pool), commit="all")
        theirs.start()
        theirs.put(1, b"x" * PAGE)
        if os.fork() == 0:  # as who is just being started: it has the lock a little longer
            os.write(tell, b"!")
            time.sleep(0.3)
            os._exit(0)
        signal.pause()
    assert os.read(told, 1) == b"!"
    assert MemoryFile.expect("nobody") is None
    memory = MemoryFile.expect("heir")
    assert memory is not None
    assert (memory.expected, memory.writable) == (True, False)
    rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    assert [row[1] for row in rows if row[4] == str(memory.shmid)] == ["r--s"]
    with pytest.raises(ValueError, match="read-only"):
        memory.poke(0, b"X")
    store = Store(memory, commit="all")
    with pytest.raises(InUseError, match="running server"):
        memory.take(patience_s=0.0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(InUseError, match="running server"):
        memory.take(patience_s=0.0)
    memory.take()
    try:
        assert (memory.expected, memory.writable, memory.fresh) == (False, True, False)
        store.begin()
        at = memory.offsets()["index"] + 8
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for page in range(16384 * 16 // PAGE):
            memory.poke(at + page * PAGE, memory.peek(at + page * PAGE, 8))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 32, "of 64 pages"
        store.start()
        assert store.get(1) == b"x" * PAGE
        store.put(2, os.urandom(PAGE))
        assert store.check() == 0
    finally:
        store.stop()
        memory.destroy()


def test_killed_owner_of_a_private_file_leaves_nothing() -> None:
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"%d" % MemoryFile.create(None, DEVICE, POOL).shmid)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    shmid = int(os.read(told, 20))
    os.close(told)
    os.close(tell)
    assert shmid not in {row.shmid for row in memfile.leftovers()}
    with pytest.raises(MemoryFileError, match="cannot be attached"):
        MemoryFile.attach(shmid)


def test_successor_waits_for_the_predecessors_exit(tmp_path: Path) -> None:
    """The second witness: a living process with the recorded pid and start time."""
    other = subprocess.Popen(["sleep", "60"])
    try:
        lock = owner.OwnerLock.acquire("witness")
        owner.EXIT_WAIT_S, saved = 0.1, owner.EXIT_WAIT_S
        with pytest.raises(InUseError, match=str(other.pid)):
            lock.wait_for_exit(other.pid, owner.start_ticks(other.pid))
        lock.wait_for_exit(other.pid, owner.start_ticks(other.pid) + 1)  # the number was reused
        other.kill()
        owner.EXIT_WAIT_S = saved
        lock.wait_for_exit(other.pid, owner.start_ticks(other.pid))
        lock.release()
    finally:
        owner.EXIT_WAIT_S = 10.0
        other.kill()
        other.wait()


OWNER_WITHOUT_ITS_LOCK = """
import os, sys
from pathlib import Path
from zcache_core.memfile import MemoryFile
memory = MemoryFile.create(sys.argv[1], 64 * 4096, 16 * 4096)
memory.poke(memory.offsets()["index"], b"x")
for link in Path("/proc/self/fd").iterdir():
    if link.is_symlink() and os.readlink(link).endswith(".mem"):
        os.close(int(link.name))
print(memory.shmid, flush=True)
sys.stdin.read()
"""


def mappings_of(shmid: int) -> list[str]:
    """Permissions with which this process maps a segment."""
    rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [row[1] for row in rows if row[4] == str(shmid) and "SYSV" in line_end(row)]


def line_end(row: list[str]) -> str:
    return row[5] if len(row) > 5 else ""


def test_successor_does_not_touch_a_file_whose_owner_still_exists() -> None:
    """A dying process has lost its lock before the last of its threads has stopped writing.

    Until it is gone, the successor waits, and maps the file for reading at most.
    """
    command = [sys.executable, "-c", OWNER_WITHOUT_ITS_LOCK, "dying"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owning:
        assert owning.stdout is not None
        shmid = int(owning.stdout.readline())
        opened: list[MemoryFile] = []
        successor = threading.Thread(target=lambda: opened.append(MemoryFile.open("dying")))
        successor.start()
        end = time.monotonic() + 30
        while "r--s" not in mappings_of(shmid) and successor.is_alive():
            assert time.monotonic() < end
            time.sleep(0.001)
        successor.join(0.3)  # nothing is measured: time for what must not happen
        assert successor.is_alive()
        assert mappings_of(shmid) == ["r--s"]
        owning.kill()
        successor.join(30)
    assert opened[0].peek(opened[0].offsets()["index"], 1) == b"x"
    assert mappings_of(shmid) == ["rw-s"]
    opened[0].destroy()


@pytest.mark.parametrize(
    ("offset", "data", "says"),
    [
        (0, b"X", "no zcache memory file"),
        (8, b"\x63", "has format 99, this version reads 4; swapoff with the version"),
        (40, b"\xff", "geometry .* is damaged"),
    ],
)
def test_damaged_superblock_is_refused(offset: int, data: bytes, says: str) -> None:
    memory = MemoryFile.create(None, DEVICE, POOL)
    memory.poke(offset, data)
    with pytest.raises(MemoryFileError, match=says):
        MemoryFile.attach(memory.shmid)
    memory.poke(0, b"Z")
    memory.close()


def test_another_format_is_refused_and_left_alone() -> None:
    """Also to who would own it: the version that made it can still serve it."""
    memory = MemoryFile.create("older", DEVICE, POOL)
    memory.poke(8, b"\x03")
    shmid = memory.shmid
    with pytest.raises(MemoryFileError, match="has format 3, this version reads 4; swapoff"):
        MemoryFile.attach(shmid)
    memory.close()
    for _ in range(2):  # the first did not make it a 4
        with pytest.raises(MemoryFileError, match="has format 3, this version reads 4; swapoff"):
            MemoryFile.open("older")
    memfile.remove(shmid)


def test_lock_file_of_another_segment_is_refused(tmp_path: Path) -> None:
    """A stale lock file whose segment number was used again, by a file of another name."""
    memory = MemoryFile.create("b", DEVICE, POOL)
    (tmp_path / "a.mem").write_text(f"{memory.shmid}\n")
    with pytest.raises(MemoryFileError, match="belongs to another memory file"):
        MemoryFile.open("a")
    memory.destroy()


def test_a_file_in_use_is_not_removed() -> None:
    memory = MemoryFile.create("used", DEVICE, POOL)
    with pytest.raises(InUseError, match="running server"):
        memfile.remove(memory.shmid)
    assert memory.peek(0, 8) == b"ZCACHEMF"
    memory.destroy()


def test_lock_goes_with_its_holder() -> None:
    """Dropped without close(): the next owner need not wait for a garbage collection."""
    memory = MemoryFile.create("dropped", DEVICE, POOL)
    del memory
    MemoryFile.open("dropped").destroy()
