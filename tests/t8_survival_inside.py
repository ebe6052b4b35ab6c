"""A guest swaps onto its own server, memory exhausted; it is killed, upgraded: nothing is lost.

    up -> hog or stress-ng over what the guest has -> kill -9 the server, again and again -> down

Nobody can start a server there when it is dead: the next one waits already (plugin/standby.py).
Every run prints how long nothing moved.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.corpus import pages_file
from tests.survival_helpers import (
    Kills,
    assert_survived,
    kill_server_in,
    kill_supervisor_in,
    serve_state,
)
from tests.swaplab import (
    SELF_SERVING_SYSCTL,
    Guest,
    GuestConfig,
    Job,
    Lab,
    fitness,
    hog,
    read_hog,
    read_stress,
    stress_ng,
)
from tests.swaplab.errors import CommandFailedError
from tests.swaplab.zattach import state, zcache_in

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its network"
)
# 150 MiB of pool; kernel, server, standby, supervisor, helper and spare take about 125.
SELF_SERVING = GuestConfig(mem_mib=384, sample_ms=50, sysctl=SELF_SERVING_SYSCTL)
SETTINGS = ("--size", "288M", "--pool", "150M")
HOG_MIB, STRESS_MIB = 270, 230
# A pool that holds a third of what is out; the rest goes to a disk of the guest's own.
DISK_SETTINGS = ("size=288M", "pool=32M", "commit=all", "high=60", "low=40", "disk=/dev/ubda")
DISK_MIB, DISK_HOG_MIB = 330, 320
STANDBY_S = 60.0
RESERVE_KB = 24 << 10  # free memory that is nobody's to take: the kernel's watermarks


def up(lab: Lab, disk: Path | None = None) -> Guest:
    """A guest that swaps onto its own server, with another one ready."""
    if disk is None:
        guest = lab.boot(SELF_SERVING)
        zcache_in(guest, "up", *SETTINGS)
    else:
        guest = lab.boot(replace(SELF_SERVING, disks=(disk,)))
        zcache_in(guest, "up", *DISK_SETTINGS)
    guest.link.wait_for(lambda: has_standby(guest), STANDBY_S, "a standby")
    return guest


def has_standby(guest: Guest) -> bool:
    return bool(serve_state(guest)["standby_ready"])


def kill_exhausted(guest: Guest) -> None:
    """kill -9 of the server, once memory for another one is not to be had."""
    guest.link.wait_for(
        lambda: guest.meminfo_kb()["MemAvailable"] < RESERVE_KB, 30, "memory to be exhausted"
    )
    kill_server_in(guest)


def kill_both_exhausted(guest: Guest) -> None:
    """kill -9 of the supervisor, and of the server at once; before that there is one again."""
    if not is_supervised(guest):
        zcache_in(guest, "up", *SETTINGS)
        guest.link.wait_for(lambda: has_standby(guest), STANDBY_S, "a supervisor")
    guest.link.wait_for(
        lambda: guest.meminfo_kb()["MemAvailable"] < RESERVE_KB, 30, "memory to be exhausted"
    )
    kill_supervisor_in(guest)
    kill_server_in(guest)


def is_supervised(guest: Guest) -> bool:
    with contextlib.suppress(CommandFailedError):
        return "zcache" in guest.read(f"/proc/{serve_state(guest)['supervisor_pid']}/cmdline")
    return False


def upgrade_in(guest: Guest) -> None:
    zcache_in(guest, "upgrade")


def run(
    lab: Lab,
    guest: Guest,
    workload: Callable[[], Job],
    kills: Sequence[tuple[int, str, Callable[[Guest], None]]],
    rng: random.Random,
) -> Any:
    """The workload's result; meanwhile so many ends of each kind."""
    done: list[tuple[str, Kills]] = []

    def while_running(job: Job) -> None:
        for count, what, end in kills:
            done.append((what, Kills(guest, job, rng)))
            done[-1][1].run(count, lambda end=end: end(guest))  # type: ignore[misc]

    result = lab.watch(workload, while_running=while_running)
    for what, its in done:
        print(its.report(what))
    assert result.exit.code == 0, result.stdout + result.stderr
    assert_survived(guest, result)
    return result


