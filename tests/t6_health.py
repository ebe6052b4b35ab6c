"""Health: each rule by itself, and the whole as bad as its worst reason."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.health import RULES, health
from zcache_core.counters import COUNTERS

WELL = {counter.name: 0 for counter in COUNTERS} | {
    "device_pages": 1000,
    "pool_limit_frames": 1000,
    "pers_pageframes": 100,
}

# What is the matter, how bad it is, and words of what to do.
TROUBLE = [
    ({"lost_pages": 3}, {}, "critical", "3 stored pages are lost", "swapoff"),
    ({"corrupt_loads": 1}, {}, "critical", "1 reads found a damaged copy", "memtest"),
    ({"pers_pageframes": 995}, {}, "critical", "The pool is full (99 %)", "another swap device"),
    ({"pers_pageframes": 850}, {}, "degraded", "The pool is 85 % full", "larger pool="),
    ({"failed_stores": 9}, {}, "degraded", "9 page writes have been refused", "larger pool="),
    ({"commit_failures": 2}, {}, "degraded", "gave no memory to the pool 2 times", "commit=all"),
    ({"device_pages": 4000}, {}, "degraded", "worse than 4.0 to 1", "lower priority"),
    ({}, {"refused": ["a is refused", "b too"]}, "degraded", "a is refused; b too.", "as root"),
]


def test_well() -> None:
    assert health(WELL, {}) == {"status": "ok", "reasons": []}
    assert len(TROUBLE) == len(RULES) + 1  # pool_full has two levels


@pytest.mark.parametrize(("stats", "config", "status", "what", "do"), TROUBLE)
def test_one_trouble(
    stats: dict[str, int], config: dict[str, Any], status: str, what: str, do: str
) -> None:
    found = health(WELL | stats, config)
    assert found["status"] == status
    (reason,) = found["reasons"]
    assert what in reason["what"]
    assert do in reason["do"]
    assert reason.keys() == {"what", "do"}


def test_worst_comes_first() -> None:
    stats = WELL | {"device_pages": 4000, "pers_pageframes": 1000, "failed_stores": 1}
    found = health(stats, {"refused": ["x"]})
    assert found["status"] == "critical"
    assert len(found["reasons"]) == 4
    assert "pool is full" in found["reasons"][0]["what"]


def test_a_pool_of_no_frames_divides_by_nothing() -> None:
    assert health(WELL | {"pool_limit_frames": 0, "device_pages": 0}, {})["status"] == "ok"
