"""What moved while the guest swapped.

A workload can report success long after swap has stopped moving (stress-ng does), and a guest that
hangs may go on answering.  So progress is judged by pswpin and pswpout over time, which PID 1 of
the guest sends several times a second: `Progress` over the samples of one workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Sample:
    """Counters at a moment.

    guest_s: the guest's monotonic clock.  host_s: ours, when the sample arrived.
    pswpin, pswpout: pages.  Counters run from boot.
    """

    guest_s: float
    host_s: float
    pswpin: int
    pswpout: int
    pgmajfault: int
    oom_kill: int
    free_kb: int
    swap_used_kb: int

    @property
    def moved_pages(self) -> int:
        return self.pswpin + self.pswpout


def parse_sample(words: Sequence[str], host_s: float) -> Sample:
    """From the agent's words: milliseconds, then key=value."""
    values = {key: int(value) for key, _, value in (word.partition("=") for word in words[1:])}
    return Sample(int(words[0]) / 1000, host_s, **values)


def parse_vmstat(text: str) -> dict[str, int]:
    """/proc/vmstat as a dictionary."""
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


@dataclass(frozen=True)
class Progress:
    """How pages moved over a stretch of samples.

    moved_by_part: pages in and out in each of `parts` equal parts of the time.
    longest_pause_s: longest time in which nothing moved, or in which no sample could be sent.
    """

    seconds: float
    pages_in: int
    pages_out: int
    moved_by_part: tuple[int, ...]
    longest_pause_s: float
    peak_swap_bytes: int

    def kept_moving(self) -> bool:
        """Did pages move in every part of the time?  (The check that needs no clock.)"""
        return bool(self.moved_by_part) and min(self.moved_by_part) > 0


def progress(samples: Sequence[Sample], parts: int = 4) -> Progress:
    """Needs two samples at least to say anything but zero."""
    if len(samples) < 2:
        return Progress(0, 0, 0, (), 0, 0)
    first, last = samples[0], samples[-1]
    seconds = last.guest_s - first.guest_s
    edges = [first.guest_s + seconds * part / parts for part in range(1, parts)]
    counts = [
        first.moved_pages,
        *(max(s.moved_pages for s in samples if s.guest_s <= edge) for edge in edges),
        last.moved_pages,
    ]
    longest, since = 0.0, first
    for sample in samples[1:]:
        longest = max(longest, sample.guest_s - since.guest_s)
        if sample.moved_pages != since.moved_pages:
            since = sample
    return Progress(
        seconds=seconds,
        pages_in=last.pswpin - first.pswpin,
        pages_out=last.pswpout - first.pswpout,
        moved_by_part=tuple(after - before for before, after in pairwise(counts)),
        longest_pause_s=longest,
        peak_swap_bytes=max(s.swap_used_kb for s in samples) << 10,
    )
