"""A server for `zcache top` without a server: answers from a dict, and notes what is changed."""

from __future__ import annotations

from typing import Any

from cluster.health import health
from zcache_core.counters import COUNTERS, HISTOGRAMS
from zcache_core.errors import ControlError

PAGE = 4096
SPREAD = {"unit": "microseconds", "count": 0, "sum": 0, "buckets": list[int]()}
STATS: dict[str, Any] = {counter.name: 0 for counter in COUNTERS} | {
    "histograms": {histogram.name: SPREAD for histogram in HISTOGRAMS},
    "device_pages": 100_000, "pool_limit_frames": 25_000, "pers_pageframes": 10_000,
    "eph_pageframes": 5_000, "pers_zpages": 20_000, "eph_zpages": 9_000, "loads": 1000,
    "disk_limit_bytes": 1 << 30, "disk_bytes": 300 << 20, "disk_pages": 30_000,
    "logical_bytes": 50_000 * PAGE, "ram_bytes": 16_000 * PAGE, "high_percent": 90,
    "low_percent": 80, "pool_set_frames": 25_000, "pool_target_frames": 25_000,
}  # fmt: skip
CONFIG = {"size": 100_000 * PAGE, "allocator": "zbud", "codec": "lz4", "guaranteed": 1 << 40}
PING = {"version": "1.2.3", "server_pid": 77, "pid": 78, "uptime_seconds": 3700}


class FakeServer:
    """Answers from a dict, and notes what is changed."""

    def __init__(self, **stats: Any) -> None:
        self.stats = STATS | stats
        self.config: dict[str, Any] = dict(CONFIG)
        self.peers: list[dict[str, Any]] = []
        self.owners: list[dict[str, Any]] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.error: ControlError | None = None

    def __call__(self, method: str, *params: Any) -> Any:
        if self.error is not None:
            raise self.error
        if method in ("set", "drain"):
            self.calls.append((method, params))
            return {"high": 85} if method == "set" else {"draining": params[0]}
        peers = {"peers": [peer["address"] for peer in self.peers], "replicas": 2}
        config = peers | self.config if self.peers else self.config
        return {
            "ping": PING, "stats": dict(self.stats), "config": config, "peers": self.peers,
            "health": health(self.stats, config), "owners": self.owners,
        }[method]  # fmt: skip

    def close(self) -> None:
        pass
