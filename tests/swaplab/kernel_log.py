"""The guest's kernel log, as lines with a time, and which of them are bad news.

The guest boots with printk.time=1, so a kernel line is `[   12.345678] text`; everything else on
the console was said by User Mode Linux before or after the kernel, or by PID 1.

`BAD` is a list of patterns with a name each.  It errs towards naming too much: a test that expects
one of them (write errors on a full device, an OOM kill) says so by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

LINE = re.compile(r"^\[\s*(\d+\.\d+)\] ?(.*)$")

BAD = {
    "panic": re.compile(r"Kernel panic|Oops|BUG:|kernel BUG|general protection|UML panic"),
    "warning": re.compile(r"WARNING: CPU|refcount_t|list_(add|del) corruption"),
    "write-error": re.compile(r"Write-error on swap-device"),
    "read-error": re.compile(r"Read-error on swap-device"),
    "io-error": re.compile(r"I/O error|Buffer I/O|blk_update_request|critical \w+ error"),
    "swap": re.compile(r"[Bb]ad swap|swap_(free|dup|info_get)|get_swap_device|Unable to find swap"),
    "nbd": re.compile(
        r"block nbd\d+: (?!.*(?:NBD_DISCONNECT|Disconnected due to user|shutting down sockets))"
    ),
    "oom": re.compile(r"Out of memory|oom-kill:|invoked oom-killer|Memory cgroup out of memory"),
    "allocation": re.compile(r"page allocation (failure|stalls)"),
    "hung": re.compile(r"blocked for more than|soft lockup|rcu.*stall|hung_task"),
    "killed": re.compile(r"segfault|Attempted to kill init|traps: "),
}


@dataclass(frozen=True)
class LogLine:
    """time_s: seconds since the guest's boot, or None where the kernel did not print this."""

    time_s: float | None
    text: str


def parse(line: str) -> LogLine:
    found = LINE.match(line)
    if found is None:
        return LogLine(None, line)
    return LogLine(float(found[1]), found[2])


def trouble(lines: Iterable[LogLine], expected: Collection[str] = ()) -> list[str]:
    """The bad lines, each with the name of its kind in front, except for the expected kinds."""
    unknown = set(expected) - set(BAD)
    assert not unknown, f"no such kinds: {unknown}"
    found = []
    for line in lines:
        for kind, pattern in BAD.items():
            if kind not in expected and pattern.search(line.text):
                found.append(f"{kind}: {line.text}")
                break
    return found
