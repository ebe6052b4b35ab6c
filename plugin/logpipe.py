"""The server's stderr as a pipe that never makes it wait.

    before   fd 2 -> terminal, file, or journald, which may itself be swapped out to us
    after    fd 2 -> pipe, O_NONBLOCK -> node process -> where fd 2 led before

What is written while the pipe is full is lost; that is the point.  The node thins
out what repeats (`cluster/logrelay.py`).

What it is not: for a server that logs nowhere, or one with -v, whose user wants
every line.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

STDERR = 2


class LogPipe:
    """`read_fd` is the node's to read, `log_fd` leads to the real log."""

    def __init__(self) -> None:
        self.log_fd = os.dup(STDERR)  # Python makes all three close-on-exec
        self.read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        # One page, used once: from now on the kernel keeps it, and a write allocates nothing.
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
        os.write(write_fd, b"\n")
        os.read(self.read_fd, 1)
        os.dup2(write_fd, STDERR)
        os.close(write_fd)

    def say(self, sentence: str) -> None:
        """Write to the real log, past the pipe: for what concerns the node itself."""
        with contextlib.suppress(OSError):
            os.write(self.log_fd, f"{sentence}\n".encode())

    def close(self) -> None:
        """Lead fd 2 back to the log, for the server's last words."""
        os.dup2(self.log_fd, STDERR)


def is_wanted(verbose: bool) -> bool:
    """Whether there is a log worth protecting the server from."""
    return not verbose and not os.path.samestat(os.fstat(STDERR), os.stat(os.devnull))
