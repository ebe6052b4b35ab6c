"""What to run in the guest, and how to read what it says.

    stress_ng   the stock memory stressor, which verifies its own patterns
    hog         ours (guest/hog.c): real page content, a checksum at every touch, fault latencies

Both are bounded by seconds of work; under heavy swapping stress-ng ends late, so give `wait` room.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fitness import tool
from .guest import SHARE, Guest, Job

HOG_BAD, HOG_LOST = 2, 3
"""hog's exit codes for a page that came back wrong, and for one that did not come back."""


@dataclass(frozen=True)
class Phase:
    """One phase of the hog (fill, sequential, random, audit).

    touches and writes in pages; major, minor: faults; *_us: quantiles "p50" ... "max" and "count".
    """

    name: str
    seconds: float
    touches: int
    writes: int
    bad: int
    major: int
    minor: int
    touches_per_s: float
    touch_us: dict[str, float]
    major_us: dict[str, float]


@dataclass(frozen=True)
class HogReport:
    """What the hog found.  lost_page: number of the page that could not be read back, or -1."""

    pages: int
    bad: int
    lost_page: int
    phases: tuple[Phase, ...]
    bad_pages: tuple[dict[str, Any], ...]

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def read_hog(text: str) -> HogReport:
    """From the hog's output.  Raises ValueError if it did not get as far as a report."""
    document = json.loads(text)
    return HogReport(
        pages=document["pages"],
        bad=document["bad"],
        lost_page=document["lost_page"],
        phases=tuple(Phase(**phase) for phase in document["phases"]),
        bad_pages=tuple(document["bad_pages"]),
    )


def hog(
    guest: Guest,
    mib: int,
    corpus: Path | None,
    sequential_s: float = 5,
    random_s: float = 5,
    noise_percent: int = 0,
    writes_percent: int = 25,
    seed: int = 1,
    name: str = "hog",
) -> Job:
    """Start the hog.  noise_percent: share of pages of random bytes; 100 needs no corpus."""
    words = ["--mib", mib, "--sequential", sequential_s, "--random", random_s]
    words += ["--noise", noise_percent, "--writes", writes_percent, "--seed", seed]
    if corpus is not None:
        words += ["--corpus", guest.bring(corpus)]
    return guest.start([f"{SHARE}/hog", *map(str, words)], name)


@dataclass(frozen=True)
class StressReport:
    """failures: stress-ng's own lines that say that verification failed."""

    passed: bool
    bogo_ops: int
    failures: tuple[str, ...]


def stress_ng(guest: Guest, mib: int, seconds: float, workers: int = 1) -> Job:
    """stress-ng --vm --verify over `mib` MiB in all."""
    words = ["--vm", workers, "--vm-bytes", f"{mib // workers}M", "--vm-keep", "--verify"]
    words += ["--timeout", f"{seconds:g}s", "--temp-path", "/tmp", "--metrics-brief", "--oomable"]
    return guest.start([tool("stress-ng"), *map(str, words)], "stress")


def read_stress(job: Job) -> StressReport:
    """From stress-ng's output; `job` has ended."""
    assert job.exit is not None
    text = job.stdout() + job.stderr()
    bad = tuple(line for line in text.splitlines() if re.search(r"\bfail|error detected", line))
    metric = re.search(r"\bvm\s+(\d+)\s+[\d.]+\s+[\d.]+", text)
    passed = job.exit.code == 0 and "successful run completed" in text
    return StressReport(passed, int(metric[1]) if metric else 0, bad)
