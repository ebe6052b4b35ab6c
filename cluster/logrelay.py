"""The server's log, passed on line by line, repeated lines thinned out.

    server: write(2) --> pipe, never waited for --> node: LogRelay --> the real log

nbdkit prints a line for every request that fails, and a full pool makes thousands.
Were they written straight to the log, the server would wait for whoever reads it,
and that may be a process swapped out to this very server.  So the server's side of
the pipe does not block (a full pipe drops lines), and this side lets a line of one
shape (all but its digits) through `LINES` times in `WINDOW_S`, then says how many
more there were.

Bound: `SHAPES` shapes are remembered, and `LINE_BYTES` of an unfinished line.

What it is not: it reads and writes nothing by itself (`node.py` does).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

LINES = 5
WINDOW_S = 10.0
SHAPES = 64
LINE_BYTES = 4096


@dataclass
class _Window:
    began_s: float
    passed: int = 0
    held_back: int = 0


class LogRelay:
    """Bytes of the log in, bytes of the log out; times are any clock's seconds."""

    def __init__(self) -> None:
        self._unfinished = b""
        self._windows: OrderedDict[bytes, _Window] = OrderedDict()

    def feed(self, data: bytes, now_s: float) -> bytes:
        """What to write for these bytes."""
        *lines, rest = (self._unfinished + data).split(b"\n")
        if len(rest) > LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._unfinished = rest
        return b"".join(self._line(line, now_s) for line in lines)

    def close(self) -> bytes:
        """What is still to write when nothing more comes."""
        rest = self._unfinished + b"\n" if self._unfinished else b""
        sums = b"".join(_sum(window) for window in self._windows.values())
        self._unfinished = b""
        self._windows.clear()
        return rest + sums

    def _line(self, line: bytes, now_s: float) -> bytes:
        shape = re.sub(rb"\d+", b"", line[:LINE_BYTES])
        before = b""
        window = self._windows.get(shape)
        if window is None or now_s - window.began_s >= WINDOW_S:
            before = _sum(window) if window else b""
            window = self._windows[shape] = _Window(now_s)
        self._windows.move_to_end(shape)
        if len(self._windows) > SHAPES:
            _, oldest = self._windows.popitem(last=False)
            before += _sum(oldest)
        if window.passed >= LINES:
            window.held_back += 1
            return before
        window.passed += 1
        return before + line + b"\n"


def _sum(window: _Window) -> bytes:
    if not window.held_back:
        return b""
    return b"zcache: %d more lines like one above were left out\n" % window.held_back
