"""A real Linux swaps three times what the pool holds, so that its pages live on a disk below.

    1  a server on the host, its disk a file
    2  the same, with a disk that refuses writes, stalls, and is well again, in the middle of it
    3  the server inside of the guest that swaps, its disk a block device there: what the tier
       needs to write must never wait for a page that only the tier could take

Each has another allocator, with recompression at its most hasty; `make soak` has the other pairs.
The workload is stress-ng with --verify, bounded by work: it fills its memory and verifies it.  What
is waited for is counted in pages, never in seconds.  Together about two minutes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import faulty_disk
from tests.faulty_disk import FaultyDisk
from tests.swaplab import (
    SELF_SERVING_SYSCTL,
    Guest,
    GuestConfig,
    HostServer,
    Job,
    Lab,
    Recipe,
    Result,
    attach,
    detach,
    fitness,
    read_stress,
    serve_inside,
    stress_ng,
    swap_off,
    swap_on,
    trouble,
    zcache,
)
from tests.t8_swaplab import HASTY, every_allocator

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its network"
)
MIB = 1 << 20
POOL_MIB = 8
STRESS_MIB = 96
DISK_MIB = 192
SIZE = "160M"
SWAPPING = GuestConfig(mem_mib=80, sysctl={"vm.min_free_kbytes": "4096"})
REFUSED = ("nbd", "io-error", "write-error")
"""What the kernel says when the server refuses a write."""
HARMLESS = ("allocation",)
"""A small guest's network finds no memory at once, and tries again."""


def with_disk(path: Path, mib: int, allocator: str) -> Recipe:
    keys = {"disk": os.fspath(path), "disk_size": f"{mib}M", "allocator": allocator, **HASTY}
    return zcache(None, (), size=SIZE, pool=f"{POOL_MIB}M", **keys)


def assert_verified(result: Result, mib: int, pool_mib: int) -> None:
    """stress-ng found all of its memory as it was, and three pools of it were out at once."""
    report = read_stress(result)
    assert report.failures == ()
    assert report.passed, result.stdout + result.stderr
    assert report.passes(mib) > 1, "no pass of verification was completed"
    assert result.counted("oom_kill") == 0
    assert result.progress().peak_swap_bytes > 3 * pool_mib * MIB


def assert_went_through_the_disk(stats: dict[str, int], pool_mib: int) -> None:
    """More than two pools left RAM, came back, and not one was wrong or lost."""
    assert stats["written_back_pages"] > 2 * pool_mib << 8
    assert stats["cold_loads"] > pool_mib << 8
    assert stats["committed_frames_max"] <= pool_mib << 8
    for name in ("corrupt_loads", "lost_pages", "disk_corrupt_pages", "disk_read_errors"):
        assert stats[name] == 0, name
    assert stats["disk_degraded"] == 0


def swap_off_again(guest: Guest, expected: tuple[str, ...] = HARMLESS) -> None:
    swap_off(guest)
    detach(guest)
    assert trouble(guest.log, expected) == []


@pytest.mark.timeout(330)
@every_allocator("zsmalloc")
def test_three_pools_onto_a_disk_file(tmp_path: Path, allocator: str) -> None:
    with Lab(limit_s=300) as lab:
        server = lab.serve(
            with_disk(tmp_path / "disk", DISK_MIB, allocator)
        )  # promised: refuses nothing
        guest = lab.boot(SWAPPING)
        attach(guest, server)
        swap_on(guest)
        result = lab.watch(lambda: stress_ng(guest, STRESS_MIB, limit_s=280), server)
        assert_verified(result, STRESS_MIB, POOL_MIB)
        stats = server.stats()
        assert_went_through_the_disk(stats, POOL_MIB)
        assert stats["failed_stores"] == stats["failed_requests"] == 0
        swap_off_again(guest)


