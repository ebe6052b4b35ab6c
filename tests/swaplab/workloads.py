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
from .lab import Result

STRESS_OPS_PER_MIB = 32
"""One bogo op of stress-ng's rand-set is 4096 words of 8 bytes."""
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
    audit_s: float = 0,
    noise_percent: int = 0,
    writes_percent: int = 25,
    seed: int = 1,
    name: str = "hog",
) -> Job:
    """Start the hog.  audit_s: bound of the last look at every page, 0 for none.  noise_percent:
    share of pages of random bytes; 100 needs no corpus.
    """
    words = ["--mib", mib, "--sequential", sequential_s, "--random", random_s]
    words += ["--audit", audit_s]
    words += ["--noise", noise_percent, "--writes", writes_percent, "--seed", seed]
    if corpus is not None:
        words += ["--corpus", guest.bring(corpus)]
    return guest.start([f"{SHARE}/hog", *map(str, words)], name)


@dataclass(frozen=True)
class StressReport:
    """failures: stress-ng's own lines that say that verification failed.

    bogo_ops: what it counts; with the method rand-set, STRESS_OPS_PER_MIB a pass of filling.
    """

    passed: bool
    bogo_ops: int
    failures: tuple[str, ...]

    def passes(self, mib: int) -> float:
        """How often `mib` MiB were filled; each time is verified before the next begins."""
        return self.bogo_ops / (STRESS_OPS_PER_MIB * mib)


def stress_ng(guest: Guest, mib: int, passes: int = 1, limit_s: float = 90) -> Job:
    """stress-ng --vm --verify over `mib` MiB: fills them and then verifies them, `passes` times.

    Bounded by work, with a limit in time: stress-ng calls it a success when time is up, and a
    guest that swaps gets through none of its default methods in half a minute.
    """
    ops = passes * mib * STRESS_OPS_PER_MIB + 1  # one more, so that the last pass is verified
    words = ["--vm", 1, "--vm-bytes", f"{mib}M", "--vm-method", "rand-set", "--vm-keep"]
    words += ["--vm-ops", ops, "--timeout", f"{limit_s:g}s", "--verify", "--temp-path", "/tmp"]
    return guest.start([tool("stress-ng"), *map(str, words), "--metrics-brief"], "stress")


def read_stress(result: Result) -> StressReport:
    """From stress-ng's output."""
    text = result.stdout + result.stderr
    bad = tuple(line for line in text.splitlines() if re.search(r"\bfail:|error.* detected", line))
    metric = re.search(r"\bvm\s+(\d+)\s+[\d.]+\s+[\d.]+", text)
    passed = result.exit.code == 0 and "successful run completed" in text
    return StressReport(passed, int(metric[1]) if metric else 0, bad)
