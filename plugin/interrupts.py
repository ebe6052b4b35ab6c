"""Signals that end a command as Ctrl-C does, so that it leaves everything in order."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def as_ctrl_c(*numbers: int) -> Iterator[None]:
    """These signals raise KeyboardInterrupt in the block; in the main thread only."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
