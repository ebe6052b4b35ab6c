"""The helper's spare: a copy that waits, locked in memory, to take its place.

    mender ── each new connection's socket and generation, its relays ──► spare
       │                                                        │ end of the line: mender dead
       └── kill -9                                              └─► goes on where it stood

When the helper dies while the link is dead, nobody could start another one: a new process needs
memory, and memory is to be had only by swapping out.  (Measured in the lab: `zcache attach` then
hangs until the kernel gives the device up.)  So the next one is there already.  It is a fork, so
it shares all code, and costs the 9 MB of data that its own memory lock makes its own.

Forking is done only while the link lives and answers (`mender`).  Before the spare has said that
it is locked, the helper's own pages are shared with it and the first write to one would need
another.  A spare that gets SIGTERM just ends; only the mender's end is in good order.

Bound: one spare; until it inherits it does one thing only: what the helper must not wait for, see
`swift`.  Linux: fork(2), unix(7) SCM_RIGHTS.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import struct
import time
from contextlib import suppress

from zcache_core import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from plugin.swift import Swift

READY_S = 5.0  # it takes some milliseconds
DISMISS_S = 1.0  # as well; but it may be waiting for a lock, see `swift`
NEWS = struct.Struct("=QII")  # the generation, the relays' processes; sockets go with it
FDS_MAX = 3  # the connection's socket, the relays' lines
BYE = b"bye"
SWIFT = b"swift"
COUNTING, YES, NO = b"counting?", b"1", b"0"
TERM = (signal.SIGTERM,)


class Inheritance:
    """What the dead one had told: its socket, last generation, and relays (process, line).

    None and 0 if nothing was told since the fork.
    """

    __slots__ = ("generation", "relays", "sock")

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.generation = 0
        self.relays: list[tuple[int, socket.socket]] | None = None

    def take(self, news: bytes, fds: list[int]) -> None:
        """What came last is what holds."""
        self.generation, *pids = NEWS.unpack(news)
        for old in (self.sock, *(line for _, line in self.relays or [])):
            if old is not None:
                old.close()
        self.sock = socket.socket(fileno=fds[0])
        lines = [socket.socket(fileno=fd) for fd in fds[1:]]
        self.relays = list(zip(pids, lines, strict=False))


class Spare:
    """The mender's side: `line` is readable when the spare has died, None without one."""

    def __init__(self, swift: Swift | None = None) -> None:
        self._swift = swift
        self.pid = 0
        self.line: socket.socket | None = None
        self._asked = False
        self._pidfd = -1  # a number may be somebody else's by the time we kill

    def fork(self) -> Inheritance | None:
        """Make one.  None in the mender, once the spare is ready (or could not be made).

        In the spare: returns when it has to take the mender's place.
        """
        self.bury()
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Until either side knows which one it is, SIGTERM waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, TERM)
        try:
            pid = os.fork()
        except OSError:
            pid = -1
        if pid == 0:
            ours.close()
            return _live(its, self._swift)
        its.close()
        if pid > 0:
            self.pid, self.line = pid, ours
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERM)
        if pid < 0:
            ours.close()
            return None
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:  # it has ended already, or there is no memory: none for now
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.bury()
            return None
        ours.settimeout(READY_S)
        try:
            ready = ours.recv(16)
        except OSError:
            ready = b""
        ours.setblocking(False)
        if not ready:
            self.kill()
        return None

    def tell(
        self, sock: socket.socket, generation: int, relays: list[tuple[int, socket.socket]]
    ) -> None:
        """What there is now.  Never blocks; a spare that is gone shows in `line`."""
        if self.line is not None:
            fds = array.array("i", [sock.fileno(), *(line.fileno() for _, line in relays)])
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)
            pids = ([pid for pid, _ in relays] + [0, 0])[: FDS_MAX - 1]
            try:
                self.line.sendmsg([NEWS.pack(generation, *pids)], [rights])
            except OSError:
                self.kill()  # it would inherit something old

    def be_swift(self) -> None:
        """The link lives, and we look after it.  Never blocks."""
        if self.line is not None:
            try:
                self.line.send(SWIFT)
            except OSError:
                self.kill()

    def ask(self) -> None:
        """Whether the kernel counts: `hear` says it.  Never blocks; one question at a time."""
        if self.line is not None and not self._asked:
            try:
                self.line.send(COUNTING)
                self._asked = True
            except OSError:
                self.kill()

    def hear(self) -> bool | None:
        """`line` is readable: True when it does not count, None when the spare has died."""
        assert self.line is not None
        try:
            said = self.line.recv(16)
        except BlockingIOError:
            return None
        except OSError:
            said = b""
        if not said:
            self.bury()
            return None
        self._asked = False
        return said == NO

    def dismiss(self) -> None:
        """We end in good order: it is not to take our place.

        Waits until it has ended, so that what it asks of the kernel comes before what we do.  If
        it does not in time, it has to ask for the careful timeout itself: see `_leave`.
        """
        if self.line is not None:
            end_s = time.monotonic() + DISMISS_S
            try:
                self.line.send(BYE)
                while (left_s := end_s - time.monotonic()) > 0:
                    self.line.settimeout(left_s)
                    if not self.line.recv(16):  # before it there may be "ready"
                        break
            except TimeoutError:
                pass
            except OSError:
                self.kill()
        self.bury()

    def kill(self) -> None:
        """It may have ended already."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.bury()

    def bury(self) -> None:
        """Forget a spare that has ended or is about to.  (SIGCHLD is ignored: nobody waits.)"""
        if self.line is not None:
            self.line.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self.line, self.pid, self._pidfd, self._asked = None, 0, -1, False


def _live(line: socket.socket, swift: Swift | None) -> Inheritance:
    """The spare's life, until the mender's ends.  SIGTERM is blocked when it begins."""
    mender_does = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TERM)
    try:
        found = _wait(line, swift)
    except BaseException:  # it must not end what is the mender's, as that would
        os._exit(1)
    signal.signal(signal.SIGTERM, mender_does)
    return found


def _wait(line: socket.socket, swift: Swift | None) -> Inheritance:
    process.lock_memory(on_fault=False)
    line.send(b"ready")
    found = Inheritance()
    while True:
        try:
            data, rights, _, _ = line.recvmsg(64, socket.CMSG_SPACE(4 * FDS_MAX))
        except (InterruptedError, ConnectionResetError):
            continue  # reset: the mender died before it read an answer; its end comes next
        if data == BYE:
            _leave(line, swift)
        if data == SWIFT:
            if swift is not None:
                swift.begin()
            continue
        if data == COUNTING:
            with suppress(OSError):  # a mender that has ended asks no more
                line.send(YES if swift is None or swift.is_counting() else NO)
            continue
        if not data:
            line.close()
            return found
        for _, _, fds in rights:
            found.take(data, list(struct.unpack(f"={len(fds) // 4}i", fds)))


def _leave(line: socket.socket, swift: Swift | None) -> NoReturn:
    """The mender looks after the kernel when we have ended; unless it is tired of waiting."""
    try:
        gone = not line.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        gone = False
    except OSError:
        gone = True
    if gone and swift is not None:
        with suppress(OSError):
            swift.end()
    os._exit(0)
