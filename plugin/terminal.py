"""A whole terminal for a while: alternate screen, single keys, and everything given back.

    with Screen() as screen:
        screen.draw(lines)              all at once, so that nothing flickers
        key = screen.key(wait_s)        a character, or None when none came in that time

SIGTERM and SIGHUP end it as Ctrl-C does, so that the terminal is restored.  Another
size of the window, and coming back from Ctrl-Z, end the wait for a key, so that whoever
draws draws again.

What it is not: for output into a pipe; ask `is_terminal` first.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Self

from rich.console import Console
from rich.text import Text

from plugin.interrupts import as_ctrl_c

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
ESCAPE = b"\x1b"


def is_terminal() -> bool:
    """Whether output goes to a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def ending_signals_as_ctrl_c() -> contextlib.AbstractContextManager[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt in the block."""
    return as_ctrl_c(signal.SIGTERM, signal.SIGHUP)


class Screen:
    """The terminal on standard output and, when it is one, the keys of standard input."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._stack = contextlib.ExitStack()
        self._keys = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._woken, self._wake = os.pipe()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self._woken)
            stack.callback(os.close, self._wake)
            stack.enter_context(ending_signals_as_ctrl_c())
            stack.enter_context(self._wake_by_signal())
            stack.callback(self._write, LEAVE)
            if self._keys is not None:
                stack.callback(
                    termios.tcsetattr, self._keys, termios.TCSADRAIN, termios.tcgetattr(self._keys)
                )
            self._take()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        return self._console.size.width, self._console.size.height

    @property
    def utf8(self) -> bool:
        """Whether block characters can be shown."""
        return self._console.encoding.lower().startswith("utf")

    def draw(self, lines: Sequence[Text]) -> None:
        """From the first line on; what does not fit is cut, and seen to be."""
        columns, rows = self.size
        with self._console.capture() as capture:
            for line in lines[:rows]:
                line = line.copy()
                line.truncate(columns, overflow="ellipsis")
                self._console.print(line, end="\n", no_wrap=True, crop=True, overflow="crop")
        drawn = capture.get().rstrip("\n").replace("\n", f"{REST_OF_LINE}\r\n")
        self._write(HOME + drawn + REST_OF_LINE + REST_OF_SCREEN)

    def key(self, wait_s: float) -> str | None:
        """The next key, or None when none came or the screen must be drawn anew.

        Keys that send several bytes (arrows) come as their last one after an escape: "\\x1b[A".
        """
        watched = [self._woken] if self._keys is None else [self._woken, self._keys]
        ready, _, _ = select.select(watched, [], [], max(0.0, wait_s))
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._keys is None or self._keys not in ready:
            return None
        data = os.read(self._keys, 1)
        if not data:  # the terminal is gone
            raise KeyboardInterrupt
        if data == ESCAPE:
            while select.select([self._keys], [], [], 0.01)[0] and len(data) < 8:
                data += os.read(self._keys, 1)
                if data[-1:].isalpha() or data[-1:] == b"~":
                    break
        return data.decode(errors="replace")

    def _take(self) -> None:
        if self._keys is not None:
            tty.setcbreak(self._keys)
        self._write(ENTER)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    @contextlib.contextmanager
    def _wake_by_signal(self) -> Iterator[None]:
        def wake(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGCONT:
                self._take()
            with contextlib.suppress(OSError):
                os.write(self._wake, b"!")

        def stop(number: int, frame: FrameType | None) -> None:
            self._write(LEAVE)
            os.kill(os.getpid(), signal.SIGSTOP)

        os.set_blocking(self._wake, False)
        wanted = {signal.SIGWINCH: wake, signal.SIGCONT: wake, signal.SIGTSTP: stop}
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
