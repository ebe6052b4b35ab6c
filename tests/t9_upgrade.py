"""A server replaced while it serves: nothing lost, nothing cut off; what cannot be done is said."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from plugin import servestate
from tests.plugin_helpers import wait_for
from tests.serve_helpers import Served, kill, served
from zcache_core import memfile

PAGE = 4096
WORDS = ("size=16M", "pool=8M")
FORMAT_OFFSET = 8  # of format_version in the superblock


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    with served(tmp_path, f"t9-up-{os.getpid()}") as it:
        it.serve(*WORDS)
        yield it


def one_of_each(it: Served) -> None:
    kinds = ["node", "server", "supervisor"]
    wait_for("one of each", lambda: sorted(it.processes().values()) == kinds)


class Client(threading.Thread):
    """Writes page after page like a kernel at queue depth one, dialling again when cut off.

    `stall_s` is the longest time between two answers.
    """

    def __init__(self, it: Served) -> None:
        super().__init__()
        self._it, self.finish = it, threading.Event()
        self.written: dict[int, bytes] = {}
        self.dials, self.stall_s = 0, 0.0

    def run(self) -> None:
        rng = random.Random(1)
        last_s = time.monotonic()
        while not self.finish.is_set():
            try:
                handle = nbd.NBD()
                handle.connect_unix(str(self._it.instance.socket))
                self.dials += 1
            except nbd.Error:
                time.sleep(0.002)
                continue
            while not self.finish.is_set():
                page, data = rng.randrange(2000), rng.randbytes(64) * 64
                self.written.pop(page, None)
                try:
                    handle.pwrite(data, page * PAGE)
                except nbd.Error:
                    break
                self.written[page] = data
                now_s = time.monotonic()
                self.stall_s, last_s = max(self.stall_s, now_s - last_s), now_s


def test_upgrade_under_load(it: Served) -> None:
    before = it.state()
    client = Client(it)
    client.start()
    try:
        for turn in range(2):
            wait_for("work", lambda: len(client.written) > 100)
            old = it.state().server_pid
            done = it.zcache("upgrade")
            after = it.state()
            assert f"(process {after.server_pid})" in done.stdout
            assert after.server_pid != old
            assert after.upgrades == turn + 1
            assert after.supervisor_pid == before.supervisor_pid
    finally:
        client.finish.set()
        client.join()
    assert client.dials == 3
    handle = it.connect()
    for page, data in client.written.items():
        assert handle.pread(PAGE, page * PAGE) == data
    one_of_each(it)
    assert "signal 9" not in it.log()
    # and it is supervised as before
    kill(after.server_pid)
    assert it.serving(other_than=after.server_pid).upgrades == 2


def test_a_format_that_the_new_version_cannot_read(it: Served) -> None:
    """Refused beforehand, in one sentence; the old server goes on."""
    handle = it.connect()
    handle.pwrite(b"x" * PAGE, 0)
    state = it.state()
    poke_format(it, 99)
    try:
        done = it.zcache("upgrade", check=False)
        assert done.returncode == 2
        assert "the server goes on as it was: the memory file has format 99" in done.stderr
        assert done.stderr.count("\n") == 1
        assert it.state().server_pid == state.server_pid
        assert handle.pread(PAGE, 0) == b"x" * PAGE
    finally:
        poke_format(it, memfile.FORMAT)
    it.zcache("upgrade")
    assert it.state().server_pid != state.server_pid
    assert it.state().upgrade_error == ""
    assert it.connect().pread(PAGE, 0) == b"x" * PAGE


def poke_format(it: Served, number: int) -> None:
    """Through the running server's mapping: nobody else may write there."""
    shmid = memfile.find(it.name)
    assert shmid is not None
    pid = it.state().server_pid
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "SYSV" in line and line.split()[4] == str(shmid):
            at = int(line.partition("-")[0], 16)
            with open(f"/proc/{pid}/mem", "r+b", buffering=0) as file:
                file.seek(at + FORMAT_OFFSET)
                file.write(number.to_bytes(4, "little"))
            return
    raise AssertionError("the server does not map its memory file")


def test_nobody_to_upgrade(it: Served) -> None:
    kill(it.state().supervisor_pid)
    done = it.zcache("upgrade", check=False)
    assert done.returncode == 2
    assert "no supervisor of" in done.stderr
    assert "'zcache serve' starts one and takes the server over" in done.stderr
    it.serve()
    it.zcache("upgrade")


def test_supervisor_killed_in_the_middle(it: Served, rng: random.Random) -> None:
    """At any moment of an upgrade: the next supervisor finds or starts one server."""
    data = rng.randbytes(PAGE) + bytes(PAGE)
    it.connect().pwrite(data, 0)
    it.disconnect()
    for _ in range(2):
        state = it.state()
        os.kill(state.supervisor_pid, signal.SIGHUP)
        time.sleep(rng.random() * 0.5)
        kill(state.supervisor_pid)
        it.serve()
        one_of_each(it)
        assert it.state().phase == servestate.SERVING
        assert it.connect().pread(len(data), 0) == data
        it.disconnect()
