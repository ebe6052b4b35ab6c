"""A real server with a disk below its pool: what goes down comes back, whatever happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.plugin_helpers import (
    PLUGIN,
    Server,
    environment,
    node_processes,
    remove_memory,
    run_nbdkit,
    wait_for,
)
from zcache_core.memfile import MemoryFile

PAGE = 4096
PIECE = 64 * PAGE
MIB = 1 << 20
NAME = f"t7-disk-{os.getpid()}"
SMALL = ("size=32M", "pool=4M", "disk_size=64M")


def piece(rng: random.Random) -> bytes:
    """64 pages: noise, compressible, or one word; noise as often as not."""
    kind = rng.randrange(4)
    if kind < 2:
        return rng.randbytes(PIECE)
    if kind == 2:
        return b"".join(rng.randbytes(1000) + bytes(PAGE - 1000) for _ in range(PIECE // PAGE))
    return rng.randbytes(8) * (PIECE // 8)


def fill(handle: Any, rng: random.Random, size_bytes: int) -> dict[int, bytes]:
    """Write so many bytes from the start; what was written, by offset."""
    written = {offset: piece(rng) for offset in range(0, size_bytes, PIECE)}
    for offset, data in written.items():
        handle.pwrite(data, offset)
    return written


def assert_holds(handle: Any, written: dict[int, bytes]) -> None:
    for offset, data in written.items():
        assert handle.pread(len(data), offset) == data, offset


def read_page(handle: Any, offset: int) -> bytes | None:
    """A page's bytes, None when it answers EIO."""
    try:
        return bytes(handle.pread(PAGE, offset))
    except nbd.Error as error:
        if error.errno != "EIO":
            raise
        return None


def broken_pages(handle: Any, written: dict[int, bytes]) -> int:
    """Pages that answer EIO; every other one has to be right."""
    broken = 0
    for offset, data in written.items():
        for at in range(0, len(data), PAGE):
            found = read_page(handle, offset + at)
            assert found in (None, data[at : at + PAGE]), offset + at
            broken += found is None
    return broken


def in_ram(server: Server) -> int:
    stats = server.rpc("stats")
    return int(stats["pers_zpages"] + stats["eph_zpages"])


def pages_in_ram() -> list[int]:
    """Those that the memory file itself has, while nobody serves it."""
    memory = MemoryFile.open(NAME)
    try:
        at, pages = memory.offsets()["index"], memory.device_bytes // PAGE
        words = memory.peek(at, pages * 16)
    finally:
        memory.close()
    return [page for page in range(pages) if words[page * 16 + 8] & 0xF in (2, 3)]


def write_refused(handle: Any, data: bytes, offset: int) -> bool:
    try:
        handle.pwrite(data, offset)
    except nbd.Error as error:
        if error.errno != "ENOSPC":
            raise
        return True
    return False


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of our own for lock files, and no memory file left at the end."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    yield tmp_path
    remove_memory(NAME)


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()
    wait_for("the end of the node process", lambda: not node_processes(server.pid))


# ---- data --------------------------------------------------------------------------------


def test_eight_times_the_pool(tmp_path: Path, rng: random.Random) -> None:
    words = ("size=256M", "pool=16M", f"disk={tmp_path / 'disk'}", "disk_size=300M")
    with Server(tmp_path, *words) as server:
        assert "no write is ever refused" in server.log()
        assert "ENOSPC" not in server.log()
        handle = server.connect()
        written = fill(handle, rng, 128 * MIB)
        assert_holds(handle, written)
        stats = server.rpc("stats")
        assert stats["written_back_pages"] > 0
        assert stats["cold_loads"] > 0
        assert stats["disk_written_bytes"] > 0
        assert stats["logical_bytes"] == 128 * MIB
        assert stats["committed_frames_max"] <= 16 * MIB // PAGE
        for name in ("failed_stores", "failed_requests", "corrupt_loads", "disk_corrupt_pages"):
            assert stats[name] == 0, name
        reasons = server.rpc("health")["reasons"]
        assert not any("no lower tier" in r["what"] or "can fill" in r["what"] for r in reasons)
        for offset in rng.sample(sorted(written), 100):  # over what lies below
            written[offset] = piece(rng)
            handle.pwrite(written[offset], offset)
        assert_holds(handle, written)
        handle.trim(128 * MIB, 0)
        wait_for("dropped copies", lambda: server.rpc("stats")["disk_pages"] == 0)
        assert server.rpc("stats")["disk_live_bytes"] == 0


