"""What a supervisor says: how its start went, to whom it concerns, and lines on the log.

A log line never waits: the reader of the log may be swapped out to the device whose
server we are about to start.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

STDERR = 2


def say(line: str) -> None:
    """One line on the log; dropped if the log would make us wait."""
    data = f"{line}\n".encode()
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(STDERR).st_mode):
            log = socket.socket(fileno=os.dup(STDERR))
            with log:
                log.send(data, socket.MSG_DONTWAIT)
        else:
            os.write(STDERR, data)


class Teller:
    """Says once how it went: to who started us (a pipe), to systemd, or on the log."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def __call__(self, code: int, sentence: str) -> None:
        if code == 0:
            notify("READY=1")
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.write(self._fd, f"{code} {sentence}\n".encode())
            os.close(self._fd)
            self._fd = None
        elif code:
            say(f"zcache: {sentence}")


def notify(text: str) -> None:
    """To systemd, when it started us (sd_notify(3))."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(text.encode(), "\0" + path[1:] if path[0] == "@" else path)
