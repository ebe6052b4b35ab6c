"""What a supervisor says: how its start went, to whom it concerns, and lines on the log.

A log line never waits: the reader of the log may be swapped out to the device whose
server we are about to start, and so may the page of a log file in a tmpfs (measured: the
supervisor then hung in its own "starting it again").  So a thread writes, and who speaks
only queues; LINES_MAX lines wait, what comes on top is dropped.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import socket
import stat
import sys
import threading
import time

STDERR = 2
LINES_MAX = 64
FLUSH_S = 0.5
STACK_BYTES = 256 * 1024  # the default of 8 MiB would be locked as far as touched


class Log(threading.Thread):
    """Writes lines to standard error, however long that takes.  Start it before swap is on."""

    def __init__(self) -> None:
        super().__init__(name="zcache-log", daemon=True)
        self._lines: queue.Queue[str] = queue.Queue(LINES_MAX)

    def say(self, line: str) -> None:
        """Dropped when too many wait."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def flush(self) -> None:
        """Give what waits a moment, before the process ends or becomes another program."""
        until_s = time.monotonic() + FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < until_s:
            time.sleep(0.005)

    def run(self) -> None:
        while True:
            data = f"{self._lines.get()}\n".encode()
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(STDERR).st_mode):
                    with socket.socket(fileno=os.dup(STDERR)) as log:
                        log.send(data, socket.MSG_DONTWAIT)
                else:
                    os.write(STDERR, data)
            self._lines.task_done()


_log: Log | None = None


def start_log() -> None:
    """From now on `say` does not wait."""
    global _log
    before = threading.stack_size(STACK_BYTES)
    try:
        _log = Log()
        _log.start()
    finally:
        threading.stack_size(before)
    atexit.register(_log.flush)


def flush() -> None:
    """See Log.flush."""
    if _log is not None:
        _log.flush()


def say(line: str) -> None:
    """One line on the log; dropped if the log would make us wait."""
    if _log is not None:
        _log.say(line)
    else:
        print(line, file=sys.stderr, flush=True)


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
