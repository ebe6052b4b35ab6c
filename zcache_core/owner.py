"""Whose a named memory file is: a lock file, a segment number, a dead predecessor.

A lock word inside the memory file would outlive the process that set it.  So the
lock is a flock on `NAME.mem` in the runtime folder, which the kernel drops when
the last thread of its holder is gone.  The file's text is the segment number.  As
a second witness the successor waits until the pidfd of the last owner (written in
the superblock with its start time, because numbers are used again) reports exit.

    acquire -> flock held? no: InUseError
    wait_for_exit(pid, start) -> pidfd readable, or the pid is another process

Linux: flock(2), pidfd_open(2), proc(5).
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import time
from pathlib import Path
from typing import NamedTuple

from zcache_core.errors import InUseError, MemoryFileError

LOOK_S = 0.005
EXIT_WAIT_S = 10.0  # a killed server with tens of GiB mapped needs seconds to go, not more


def runtime_dir() -> Path:
    """Folder for sockets and lock files, made if missing: /run/zcache for root.

    ZCACHE_RUNTIME_DIR overrides; others use XDG_RUNTIME_DIR, then a folder in /tmp.
    """
    if wish := os.environ.get("ZCACHE_RUNTIME_DIR"):
        path = Path(wish)
    elif os.geteuid() == 0:
        path = Path("/run/zcache")
    elif base := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(base) / "zcache"
    else:
        path = Path(f"/tmp/zcache-{os.geteuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.geteuid():
        raise MemoryFileError(
            f"{path} belongs to another user; set ZCACHE_RUNTIME_DIR to a folder of your own"
        )
    return path


def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rsplit(")", 1)[1].split()[19])


def lock_path(name: str) -> Path:
    """The lock file of a memory file's name."""
    return runtime_dir() / f"{name}.mem"


def recorded_segment(name: str) -> int:
    """The segment that the lock file of `name` tells of; -1 when there is none."""
    try:
        text = lock_path(name).read_text().partition("\n")[0]
    except OSError:
        return -1
    return int(text) if text.isdigit() else -1


class OwnerLock:
    """The held lock of one memory-file name.  `shmid` is -1 when none is recorded."""

    def __init__(self, name: str, path: Path, fd: int, shmid: int) -> None:
        self.name, self.path, self.shmid = name, path, shmid
        self._fd = fd

    @classmethod
    def acquire(cls, name: str, patience_s: float = 0.0) -> OwnerLock:
        """Take the lock of `name`, or raise InUseError after so long.

        Patience is for who knows that the holder has ended: a child that it was about to start
        has the lock, too, until it is another program.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", name):
            raise MemoryFileError(
                f"the memory file name {name!r} is not usable; use up to 60 letters, digits, "
                f"dots, dashes and underscores"
            )
        path, until_s = lock_path(name), time.monotonic() + patience_s
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                if time.monotonic() < until_s:
                    time.sleep(LOOK_S)
                    continue
                raise InUseError(
                    f"the memory file {name} belongs to a running server; stop that one first, "
                    f"or use another name"
                ) from None
            try:  # the last owner may have removed the file between our open and our lock
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(fd)
        text = os.pread(fd, 32, 0).decode(errors="replace").partition("\n")[0]
        return cls(name, path, fd, int(text) if text.isdigit() else -1)

    def wait_for_exit(self, pid: int, ticks: int) -> None:
        """Return once the process (pid, start time) is gone; InUseError after 10 s."""
        if pid in (0, os.getpid()) or start_ticks(pid) != ticks:
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if not select.select([pidfd], [], [], EXIT_WAIT_S)[0]:
                raise InUseError(
                    f"process {pid} still has the memory file {self.name}; end it, then try again"
                )
        finally:
            os.close(pidfd)

    def record(self, shmid: int) -> None:
        """Write down the segment, for the successor.

        Never through an empty file: who is killed in between must still be found.
        """
        text = f"{shmid}\n".encode()
        self.shmid = shmid
        if os.pread(self._fd, 32, 0) != text:
            os.pwrite(self._fd, text, 0)
            os.ftruncate(self._fd, len(text))

    def forget(self) -> None:
        """The file is gone: remove its lock file (still holding the lock)."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock up; harmless when it is not held any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Leftover(NamedTuple):
    """A memory file that nobody has attached: its server was killed."""

    shmid: int
    name: str
    size_bytes: int
    resident_bytes: int
    uid: int


def unattached_segments() -> list[Leftover]:
    """System V segments without a user, from /proc/sysvipc/shm; names still empty."""
    rows: list[Leftover] = []
    with open("/proc/sysvipc/shm", encoding="ascii") as table:
        names = table.readline().split()
        for line in table:
            row = dict(zip(names, line.split(), strict=False))
            if row["nattch"] == "0":
                rows.append(
                    Leftover(
                        int(row["shmid"]), "", int(row["size"]), int(row["rss"]), int(row["cuid"])
                    )
                )
    return rows
