"""Killing what a guest swaps onto, again and again, and seeing that it lives on.

    kills = Kills(guest, job, rng)
    kills.run(5, lambda: (server.kill(), server.start(deadline)))
    kills.stalls_s()

Each kill waits until thousands of pages have moved since the last one, at random, and afterwards
until pages move again: a workload's own success says nothing about that.  Nothing here asserts on
a duration; how long each stall was is printed.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.swaplab import Guest, Job, Result, Sample, progress, trouble
from tests.swaplab.zattach import kill_in

PAGES_BETWEEN = (2000, 8000)
PAGES_AFTER = 200  # more than what was on its way when the server died
RECOVERY_S = 60.0
AROUND_S = 0.3
NBD_NOISE = ("nbd",)
"""What the kernel says when a connection dies and is mended; everything else is trouble."""


@dataclass
class Kills:
    """job has to go on for as long as there are kills.  at_s, well_s: our clock at each kill, and
    when pages moved again."""

    guest: Guest
    job: Job
    rng: random.Random
    at_s: list[float] = field(default_factory=list)
    well_s: list[float] = field(default_factory=list)

    def run(self, count: int, kill: Callable[[], object]) -> None:
        """Kill `count` times, each time while pages move; returns when they move again."""
        for _ in range(count):
            self._wait_for_pages(self.rng.randint(*PAGES_BETWEEN))
            time.sleep(self.rng.uniform(0, 0.2))
            self.at_s.append(time.monotonic())
            kill()
            # Not the newest sample's: it may lag by what moved before the kill.
            now = self.guest.vmstat()
            self._wait_until(now["pswpin"] + now["pswpout"] + PAGES_AFTER)
            self.well_s.append(time.monotonic())

    def _wait_for_pages(self, pages: int) -> None:
        """Until so many more have moved."""
        self._wait_until(self._moved() + pages)

    def _wait_until(self, goal: int) -> None:
        """Until so many pages have moved since boot.  The job must not end before that."""
        self.guest.link.wait_for(
            lambda: self.job.done() or self._moved() >= goal,
            RECOVERY_S,
            f"pages to move, after {len(self.at_s)} kills",
        )
        assert not self.job.done(), (
            f"{self.job.name} ended after {len(self.at_s)} kills: "
            f"{self.job.stdout()}{self.job.stderr()}"
        )

    def _moved(self) -> int:
        return self.guest.samples[-1].moved_pages if self.guest.samples else 0

    def stalls_s(self) -> list[float]:
        """For each kill the longest time, until pages moved well again, in which none did."""
        both = zip(self.at_s, self.well_s, strict=True)
        return [stall_s(self.guest.samples, at_s, well_s) for at_s, well_s in both]

    def report(self, what: str) -> str:
        """One line about the stalls, for whoever reads the test's output."""
        found = sorted(self.stalls_s())
        said = ", ".join(f"{stall:.2f}" for stall in found)
        middle = statistics.median(found)
        return f"{what}: stalls of {said} s; median {middle:.2f} s, longest {found[-1]:.2f} s"


def stall_s(samples: Sequence[Sample], at_s: float, well_s: float) -> float:
    """Longest pause between shortly before `at_s` and shortly after `well_s`."""
    near = [s for s in samples if at_s - AROUND_S <= s.host_s <= well_s + AROUND_S]
    return progress(near).longest_pause_s


def assert_survived(guest: Guest, result: Result) -> None:
    """No process was killed, no page lost, and the kernel says nothing of swap errors."""
    assert result.counted("oom_kill") == 0
    found = trouble(guest.log, expected=NBD_NOISE)
    assert found == [], found


def serve_state(guest: Guest, name: str = "zcache") -> dict[str, Any]:
    """What the supervisor in the guest says of its server."""
    text = guest.read(f"/run/zcache/{name}.serve")
    found: dict[str, Any] = json.loads(text.rstrip("\0"))
    return found


def kill_server_in(guest: Guest, name: str = "zcache") -> None:
    kill_in(guest, int(serve_state(guest, name)["server_pid"]))


def kill_supervisor_in(guest: Guest, name: str = "zcache") -> None:
    kill_in(guest, int(serve_state(guest, name)["supervisor_pid"]))
