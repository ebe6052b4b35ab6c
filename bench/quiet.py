"""As quiet as it gets: servers, client and guests before whatever else this machine does.

Both sides of every comparison run under the same priority, so it favours nobody; it only keeps a
browser or a test run next to the bench from deciding the figures.  Where the kernel groups by
session (sched(7), autogroup), a nice value counts within the session alone, and the session has
one of its own.  What is not permitted is left as it is; the session's value is put back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

NICE = -10
AUTOGROUP = Path("/proc/self/autogroup")
BUSY_LOAD = 0.7


@contextmanager
def preferred() -> Iterator[None]:
    """For this process's session, and what it starts."""
    with contextlib.suppress(PermissionError):
        os.nice(NICE - os.nice(0))
    before = _session_nice()
    _set_session_nice(NICE)
    try:
        yield
    finally:
        _set_session_nice(before)


def prefer(pids: Iterable[int]) -> None:
    """The same for processes that have made sessions of their own; harmless for others."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/autogroup").write_text(str(NICE))


def busy() -> bool:
    """Is anybody else at work?"""
    return os.getloadavg()[0] > BUSY_LOAD


def _session_nice() -> int:
    """From "/autogroup-25 nice 0"; 0 where there is no such file."""
    try:
        return int(AUTOGROUP.read_text().split()[-1])
    except (OSError, ValueError, IndexError):
        return 0


def _set_session_nice(value: int) -> None:
    with contextlib.suppress(OSError):
        AUTOGROUP.write_text(str(value))
