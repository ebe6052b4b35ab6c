"""`zcache doctor FILE`: what a recording of a bad hour says, in sentences.

    looks -> minutes (what grew in each) -> worst minute of each trouble, who was slow
          -> peers: who was away, who was slow (slowness.py)
          -> health: each reason, since when, for how long, what to do
          -> gaps and restarts

It says what was seen and what that usually means; it asks no server.

Bound: one number a minute for each counter that is looked at (GROWING) and each cell of a
histogram, whatever the file's length.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from plugin import show, slowness
from plugin.recording import Sample, samples
from plugin.show import Line
from zcache_core.errors import ConfigError

MINUTE_S = 60
PAGE_BYTES = 4096
GROWING = (
    "succ_stores", "loads", "cold_loads", "failed_stores", "pool_waits", "pool_wait_us",
    "commit_waits", "commit_wait_us", "slot_waits", "disk_written_bytes", "disk_cleaned_bytes",
    "disk_write_errors", "disk_read_errors", "disk_corrupt_pages", "corrupt_loads",
    "written_back_pages", "commit_failures", "read_retries", "remote_corrupt_pages",
    "remote_pers_pages_unsucc_get", "remote_failed_puts",
)  # fmt: skip
# What must not grow: counter, words for it, how bad.
TROUBLES = (
    ("failed_stores", "pages were refused; the kernel kept them", "critical"),
    ("corrupt_loads", "reads found a damaged copy in RAM", "critical"),
    ("disk_corrupt_pages", "copies on the disk were found wrong or damaged", "critical"),
    ("disk_read_errors", "reads from the disk failed", "critical"),
    ("disk_write_errors", "writes to the disk failed", "degraded"),
    ("remote_corrupt_pages", "copies of peers were found wrong or damaged", "degraded"),
    ("remote_pers_pages_unsucc_get", "reads from peers found no copy", "degraded"),
    ("remote_failed_puts", "pages were not taken by peers", "note"),
    ("commit_failures", "times the kernel gave no memory to the pool", "degraded"),
)
WAITED_MUCH = 0.02  # of the time: below, nobody notices
CLEANING_MUCH = 0.5  # of what is written: then the disk is too small for what is on it


@dataclass
class Minute:
    """What grew in one minute, and how long of it was seen."""

    start_s: float
    seen_s: float = 0.0
    grown: dict[str, int] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        return self.grown.get(name, 0) / self.seen_s if self.seen_s else 0.0


@dataclass
class Ailment:
    """One reason of health over the recording."""

    what: str
    do: str
    status: str
    first_s: float
    lasted_s: float = 0.0


@dataclass
class History:
    """Everything that is kept of a recording."""

    first: Sample | None = None
    last: Sample | None = None
    looks: int = 0
    silences: list[tuple[float, str]] = field(default_factory=list)
    silent_s: float = 0.0
    restarts: list[float] = field(default_factory=list)
    minutes: list[Minute] = field(default_factory=list)
    ailments: dict[str, Ailment] = field(default_factory=dict)
    lasted_s: dict[str, float] = field(default_factory=dict)  # by status of health
    peers: dict[str, slowness.Away] = field(default_factory=dict)  # by address


def read(found: Iterable[Sample]) -> History:
    """The history that these samples tell."""
    history = History()
    before: Sample | None = None
    for sample in found:
        history.looks += 1
        took_s = max(0.0, sample.time_s - before.time_s) if before else 0.0
        if sample.silent:
            history.silent_s += took_s
            if before is None or not before.silent:
                history.silences.append((sample.time_s, sample.silent))
        else:
            _add(history, sample, took_s)
        before = sample
    return history


def _add(history: History, sample: Sample, took_s: float) -> None:
    last = history.last
    if history.first is None:
        history.first = sample
    if last is not None:
        if _server(sample) != _server(last):
            history.restarts.append(sample.time_s)
        _grow(history, last, sample)
    slowness.note_peers(history.peers, sample, took_s)
    status = str(sample.health.get("status", "ok"))
    history.lasted_s[status] = history.lasted_s.get(status, 0.0) + took_s
    for reason in sample.health.get("reasons", ()):
        kind = re.sub(r"[\d.]+", "#", reason["what"])
        ailment = history.ailments.setdefault(
            kind, Ailment(reason["what"], reason["do"], status, sample.time_s)
        )
        ailment.what, ailment.lasted_s = reason["what"], ailment.lasted_s + took_s
    history.last = sample


def _grow(history: History, old: Sample, new: Sample) -> None:
    start_s = new.time_s // MINUTE_S * MINUTE_S
    if not history.minutes or history.minutes[-1].start_s != start_s:
        history.minutes.append(Minute(start_s))
    minute = history.minutes[-1]
    minute.seen_s += max(0.0, new.time_s - old.time_s)
    for name in (*GROWING, *slowness.cells(new.stats)):
        grown = new.stats.get(name, 0) - old.stats.get(name, 0)
        if grown > 0:  # less: another memory file
            minute.grown[name] = minute.grown.get(name, 0) + grown


def _server(sample: Sample) -> Any:
    ping = sample.about.get("ping", {})
    return ping.get("server_pid"), ping.get("server_started_seconds")


# ---- in sentences ----------------------------------------------------------------------


def report(history: History) -> list[Line]:
    """What to tell.  Raises ConfigError when there is nothing to tell of."""
    if history.first is None or history.last is None:
        raise ConfigError("nobody answered in all of this recording; it says nothing else")
    return [
        *_overview(history, history.first, history.last),
        *_health(history),
        *_troubles(history),
        *_who_was_slow(history),
        *slowness.tier_lines(history.minutes, clock),
        *slowness.peer_lines(history.peers, clock),
        *_traffic(history),
    ]


def clock(time_s: float) -> str:
    """Of this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _overview(history: History, first: Sample, last: Sample) -> list[Line]:
    lasted_s = int(last.time_s - first.time_s)
    ping = last.about.get("ping", {})
    found = [
        Line(
            "recording",
            f"{clock(first.time_s)} to {clock(last.time_s)} ({show.duration(lasted_s)}), "
            f"{show.count(history.looks)} looks, zcache {ping.get('version', '?')}",
        )
    ]
    if history.silences:
        when, why = history.silences[0]
        found += [
            Line(
                "silence",
                f"{len(history.silences)} times nobody answered, {history.silent_s:.0f} s in all; "
                f"first at {clock(when)}",
                "degraded",
            ),
            Line("", why),
        ]
    if history.restarts:
        times = ", ".join(clock(when) for when in history.restarts[:5])
        found.append(
            Line("restarts", f"{len(history.restarts)} of the server: {times}", "degraded")
        )
    return found


