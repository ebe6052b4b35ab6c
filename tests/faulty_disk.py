"""A disk that fails on command, below the kernel's own file calls: what a server's disk= is given.

    server --O_DIRECT--> PATH, a file of a FUSE mount
                           nbdfuse --NBD--> nbdkit, filter error --> BACKING, a plain file
                                              |         |
                                 stall(): SIGSTOP     a file that exists: reads, or writes, fail

    with FaultyDisk(folder, 64 << 20) as disk:
        Server(..., f"disk={disk.path}", "disk_size=64M")
        disk.fail_writes(True)          EIO from write(2), until fail_writes(False)

Nothing of it is ours but the switches, so what the server sees is what a failing medium does:
errors out of the kernel, calls that hang, bytes that are not those written (`flip`).

It needs root, /dev/fuse and Debian's libnbd-bin; `missing` says what is not there.  Bound: it ends
with its `with`, also when the server still holds the file open.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.servers import is_listening
from tests.plugin_helpers import wait_for


def missing() -> str:
    """Why there can be none here; empty when there can."""
    for program in ("nbdfuse", "nbdkit", "setpriv", "umount"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    if os.geteuid() != 0:
        return "needs root to mount"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse"
    return ""


class FaultyDisk:
    """`path` is the disk, `backing` the plain file under it.

    error: what a failing write or read answers with: EIO, ENOSPC, ...
    """

    def __init__(self, folder: Path, size_bytes: int, error: str = "EIO") -> None:
        self.backing = folder / "backing"
        self.size_bytes = size_bytes
        self._mount = folder / "disk"
        self.path = self._mount / "nbd"
        self._socket = folder / "backing.sock"
        self._switches = {kind: folder / f"{kind} fails" for kind in ("pread", "pwrite")}
        self._error = error
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._mount.mkdir()
        with open(self.backing, "wb") as file:
            file.truncate(self.size_bytes)
        words = [f"error={self._error}"]
        for kind, switch in self._switches.items():
            words += [f"error-{kind}-rate=100%", f"error-{kind}-file={switch}"]
        nbdkit = ["nbdkit", "-f", "-U", str(self._socket), "--filter=error", "file"]
        try:
            self._start([*nbdkit, str(self.backing), *words])
            wait_for("the backing server", lambda: is_listening(self._socket))
            self._start(["nbdfuse", str(self.path), "--unix", str(self._socket)])
            wait_for("the mount", self._mounted)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _start(self, command: list[str]) -> None:
        die_with_us = ["setpriv", "--pdeathsig", "KILL"]
        self._running.append(subprocess.Popen([*die_with_us, *command], stdin=subprocess.DEVNULL))

    def _mounted(self) -> bool:
        assert all(process.poll() is None for process in self._running), "it ended at once"
        return self.path.exists() and self.path.stat().st_size == self.size_bytes

    def _end(self) -> None:
        self.stall(False)
        if os.path.ismount(self._mount):
            subprocess.run(["umount", "--lazy", str(self._mount)], check=True)
        for process in reversed(self._running):
            process.kill()
            process.wait()

    # ---- faults ----

    def fail_writes(self, now: bool) -> None:
        """From now on every write fails, or none."""
        self._switch("pwrite", now)

    def fail_reads(self, now: bool) -> None:
        self._switch("pread", now)

    def _switch(self, kind: str, now: bool) -> None:
        if now:
            self._switches[kind].touch()
        else:
            self._switches[kind].unlink(missing_ok=True)

    def stall(self, now: bool) -> None:
        """From now on every call hangs; or those that hang go on."""
        if not self._running:
            return
        server = self._running[0]
        server.send_signal(signal.SIGSTOP if now else signal.SIGCONT)
        if now:
            wait_for("the stall", lambda: all(_is_stopped(task) for task in _tasks(server.pid)))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing reaches the medium meanwhile."""
        self.stall(True)
        try:
            yield
        finally:
            self.stall(False)

    def flip(self, offset: int, bit: int) -> None:
        """One bit of the medium is another from now on."""
        with open(self.backing, "r+b") as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def _is_stopped(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return True
