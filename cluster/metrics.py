"""The counter table as OpenMetrics: what Prometheus and everything that reads it scrapes.

    counter  succ_stores        -> zcache_succ_stores_total
    time     pool_wait_us       -> zcache_pool_wait_seconds_total     base units
    share    high_percent       -> zcache_high_ratio
    gauge    buddied_count      -> zcache_buddied_frames              _count is a histogram's
    peak     pers_zpages_max    -> zcache_pers_zpages_max
    spread   pool_wait          -> zcache_pool_wait_duration_seconds, a histogram

Of the peers of a server, each with its `peer` (the address of peers=): zcache_peer_up,
zcache_peer_latency_seconds, zcache_peer_room_bytes, zcache_peer_copies,
zcache_peer_wrong_copies.

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

from cluster.reasons import CRITICAL, DEGRADED, OK
from zcache_core.counters import BUCKETS, COUNTERS, HISTOGRAMS, UNITS_S, Counter

PREFIX = "zcache_"
UNITS = (("_us", "_seconds", 1e-6), ("_s", "_seconds", 1.0), ("_percent", "_ratio", 0.01))
LEVELS = {OK: 0, DEGRADED: 1, CRITICAL: 2}
# Of each peer: what the method `peers` calls it, the metric, its help, and what to multiply with.
PEERS = (
    ("copies", "copies", "Copies of our pages that the index counts on at this peer", 1.0),
    ("room_bytes", "room_bytes", "Bytes of pages that this peer has room for now", 1.0),
    ("latency_us", "latency_seconds", "Its usual answer to a ping", 1e-6),
    ("wrong_copies", "wrong_copies", "Copies of this peer found wrong or damaged", 1.0),
)


def metric(counter: Counter) -> tuple[str, float]:
    """Name of a counter's metric (a counter's without _total), and what to multiply with."""
    name = PREFIX + counter.name
    for suffix, base, factor in UNITS:
        if name.endswith(suffix):
            return name.removesuffix(suffix) + base, factor
    if name.endswith("_count"):
        return name.removesuffix("_count") + f"_{counter.unit}", 1
    return name, 1


def sample(counter: Counter) -> str:
    """The name under which a counter's value is scraped."""
    return metric(counter)[0] + ("_total" if counter.kind == "counter" else "")


def spread(name: str) -> str:
    """The metric of a histogram."""
    return f"{PREFIX}{name}_duration_seconds"


def cumulated(buckets: Sequence[int], unit_s: float) -> list[tuple[str, float]]:
    """Ours (one for each power of two of a unit) as Prometheus has them: in seconds."""
    found, seen = [], 0
    for at in range(BUCKETS):
        seen += buckets[at] if at < len(buckets) else 0
        bound = "+Inf" if at == BUCKETS - 1 else f"{(1 << at) * unit_s:.9g}"
        found.append((bound, float(seen)))
    return found


class Look(Collector):
    """One look at everything: the answers of ping, stats, config, health and peers."""

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
            unit_s, seen = UNITS_S[histogram.unit], stats["histograms"][histogram.name]
            yield HistogramMetricFamily(
                spread(histogram.name),
                histogram.help[0].upper() + histogram.help[1:],
                buckets=cumulated(seen["buckets"], unit_s),
                sum_value=seen["sum"] * unit_s,
            )
        yield from self._peers()
        yield from self._about()

    def _peers(self) -> Iterator[Metric]:
        rows = self._answers.get("peers", ())
        up = GaugeMetricFamily(
            PREFIX + "peer_up", "1 while this peer answers, 0 while it does not", labels=["peer"]
        )
        for row in rows:
            up.add_metric([row["address"]], float(row["state"] == "up"))
        yield up
        for key, name, text, factor in PEERS:
            family = GaugeMetricFamily(f"{PREFIX}peer_{name}", text, labels=["peer"])
            for row in rows:
                family.add_metric([row["address"]], row[key] * factor)
            yield family

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
            if f"{what}_started_seconds" not in ping:
                continue  # a node that only lends has no server
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
