"""`zcache drain`: empty a server's RAM to what is below, and watch it go.

Also `zcache node drain`: empty a node of what it holds for others (NODE's words).

    drain on -> look every 0.2 s: pages and bytes left, bytes a second -> empty
         Ctrl-C, SIGTERM, or no progress for a minute -> drain off again (not with --keep)

Draining itself is the server's work; this only switches it and looks.  When RAM is empty
it stays so, whatever comes is moved on at once, until `zcache drain --off`.

Bound: a drain that stands still for STALL_S ends.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TextIO

from cluster.link import RpcError
from plugin import show
from plugin.interrupts import as_ctrl_c
from zcache_core.errors import ControlError

Call = Callable[..., Any]  # (method, *params) -> the answer
PAGE_BYTES = 4096
LOOK_S = 0.2
SAY_S = 5.0  # into a pipe: one line in that time
STALL_S = 60.0
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


class What(NamedTuple):
    """What is drained: the sentences, and the frames in a thousand that may be left."""

    empty: str
    goes_on: str
    left: str
    stands: str
    off: str
    permille: int


SERVER = What(
    "RAM is empty, and stays so until 'zcache drain --off'.",
    "The server goes on draining; 'zcache drain --off' ends it.",
    "Draining is off again; what has gone to the disk is read from there.",
    "'zcache status' says what is the matter with the disk",
    "Draining is off; {} pages are in RAM.",
    1,  # what came just now
)
NODE = What(
    "The node holds nothing, and takes nothing until 'zcache node drain --off'.",
    "The node goes on draining; 'zcache node drain --off' ends it.",
    "Draining is off again; the node lends what it has.",
    "owners that are away, or have no other room for their pages, keep them here: 'zcache status "
    "--control SOCK' says whose",
    "Draining is off; {} pages are here.",
    0,
)


def run(call: Call, keep: bool, out: TextIO | None = None, what: What = SERVER) -> int:
    """Drain until RAM is empty; the exit code.  Raises ControlError."""
    out = out or sys.stdout
    try:
        with as_ctrl_c(signal.SIGTERM):
            call("drain")
            _watch(call, out, what)
    except KeyboardInterrupt:
        _leave(call, keep, out, what)
        return INTERRUPTED
    except RpcError:  # the server said no: nothing was begun
        raise
    except ControlError:
        with contextlib.suppress(ControlError):  # it may be gone
            _leave(call, keep, out, what)
        raise
    _say(out, what.empty)
    return 0


def _leave(call: Call, keep: bool, out: TextIO, what: What) -> None:
    """Before the end of it."""
    if keep:
        _say(out, what.goes_on)
        return
    call("drain", False)
    _say(out, what.left)


def off(call: Call, out: TextIO | None = None, what: What = SERVER) -> int:
    """RAM is used again.  Raises ControlError."""
    left = call("drain", False)
    _say(out or sys.stdout, what.off.format(show.count(left["pages"])))
    return 0


def left_frames(stats: Mapping[str, int]) -> int:
    """Frames that hold pages."""
    return stats["pers_pageframes"] + stats["eph_pageframes"]


def is_empty(stats: Mapping[str, int], what: What = SERVER) -> bool:
    """Nothing left, or no more than may be."""
    return left_frames(stats) <= stats["pool_set_frames"] * what.permille // 1000


def _watch(call: Call, out: TextIO, what: What) -> None:
    stats = call("stats")
    began_s = said_s = moved_s = time.monotonic()
    first = last = left_frames(stats)
    while not is_empty(stats, what):
        time.sleep(LOOK_S)
        stats = call("stats")
        now_s, left = time.monotonic(), left_frames(stats)
        if left < last:
            last, moved_s = left, now_s
        elif now_s - moved_s > STALL_S:
            raise ControlError(
                f"the drain stands still with {show.size(left * PAGE_BYTES)} left in RAM; "
                f"{what.stands}"
            )
        if out.isatty() or now_s - said_s >= SAY_S:
            said_s = now_s
            rate = max(0.0, (first - left) * PAGE_BYTES / (now_s - began_s))
            _progress(out, 1 - left / first if first else 1.0, stats, rate)
    if out.isatty():
        print("\r\x1b[K", end="", file=out)


def _progress(out: TextIO, share: float, stats: Mapping[str, int], rate: float) -> None:
    pages = stats["pers_zpages"] + stats["eph_zpages"]
    line = (
        f"{show.bar(share)} {show.count(pages)} pages left in "
        f"{show.size(left_frames(stats) * PAGE_BYTES)} of RAM, {show.size(rate)}/s"
    )
    if out.isatty():
        print(f"\r{line}\x1b[K", end="", file=out, flush=True)
    else:
        _say(out, line)


def _say(out: TextIO, sentence: str) -> None:
    lead = "\r\x1b[K" if out.isatty() else ""
    print(f"{lead}{sentence}", file=out, flush=True)
