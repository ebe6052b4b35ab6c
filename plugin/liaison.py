"""What a server tells the supervisor that started it, over a socket pair.

    server -> supervisor   "waiting\n"            an origin can be forked; a standby can take over
                           "forked PID\n"         an origin has made a standby; its line goes along
                           "serving\n"            pages are answered from now on
                           "refused CODE TEXT\n"  it will not start, and why: one sentence
    supervisor -> origin   "f"                    make a standby (standby.py)
    supervisor -> standby  "g"                    the predecessor is gone: go on
    end of file            the other one is gone; a standby may have another one (lone.py)

A server without a supervisor (ZCACHE_SUPERVISOR not set) tells nobody.  After
"serving" the socket is closed: from then on the two know each other by pidfd only, so
that either may be replaced.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Protocol

from zcache_core import process
from zcache_core.errors import InUseError, ZcacheError

SUPERVISOR_FD = "ZCACHE_SUPERVISOR"
STANDBY = "ZCACHE_STANDBY"
FORK, GO = b"f", b"g"
SENTENCE_BYTES_MAX = 4000


class Alone(Protocol):
    """What a standby does without its supervisor (lone.py)."""

    def wait(self) -> socket.socket | None: ...
    def hang_up(self) -> None: ...
    def close(self) -> None: ...


class Liaison:
    """Our end of it."""

    def __init__(self, sock: socket.socket | None, standby: bool) -> None:
        self._sock, self.is_standby = sock, standby
        self.is_supervised = sock is not None
        self._alone: Alone | None = None

    @classmethod
    def from_environment(cls) -> Liaison:
        """Takes the variables out, so that no child of ours believes they are its own."""
        fd, standby = os.environ.pop(SUPERVISOR_FD, ""), os.environ.pop(STANDBY, "")
        if not fd.isdigit():
            return cls(None, False)
        sock = socket.socket(fileno=int(fd))
        sock.set_inheritable(False)
        return cls(sock, bool(standby))

    def be_forked(self) -> None:
        """The origin: say that we are ready; returns in each fork, with a line of its own."""
        assert self._sock is not None
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
        self._send("waiting\n")
        while True:
            self._hear(FORK)
            ours, its = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                break
            with contextlib.suppress(OSError):  # ended already
                os.setpgid(pid, pid)  # before the supervisor hears of it: see Server
            its.close()
            with ours:
                socket.send_fds(self._sock, [b"forked %d\n" % pid], [ours.fileno()])
        ours.close()
        self._sock.close()
        self._sock = its
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def wait_turn(self, alone: Alone | None = None) -> None:
        """A standby: say that we are ready, return when the predecessor is gone.

        `alone`: what is done when the supervisor is gone; without it, nothing.
        """
        self.is_standby = False
        while self._sock is not None:
            self._send("waiting\n")
            try:
                self._hear(GO)
                break
            except InUseError:
                if alone is None:
                    raise
                self._sock.close()
                self._sock = alone.wait()
        self._alone = alone
        if alone is not None:
            alone.hang_up()

    def _hear(self, order: bytes) -> None:
        assert self._sock is not None
        heard = b""
        with contextlib.suppress(ConnectionError):
            heard = self._sock.recv(1)
        if heard != order:
            raise InUseError("the supervisor is gone; start it again with 'zcache serve'")

    def serving(self) -> None:
        """Pages are answered from now on, whether the supervisor lives or not.  The last word."""
        if self.is_supervised:
            process.outlive_parent()
            self._send("serving\n")
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._alone is not None:
            self._alone.close()
            self._alone = None

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """What goes wrong inside is told, and raised on."""
        try:
            yield
        except ZcacheError as error:
            sentence = " ".join(str(error).split())[:SENTENCE_BYTES_MAX]
            self._send(f"refused {error.exit_code} {sentence}\n")
            raise

    def _send(self, text: str) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):  # it may be gone, which is no matter of ours
                self._sock.sendall(text.encode())