def fail_and_recover(lab: Lab, server: HostServer, disk: FaultyDisk, job: Job) -> None:
    """Each fault lasts until the server, or the guest, has met it."""

    def writes_go_on() -> None:
        before = server.stats()["written_back_pages"]
        lab.until_stats(server, lambda now: now["written_back_pages"] > before + 1000, None)

    writes_go_on()
    disk.fail_writes(True)
    lab.until_stats(server, lambda now: now["disk_degraded"] > 0, None)
    lab.until_stats(server, lambda now: now["failed_stores"] > 0, None)
    assert not job.done(), job.stderr()
    disk.fail_writes(False)
    lab.until_stats(server, lambda now: now["disk_degraded"] == 0, None)
    writes_go_on()
    with disk.frozen():
        guest = job.guest
        seen, refused = len(guest.samples), server.stats()["failed_stores"]

        def has_met_it() -> bool:
            """A read waits for the disk; or all reads find RAM, and a write found no room."""
            return stands_still(guest, seen) or server.stats()["failed_stores"] > refused

        guest.link.wait_for(has_met_it, None, "a guest that waits for it")
    writes_go_on()
    assert not job.done(), "all of it was to happen while the guest swaps"


SMALL_DISK_MIB = 160  # not preallocated: nothing is promised while it fails
STILL_SAMPLES = 5


def stands_still(guest: Guest, since: int) -> bool:
    """Over some samples nothing was read: a read waits for the disk."""
    recent = guest.samples[since:][-STILL_SAMPLES:]
    return len(recent) == STILL_SAMPLES and recent[0].pswpin == recent[-1].pswpin


@pytest.mark.skipif(bool(faulty_disk.missing()), reason=faulty_disk.missing())
@pytest.mark.timeout(330)
@every_allocator("z3fold")
def test_a_disk_that_fails_and_recovers_meanwhile(tmp_path: Path, allocator: str) -> None:
    with FaultyDisk(tmp_path, SMALL_DISK_MIB * MIB) as disk, Lab(limit_s=300) as lab:
        server = lab.serve(with_disk(disk.path, SMALL_DISK_MIB, allocator))
        guest = lab.boot(SWAPPING)
        attach(guest, server)
        swap_on(guest)
        result = lab.watch(
            lambda: stress_ng(guest, STRESS_MIB, limit_s=280),
            server,
            while_running=lambda job: fail_and_recover(lab, server, disk, job),
        )
        assert_verified(result, STRESS_MIB, POOL_MIB)
        stats = server.stats()
        assert_went_through_the_disk(stats, POOL_MIB)
        assert stats["disk_write_errors"] > 0
        swap_off_again(guest, (*REFUSED, *HARMLESS))


# ---- the machine that swaps is the machine that serves --------------------------------------

OWN_POOL_MIB = 12
OWN_STRESS_MIB = 128
OWN_SYSCTL = {**SELF_SERVING_SYSCTL, "vm.overcommit_memory": "1"}
"""A guest this small refuses nbdkit's 192 MiB of empty tables, most of which it never touches."""


@pytest.mark.timeout(330)
@every_allocator("zbud")
def test_a_guest_swaps_onto_its_own_disk(tmp_path: Path, allocator: str) -> None:
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(DISK_MIB * MIB)
    config = GuestConfig(mem_mib=160, sysctl=OWN_SYSCTL, disks=(disk,))
    with Lab(limit_s=300) as lab:
        guest = lab.boot(config)
        pool = f"{OWN_POOL_MIB}M"
        keys = {"commit": "all", "disk": "/dev/ubda", "allocator": allocator, **HASTY}
        server = serve_inside(guest, zcache(None, (), size=SIZE, pool=pool, **keys))
        attach(guest, server)
        swap_on(guest)
        result = lab.watch(lambda: stress_ng(guest, OWN_STRESS_MIB, limit_s=280))
        assert not server.job.done(), server.job.stderr()
        assert_verified(result, OWN_STRESS_MIB, OWN_POOL_MIB)
        stats = server.stats()
        assert_went_through_the_disk(stats, OWN_POOL_MIB)
        assert stats["failed_stores"] == stats["failed_requests"] == 0
        swap_off_again(guest)
