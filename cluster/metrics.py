"""The counter table as OpenMetrics: what Prometheus and everything that reads it scrapes.

    counter  succ_stores        -> zcache_succ_stores_total
    time     pool_wait_us       -> zcache_pool_wait_seconds_total     base units
    share    high_percent       -> zcache_high_ratio
    gauge    buddied_count      -> zcache_buddied_frames              _count is a histogram's
    peak     pers_zpages_max    -> zcache_pers_zpages_max
    spread   pool_wait          -> zcache_pool_wait_duration_seconds, a histogram

Beside the counters: zcache_health_status (0 ok, 1 degraded, 2 critical), the numbers of
reasons, zcache_info with version, allocator and codec, and when server and node were started.

Everything is made from the tables of `counters.py`; nothing is remembered between scrapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from cluster.health import CRITICAL, DEGRADED, OK
from zcache_core.counters import BUCKETS, COUNTERS, HISTOGRAMS, Counter

PREFIX = "zcache_"
LEVELS = {OK: 0, DEGRADED: 1, CRITICAL: 2}


def metric(counter: Counter) -> tuple[str, float]:
    """Name of a counter's metric (a counter's without _total), and what to multiply with."""
    name = PREFIX + counter.name
    for suffix, base, factor in (("_us", "_seconds", 1e-6), ("_percent", "_ratio", 0.01)):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + base, factor
    if name.endswith("_count"):
        return name.removesuffix("_count") + f"_{counter.unit}", 1
    return name, 1


def sample(counter: Counter) -> str:
    """The name under which a counter's value is scraped."""
    return metric(counter)[0] + ("_total" if counter.kind == "counter" else "")


def spread(name: str) -> str:
    """The metric of a histogram of microseconds."""
    return f"{PREFIX}{name}_duration_seconds"


def cumulated(buckets: Sequence[int]) -> list[tuple[str, float]]:
    """Ours (one for each power of two, in microseconds) as Prometheus has them."""
    found, seen = [], 0
    for at in range(BUCKETS):
        seen += buckets[at] if at < len(buckets) else 0
        bound = "+Inf" if at == BUCKETS - 1 else repr((1 << at) * 1e-6)
        found.append((bound, float(seen)))
    return found


class Look(Collector):
    """One look at everything: the answers of ping, stats, config and health."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers

    def collect(self) -> Iterator[Metric]:
        """Each metric once."""
        stats = self._answers["stats"]
        for counter in COUNTERS:
            name, factor = metric(counter)
            family = CounterMetricFamily if counter.kind == "counter" else GaugeMetricFamily
            text = counter.help[0].upper() + counter.help[1:]
            yield family(name, text, value=stats[counter.name] * factor)
        for histogram in HISTOGRAMS:
            assert histogram.unit == "microseconds"
            total_us = stats.get(f"{histogram.name}_us")
            yield HistogramMetricFamily(
                spread(histogram.name),
                histogram.help[0].upper() + histogram.help[1:],
                buckets=cumulated(stats["histograms"][histogram.name]["buckets"]),
                sum_value=None if total_us is None else total_us * 1e-6,
            )
        yield from self._about()

    def _about(self) -> Iterator[Metric]:
        ping, config, health = (self._answers[name] for name in ("ping", "config", "health"))
        yield GaugeMetricFamily(
            PREFIX + "health_status",
            "What `zcache health` answers: 0 ok, 1 degraded, 2 critical",
            value=LEVELS[health["status"]],
        )
        yield GaugeMetricFamily(
            PREFIX + "health_reasons", "Reasons it gives for that", value=len(health["reasons"])
        )
        for what in ("server", "node"):
            yield GaugeMetricFamily(
                f"{PREFIX}{what}_start_time_seconds",
                f"When the {what} process was started, in seconds since 1970",
                value=ping[f"{what}_started_seconds"],
            )
        words = {key: str(config.get(key, "")) for key in ("allocator", "codec")}
        yield InfoMetricFamily("zcache", "The version and how pages are kept",
                               value={"version": str(ping["version"]), **words})  # fmt: skip


def exposition(answers: Mapping[str, Any], accept: str) -> tuple[bytes, str]:
    """Body and content type for an Accept header: OpenMetrics where it is asked for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Look(answers))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