def test_disk_truncated_under_us(tmp_path: Path, rng: random.Random) -> None:
    disk = tmp_path / "disk"
    with Server(tmp_path, *SMALL, f"disk={disk}") as server:
        handle = server.connect()
        written = fill(handle, rng, 24 * MIB)
        server.rpc("drain")
        wait_for("an empty RAM", lambda: in_ram(server) == 0)
        server.rpc("drain", False)
        os.truncate(disk, 8 * MIB)
        wait_for("a file as long as it was", lambda: disk.stat().st_size == 64 * MIB)
        broken = broken_pages(handle, written)
        stats = server.rpc("stats")
        # At most: a page that straddles the end.
        assert 0 < broken <= stats["disk_pages"]
        assert broken == stats["disk_read_errors"] + stats["disk_corrupt_pages"]
        health = server.rpc("health")
        assert health["status"] == "critical"
        assert any("could not be read" in reason["what"] for reason in health["reasons"])
        again = fill(handle, rng, 24 * MIB)  # the device lives, and mends what is written
        assert_holds(handle, again)
        assert server.ping()


def test_disk_removed_under_us(tmp_path: Path, rng: random.Random) -> None:
    """Reads go on, nothing more is written there, and health says why."""
    disk = tmp_path / "disk"
    with Server(tmp_path, *SMALL, f"disk={disk}") as server:
        handle = server.connect()
        written = fill(handle, rng, 16 * MIB)
        server.rpc("drain")
        wait_for("an empty RAM", lambda: in_ram(server) == 0)
        server.rpc("drain", False)
        disk.unlink()
        wait_for("a degraded disk", lambda: server.rpc("stats")["disk_degraded"])
        assert os.strerror(server.rpc("stats")["disk_errno"]) == "No such file or directory"
        assert any("was removed" in reason["what"] for reason in server.rpc("health")["reasons"])
        before = server.rpc("stats")["disk_written_bytes"]
        refused = 0
        for offset in range(16 * MIB, 32 * MIB, PIECE):
            data = rng.randbytes(PIECE)
            if write_refused(handle, data, offset):
                refused += 1
            else:
                written[offset] = data
        assert refused > 10, "the pool is all there is"
        assert_holds(handle, written)
        stats = server.rpc("stats")
        assert stats["disk_written_bytes"] == before
        assert stats["disk_write_errors"] == stats["disk_read_errors"] == 0


# ---- a memory file and its disk ----------------------------------------------------------------


def test_killed_server_finds_everything(runtime: Path, rng: random.Random) -> None:
    words = (*SMALL, f"memory={NAME}", f"disk={runtime / 'disk'}")
    with Server(runtime, *words) as server:
        written = fill(server.connect(), rng, 24 * MIB)
        assert server.rpc("stats")["disk_pages"] > 0
        kill(server)
        with Server(runtime, *words) as successor:
            handle = successor.connect()
            assert_holds(handle, written)
            stats = successor.rpc("stats")
            assert stats["logical_bytes"] == 24 * MIB
            assert stats["lost_pages"] == stats["disk_corrupt_pages"] == 0
            handle.pwrite(b"x" * PAGE, 0)
            assert handle.pread(PAGE, 0) == b"x" * PAGE
        remove_memory(NAME)


@pytest.mark.parametrize("noticed", [True, False])
def test_cut_disk_and_the_next_server(runtime: Path, rng: random.Random, noticed: bool) -> None:
    """Every page that RAM had when the file was cut is right, also when the next one needs room."""
    disk = runtime / "disk"
    words = (*SMALL, f"memory={NAME}", f"disk={disk}")
    with Server(runtime, *words) as server:
        written = fill(server.connect(), rng, 24 * MIB)
        if noticed:
            os.truncate(disk, MIB)
            wait_for("a file as long as it was", lambda: disk.stat().st_size == 64 * MIB)
        kill(server)
        kept = pages_in_ram()
        assert len(kept) > 100
        if not noticed:
            os.truncate(disk, MIB)
            smaller = ("size=32M", "pool=4M", "disk_size=32M", words[3], words[4])
            code, _, _ = run_nbdkit(runtime, *smaller, options=("-U", str(runtime / "x.sock")))
            assert code != 0
            assert disk.stat().st_size == MIB, "its length is what tells of the cut"
        with Server(runtime, *words) as successor:
            handle = successor.connect()
            wait_for("a file as long as it was", lambda: disk.stat().st_size == 64 * MIB)
            successor.rpc("drain")
            wait_for("an empty RAM", lambda: in_ram(successor) == 0)
            successor.rpc("drain", False)
            for page in kept:
                at = page * PAGE
                first = at // PIECE * PIECE
                data = written[first][at - first : at - first + PAGE]
                assert handle.pread(PAGE, at) == data, page
        remove_memory(NAME)