def hog_run(
    kill_count: int,
    upgrade_count: int,
    rng: random.Random,
    limit_s: float,
    disk: Path | None = None,
    both_count: int = 0,
) -> None:
    with Lab(limit_s) as lab:
        guest = up(lab, disk)
        first = serve_state(guest)["server_pid"]
        seconds = 4.0 * (kill_count + both_count) + 20.0 * upgrade_count
        seed = rng.getrandbits(30)
        result = run(
            lab,
            guest,
            lambda: hog(
                guest,
                DISK_HOG_MIB if disk else HOG_MIB,
                pages_file(64),
                seconds,
                seconds,
                audit_s=seconds,
                seed=seed,
            ),
            [
                (count, what, end)
                for count, what, end in (
                    (kill_count, "kill -9, server inside", kill_exhausted),
                    (upgrade_count, "upgrade, server inside", upgrade_in),
                    (both_count, "kill -9, supervisor and server", kill_both_exhausted),
                )
                if count
            ],
            rng,
        )
        assert read_hog(result.stdout).bad == 0
        served = serve_state(guest)
        assert served["server_pid"] != first
        assert served["takeovers"] == kill_count, "every one was a standby"
        assert served["upgrades"] == upgrade_count
        assert state(guest)["mended"] >= kill_count + upgrade_count + both_count
        assert is_supervised(guest) == (not both_count)
        if disk is not None:
            stats = json.loads(zcache_in(guest, "status", "--json"))["stats"]
            assert stats["written_back_pages"] > 5000
            assert stats["disk_corrupt_pages"] == stats["corrupt_loads"] == 0
        zcache_in(guest, "down")


@pytest.mark.timeout(200)
def test_kill_9_of_its_own_server(rng: random.Random) -> None:
    """The last time its supervisor, too: its standby goes on by itself."""
    hog_run(4, 0, rng, limit_s=180, both_count=1)


@pytest.mark.soak
@pytest.mark.timeout(500)
def test_kill_9_of_its_supervisor_and_its_server(rng: random.Random) -> None:
    """Again and again: the next supervisor, started with memory exhausted, finds all as it was."""
    count = 5
    with Lab(490) as lab:
        guest = up(lab)
        seed, seconds = rng.getrandbits(30), 20.0 * count
        result = run(
            lab,
            guest,
            lambda: hog(
                guest, HOG_MIB, pages_file(64), seconds, seconds, audit_s=seconds, seed=seed
            ),
            [(count, "kill -9, supervisor and server", kill_both_exhausted)],
            rng,
        )
        assert read_hog(result.stdout).bad == 0
        assert not is_supervised(guest)
        zcache_in(guest, "up", *SETTINGS)
        assert is_supervised(guest)
        zcache_in(guest, "down")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_twenty_kills_and_some_upgrades_of_its_own_server(rng: random.Random) -> None:
    hog_run(20, 4, rng, limit_s=880)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [3, 20])
def test_kills_of_its_own_server_with_pages_on_its_disk(
    tmp_path: Path, rng: random.Random, count: int
) -> None:
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(DISK_MIB << 20)
    hog_run(count, 0, rng, limit_s=880, disk=disk)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_twenty_kills_of_its_own_server_while_stress_ng_verifies(rng: random.Random) -> None:
    with Lab(880) as lab:
        guest = up(lab)
        result = run(
            lab,
            guest,
            lambda: stress_ng(guest, STRESS_MIB, 5, 880),
            [(20, "kill -9, server inside, stress-ng", kill_exhausted)],
            rng,
        )
        report = read_stress(result)
        assert report.failures == ()
        assert report.passed
        zcache_in(guest, "down")
