"""The state page: one page of shared memory in which the attach helper says how it is.

    RUNTIME/NAME.attach     4096 bytes of JSON, padded with blanks; its flock is the helper's life

The helper may write only where nothing can block: not to a log, whose reader may be swapped out,
and not to a file, whose page may be.  So the file is mapped and locked, and saying something is
a copy.  It begins with what is needed to take the helper's place, and what is attached; what
changes is at the end.

Bound: PAGE_BYTES; a text that does not fit is cut.  A reader may catch it half written: `read`
looks again.

What it is not: proof of anything.  Whether the device is connected only the kernel knows.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

PAGE_BYTES = 4096
TEXT_BYTES_MAX = 300  # of one error
LOOKS, LOOK_S = 20, 0.01


class StatePage:
    """`values`: what the page says.  Made by `create` or `open`."""

    def __init__(self, fd: int, values: dict[str, Any]) -> None:
        self.values = values
        self._map = mmap.mmap(fd, PAGE_BYTES)

    @classmethod
    def create(cls, fd: int, values: dict[str, Any]) -> StatePage:
        """Write these values into the (locked) file."""
        if os.fstat(fd).st_size != PAGE_BYTES:
            os.ftruncate(fd, PAGE_BYTES)
        page = cls(fd, values)
        page._write()
        return page

    @classmethod
    def open(cls, fd: int) -> StatePage:
        """The page of a file that `create` has written."""
        return cls(fd, parse(os.pread(fd, PAGE_BYTES, 0)) or {})

    def close(self) -> None:
        """Unmap it.  (The map holds a descriptor of its own, and with it the lock.)"""
        self._map.close()

    def update(self, **values: Any) -> None:
        """Change some values."""
        for name, value in values.items():
            self.values[name] = value[:TEXT_BYTES_MAX] if isinstance(value, str) else value
        self._write()

    def mended(self, outage_s: float, generation: int) -> None:
        """Count one outage that is over."""
        outage_ms = int(outage_s * 1000)
        self.update(
            state="connected",
            error="",
            mended=self.values.get("mended", 0) + 1,
            mended_at=int(time.time()),
            last_outage_ms=outage_ms,
            longest_outage_ms=max(outage_ms, self.values.get("longest_outage_ms", 0)),
            generation=generation,
        )

    def take_over(self, pid: int, start_ticks: int) -> None:
        """Another process writes from now on: what the last one said stays."""
        self.values = parse(self._map[:PAGE_BYTES]) or self.values
        takeovers = self.values.get("takeovers", 0) + 1
        self.update(pid=pid, start_ticks=start_ticks, spare_pid=0, takeovers=takeovers)

    def _write(self) -> None:
        text = json.dumps(self.values).encode()
        assert len(text) < PAGE_BYTES
        self._map[:PAGE_BYTES] = text.ljust(PAGE_BYTES)


def parse(data: bytes) -> dict[str, Any] | None:
    """The values in a page; None when there are none."""
    try:
        values = json.loads(data.rstrip(b" \0") or b"null")
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def read(path: Path) -> dict[str, Any]:
    """What the page at `path` says; empty when there is none."""
    for _ in range(LOOKS):
        try:
            data = path.read_bytes()
        except OSError:
            return {}
        if (values := parse(data)) is not None or not data.rstrip(b" \0"):
            return values or {}
        time.sleep(LOOK_S)
    return {}


def lock(path: Path) -> int:
    """Open and lock the file, made if missing; its descriptor.  Raises BlockingIOError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        except FileNotFoundError:  # removed by its last holder meanwhile
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
