"""A standby whose supervisor is gone: it goes on by itself, or with the next supervisor.

    SUPERVISED   waits for "g" on its line (liaison.py)
        │ end of file: the supervisor is gone
        ▼
    ALONE        polls the pidfd of the server, and its own socket NAME.lone
        ├─ the next supervisor calls there             ──► SUPERVISED, on that line
        ├─ the server has ended, nobody supervises     ──► its turn: it holds the supervisor's
        │                                                  lock until it serves
        ├─ the server ended and left the memory file   ──► ends: it is not to be succeeded
        ├─ the supervisor was told to end, or the name
        │  was given up ('zcache stop')                ──► ends, too
        ├─ the memory file is another server's         ──► ends
        └─ there is a supervisor that does not call    ──► ends, after UNCALLED_S

Who decides is who holds the lock of NAME.serve: the supervisor for its life, a lone standby for
its turn.  So never two do, and a supervisor that starts just then waits, and adopts who serves.
The first law is the memory file's all the same (`MemoryFile.take`).

All that is needed is had while there is memory: the pidfd, the socket, the lock's file, and the
page of NAME.mem, which a supervisor holds in memory otherwise.

Bound: it looks once a second.  What it is not: a supervisor; it starts nobody.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import time
from pathlib import Path

from cluster import unixsock
from plugin.instance import Instance
from plugin.servestate import HeldState, Kept
from zcache_core.errors import InUseError
from zcache_core.memfile import MemoryFile
from zcache_core.owner import start_ticks

LOOK_S = 1.0
AGAIN_S = 0.02  # the server is dead and a supervisor is there: it calls in a moment
# A supervisor calls as soon as it has the lock; where memory is short even that may take long.
UNCALLED_S = 60.0
CALL_S = 1.0  # to connect: the kernel does that alone


class Vigil:
    """What a standby has to be alone with; made while the server lives.  Raises OSError."""

    def __init__(self, instance: Instance, memory: MemoryFile) -> None:
        self._memory, self._path, self._serve = memory, instance.lone, instance.serve
        self._kept = Kept(instance.memory_lock)
        self._has_turn = False
        self._owner = memory.owner_pid, memory.owner_start_ticks
        self._pidfd = _pidfd_of(*self._owner)
        self._lock_fd = os.open(self._serve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._state = HeldState(self._lock_fd)
        self._socket: socket.socket | None = _listen(self._path)
        self._inode = os.stat(self._path).st_ino

    def wait(self) -> socket.socket | None:
        """A line to the next supervisor; None: it is our turn.  Raises InUseError for neither."""
        assert self._socket is not None
        uncalled_s: float | None = None
        while True:
            ended = self._pidfd < 0 or _is_readable(self._pidfd)
            self._sleep(ended)
            ended = ended or _is_readable(self._pidfd)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                line, _ = self._socket.accept()
                line.setblocking(True)
                return line
            if self._take_lock():
                self._check_owner()
                if ended:
                    self._has_turn = True
                    return None
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
                uncalled_s = None
                continue
            now_s = time.monotonic()
            uncalled_s = now_s if uncalled_s is None else uncalled_s
            if now_s - uncalled_s > UNCALLED_S:
                raise InUseError("the supervisor has another standby; this one is not needed")

    def hang_up(self) -> None:
        """Nobody can call any more: it is our turn."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            unixsock.remove(self._path, self._inode)

    def close(self) -> None:
        """It serves, and may be adopted."""
        self.hang_up()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        if self._has_turn:
            self._state.tell_heir(os.getpid())
        self._state.close()
        fcntl.flock(self._lock_fd, fcntl.LOCK_UN)  # a child just starting may have it, too
        os.close(self._lock_fd)
        self._kept.close()

    def _sleep(self, ended: bool) -> None:
        assert self._socket is not None
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not ended:
            poll.register(self._pidfd, select.POLLIN)
        poll.poll(1000 * (AGAIN_S if ended else LOOK_S))

    def _check_owner(self) -> None:
        """Nobody else decides just now."""
        now = self._memory.owner_pid, self._memory.owner_start_ticks
        if now != self._owner or not now[0]:
            whom = "nobody's: it was ended in good order" if not now[0] else "another server's"
            raise InUseError(f"the memory file is {whom}; start with 'zcache serve'")
        if self._state.is_stopping:
            raise InUseError("the server was told to end; start it with 'zcache serve'")

    def _take_lock(self) -> bool:
        """The supervisor's lock, if there is none; of the file that has the name now."""
        for _ in range(2):
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            try:
                if os.stat(self._serve).st_ino == os.fstat(self._lock_fd).st_ino:
                    return True
                new_fd = os.open(self._serve, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                raise InUseError("the server was stopped; start it with 'zcache serve'") from None
            self._state.close()
            os.close(self._lock_fd)
            self._lock_fd, self._state = new_fd, HeldState(new_fd)
        return False


def call(path: Path) -> tuple[int, socket.socket] | None:
    """(process, line) of the standby that listens there; None if none does."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        line.settimeout(CALL_S)
        line.connect(str(path))
        line.settimeout(None)
        # Of who called listen(); struct ucred
        peer = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        line.close()
        return None
    return struct.unpack("3i", peer)[0], line


def _listen(path: Path) -> socket.socket:
    """In the place of whoever listened there: there is one standby."""
    path.unlink(missing_ok=True)
    sock = socket.socket(
        socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    os.fchmod(sock.fileno(), 0o600)
    sock.bind(str(path))
    sock.listen(4)
    return sock


def _pidfd_of(pid: int, ticks: int) -> int:
    """-1 when that process is gone.  Raises OSError when that cannot be known."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    found = start_ticks(pid)
    if found == ticks:
        return pidfd
    is_over = found != 0 or _is_readable(pidfd)
    os.close(pidfd)
    if not is_over:
        raise OSError(errno.EIO, f"/proc says nothing of process {pid}")
    return -1


def _is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])