def _health(history: History) -> list[Line]:
    total = sum(history.lasted_s.values())
    shares = ", ".join(
        f"{status} {show.percent(history.lasted_s[status], total)}"
        for status in ("ok", "degraded", "critical")
        if history.lasted_s.get(status)
    )
    found = [Line("health", shares or "one look only")]
    for ailment in sorted(history.ailments.values(), key=lambda ailment: -ailment.lasted_s):
        found += [
            Line(
                "",
                f"{ailment.what} (from {clock(ailment.first_s)}, "
                f"{show.duration(int(ailment.lasted_s))})",
                ailment.status,
            ),
            Line("", f"-> {ailment.do}"),
        ]
    return found


def worst(history: History, name: str) -> Minute | None:
    """The minute in which it grew most; None when it never did."""
    found = [minute for minute in history.minutes if minute.grown.get(name)]
    return max(found, key=lambda minute: minute.grown[name], default=None)


def total(history: History, name: str) -> int:
    return sum(minute.grown.get(name, 0) for minute in history.minutes)


def _troubles(history: History) -> list[Line]:
    found = []
    for name, words, level in TROUBLES:
        if (minute := worst(history, name)) is not None:
            found.append(
                Line(
                    "trouble",
                    f"{show.count(total(history, name))} {words}; most in the minute of "
                    f"{clock(minute.start_s)} ({show.count(minute.grown[name])})",
                    level,
                )
            )
    return found or [Line("trouble", "no page was refused, damaged or lost", "ok")]


