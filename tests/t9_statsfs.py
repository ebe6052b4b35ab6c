"""`zcache stats-fs`: counters as files, on a real mount."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugin import counterfiles
from plugin.statsfs import DEVICE, CounterFiles, check
from tests.plugin_helpers import ROOT, Server, environment, wait_for
from zcache_core.counters import COUNTERS, HISTOGRAMS
from zcache_core.errors import ConfigError, ControlError

PAGE = 4096
TIMED = {"unit": "nanoseconds", "count": 5, "sum": 900, "buckets": [0, 2, 0, 0, 3]}
STATS: dict[str, Any] = {counter.name: at for at, counter in enumerate(COUNTERS)}
ANSWER = STATS | {"histograms": {histogram.name: TIMED for histogram in HISTOGRAMS}}


def test_every_counter_has_one_file_of_its_own_name() -> None:
    files = counterfiles.files()
    own = [path for path, name in files.items() if path.endswith("/" + name)]
    assert sorted(files[path] for path in own) == sorted(STATS)
    assert counterfiles.KERNEL_NAMES.keys() == files.keys() - set(own)


def test_folders_as_the_kernel_had_them() -> None:
    tree = CounterFiles(lambda: ANSWER)
    assert tree.names("/") == ["frontswap", "latency", "ramster", "zbud", "zcache"]
    assert tree.names("/frontswap") == ["failed_stores", "invalidates", "loads", "succ_stores"]
    assert "unbuddied_count" in tree.names("/zbud")
    kernels = {"writtenback_pages", "failed_pers_puts", "flush_found"}
    assert kernels < set(tree.names("/zcache"))
    assert {"pers_zpages", "eph_zpages_max", "evicted_eph_pageframes"} < set(tree.names("/zcache"))
    assert counterfiles.folder("remote_pers_pages_succ_get") == "ramster"
    for path in tree.names("/zcache"):
        assert tree.content(f"/zcache/{path}").endswith(b"\n")
    for path in ("/nothing", "/zcache/loads", "/zcache/pers_zpages/x"):
        with pytest.raises(OSError) as error:  # noqa: PT011
            tree.attributes(path)
        assert error.value.errno == errno.ENOENT


def test_files_of_the_histograms() -> None:
    tree = CounterFiles(lambda: ANSWER)
    names = tree.names("/latency")
    assert len(names) == 5 * len(HISTOGRAMS)
    assert {name: tree.content(f"/latency/{name}") for name in names if name[:3] == "put"} == {
        "put_count": b"5\n", "put_sum_ns": b"900\n", "put_buckets": b"0 2 0 0 3\n",
        "put_p50_ns": b"9\n", "put_p99_ns": b"16\n",
    }  # fmt: skip
    assert "get_disk_p99_us" in names
    for name in names:
        assert (
            len(tree.content(f"/latency/{name}")) <= tree.attributes(f"/latency/{name}")["st_size"]
        )


def test_one_question_for_many_files() -> None:
    asked = 0

    def ask() -> dict[str, int]:
        nonlocal asked
        asked += 1
        return STATS

    tree = CounterFiles(ask)
    for name in tree.names("/zcache"):
        tree.content(f"/zcache/{name}")
    assert 1 <= asked < 20


def test_what_cannot_be_mounted_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in ((tmp_path, "not empty"), (tmp_path / "file", "no folder"),
                       (tmp_path / "none", "make that folder first")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            check(str(path))


def may_mount() -> bool:
    """Whether /dev/fuse can be opened and this user may mount."""
    with contextlib.suppress(OSError):
        os.close(os.open(DEVICE, os.O_RDWR))
        return os.geteuid() == 0
    return False


mounts = pytest.mark.skipif(not may_mount(), reason="mounting needs root and /dev/fuse")


@contextlib.contextmanager
def mounted(folder: Path, server: Server) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    where = folder / "mnt"
    where.mkdir()
    command = [sys.executable, "-m", "plugin.cli", "stats-fs", str(where)]
    process = subprocess.Popen(
        [*command, "--control", str(server.control)], cwd=ROOT, env=environment(folder),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def there() -> bool:
        assert process.poll() is None, process.stdout and process.stdout.read()
        return os.path.ismount(where)

    try:
        wait_for("the mount", there)
        yield where, process
    finally:
        process.terminate()
        process.wait(30)
        if os.path.ismount(where):
            subprocess.run(["umount", "-l", where], check=False)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def server(tmp_path: Path) -> Any:
    with Server(tmp_path, "size=16M", "pool=4M") as running:
        yield running


@mounts
def test_files_of_a_real_server(server: Server, tmp_path: Path) -> None:
    handle = server.connect()
    for page in range(25):
        handle.pwrite((b"page %4d " % page * 410)[:PAGE], page * PAGE)
    with mounted(tmp_path, server) as (where, process):
        done = subprocess.run(
            ["grep", "-r", "."], cwd=where, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        found = dict(line.split(":") for line in done.stdout.splitlines())
        assert found.keys() == counterfiles.files().keys() | counterfiles.latency_files().keys()
        assert int(found["latency/put_count"]) > 0
        assert found["frontswap/succ_stores"] == found["zcache/pers_zpages"] == "25"
        stats = server.rpc("stats")
        for path, name in counterfiles.files().items():
            if name not in ("server_resident_bytes", "server_locked_bytes"):
                assert int(found[path]) == stats[name], path
        for page in range(25, 30):
            handle.pwrite((b"page %4d " % page * 410)[:PAGE], page * PAGE)
        wait_for("newer numbers", lambda: (where / "frontswap/succ_stores").read_text() == "30\n")
        for change in (lambda: (where / "zcache/x").touch(),
                       lambda: (where / "frontswap/loads").write_text("0"),
                       lambda: (where / "frontswap/loads").unlink()):  # fmt: skip
            with pytest.raises(OSError, match="Read-only"):
                change()
        os.kill(server.node_pid, signal.SIGKILL)
        wait_for("the new node", server.ping)
        wait_for("files again", lambda: readable(where / "frontswap/succ_stores"))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not os.path.ismount(where)
        assert process.stdout is not None
        assert "Counters are files below" in process.stdout.read()


def readable(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text() == "30\n"
    return False


@mounts
def test_umount_ends_it(server: Server, tmp_path: Path) -> None:
    with mounted(tmp_path, server) as (where, process):
        subprocess.run(["umount", where], check=True, timeout=30)
        assert process.wait(30) == 0


def test_a_silent_server_is_eio() -> None:
    def ask() -> dict[str, int]:
        raise ControlError("nobody")

    with pytest.raises(OSError) as error:  # noqa: PT011
        CounterFiles(ask).content("/frontswap/loads")
    assert error.value.errno == errno.EIO
