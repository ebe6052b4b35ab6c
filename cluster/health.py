"""What is wrong, in sentences: rules over the counters and the configuration.

Each rule is a small function that looks at one thing and returns a Reason or
None; the whole is as bad as its worst reason.  A reason says what is the matter
and what to do about it, with the numbers that made it true.

    ok         nothing to do
    degraded   it works, something can or should be done
    critical   writes are refused, or pages are lost, now

What it is not: an alarm with memory.  A rule sees one moment; trends are the
metrics' work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OK, DEGRADED, CRITICAL = "ok", "degraded", "critical"
_ORDER = (OK, DEGRADED, CRITICAL)

PAGE_BYTES = 4096
NEARLY_FULL, FULL = 0.80, 0.99  # shares of the pool's frames in use


@dataclass(frozen=True)
class Reason:
    """`level` (degraded, critical), `what` is the matter, what to `do`: two sentences."""

    level: str
    what: str
    do: str


Stats = Mapping[str, int]
Config = Mapping[str, Any]
Rule = Callable[[Stats, Config], Reason | None]


def health(stats: Stats, config: Config) -> dict[str, Any]:
    """{"status": level, "reasons": [{"what": sentence, "do": sentence}, ...]}, worst first."""
    reasons = [reason for rule in RULES if (reason := rule(stats, config)) is not None]
    reasons.sort(key=lambda reason: -_ORDER.index(reason.level))
    return {
        "status": reasons[0].level if reasons else OK,
        "reasons": [{"what": reason.what, "do": reason.do} for reason in reasons],
    }


def pages_lost(stats: Stats, config: Config) -> Reason | None:
    """A page whose last copy is gone: its owner gets an I/O error at the next touch."""
    if not (lost := stats["lost_pages"]):
        return None
    return Reason(
        CRITICAL,
        f"{lost} stored pages are lost and answer with an I/O error.",
        "Restart the programs that the kernel log names, then swapoff and swapon the device.",
    )


def copies_damaged(stats: Stats, config: Config) -> Reason | None:
    """A checksum did not match what was stored in RAM."""
    if not (corrupt := stats["corrupt_loads"]):
        return None
    return Reason(
        CRITICAL,
        f"{corrupt} reads found a damaged copy in RAM and were answered with an I/O error.",
        "Test this machine's memory (memtest86+, or EDAC counters), and move its work elsewhere.",
    )


def pool_full(stats: Stats, config: Config) -> Reason | None:
    """With nothing below the pool, the next page that needs a frame is refused."""
    used, limit = stats["pers_pageframes"], stats["pool_limit_frames"]
    if limit == 0 or used < NEARLY_FULL * limit:
        return None
    percent = 100 * used // limit
    if used < FULL * limit:
        return Reason(
            DEGRADED,
            f"The pool is {percent} % full, and there is no lower tier to move pages to.",
            "End something that uses memory, or restart with a larger pool= before it is full.",
        )
    return Reason(
        CRITICAL,
        f"The pool is full ({percent} %) and there is no lower tier: writes are being refused "
        f"with ENOSPC, the kernel keeps those pages in RAM.",
        "End something that uses memory, or add another swap device of lower priority now.",
    )


def writes_refused(stats: Stats, config: Config) -> Reason | None:
    """It has happened; the pages stayed in the kernel, nothing was lost."""
    if not (refused := stats["failed_stores"]):
        return None
    return Reason(
        DEGRADED,
        f"{refused} page writes have been refused since the start because the pool was full.",
        "Restart with a larger pool= or a smaller size=, or add swap of lower priority.",
    )


def pool_can_fill(stats: Stats, config: Config) -> Reason | None:
    """Pages that do not compress take a frame each, so size above pool can end in ENOSPC."""
    device, pool = stats["device_pages"], stats["pool_limit_frames"]
    if device <= pool:
        return None
    return Reason(
        DEGRADED,
        f"The pool can fill: {device} pages of device, {pool} frames of pool, no lower tier. "
        f"When pages compress worse than {device / pool:.1f} to 1, writes will be refused.",
        "Keep swap of lower priority beside it, or choose size= nearer to pool=.",
    )


def memory_not_given(stats: Stats, config: Config) -> Reason | None:
    """The kernel refused memory to the pool although its limit is not reached."""
    if not (failures := stats["commit_failures"]):
        return None
    return Reason(
        DEGRADED,
        f"The kernel gave no memory to the pool {failures} times, below its limit.",
        "Choose a smaller pool=, or commit=all, which takes the memory at start or fails there.",
    )


def server_unfit(stats: Stats, config: Config) -> Reason | None:
    """What the kernel refused at start (`process.prepare`): locking, priority, OOM score."""
    if not (refused := list(config.get("refused", ()))):
        return None
    return Reason(
        DEGRADED,
        "The server runs without what swapping onto it needs: " + "; ".join(refused) + ".",
        "Start it as root, or grant CAP_IPC_LOCK, CAP_SYS_NICE and CAP_SYS_RESOURCE "
        "('zcache check' shows what is missing).",
    )


RULES: tuple[Rule, ...] = (
    pages_lost,
    copies_damaged,
    pool_full,
    writes_refused,
    memory_not_given,
    server_unfit,
    pool_can_fill,
)