def test_memory_file_is_refused_without_its_disk(runtime: Path, rng: random.Random) -> None:
    disk, other = runtime / "disk", runtime / "other"
    words = (*SMALL, f"memory={NAME}")
    with Server(runtime, *words, f"disk={disk}") as server:
        written = fill(server.connect(), rng, 24 * MIB)
        kill(server)
        head = disk.read_bytes()[:PAGE]

        def refused(*words: str) -> str:
            code, _, log = run_nbdkit(runtime, *words, options=("-U", str(runtime / "x.sock")))
            assert code != 0
            assert log.count("\n") == 1, log
            return log

        assert "lie on the disk that its last server had" in refused(
            "size=32M", "pool=4M", words[3]
        )
        assert "lie on another disk than" in refused(*words, f"disk={other}")
        assert not other.exists()
        smaller = ("size=32M", "pool=4M", "disk_size=32M", words[3])
        assert "write disk_size=64M or more" in refused(*smaller, f"disk={disk}")
        # And the disk is not given to anybody else.
        assert f"holds pages of the memory file {NAME}" in refused(*SMALL, f"disk={disk}")
        assert disk.read_bytes()[:PAGE] == head
        larger = ("size=32M", "pool=4M", "disk_size=96M", words[3])
        with Server(runtime, *larger, f"disk={disk}") as successor:
            assert_holds(successor.connect(), written)
        remove_memory(NAME)


# ---- disks that are refused ------------------------------------------------------------------


def test_refused_disks(tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        options = ("-U", str(tmp_path / "x.sock"))
        code, _, log = run_nbdkit(tmp_path, "size=8M", "pool=4M", *words, options=options)
        assert code != 0
        assert log.count("\n") == 1, log
        return log

    disk = tmp_path / "disk"
    assert "say how large it may grow with disk_size=" in refused(f"disk={disk}")
    assert not disk.exists()
    swap = tmp_path / "swap"
    swap.write_bytes(bytes(4086) + b"SWAPSPACE2" + bytes(32 * MIB))
    before = swap.read_bytes()
    assert f"carries swap; choose another, or repeat its path in disk_force={swap}" in refused(
        f"disk={swap}"
    )
    thesis = tmp_path / "thesis"
    thesis.write_bytes(b"many years of work" * 2 * MIB)
    assert "holds data that are not zcache's" in refused(f"disk={thesis}")
    assert "is another path" in refused(f"disk={swap}", f"disk_force={thesis}")
    assert swap.read_bytes() == before
    with Server(tmp_path, "size=8M", "pool=4M", f"disk={swap}", f"disk_force={swap}") as server:
        assert "used by another server" in refused(f"disk={swap}")
        server.connect().pwrite(b"x" * PAGE, 0)


def test_in_the_background(tmp_path: Path) -> None:
    """The disk is opened and locked before the fork, and still is after it."""
    pidfile, disk = tmp_path / "pid", f"disk={tmp_path / 'disk'}"
    sock = ("-U", str(tmp_path / "nbd.sock"))
    command = ["nbdkit", *sock, "-P", str(pidfile), "python", str(PLUGIN), *SMALL, disk]
    subprocess.run(command, env=environment(tmp_path), check=True, timeout=30)
    pid = int(wait_for("the pid file", lambda: pidfile.exists() and pidfile.read_text()))
    try:
        handle = nbd.NBD()
        handle.connect_unix(sock[1])
        data = os.urandom(8 * MIB)
        handle.pwrite(data, 0)
        assert handle.pread(len(data), 0) == data
        handle.shutdown()
        code, _, log = run_nbdkit(tmp_path, *SMALL, disk, options=("-U", str(tmp_path / "x.sock")))
        assert code != 0
        assert "used by another server" in log
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for("the end of the node process", lambda: not node_processes(pid))


def test_too_small_a_disk_says_what_is_safe(tmp_path: Path) -> None:
    words = ("size=64M", "pool=4M", f"disk={tmp_path / 'disk'}", "disk_size=32M")
    with Server(tmp_path, *words) as server:
        assert "of size=64M, 15 MiB are safe from refused writes" in server.log()
        assert "write disk_size=84M or more" in server.log()
        reasons = server.rpc("health")["reasons"]
        assert any("Pool and disk can fill" in reason["what"] for reason in reasons)