def _who_was_slow(history: History) -> list[Line]:
    """Where writes waited, and what the one they waited for did meanwhile."""
    found = []
    disk, memory = worst(history, "pool_wait_us"), worst(history, "commit_wait_us")
    if disk is not None and disk.rate("pool_wait_us") / 1e6 >= WAITED_MUCH:
        found += [_waited(history, disk, "room in the pool", "pool_wait_us"), *_disk(history, disk)]
    if memory is not None and memory.rate("commit_wait_us") / 1e6 >= WAITED_MUCH:
        found += [
            _waited(history, memory, "memory from the kernel", "commit_wait_us"),
            Line("", "-> commit=all takes the pool at the start; or raise vm.min_free_kbytes"),
        ]
    if slots := total(history, "slot_waits"):
        found.append(Line("slow", f"{show.count(slots)} requests waited for a request slot"))
    return found or [Line("slow", "nobody: writes hardly waited", "ok")]


def _waited(history: History, minute: Minute, what: str, name: str) -> Line:
    return Line(
        "slow",
        f"writes waited {total(history, name) / 1e6:.1f} s for {what}; worst in the minute of "
        f"{clock(minute.start_s)}: {minute.grown[name] / 1e6:.1f} s of waiting in "
        f"{minute.seen_s:.0f} s",
        "degraded",
    )


def _disk(history: History, minute: Minute) -> list[Line]:
    """The disk in the minute when writes waited for it."""
    written, best = minute.rate("disk_written_bytes"), worst(history, "disk_written_bytes")
    if best is None:
        return [Line("", "there was nothing below the pool to make room"),
                Line("", "-> use a larger pool=, or give it a disk=")]  # fmt: skip
    cleaned = minute.rate("disk_cleaned_bytes")
    found = [
        Line(
            "",
            f"pages came with {show.size(minute.rate('succ_stores') * PAGE_BYTES)}/s, the disk "
            f"took {show.size(written)}/s then and "
            f"{show.size(best.rate('disk_written_bytes'))}/s at best",
        )
    ]
    if written and cleaned / written >= CLEANING_MUCH:
        found += [
            Line(
                "", f"{show.percent(cleaned, written)} of that was cleaning: the disk is too full"
            ),
            Line("", "-> use a larger disk_size="),
        ]
    elif minute.grown.get("disk_write_errors"):
        found.append(Line("", "-> it failed meanwhile: see the kernel log and smartctl"))
    else:
        found.append(Line("", "-> use a faster disk, a larger pool=, or lower watermarks (high=)"))
    return found


def _traffic(history: History) -> list[Line]:
    found = []
    seen_s = sum(minute.seen_s for minute in history.minutes)
    for label, name in (("in", "succ_stores"), ("out", "loads"), ("from below", "cold_loads")):
        grown, peak = total(history, name), worst(history, name)
        if peak is not None and seen_s:
            found.append(
                Line(
                    label,
                    f"{show.count(grown)} pages, {grown / seen_s:,.0f} a second, at most "
                    f"{peak.rate(name):,.0f} in the minute of {clock(peak.start_s)}",
                )
            )
    last = history.last.stats if history.last else {}
    if last:
        found.append(
            Line(
                "at the end",
                f"{show.size(last['logical_bytes'])} of pages in {show.size(last['ram_bytes'])} of "
                f"RAM, ratio {show.ratio(last['logical_bytes'], last['ram_bytes'])}",
            )
        )
    return found


def run(path: str) -> list[Line]:
    """The report on the recording at `path`.  Raises ConfigError."""
    return report(read(samples(path)))
