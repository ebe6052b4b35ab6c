"""Naps: long work in a real-time class, that lets everybody else run now and then.

A supervisor's start after an upgrade and a standby's copying of its memory are of the class of
those who serve, because as ordinary processes they wait for memory without end.  But they compute
for up to a second of a slow CPU, and with one CPU nobody below runs meanwhile: neither who swaps,
nor the kernel's own workers, which carry pages to the server and back.  To yield helps only equals.

    naps = Naps()
    for piece in work:
        ...
        naps.breathe()          yield; after RUN_S of CPU time, sleep NAP_S

    between_imports()           an import is such work, too

Bound: a quarter more time.  Nothing for a process of an ordinary class.
What it is not: a limit; a piece may be long.
"""

from __future__ import annotations

import os
import sys
import time

# Upgrades in a guest of one CPU with its memory exhausted, in turns with none of this, load 3 to 6:
# 18 without naps, median 1.00 s, worst 1.86; 24 with them, 0.58 and 1.17.
RUN_S, NAP_S = 0.02, 0.005


class Naps:
    """The calling thread's."""

    def __init__(self) -> None:
        self._is_needed = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
        self._at_s = time.thread_time()

    def breathe(self) -> None:
        """Between two pieces."""
        if not self._is_needed or time.thread_time() - self._at_s < RUN_S:
            os.sched_yield()  # to those of our class: who serves comes first
            return
        time.sleep(NAP_S)
        self._at_s = time.thread_time()

    def find_spec(self, *_: object) -> None:
        """As a finder of modules, which finds none."""
        self.breathe()


def between_imports() -> None:
    """From now on whatever this process imports."""
    sys.meta_path.insert(0, Naps())
