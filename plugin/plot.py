"""`zcache plot FILE`: a recording as a picture, PNG or SVG.

    pages by tier | pool and disk in bytes
    ratio         | pages a second
    waits         | disk traffic
    latencies: half below | 99 % below

Drawn by matplotlib, without a display.  Gaps in the recording are gaps in the lines.

Bound: POINTS_MAX points a line; of a longer recording every n-th look is drawn.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plugin import show
from plugin.rates import between, newer
from plugin.recording import Sample, histogram, samples
from zcache_core.counters import HISTOGRAMS, Histogram, quantile_s
from zcache_core.errors import ConfigError

POINTS_MAX = 2000
PAGE_BYTES = 4096
MIB = 1 << 20
KINDS = (".png", ".svg")

Stats = Mapping[str, int]
Line = tuple[str, Callable[[Stats], float]]
NAN = float("nan")
LEGEND_ROOM = (
    1.4  # five lines of a legend take a quarter of a panel: they stand above what is drawn
)

PAGES: tuple[Line, ...] = (
    ("RAM only", lambda s: s["pers_zpages"]),
    ("RAM and below", lambda s: s["eph_zpages"]),
    (
        "disk or peers only",
        lambda s: s["disk_pages"] + s.get("pers_pages_remoted", 0) - s["eph_zpages"],
    ),
    ("same-filled", lambda s: s["same_filled_pages"]),
)
BYTES: tuple[Line, ...] = (
    ("pool in use", lambda s: (s["pers_pageframes"] + s["eph_pageframes"]) * PAGE_BYTES / MIB),
    ("pool limit", lambda s: s["pool_limit_frames"] * PAGE_BYTES / MIB),
    ("disk in use", lambda s: s["disk_bytes"] / MIB),
    ("at peers", lambda s: s.get("remote_bytes", 0) / MIB),
)
RATIOS: tuple[Line, ...] = (
    ("stored to all RAM", lambda s: _ratio(s["logical_bytes"], s["ram_bytes"])),
    (
        "codec alone",
        lambda s: _ratio(
            (s["pers_zpages"] + s["eph_zpages"]) * PAGE_BYTES, s["pers_zbytes"] + s["eph_zbytes"]
        ),
    ),
)
RATES = {
    "pages a second": (
        ("in", "succ_stores", 1.0), ("out", "loads", 1.0), ("from below", "cold_loads", 1.0),
        ("written back", "written_back_pages", 1.0), ("refused", "failed_stores", 1.0),
    ),
    "writes wait, s a second": (
        ("for room in the pool", "pool_wait_us", 1e-6), ("for memory", "commit_wait_us", 1e-6),
    ),
    "disk, MiB/s": (
        ("written", "disk_written_bytes", 1 / MIB),
        ("of it cleaning", "disk_cleaned_bytes", 1 / MIB),
    ),
}  # fmt: skip


QUANTILES = ("half below, us", "99 % below, us")


def run(path: str, output: str | None, last_s: float | None) -> Path:
    """Draw the recording at `path`; where the picture lies.  Raises ConfigError."""
    target = Path(output) if output else Path(path).with_suffix(".svg")
    if target.suffix not in KINDS:
        raise ConfigError(f"{target} is no picture; end its name in .png or .svg")
    if target == Path(path):
        raise ConfigError(f"{target} is the recording itself; name the picture with --output")
    drawn = thinned(path, last_s)
    if len(drawn) < 2:
        raise ConfigError(f"{path} holds fewer than two looks; record for longer")
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("matplotlib is missing; run 'make setup'") from None
    matplotlib.use("agg")
    try:
        _figure(drawn).savefig(target, dpi=110)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror})") from None
    return target


def thinned(path: str, last_s: float | None) -> list[Sample]:
    """At most POINTS_MAX samples, evenly taken from the last `last_s` seconds."""
    times = [sample.time_s for sample in samples(path)]
    since = times[-1] - last_s if times and last_s is not None else -float("inf")
    wanted = sum(time_s >= since for time_s in times)
    step = -(-wanted // POINTS_MAX) or 1
    kept = (sample for sample in samples(path) if sample.time_s >= since)
    return [sample for at, sample in enumerate(kept) if at % step == 0 or sample.silent]


def rate(drawn: Sequence[Sample], name: str, factor: float) -> list[float]:
    """One value a sample: since the one before; nan where that is unknown."""
    found = [NAN]
    for old, new in itertools.pairwise(drawn):
        if not old.stats or not new.stats:
            found.append(NAN)
            continue
        value = between(name, (old.time_s, old.stats), (new.time_s, new.stats))
        found.append(NAN if value is None else value * factor)
    return found


def latencies(drawn: Sequence[Sample], which: Histogram) -> list[tuple[float, float]]:
    """Half and 99 % of what was timed since the sample before, in us; nan where nothing was."""
    looks = [histogram(sample.stats, which) if sample.stats else None for sample in drawn]
    found = [(NAN, NAN)]
    for old, new in itertools.pairwise(looks):
        seen = newer(old, new) if old and new else None
        if seen and seen["count"]:
            found.append((quantile_s(seen, 0.5) * 1e6, quantile_s(seen, 0.99) * 1e6))
        else:
            found.append((NAN, NAN))
    return found


def values(drawn: Sequence[Sample], value: Callable[[Stats], float]) -> list[float]:
    return [value(sample.stats) if sample.stats else NAN for sample in drawn]


def _figure(drawn: Sequence[Sample]) -> Any:
    from matplotlib.figure import Figure

    when = [datetime.datetime.fromtimestamp(sample.time_s) for sample in drawn]
    figure = Figure(figsize=(14, 13), layout="constrained")
    axes = figure.subplots(4, 2, sharex=True).flatten()
    stacked = [values(drawn, value) for _, value in PAGES]
    axes[0].stackplot(when, [[0 if v != v else v for v in row] for row in stacked],
                      labels=[label for label, _ in PAGES], alpha=0.8)  # fmt: skip
    axes[0].set_title("pages")
    for axis, title, lines in ((axes[1], "MiB", BYTES), (axes[2], "ratio", RATIOS)):
        axis.set_title(title)
        for label, value in lines:
            axis.plot(when, values(drawn, value), label=label)
    for axis, (title, counters) in zip(axes[3:6], RATES.items(), strict=True):
        axis.set_title(title)
        for label, name, factor in counters:
            axis.plot(when, rate(drawn, name, factor), label=label)
    for axis in axes[:6]:
        top = axis.dataLim.y1
        axis.set_ylim(0, LEGEND_ROOM * top if top > 0 else 1)
    for axis, title in zip(axes[6:], QUANTILES, strict=True):
        axis.set_title(title)
        axis.set_yscale("log")
    for which in HISTOGRAMS:
        if not any(f"{which.name}[sum]" in sample.stats for sample in drawn):
            continue
        quantiles = zip(*latencies(drawn, which), strict=True)
        for axis, line in zip(axes[6:], quantiles, strict=True):
            # Marked: what happens now and then has no neighbours to be joined with.
            axis.plot(when, line, marker=".", markersize=3, label=show.TIMED[which.name])
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper left", fontsize="small")
    figure.autofmt_xdate()
    return figure


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN
