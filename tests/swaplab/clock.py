"""A time limit that is handed down.

Every wait in the lab ends at the earlier of its own limit and that of the whole lab.  `Deadline`
carries the moment; whoever waits asks `left_s()`, whoever may wait less makes a nearer one.
Nothing in the lab sleeps and hopes: `until` asks for a condition again and again and says what it
was waiting for when time is up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .errors import LabTimeoutError

T = TypeVar("T")

POLL_S = 0.02
"""Between two looks at something that cannot be waited for (a file, a foreign process's state)."""


class Deadline:
    """A moment on the monotonic clock.

    limit_s: seconds from now.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.end_s = time.monotonic() + limit_s

    def left_s(self) -> float:
        """Seconds that are left, never negative."""
        return max(0.0, self.end_s - time.monotonic())

    def passed(self) -> bool:
        return time.monotonic() >= self.end_s

    def bring_nearer(self, limit_s: float) -> None:
        """From now on it is in `limit_s` seconds, for whoever holds it, unless it is nearer."""
        if limit_s < self.left_s():
            self.limit_s, self.end_s = limit_s, time.monotonic() + limit_s

    def nearer(self, limit_s: float | None) -> Deadline:
        """This deadline, or the one `limit_s` seconds from now if that comes first."""
        if limit_s is None or limit_s >= self.left_s():
            return self
        return Deadline(limit_s)


def until(look: Callable[[], T | None], deadline: Deadline, what: str, poll_s: float = POLL_S) -> T:
    """Call `look` until it gives something that is true, and return that.

    Raises LabTimeoutError with `what` when the deadline passes first; the last look is after it.
    """
    while True:
        late = deadline.passed()
        found = look()
        if found:
            return found
        if late:
            raise LabTimeoutError(f"waited {deadline.limit_s:.0f} s in vain for {what}")
        time.sleep(min(poll_s, deadline.left_s()))
