"""Each counter as a file: which folder it is in, under which names, and what it says.

    frontswap/loads             what the kernel had in debugfs, by the same name
    zbud/unbuddied_count        frames of the zbud allocator
    ramster/...                 what concerns other machines
    zcache/pers_zpages          all others, the kernel's first among them
    zcache/writtenback_pages    the kernel's name for one that is called better here
    latency/put_p99_ns          of each histogram: count, sum, p50, p99, and its buckets in a line

A file holds the number and a line feed, as the kernel's do.

Source: drivers/staging/zcache/{debug,zbud}.c and ramster/debug.c of Linux 3.10;
mm/frontswap.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zcache_core.counters import COUNTERS, HISTOGRAMS, UNITS_S, quantile_s

FRONTSWAP = {"loads", "succ_stores", "failed_stores", "invalidates"}
ZBUD = {"buddied_count", "unbuddied_count"}
OF_OTHER_MACHINES = ("remote", "foreign", "peer")
# The kernel's name -> ours, where the thing is the same and the name is not.
KERNEL_NAMES = {
    "zcache/writtenback_pages": "written_back_pages",
    "zcache/failed_pers_puts": "failed_stores",
    "zcache/flush_found": "invalidates",
}


UNITS = {"nanoseconds": "ns", "microseconds": "us"}
PARTS = ("count", "sum", "p50", "p99", "buckets")


def folder(name: str) -> str:
    """Of a counter."""
    if name in FRONTSWAP:
        return "frontswap"
    if name in ZBUD:
        return "zbud"
    return "ramster" if any(word in name for word in OF_OTHER_MACHINES) else "zcache"


def files() -> dict[str, str]:
    """Path below the mount point -> the counter it shows."""
    found = {f"{folder(counter.name)}/{counter.name}": counter.name for counter in COUNTERS}
    assert not KERNEL_NAMES.keys() & found.keys()
    return dict(sorted((found | KERNEL_NAMES).items()))


def latency_files() -> dict[str, tuple[str, str]]:
    """Path below the mount point -> the histogram, and which of PARTS it shows."""
    found = {}
    for histogram in HISTOGRAMS:
        for part in PARTS:
            unit = "" if part in ("count", "buckets") else f"_{UNITS[histogram.unit]}"
            found[f"latency/{histogram.name}_{part}{unit}"] = (histogram.name, part)
    return found


def content(path: str, stats: Mapping[str, Any]) -> bytes:
    """What the file at `path` says; KeyError when there is none, or the server has it not."""
    if path not in (timed := latency_files()):
        return b"%d\n" % stats[files()[path]]
    name, part = timed[path]
    histogram = stats["histograms"][name]
    if part == "buckets":
        return " ".join(map(str, histogram["buckets"] or [0])).encode() + b"\n"
    if part in ("count", "sum"):
        return b"%d\n" % histogram[part]
    share = {"p50": 0.5, "p99": 0.99}[part]
    return b"%d\n" % round(quantile_s(histogram, share) / UNITS_S[histogram["unit"]])
