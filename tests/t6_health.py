"""Health: each rule by itself, and the whole as bad as its worst reason."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from cluster.health import RULES, health
from zcache_core.counters import COUNTERS

WELL = {counter.name: 0 for counter in COUNTERS} | {
    "device_pages": 1000,
    "pool_limit_frames": 1000,
    "pool_set_frames": 1000,
    "pool_target_frames": 1000,
    "pers_pageframes": 100,
}

MIB = 1 << 20
DISK = {"disk_segments": 100, "disk_limit_bytes": 100 * MIB, "disk_bytes": 10 * MIB}
FULL_DISK = DISK | {"disk_bytes": 95 * MIB}
FAILING = DISK | {"disk_degraded": 1, "disk_errno": errno.EIO, "disk_write_errors": 4}
ALL = {"guaranteed": 1000 * 4096}
ZBUD = {"allocator": "zbud"}
PEERS = {"peers": ["a", "b"], "replicas": 2}
TAKEN = {"live_peers": 2, "remote_room_bytes": 1}

# What is the matter, how bad it is, and words of what to do.
TROUBLE: list[tuple[dict[str, int], dict[str, Any], str, str, str]] = [
    ({"lost_pages": 3}, {}, "critical", "3 stored pages are lost", "swapoff"),
    ({"corrupt_loads": 1}, {}, "critical", "1 reads found a damaged copy", "memtest"),
    ({"pers_pageframes": 995}, {}, "critical", "The pool is full (99 %)", "another swap device"),
    ({"pers_pageframes": 850}, {}, "degraded", "The pool is 85 % full", "larger pool="),
    ({"failed_stores": 9}, {}, "degraded", "9 page writes have been refused", "larger pool="),
    ({"commit_failures": 2}, {}, "degraded", "gave no memory to the pool 2 times", "commit=all"),
    ({"device_pages": 1900}, ZBUD, "degraded", "worse than 1.9 to 1", "lower priority"),
    ({"device_pages": 4000}, ZBUD, "degraded", "more than 2000 pages in use", "lower priority"),
    ({"draining": 1}, {}, "degraded", "The pool is drained", "zcache drain --off"),
    (
        {"disk_corrupt_pages": 2},
        {},
        "critical",
        "2 copies on the disk were found wrong",
        "smartctl",
    ),
    (
        {"pers_pageframes": 900, "live_peers": 2},
        *(PEERS, "degraded", "90 % full, and no peer takes pages", "End"),
    ),
    ({"pers_pageframes": 900, **TAKEN}, PEERS, "ok", "", ""),
    ({"pers_pageframes": 1000, **TAKEN}, PEERS, "degraded", "faster than the peers", "peers="),
    ({"pers_pageframes": 1000, "live_peers": 2}, PEERS, "critical", "no peer takes pages", "End"),
    ({"remote_corrupt_pages": 2}, {}, "degraded", "2 copies of peers were found", "zcache status"),
    ({"live_peers": 1}, {"peers": ["a", "b"], "replicas": 2}, "degraded", "1 of 2", "says why"),
    (
        {"live_peers": 2},
        {"peers": ["a", "b", "c"], "replicas": 2},
        "degraded",
        "1 of 3 peers do not answer",
        "zcache status",
    ),
    ({"live_peers": 3}, {"peers": ["a", "b", "c"], "replicas": 2}, "ok", "", ""),
    (
        {},
        {"twin_peers": ["The peers a and b are the same donor; the second is not used."]},
        "degraded",
        "a and b are the same donor",
        "node.pem of its own",
    ),
    ({}, {"tls": "/etc/t", "certificate_days": 30}, "ok", "", ""),
    ({}, {"tls": "/etc/t", "certificate_days": 29}, "degraded", "in /etc/t ends in 29", "upgrade"),
    ({}, {"tls": "/etc/t", "certificate_days": -2}, "critical", "ended 2 days ago", "cluster-add"),
    ({}, {"etcd_silent_s": 0}, "ok", "", ""),
    ({}, {"etcd_silent_s": 40}, "degraded", "not answered for 40 s", "what etcd= says"),
    ({"remote_short_pages": 7}, {}, "degraded", "7 copies of pages are with", "renewed elsewhere"),
    ({"backup_missing_pages": 5}, {"backup": "disk"}, "degraded", "on the disk alone", "has room"),
    ({"mended_loads": 2}, {}, "degraded", "answered from the disk instead", "memtest"),
    ({}, {"unmended": None}, "ok", "", ""),
    ({}, {"unmended": "/dev/nbd3"}, "degraded", "connection of /dev/nbd3: its helper", "zcache up"),
    ({"disk_read_errors": 5}, {}, "critical", "5 could not be read", "kernel log"),
    (FAILING, ALL, "degraded", "(Input/output error, 4 times so far)", "goes on by itself"),
    (
        DISK | {"writeback_limit_reached": 1, "writeback_limit_bytes": 9, "writeback_day_bytes": 8},
        ALL,
        "degraded",
        "is used up (8 of 9 bytes): nothing is written",
        "larger writeback_limit",
    ),
    (
        DISK | {"device_pages": 4000, "writeback_limit_bytes": 9},
        {"guaranteed": 1000 * 4096},
        "degraded",
        "when a day's writeback_limit is used up: 1000 of the device's 4000",
        "zcache set writeback_limit=none",
    ),
    (FAILING | {"disk_errno": errno.ENOENT}, ALL, "degraded", "was removed", "swapoff"),
    (FAILING | {"disk_errno": errno.ENODATA}, ALL, "degraded", "was cut short", "Free some room"),
    (DISK | {"disk_stalled_us": 5_000_000}, ALL, "degraded", "for 5 s", "goes on by itself"),
    (DISK | {"disk_stalled_us": 1_000_000}, ALL, "ok", "", ""),
    (DISK | {"pers_pageframes": 900}, ALL, "ok", "", ""),
    (DISK | {"pers_pageframes": 995}, ALL, "degraded", "faster than the disk", "faster disk"),
    (DISK | {"failed_stores": 1}, ALL, "degraded", "the disk took nothing in time", "disk_size="),
    (FULL_DISK, ALL, "ok", "", ""),
    (
        DISK | {"device_pages": 4000},
        {"guaranteed": 2000 * 4096},
        "degraded",
        "2000 of the device's 4000 pages are safe",
        "larger disk_size=",
    ),
    ({"memory_pressure": 1}, {}, "degraded", "give back only what it does not use", "passes"),
    (
        DISK | {"pool_target_frames": 400, "memory_pressure": 1},
        ALL,
        "degraded",
        "Memory is short on this machine: 40 % of the pool",
        "10 s after",
    ),
    (
        DISK | {"pool_target_frames": 900},
        ALL,
        "degraded",
        "Memory is no longer short on this machine: 90 % of the pool",
        "10 s after",
    ),
    (
        DISK | {"pool_set_frames": 600, "pool_target_frames": 600},
        ALL,
        "degraded",
        "1000 frames now, 600 wanted",
        "Wait",
    ),
    ({}, {"refused": ["a is refused", "b too"]}, "degraded", "a is refused; b too.", "as root"),
]


def test_well() -> None:
    assert health(WELL, {}) == {"status": "ok", "reasons": []}


@pytest.mark.parametrize(("stats", "config", "status", "what", "do"), TROUBLE)
def test_one_trouble(
    stats: dict[str, int], config: dict[str, Any], status: str, what: str, do: str
) -> None:
    found = health(WELL | stats, config)
    assert found["status"] == status
    if status == "ok":
        assert found["reasons"] == []
        return
    (reason,) = found["reasons"]
    assert what in reason["what"]
    assert do in reason["do"]
    assert reason.keys() == {"what", "do"}
    assert "no lower tier" not in reason["what"] or not (WELL | stats)["disk_limit_bytes"]


@pytest.mark.parametrize("disk", [FULL_DISK, FAILING])
def test_pool_full_above_a_disk_that_takes_nothing(disk: dict[str, int]) -> None:
    found = health(WELL | disk | {"pers_pageframes": 1000}, ALL)
    assert found["status"] == "critical"
    assert "the disk takes no more pages" in found["reasons"][0]["what"]


def test_disk_nearly_full_matters_only_when_it_is_too_small() -> None:
    found = health(WELL | FULL_DISK | {"device_pages": 4000}, {"guaranteed": 2000 * 4096})
    assert {"95 % full" in reason["what"] for reason in found["reasons"]} == {True, False}


def test_every_rule_has_its_test() -> None:
    """Each rule speaks up in at least one of the cases above."""
    cases: list[tuple[dict[str, int], dict[str, Any]]] = [
        (stats, config) for stats, config, _, _, _ in TROUBLE
    ]
    cases.append((FULL_DISK | {"device_pages": 4000}, {"guaranteed": 0}))
    for rule in RULES:
        assert any(rule(WELL | stats, config) for stats, config in cases), rule


def test_worst_comes_first() -> None:
    stats = WELL | {"device_pages": 4000, "pers_pageframes": 1000, "failed_stores": 1}
    found = health(stats, {"refused": ["x"]})
    assert found["status"] == "critical"
    assert len(found["reasons"]) == 4
    assert "pool is full" in found["reasons"][0]["what"]


def test_a_pool_of_no_frames_divides_by_nothing() -> None:
    assert health(WELL | {"pool_limit_frames": 0, "device_pages": 0}, {})["status"] == "ok"


def test_pool_full_at_the_limit_of_the_day() -> None:
    full = {"pers_pageframes": 995, "writeback_limit_reached": 1, "writeback_limit_bytes": 9}
    found = health(WELL | DISK | full, ALL)
    assert found["status"] == "critical"
    assert "the disk takes no more pages" in found["reasons"][0]["what"]
    assert "writeback_limit is used up" in found["reasons"][1]["what"]
