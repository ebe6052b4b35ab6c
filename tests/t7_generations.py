"""A worker that is late on purpose: its old write, sent again meanwhile, is not applied."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.plugin_helpers import Server, Thread, node_processes, run_nbdkit, segments, wait_for
from zcache_core import memfile

PAGE = 4096
DELAY_S = 2  # of every write, by nbdkit's delay filter, before the plugin sees it


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    yield tmp_path
    for row in memfile.leftovers():
        if row.name == f"t7-gen-{os.getpid()}":
            memfile.remove(row.shmid)


def attach(server: Server, export: str) -> Any:
    handle = nbd.NBD()
    handle.set_export_name(export)
    handle.connect_unix(str(server.socket))
    server._handles.append(handle)
    return handle


def test_a_late_write_is_not_applied(runtime: Path) -> None:
    options = ("--filter=delay",)
    words = ("size=16M", "pool=4M", f"delay-write={DELAY_S}")
    with Server(runtime, *words, options=options) as server:
        old = attach(server, "@1")
        errors: list[str | None] = []

        def write_late() -> None:
            try:
                old.pwrite(b"late" * 1024, 0)
            except nbd.Error as error:
                errors.append(error.errno)

        late = threading.Thread(target=write_late)
        late.start()
        # The filter holds it, before our callback.
        wait_for("a worker that sleeps", lambda: any(map(is_asleep, workers(server))))
        new = attach(server, "@2")
        assert new.pread(PAGE, 0) == bytes(PAGE)
        late.join()
        assert errors == ["ESHUTDOWN"]
        assert new.pread(PAGE, 0) == bytes(PAGE), "the first answer still holds"
        assert server.rpc("stats")["fenced_requests"] == 1
        with pytest.raises(nbd.Error):
            attach(server, "@1")
        wait_for("the log", lambda: "generation 1 is over: 2 has the device" in server.log())
        with pytest.raises(nbd.Error):
            attach(server, "nowhere@3")
        wait_for("the log", lambda: "there is no device 'nowhere'" in server.log())


def workers(server: Server) -> list[Thread]:
    return [thread for thread in server.threads() if thread.tid != server.pid]


def is_asleep(thread: Thread) -> bool:
    """In nbdkit_nanosleep, which is a poll; a worker without a request is in recv."""
    return thread.syscall in ("7", "271")


def test_generations_outlive_the_server(runtime: Path) -> None:
    words = ("size=16M", "pool=4M", f"memory=t7-gen-{os.getpid()}")
    with Server(runtime, *words) as server:
        attach(server, "@1700000000000000").pwrite(b"x" * PAGE, 0)
        (shmid,) = segments(server.pid)
        server.end(signal.SIGKILL)
        wait_for("the end of the node process", lambda: not node_processes(server.pid))
        with Server(runtime, *words) as successor:
            with pytest.raises(nbd.Error):
                attach(successor, "@1699999999999999")
            assert attach(successor, "@1700000000000001").pread(PAGE, 0) == b"x" * PAGE
        memfile.remove(shmid)


def test_devices_that_share_a_pool(runtime: Path) -> None:
    """Each is an export of its own; together they are one memory file, that knows its parts."""
    words = ("devices=a:4M,b:2M", "pool=4M", f"memory=t7-gen-{os.getpid()}")
    with Server(runtime, *words) as server:
        (shmid,) = segments(server.pid)
        first, a, b = (attach(server, export) for export in ("", "a@7", "b@1"))
        assert [handle.get_size() for handle in (first, a, b)] == [4 << 20, 4 << 20, 2 << 20]
        a.pwrite(b"a" * PAGE, 0)
        b.pwrite(b"b" * 2 * PAGE, 0)
        assert first.pread(PAGE, 0) == b"a" * PAGE
        attach(server, "b@2")
        with pytest.raises(nbd.Error):
            b.pwrite(b"x" * PAGE, 0)
        a.pwrite(b"A" * PAGE, 0)
        assert server.rpc("devices") == [
            {"name": "a", "size_bytes": 4 << 20, "generation": 7, "stored_pages": 1},
            {"name": "b", "size_bytes": 2 << 20, "generation": 2, "stored_pages": 2},
        ]
        with pytest.raises(nbd.Error):
            attach(server, "c")
        wait_for("the log", lambda: "there is no device 'c'; ask for a or b" in server.log())
        server.end(signal.SIGKILL)
        wait_for("the end of the node process", lambda: not node_processes(server.pid))
        swapped = ("devices=b:4M,a:2M", *words[1:])
        code, _, log = run_nbdkit(runtime, *swapped, options=("-U", str(runtime / "x.sock")))
        assert code != 0
        assert "was made with devices=a:4M,b:2M; write that" in log
        with Server(runtime, *words) as successor:
            assert attach(successor, "b@3").pread(PAGE, PAGE) == b"b" * PAGE
        memfile.remove(shmid)
