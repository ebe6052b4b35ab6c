"""Real memory pressure: a server and a program share a memory limit that holds only one of them.

    control group, 128 MiB   pool of 64 MiB, full | a file of 80 MiB, read over and over

The program's file does not fit beside the pool: its pages are read anew all the time,
tasks stall, the kernel says so (PSI), the pool goes down to its disk and gives its
frames back until the file fits and nobody stalls any more.  (That it grows again is in
t5_steward, where seconds pass faster.)
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugin_helpers import Server, wait_for

MIB = 1 << 20
LIMIT = 128 * MIB
FILE = 80 * MIB
PIECE = 1 * MIB

READ_ON = """
import os, sys, threading

def read(start):
    room = bytearray(1 << 20)
    while True:
        for piece in range(pieces):
            os.preadv(fd, [room], (start + piece) % pieces << 20)

sys.stdin.readline()
fd = os.open(sys.argv[1], os.O_RDONLY)
pieces = os.fstat(fd).st_size >> 20
for part in range(4):
    threading.Thread(target=read, args=(part * pieces // 4,)).start()
"""


def mounted(kind: str, option: str) -> Path | None:
    """Where a control group file system of that kind and option is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, path, found, options, *_ = line.split()
        if found == kind and option in options.split(","):
            return Path(path)
    return None


class Group:
    """A group with a memory limit of our own, and the file with its pressure."""

    def __init__(self, limit_bytes: int) -> None:
        self.folders: list[Path] = []
        unified, memory = mounted("cgroup2", "rw"), mounted("cgroup", "memory")
        name = f"zcache-test-{os.getpid()}"
        try:
            if memory is not None:  # version 1 has the limit, and the unified one the pressure
                self._make(memory / name, "memory.limit_in_bytes", limit_bytes)
            if unified is not None:
                limit = "memory.max" if memory is None else ""
                self._make(unified / name, limit, limit_bytes)
        except OSError as error:
            self.remove()
            pytest.skip(f"no control group with a memory limit can be made here: {error}")
        self.pressure = self.folders[-1] / "memory.pressure"
        if not self.pressure.exists():
            self.remove()
            pytest.skip("control groups have no pressure file here")

    def _make(self, folder: Path, limit: str, limit_bytes: int) -> None:
        folder.mkdir()
        self.folders.append(folder)
        if limit:
            (folder / limit).write_text(str(limit_bytes))

    def add(self, pid: int) -> None:
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        for folder in self.folders:
            processes = folder / "cgroup.procs"
            wait_for(f"an empty {folder}", functools.partial(is_empty, processes))
            folder.rmdir()

    def stalled_us(self) -> int:
        return int(self.pressure.read_text().splitlines()[0].rpartition("total=")[2])

    def stalls(self, seconds: float) -> float:
        """Share of that time, from now on, in which some task stalled for memory."""
        before, start = self.stalled_us(), time.monotonic()
        time.sleep(seconds)
        return (self.stalled_us() - before) / 1e6 / (time.monotonic() - start)


def is_empty(file: Path) -> bool:
    return not file.read_text()


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group(LIMIT)
    yield group
    group.remove()


@contextlib.contextmanager
def reader(group: Group, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the group that reads all of the file over and over."""
    command = [sys.executable, "-c", READ_ON, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as program:
        try:
            group.add(program.pid)  # before it reads: what is read is charged to who does
            assert program.stdin is not None
            program.stdin.write(b"\n")
            program.stdin.flush()
            yield program
        finally:
            program.kill()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_pool_makes_room_for_a_program(tmp_path: Path, rng: random.Random, group: Group) -> None:
    with open(tmp_path / "file", "wb") as file:
        for _ in range(FILE // MIB):
            file.write(rng.randbytes(MIB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not another group's
    words = ("size=128M", "pool=64M", f"disk={tmp_path / 'disk'}", "disk_size=160M")
    with Server(tmp_path, *words, f"pressure={group.pressure}") as server:
        group.add(server.pid)
        handle = server.connect()
        written = {offset: rng.randbytes(PIECE) for offset in range(0, 80 * MIB, PIECE)}
        for offset, data in written.items():
            handle.pwrite(data, offset)
        assert server.rpc("stats")["committed_frames"] > 56 * MIB // 4096
        with reader(group, tmp_path / "file"):
            before = wait_for("pressure", lambda: stalls(group, 0.5, more=True))
            wait_for("a smaller pool", lambda: pool_mib(server) < 56)
            reasons = server.rpc("health")["reasons"]
            assert any("Memory is" in reason["what"] for reason in reasons)
            after = wait_for("an end of it", lambda: stalls(group, 1.0, more=False))
            print(f"stalled {before} with the pool full, {after} with {pool_mib(server):.0f} MiB")
        for offset, data in written.items():
            assert handle.pread(PIECE, offset) == data
        stats = server.rpc("stats")
        assert stats["failed_stores"] == stats["failed_requests"] == 0
        assert stats["pressure_steps"] > 0


def stalls(group: Group, seconds: float, more: bool) -> str:
    """The share of that time as text, if it is more (or not more) than a tenth; else nothing."""
    share = group.stalls(seconds)
    return f"{100 * share:.0f} %" if (share > 0.1) == more else ""


def pool_mib(server: Server) -> float:
    return float(server.rpc("stats")["committed_frames"]) / 256
