"""A real server with a disk below its pool: what goes down comes back, whatever happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from cluster.link import RpcError
from tests.plugin_helpers import (
    PLUGIN,
    ROOT,
    Server,
    environment,
    node_processes,
    remove_memory,
    run_nbdkit,
    wait_for,
)

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


# ---- set and drain ------------------------------------------------------------------------------


def in_ram(server: Server) -> int:
    stats = server.rpc("stats")
    return int(stats["pers_zpages"] + stats["eph_zpages"])


def refusal(server: Server, method: str, *params: Any) -> RpcError:
    with pytest.raises(RpcError) as caught:
        server.rpc(method, *params)
    return caught.value


def test_drain_and_set(tmp_path: Path, rng: random.Random) -> None:
    with Server(tmp_path, *SMALL, f"disk={tmp_path / 'disk'}") as server:
        handle = server.connect()
        written = fill(handle, rng, 8 * MIB)
        answer = server.rpc("drain")
        assert answer.keys() == {"draining", "pages", "frames"}
        assert answer["draining"] is True
        wait_for("an empty RAM", lambda: in_ram(server) == 0)
        assert any("drained" in r["what"] for r in server.rpc("health")["reasons"])
        os.kill(server.ping()["pid"], signal.SIGKILL)  # what is set is the server's
        wait_for("another node process", server.ping)
        assert server.rpc("stats")["draining"] == 1
        assert server.rpc("drain", False)["draining"] is False
        holds = {"pool": 4 * MIB, "writeback_limit": None}
        assert server.rpc("set", {"high": 60, "low": 40}) == holds | {"high": 60, "low": 40}
        assert server.rpc("set", {"low": 20}) == holds | {"high": 60, "low": 20}
        config = server.rpc("config")
        assert (config["high"], config["low"]) == (60, 20)
        assert_holds(handle, written)
        for params, words in (
            (({"high": 10},), "use 0 < low <= high <= 100"),
            (({"high": "90"},), "use 0 < low <= high <= 100"),
            (({"low": 0},), "use 0 < low <= high <= 100"),
            (({"size": 5},), "size cannot be set while the server runs"),
            (({"pool": 5},), "use whole pages of 4096 bytes, from 1048576 to 4194304"),
            (({"pool": 8 * MIB},), "needs a restart with a larger pool="),
            (({"pool": 2 * MIB, "low": 90},), "use 0 < low <= high <= 100"),
            ((), "set takes one map"),
            ((1,), "set takes one map"),
        ):
            assert words in str(refusal(server, "set", *params))
        assert refusal(server, "drain", 1).code == "bad_params"
        assert server.rpc("config")["high"] == 60


def test_writeback_limit(tmp_path: Path, rng: random.Random) -> None:
    """At the limit pages stay in RAM and writes are refused when it is full; set lets it go on."""
    words = (*SMALL, f"disk={tmp_path / 'disk'}", "writeback_limit=6M")
    with Server(tmp_path, *words) as server:
        assert "4 MiB are safe from refused writes" in server.log()
        assert "when writeback_limit=6M is used up" in server.log()
        handle = server.connect()
        written: dict[int, bytes] = {}
        refused = 0
        for offset in range(0, 16 * MIB, PIECE):
            data = rng.randbytes(PIECE)
            if write_refused(handle, data, offset):
                refused += 1
            else:
                written[offset] = data
        assert refused > 10
        stats = server.rpc("stats")
        assert stats["writeback_limit_reached"] == 1
        assert stats["disk_written_bytes"] == stats["writeback_day_bytes"] <= 6 * MIB
        assert stats["disk_degraded"] == stats["disk_write_errors"] == 0
        health = server.rpc("health")
        assert health["status"] == "critical"
        assert any("writeback_limit is used up" in reason["what"] for reason in health["reasons"])
        assert_holds(handle, written)
        assert server.rpc("config")["writeback_limit"] == 6 * MIB
        assert server.rpc("set", {"writeback_limit": 7 * MIB})["writeback_limit"] == 7 * MIB
        wait_for("a day's limit reached again", lambda: limit_reached(server, 6 * MIB))
        assert server.rpc("set", {"writeback_limit": None})["writeback_limit"] is None
        for offset in range(0, 16 * MIB, PIECE):
            written[offset] = rng.randbytes(PIECE)
            handle.pwrite(written[offset], offset)
        assert_holds(handle, written)
        assert server.rpc("stats")["writeback_limit_reached"] == 0
        assert server.rpc("config")["guaranteed"] == 32 * MIB
        for bad in (0, 5, "9G", True, 2**63):
            assert "is no limit; use at least" in str(
                refusal(server, "set", {"writeback_limit": bad})
            )


def write_refused(handle: Any, data: bytes, offset: int) -> bool:
    try:
        handle.pwrite(data, offset)
    except nbd.Error as error:
        if error.errno != "ENOSPC":
            raise
        return True
    return False


def limit_reached(server: Server, above_bytes: int) -> bool:
    stats = server.rpc("stats")
    written: int = stats["writeback_day_bytes"]
    return written > above_bytes - MIB and bool(stats["writeback_limit_reached"])


def test_drain_and_set_without_a_disk(tmp_path: Path) -> None:
    with Server(tmp_path, "size=1M", "pool=1M") as server:
        for method, params in (("drain", ()), ("set", ({"high": 50},))):
            error = refusal(server, method, *params)
            assert error.code == "no_disk"
            assert "start it with disk=PATH" in str(error)
        done = zcache(tmp_path, "drain", "--control", str(server.control))
        assert (done.returncode, done.stdout) == (6, "")
        assert "start it with disk=PATH" in done.stderr
        assert done.stderr.count("\n") == 1


def test_set_pool(tmp_path: Path, rng: random.Random) -> None:
    words = ("size=32M", "pool=16M", "disk_size=64M", f"disk={tmp_path / 'disk'}")
    with Server(tmp_path, *words) as server:
        handle = server.connect()
        written = fill(handle, rng, 24 * MIB)
        assert server.rpc("set", {"pool": 6 * MIB})["pool"] == 6 * MIB
        assert server.rpc("config")["pool"] == 6 * MIB
        wait_for("a smaller pool", lambda: server.rpc("stats")["pool_limit_frames"] == 1536)
        wait_for("health", lambda: not any("smaller" in what for what in reasons(server)))
        assert server.rpc("stats")["committed_frames"] <= 1536
        assert_holds(handle, written)
        os.kill(server.ping()["pid"], signal.SIGKILL)  # what is set is the server's
        wait_for("another node process", server.ping)
        assert server.rpc("config")["pool"] == 6 * MIB
        assert server.rpc("set", {"pool": 16 * MIB, "high": 95}) == {
            "pool": 16 * MIB, "high": 95, "low": 80, "writeback_limit": None
        }  # fmt: skip
        assert_holds(handle, fill(handle, rng, 24 * MIB))
        assert server.rpc("stats")["failed_requests"] == 0


def test_set_pool_that_cannot_be(tmp_path: Path, rng: random.Random) -> None:
    """Without a disk, and with one that is too small for what would have to leave."""
    with Server(tmp_path, "size=16M", "pool=16M") as server:
        handle = server.connect()
        handle.pwrite(rng.randbytes(8 * MIB), 0)
        assert server.rpc("config")["guaranteed"] == 16 * MIB
        error = refusal(server, "set", {"pool": 4 * MIB})
        assert error.code == "in_use"
        assert f"{8 * MIB} bytes of the pool are in use and there is no disk" in str(error)
        assert server.rpc("set", {"pool": 9 * MIB}) == {"pool": 9 * MIB}
        assert server.rpc("config")["guaranteed"] == 9 * MIB
        assert any("pool can fill" in what for what in reasons(server))
        with pytest.raises(nbd.Error, match="ENOSPC"):
            handle.pwrite(rng.randbytes(8 * MIB), 8 * MIB)
        assert server.rpc("set", {"pool": 16 * MIB}) == {"pool": 16 * MIB}
        handle.pwrite(rng.randbytes(8 * MIB), 8 * MIB)
    words = ("size=64M", "pool=32M", "disk_size=16M", f"disk={tmp_path / 'disk'}")
    with Server(tmp_path, *words) as server:
        handle = server.connect()
        for offset in range(0, 24 * MIB, MIB):
            handle.pwrite(rng.randbytes(MIB), offset)
        error = refusal(server, "set", {"pool": 1 * MIB})
        assert error.code == "disk_full"
        assert "bytes of pages would have to leave RAM, and the disk has room for" in str(error)
        assert server.rpc("config")["pool"] == 32 * MIB


def reasons(server: Server) -> list[str]:
    return [reason["what"] for reason in server.rpc("health")["reasons"]]


def zcache(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plugin.cli", *words],
        cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_command_drain_and_status(tmp_path: Path, rng: random.Random) -> None:
    with Server(tmp_path, *SMALL, f"disk={tmp_path / 'disk'}") as server:
        fill(server.connect(), rng, 8 * MIB)
        done = zcache(tmp_path, "drain", "--control", str(server.control))
        assert (done.returncode, done.stderr) == (0, "")
        assert "RAM is empty, and stays so until 'zcache drain --off'" in done.stdout
        assert in_ram(server) == 0
        status = zcache(tmp_path, "status", "--control", str(server.control)).stdout
        for words in ("disk", "of 63.0 MiB", "alive", "written back", "being drained", "90 %"):
            assert words in status, words
        done = zcache(tmp_path, "drain", "--off", "--control", str(server.control))
        assert (done.returncode, done.stdout) == (0, "Draining is off; 0 pages are in RAM.\n")
        assert server.rpc("stats")["draining"] == 0


@pytest.mark.parametrize(("options", "draining"), [((), 0), (("--keep",), 1)])
def test_an_interrupted_drain(tmp_path: Path, options: tuple[str, ...], draining: int) -> None:
    """Somebody writes all the time, so RAM is never empty before the interruption."""
    with Server(tmp_path, *SMALL, f"disk={tmp_path / 'disk'}") as server:
        ended = threading.Event()

        def write() -> None:
            handle = server.connect()
            while not ended.is_set():
                handle.pwrite(os.urandom(MIB), 0)

        writer = threading.Thread(target=write)
        writer.start()
        command = [sys.executable, "-m", "plugin.cli", "drain", *options]
        try:
            with subprocess.Popen(
                [*command, "--control", str(server.control)],
                cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, text=True,
            ) as process:  # fmt: skip
                wait_for("draining", lambda: server.rpc("stats")["draining"])
                process.send_signal(signal.SIGINT)
                out, _ = process.communicate(timeout=30)
        finally:
            ended.set()
            writer.join()
        assert process.returncode == 130
        assert ("goes on draining" if draining else "Draining is off again") in out
        assert server.rpc("stats")["draining"] == draining
