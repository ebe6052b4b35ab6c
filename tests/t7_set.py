"""set and drain on a real server: what is changed while it runs holds, and harms nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import nbd
import pytest

from cluster.link import RpcError
from tests.plugin_helpers import ROOT, Server, environment, wait_for
from tests.t7_disk import MIB, PIECE, SMALL, assert_holds, fill, in_ram, write_refused

PAGE = 4096
USUAL = {"allocator": "zbud", "recompress": "none", "recompress_age": 300}
COLD = "recompress=none recompress_age=300"


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
        holds = USUAL | {"pool": 4 * MIB, "writeback_limit": None}
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
        assert server.rpc("set", {"pool": 16 * MIB, "high": 95}) == USUAL | {
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
        assert server.rpc("set", {"pool": 9 * MIB}) == USUAL | {"pool": 9 * MIB}
        assert server.rpc("config")["guaranteed"] == 9 * MIB
        assert any("pool can fill" in what for what in reasons(server))
        with pytest.raises(nbd.Error, match="ENOSPC"):
            handle.pwrite(rng.randbytes(8 * MIB), 8 * MIB)
        assert server.rpc("set", {"pool": 16 * MIB}) == USUAL | {"pool": 16 * MIB}
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
        for words in ("disk", "of 63.8 MiB", "alive", "written back", "being drained", "90 %"):
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


def test_another_allocator(tmp_path: Path, rng: random.Random) -> None:
    """Chosen by RPC: the answer says so, and every page moves there, and is read."""
    with Server(tmp_path, "size=16M", "pool=8M") as server:
        handle = server.connect()
        written = fill(handle, rng, 4 * MIB)
        assert server.rpc("config")["allocator"] == "zbud"
        for name in ("zsmalloc", "z3fold"):
            assert server.rpc("set", {"allocator": name})["allocator"] == name
            assert server.rpc("config")["allocator"] == name
            wait_for("moving", lambda: server.rpc("stats")["migrating"] == 0)
            assert_holds(handle, written)
        assert "use zbud, z3fold or zsmalloc" in str(refusal(server, "set", {"allocator": 1}))


def test_recompression(tmp_path: Path, rng: random.Random) -> None:
    """At the start and by RPC; a disk below takes such pages, and gives them back."""
    words = ("size=32M", "pool=16M", "disk_size=64M", f"disk={tmp_path / 'disk'}")
    cold = ("allocator=zsmalloc", "recompress=zstd:3", "recompress_age=1")
    with Server(tmp_path, *words, *cold) as server:
        handle = server.connect()
        text = b" ".join(b"%d" % rng.randrange(1000) for _ in range(2 * MIB))
        written = {offset: text[offset : offset + PIECE] for offset in range(0, 6 * MIB, PIECE)}
        for offset, data in written.items():
            handle.pwrite(data, offset)
        wait_for("recompression", lambda: server.rpc("stats")["recompressed_pages"] > 1000)
        assert_holds(handle, written)
        server.rpc("drain")
        wait_for("an empty RAM", lambda: in_ram(server) == 0)
        server.rpc("drain", False)
        assert_holds(handle, written)
        assert server.rpc("config")["recompress"] == "zstd:3"
        status = zcache(tmp_path, "status", "--control", str(server.control)).stdout
        assert "zstd:3 after 1 s" in status
        holds = server.rpc("set", {"recompress": "none", "recompress_age": 7})
        assert (holds["recompress"], holds["recompress_age"]) == ("none", 7)
        assert server.rpc("set", {"recompress": "zstd:19"})["recompress"] == "zstd:19"
        for bad in ({"recompress": "zstd:20"}, {"recompress": "lz4"}, {"recompress": 3}):
            assert "use zstd:1 to zstd:19 or none" in str(refusal(server, "set", bad))
        for age in (0, "5m", 1 << 40):
            assert "use 1 to" in str(refusal(server, "set", {"recompress_age": age}))
        assert server.rpc("stats")["failed_requests"] == 0


def test_the_command_set(tmp_path: Path) -> None:
    with Server(tmp_path, "size=16M", "pool=8M") as server:
        zcache = (os.fspath(ROOT / ".venv/bin/zcache"), "set", "--control", str(server.control))
        done = subprocess.run(
            [*zcache, "allocator=z3fold", "pool=4M"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (
            0,
            f"zcache: allocator=z3fold {COLD} pool={4 * MIB}\n",
        )
        assert server.rpc("config")["allocator"] == "z3fold"
        for word, code, sentence in (
            ("allocator=slab", 3, "there is no allocator slab; write"),
            ("size=1G", 6, "size cannot be set while the server runs"),
            ("high", 3, "high is no change; write KEY=VALUE"),
        ):
            done = subprocess.run([*zcache, word], capture_output=True, text=True, check=False)
            assert done.returncode == code, done.stderr
            assert sentence in done.stderr
