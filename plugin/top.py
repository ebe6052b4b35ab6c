"""`zcache top`: looks at a server again and again and draws it, until q.

    every `interval`: all answers (reach) -> View -> topview.frame -> Screen
    a key in between changes the View, or asks first:
        e   change    "high=85 low=70" Enter -> "...? y" -> RPC set
        d   drain     "...? y"               -> RPC drain

Into a pipe it prints the same as plain text, one block a look.  A server that does not
answer, or whose node process is being restarted, is asked again at every look.

Bound: one connection, one look at a time, HISTORY_LOOKS kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

from plugin import topview
from plugin.amounts import total_ram_bytes
from plugin.config import KEYS
from plugin.reach import Call, answers
from plugin.terminal import Screen
from plugin.topview import View
from zcache_core.errors import ConfigError, ControlError

INTERVALS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
INTERVAL_MIN_S, INTERVAL_MAX_S = 0.1, 3600.0
PROMPT_MAX = 200
DRAIN = (
    "move every page from RAM below, to peers or the disk?",
    "end the drain and use RAM again?",
)
DRAIN_LENT = ("ask the owners to take every page back?", "end the drain and lend again?")
UP, DOWN, PAGE_UP, PAGE_DOWN = "\x1b[A", "\x1b[B", "\x1b[5~", "\x1b[6~"
ENTER, ERASE, ESCAPE = "\n", "\x7f\b", "\x1b"


class Top:
    """The state of one `zcache top`: its View, and the question that is being answered."""

    def __init__(self, call: Call, control: str, interval_s: float, utf8: bool = True) -> None:
        self._call = call
        self.view = View(control, interval_s, utf8)
        self._typed: str | None = None  # a change that is being written
        self._asked: tuple[str, tuple[Any, ...]] | None = None  # a method to call on y
        self._look_s = 0.0

    def look(self) -> None:
        """Ask for everything."""
        try:
            found = answers(self._call)
        except ControlError as error:
            self.view.silent = str(error)
            return
        self.view.silent = ""
        self.view.answers = found
        self.view.history.add(time.monotonic(), found["stats"])

    def key(self, key: str) -> bool:
        """What a key does; False for the end of it."""
        if self._typed is not None:
            self._type(key)
        elif self._asked is not None:
            self._answer(key)
        elif key in ("q", "Q"):
            return False
        else:
            self.view.message = ""
            self._command(key)
        return True

    def _command(self, key: str) -> None:
        view = self.view
        match key:
            case "p" | " ":
                view.paused = not view.paused
            case "c":
                view.counters, view.first_row = not view.counters, 0
            case "s":
                at = topview.SORTS.index(view.sort) + 1
                view.sort, view.counters = topview.SORTS[at % len(topview.SORTS)], True
            case "+":
                view.interval_s = min((i for i in INTERVALS_S if i > view.interval_s),
                                      default=view.interval_s)  # fmt: skip
            case "-":
                view.interval_s = max((i for i in INTERVALS_S if i < view.interval_s),
                                      default=view.interval_s)  # fmt: skip
            case "e" if not view.only_lends:
                self._typed = ""
                self._show_typed()
            case "d":
                self._ask_drain()
            case _:
                step = {UP: -1, "k": -1, DOWN: 1, "j": 1, PAGE_UP: -20, PAGE_DOWN: 20}.get(key, 0)
                view.first_row = max(0, view.first_row + step)

    def _type(self, key: str) -> None:
        assert self._typed is not None
        if key == ESCAPE:
            self._typed, self.view.prompt = None, ""
            return
        if key == ENTER:
            self._read_typed()
            return
        if key in ERASE:
            self._typed = self._typed[:-1]
        elif len(key) == 1 and key.isprintable() and len(self._typed) < PROMPT_MAX:
            self._typed += key
        self._show_typed()

    def _show_typed(self) -> None:
        self.view.prompt = (
            f"change (pool=1G high=85 low=70; Esc leaves all as it is): {self._typed}_"
        )

    def _read_typed(self) -> None:
        assert self._typed is not None
        text, self._typed, self.view.prompt = self._typed, None, ""
        try:
            wanted = changes(text)
        except ConfigError as error:
            self.view.message = str(error)
            return
        if wanted:
            words = " ".join(f"{key}={value}" for key, value in wanted.items())
            self._ask(f"set {words} on this server?", "set", wanted)

    def _ask_drain(self) -> None:
        begin, end = DRAIN_LENT if self.view.only_lends else DRAIN
        draining = bool(self.view.stats.get("draining"))
        self._ask(end if draining else begin, "drain", not draining)

    def _ask(self, question: str, method: str, *params: Any) -> None:
        self._asked = (method, params)
        self.view.prompt = f"{question} y: yes, any other key: no"

    def _answer(self, key: str) -> None:
        assert self._asked is not None
        method, params = self._asked
        self._asked, self.view.prompt = None, ""
        if key not in ("y", "Y"):
            self.view.message = "nothing was changed"
            return
        try:
            answer = self._call(method, *params)
        except ControlError as error:
            self.view.message = f"no: {error}"
            return
        said = answer if isinstance(answer, Mapping) else {}
        if method == "set":  # it answers with all that can be set
            said = {name: value for name, value in said.items() if name in params[0]}
        self.view.message = "done: " + ", ".join(f"{name} {said[name]}" for name in said)

    def run(self, screen: Screen) -> None:
        """Draw and listen until q; Ctrl-C raises KeyboardInterrupt."""
        next_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s >= next_s:
                if not self.view.paused:
                    self.look()
                next_s = max(now_s, next_s) + self.view.interval_s
            screen.draw(topview.frame(self.view, *screen.size))
            before_s = self.view.interval_s
            key = screen.key(next_s - time.monotonic())
            if key is not None and not self.key(key):
                return
            if self.view.interval_s != before_s:
                next_s = min(next_s, time.monotonic() + self.view.interval_s)


def changes(text: str) -> dict[str, Any]:
    """'high=85 pool=1G' as what RPC set takes.  Raises ConfigError."""
    readers = {key.name: key.read for key in KEYS}
    found: dict[str, Any] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{word} is no change; write KEY=VALUE, like high=85")
        read = readers.get(name)
        found[name] = value if read is None else read(value, total_ram_bytes())
    return found


def interval(text: str, option: str = "--interval", most_s: float = INTERVAL_MAX_S) -> float:
    """Seconds, as an option says them.  Raises ConfigError."""
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not INTERVAL_MIN_S <= seconds <= most_s:
        raise ConfigError(
            f"{option} {text} is not possible; write seconds, {INTERVAL_MIN_S:g} to {most_s:g}"
        )
    return seconds


def run_screen(call: Call, control: str, interval_s: float) -> int:
    """In a terminal; exit code 0.  A server that is not there at first is an error."""
    call("ping")
    with Screen() as screen:
        try:
            Top(call, control, interval_s, screen.utf8).run(screen)
        except KeyboardInterrupt:
            return 0
    return 0


def run_plain(call: Call, control: str, interval_s: float, once: bool, out: TextIO) -> int:
    """Into a pipe: a block of lines a look, rates over the interval; exit code 0."""
    top = Top(call, control, interval_s)
    try:
        call("ping")
        top.look()
        while True:
            time.sleep(interval_s)
            top.look()
            print("\n".join(topview.plain(top.view)), flush=True, file=out)
            if once:
                return 0
            print(file=out)
    except KeyboardInterrupt:
        return 0
