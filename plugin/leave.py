"""An orderly end on SIGUSR1: connections are finished, not cut off; then we are gone.

nbdkit alone, told to end, waits for its clients, which a kernel that swaps never does
for it.  So, in this order:

    the node process ends              while its pages, if swapped out to us, can come back; not
                                       one that brings pages from peers
    the socket's name is removed       nobody new comes
    SHUT_RD on every connection        nothing more is taken in; what is in flight is
                                       answered; a kernel's next request fails at once
                                       on a Unix socket and is sent again elsewhere,
                                       instead of waiting for its timeout
    wait until they are closed         bounded by DRAIN_S, then cut off
    exit                               at once: all that a successor needs is in the memory file
                                       at any moment, and every page waits until we are gone

The thread waits in sigwait, without the GIL: it costs nothing until then.  SIGUSR1 is
blocked in every thread that is made after `prepare`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cluster import unixsock
from plugin.keeper import STACK_BYTES

LEAVE = signal.SIGUSR1
DRAIN_S = 1.0  # below the request timeout of the clients, 2 s and more
LOOK_S = 0.002


def prepare() -> None:
    """Before any other thread is made: they must not be ended by the signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {LEAVE})


def watch(unix: str | None, inode: int, first: Callable[[], None]) -> None:
    """Start the thread.  `unix` is the NBD socket's path and inode, None without one.

    `first` is done while requests are still answered.
    """
    before = threading.stack_size(STACK_BYTES)
    try:
        threading.Thread(
            target=_run, args=(unix, inode, first), name="zcache-leave", daemon=True
        ).start()
    finally:
        threading.stack_size(before)


def _run(unix: str | None, inode: int, first: Callable[[], None]) -> None:
    signal.sigwait({LEAVE})
    first()
    if unix is not None:
        unixsock.remove(unix, inode)
    _finish_connections()
    os._exit(0)


def _finish_connections() -> None:
    """Take nothing more in, wait until all is answered, cut off what is not by then."""
    for sock in _connections():
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
        sock.detach()
    deadline_s = time.monotonic() + DRAIN_S
    while left := _connections():
        late = time.monotonic() > deadline_s
        for sock in left:
            if late:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            sock.detach()
        if late:
            return
        time.sleep(LOOK_S)


def _connections() -> list[socket.socket]:
    """This process's accepted connections; to be detached, not closed."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(Path("/proc/self/fd", name)).startswith("socket:"):
                continue
            sock = socket.socket(fileno=int(name))
            if _is_accepted(sock):
                found.append(sock)
            else:
                sock.detach()
    return found


def _is_accepted(sock: socket.socket) -> bool:
    """Connected, not listening.  The log (journald) is a socket too, but no stream of ours."""
    if sock.type != socket.SOCK_STREAM:
        return False
    try:
        sock.getpeername()
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        # What we connected to has no name of its own at our end; what was accepted has ours.
        return not listens and (sock.family != socket.AF_UNIX or bool(sock.getsockname()))
    except OSError:
        return False
