"""The plot of docs/performance.md: what a swapping kernel sends, and what the guest felt.

Everything is drawn as a ratio to nbdkit's memory plugin in the same run, because absolute figures
are those of one machine; a bar's absolute value is written beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

NAMES = ("null", "memory", "memory-zstd", "zram", "zcache")
COLOURS = {
    "null": "#c8c8c8",
    "memory": "#7a8fa6",
    "memory-zstd": "#c9a26b",
    "zram": "#8bb08b",
    "zcache": "#b5413b",
}
LATENCY = {
    "read 4 KiB random, depth 1": "4 KiB read",
    "read 32 KiB random, depth 1": "32 KiB read",
    "write 128 KiB sequential, depth 1": "128 KiB write",
}
RATE = {
    "read 4 KiB random, depth 32": "4 KiB read\ndepth 32",
    "write 4 KiB random, depth 32": "4 KiB write\ndepth 32",
    "read 128 KiB random, depth 4": "128 KiB read\ndepth 4",
    "write 128 KiB random, depth 4": "128 KiB write\ndepth 4",
}
LAB = {
    "fill_pages_per_s": "filling\npages/s",
    "sequential_per_s": "in order\ntouches/s",
    "random_per_s": "at random\ntouches/s",
    "ram_bytes": "RAM used\nMiB",
}


def draw(document: Mapping[str, Any], path: Path) -> bool:
    """One SVG of the sections that are there; False when none of them is."""
    sections = document["sections"]
    panels: list[tuple[str, dict[str, dict[str, float]]]] = []
    if "nbd" in sections:
        loads = _loads(sections["nbd"]["raw"]["loads"])
        panels.append(("latency, p50 us (lower is better)", _pick(loads, LATENCY, "p50_us")))
        panels.append(("requests/s (higher is better)", _pick(loads, RATE, "requests_per_s")))
    if "lab" in sections and sections["lab"]["raw"]:
        panels.append(("192 MiB hog in a 128 MiB guest", _lab(sections["lab"]["raw"]["runs"])))
    if not panels:
        return False
    matplotlib.rcParams["svg.hashsalt"] = "zcache"  # the same figures give the same file
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 3.4 * len(panels)), squeeze=False)
    for axis, (title, table) in zip(axes[:, 0], panels, strict=True):
        _bars(axis, title, table)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _loads(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """load -> server -> median of each figure."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for entry in entries:
        rounds = entry["rounds"]
        table.setdefault(entry["load"], {})[entry["server"]] = {
            name: statistics.median(outcome[name] for outcome in rounds) for name in rounds[0]
        }
    return table


def _pick(
    loads: Mapping[str, Mapping[str, Mapping[str, float]]], labels: Mapping[str, str], name: str
) -> dict[str, dict[str, float]]:
    return {
        label: {server: figures[name] for server, figures in loads[load].items()}
        for load, label in labels.items()
    }


def _lab(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        label: {
            system: statistics.median(run[name] for run in found)
            / (1 << 20 if name == "ram_bytes" else 1)
            for system, found in runs.items()
            if found
        }
        for name, label in LAB.items()
    }


def _bars(axis: Axes, title: str, table: Mapping[str, Mapping[str, float]]) -> None:
    names = [name for name in NAMES if any(name in row for row in table.values())]
    width = 0.8 / len(names)
    for place, row in enumerate(table.values()):
        base = row.get("memory") or 1.0
        for number, name in enumerate(names):
            if name not in row:
                continue
            x = place - 0.4 + (number + 0.5) * width
            ratio = row[name] / base
            axis.bar(x, ratio, width, color=COLOURS[name], label=name if place == 0 else None)
            text = f"{row[name]:.3g}" if row[name] < 1000 else f"{row[name]:.0f}"
            axis.annotate(
                text,
                (x, ratio),
                ha="center",
                va="bottom",
                fontsize=7,
                xytext=(0, 1),
                textcoords="offset points",
            )
    axis.axhline(1.0, color="black", linewidth=0.6, linestyle=":")
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xticks(range(len(table)), list(table))
    axis.set_ylabel("of nbdkit memory")
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        fontsize=7, ncols=len(names), frameon=False, loc="lower right", bbox_to_anchor=(1, 1)
    )
