"""A real Linux swaps onto our server: the four cases that the first capability is judged by.

    1  stress-ng with --verify over more memory than the guest has
    2  the hog: real page content, a checksum at every touch
    3  the hog has gone: discards arrive, and next to nothing stays stored
    4  the server runs inside of the guest that swaps onto it, on that guest's own memory;
       with pages that compress, and with pages that do not, so that writes are refused

All with recompression at its most hasty, and so with compaction; case 1 has zsmalloc, 2 and 3 have
z3fold, 4 has each once, and `make soak` has the others.  ZCACHE_LAB_SERVER=memory runs cases 1
to 3 against nbdkit's own RAM disk instead, to tell the server's faults from the lab's.  Together
about five minutes; `make soak` has the long runs of 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.corpus import pages_file
from tests.swaplab import (
    DEVICE,
    OTHER_DEVICE,
    SELF_SERVING_SYSCTL,
    Guest,
    GuestConfig,
    HostServer,
    InsideServer,
    Job,
    Lab,
    Recipe,
    Result,
    attach,
    detach,
    fitness,
    hog,
    nbdkit_memory,
    read_hog,
    read_stress,
    serve_inside,
    stored_bytes,
    stress_ng,
    swap_off,
    swap_on,
    trouble,
    zcache,
)
from zcache_core.several import ALLOCATORS

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its network"
)
CORPUS_MIB = 64
REFUSED = ("nbd", "io-error", "write-error")
"""What the kernel says when the server refuses a write."""
HARMLESS = ("allocation",)
"""A small guest's network finds no memory at once, and tries again."""
SWAPPING = GuestConfig(mem_mib=128, sysctl={"vm.min_free_kbytes": "8192"})


HASTY = {"recompress": "zstd:1", "recompress_age": "1"}
"""What was not asked for within a second is recompressed, and what that leaves is compacted."""


def every_allocator(first: str) -> pytest.MarkDecorator:
    """This one always, the others by `make soak`."""
    others = (name for name in ALLOCATORS if name != first)
    return pytest.mark.parametrize(
        "allocator", [first, *(pytest.param(name, marks=pytest.mark.soak) for name in others)]
    )


def on_the_host(size: str, pool: str, **keys: str) -> Recipe:
    if os.environ.get("ZCACHE_LAB_SERVER") == "memory":
        return nbdkit_memory(size)
    return zcache(None, (), size=size, pool=pool, **keys, **HASTY)


@pytest.fixture(scope="module")
def corpus() -> Path:
    return pages_file(CORPUS_MIB)


# ---- 1: stress-ng ----


@pytest.mark.timeout(400)
@every_allocator("zsmalloc")
def test_stress_ng_verifies_more_memory_than_the_guest_has(allocator: str) -> None:
    mib = 160
    with Lab(limit_s=360) as lab:
        server = lab.serve(on_the_host("512M", "256M", allocator=allocator))
        guest = lab.boot(SWAPPING)
        attach(guest, server)
        swap_on(guest)
        result = lab.watch(lambda: stress_ng(guest, mib, limit_s=300), server)
        if "ZCACHE_LAB_SERVER" not in os.environ and allocator != "zbud":  # where nothing is won
            assert server.stats()["recompressed_pages"] > 0
        swap_off(guest)
        detach(guest)
        report = read_stress(result)
        assert report.failures == ()
        assert report.passed
        assert report.passes(mib) > 1, "no pass of verification was completed"
        assert trouble(guest.log, HARMLESS) == []
        assert_swapped(result)


# ---- 2 and 3: the hog ----


@pytest.fixture(scope="module")
def overcommitted(corpus: Path) -> Iterator[tuple[Result, Lab]]:
    """A guest of 128 MiB after a hog of 192 MiB of real pages has come and gone."""
    with Lab(limit_s=360) as lab:
        server = lab.serve(on_the_host("512M", "256M", allocator="z3fold"))
        guest = lab.boot(SWAPPING)
        attach(guest, server)
        swap_on(guest)
        yield lab.watch(lambda: hog(guest, 192, corpus, 6, 6), server), lab


@pytest.mark.timeout(400)
def test_the_hog_finds_every_page_as_it_left_it(overcommitted: tuple[Result, Lab]) -> None:
    result, lab = overcommitted
    assert result.exit.code == 0, result.stdout + result.stderr
    report = read_hog(result.stdout)
    assert report.bad == 0
    assert report.phase("audit").touches == report.pages == 192 << 8
    assert report.phase("random").touches > 0
    assert trouble(lab.guests[0].log, HARMLESS) == []
    assert_swapped(result)


@pytest.mark.timeout(400)
def test_discards_empty_the_server_once_the_hog_has_gone(
    overcommitted: tuple[Result, Lab],
) -> None:
    result, lab = overcommitted
    peak = stored_bytes(result.stats["peak"])
    assert peak > 64 << 20
    # Discards of freed clusters run in a worker of the kernel: look until it has done them.
    left = lab.until_stats(lab.servers[0], lambda stats: stored_bytes(stats) < peak // 20)
    if "trim_requests" in left:
        assert left["trim_requests"] > result.stats["before"]["trim_requests"]
        assert left["corrupt_loads"] == left["lost_pages"] == left["failed_stores"] == 0
    guest = lab.guests[0]
    swap_off(guest)
    detach(guest)
    assert trouble(guest.log, HARMLESS) == []


def assert_swapped(result: Result) -> None:
    """Tens of thousands of pages out and in, and never at rest."""
    progress = result.progress()
    assert progress.pages_out > 20_000
    assert progress.pages_in > 10_000
    assert progress.kept_moving(), progress


# ---- what the server refuses ----


def refusing(commit: str = "ahead", allocator: str = "zsmalloc") -> Recipe:
    """A device that is given pages first, and can keep a quarter of it in random bytes.

    The kernel fills it before the other: of any 40 MiB that leave, 24 MiB are refused, and stay.
    """
    return zcache(None, (), size="32M", pool="8M", commit=commit, allocator=allocator, **HASTY)


MORE_MIB = 40


def swap_on_two(lab: Lab, guest: Guest, first: HostServer | InsideServer) -> None:
    """Onto a server that refuses, and after it, when its device is full, onto one with room."""
    attach(guest, first)
    swap_on(guest, priority=10)
    attach(guest, lab.serve(nbdkit_memory("512M")), OTHER_DEVICE)
    swap_on(guest, OTHER_DEVICE, priority=5)


def noise_that_must_leave(guest: Guest, seconds: float) -> Job:
    """A hog of random bytes, MORE_MIB more than the guest can hold; every page verified."""
    mib = guest.meminfo_kb()["MemAvailable"] // 1024 + MORE_MIB
    return hog(guest, mib, None, seconds, seconds, noise_percent=100)


def assert_refused_and_kept(guest: Guest, result: Result, stats: dict[str, int]) -> None:
    """Writes were refused, and not a byte is wrong.  Leaves the guest without swap."""
    assert result.exit.code == 0, result.stdout + result.stderr
    assert read_hog(result.stdout).bad == 0
    assert stats["failed_stores"] > 0
    assert stats["corrupt_loads"] == stats["lost_pages"] == 0
    for device in (DEVICE, OTHER_DEVICE):
        swap_off(guest, device)
        detach(guest, device)
    assert trouble(guest.log, expected=(*REFUSED, *HARMLESS)) == []


@pytest.mark.timeout(400)
def test_a_full_pool_refuses_writes_and_no_page_is_lost() -> None:
    with Lab(limit_s=360) as lab:
        server = lab.serve(refusing())
        guest = lab.boot(SWAPPING)
        swap_on_two(lab, guest, server)
        result = lab.watch(lambda: noise_that_must_leave(guest, 3), server)
        assert_refused_and_kept(guest, result, server.stats())


# ---- 4: the machine that swaps is the machine that serves ----

PF_MEMALLOC_NOIO = 0x00080000  # include/linux/sched.h

SELF_SERVING = GuestConfig(mem_mib=256, sysctl=SELF_SERVING_SYSCTL)


def self_serving(
    lab: Lab, size: str, pool: str, commit: str = "all", allocator: str = "zbud"
) -> tuple[Guest, InsideServer]:
    """commit "all": the pool is there from the start; "ahead": it grows while memory is short."""
    guest = lab.boot(SELF_SERVING)
    keys = {"commit": commit, "allocator": allocator, **HASTY}
    recipe = zcache(None, (), size=size, pool=pool, **keys)
    server = serve_inside(guest, recipe)
    attach(guest, server)
    swap_on(guest)
    return guest, server


def own_memory_run(corpus: Path, allocator: str, seconds: float, seed: int, limit_s: float) -> None:
    """300 MiB of real pages in a guest of 256 MiB that keeps them compressed itself.

    The device is twice the pool, so that a zbud pool cannot fill with pages that
    compress: the kernel discards whole clusters only, and what it has read back stays stored.
    """
    with Lab(limit_s) as lab:
        guest, server = self_serving(lab, size="288M", pool="144M", allocator=allocator)
        fourth = seconds / 4
        result = lab.watch(
            lambda: hog(guest, 300, corpus, fourth, fourth, audit_s=2 * fourth, seed=seed)
        )
        assert result.exit.code == 0, result.stdout + result.stderr
        report = read_hog(result.stdout)
        assert report.bad == 0
        assert report.phase("random").touches > 0
        assert result.progress().kept_moving()
        assert result.counted("oom_kill") == 0
        assert not server.job.done()
        assert trouble(guest.log) == []
        stats = server.stats()
        assert stats["failed_stores"] == stats["corrupt_loads"] == stats["lost_pages"] == 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_guest_swaps_onto_its_own_memory(corpus: Path, allocator: str, seed: int) -> None:
    own_memory_run(corpus, allocator, seconds=18, seed=seed, limit_s=360)


@pytest.mark.timeout(250)
def test_a_server_with_every_permission_is_fit_for_swap() -> None:
    """The guest's root may do what the development machine's may not."""
    with Lab(limit_s=220) as lab:
        guest, server = self_serving(lab, size="64M", pool="32M")
        pid = guest.read(server.place.pidfile).strip()
        stats = guest.call(["/bin/sh", "-c", f"cat /proc/{pid}/task/*/stat"]).splitlines()
        assert len(stats) >= 3  # nbdkit's, the connection's, the committer
        flags = [int(line.rsplit(")", 1)[1].split()[6]) for line in stats]
        assert all(flag & PF_MEMALLOC_NOIO for flag in flags), "PR_SET_IO_FLUSHER"
        policies = {
            line[line.index("(") + 1 : line.rindex(")")]: int(line.rsplit(")", 1)[1].split()[38])
            for line in stats
        }
        crew = policies.pop("zc-crew", os.SCHED_FIFO)  # there is none on one CPU
        own = {policies.pop(name) for name in list(policies) if name.startswith("zc-")}
        assert own == {os.SCHED_OTHER}
        assert {crew, *policies.values()} == {os.SCHED_FIFO}
        assert guest.read(f"/proc/{pid}/oom_score_adj").strip() == "-1000"
        assert int(server.status()["VmLck"].split()[0]) > 0
        assert "not fit" not in server.job.stderr()
        swap_off(guest)
        detach(guest)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", range(10))
def test_a_guest_swaps_onto_its_own_memory_for_long(corpus: Path, run: int, seed: int) -> None:
    own_memory_run(corpus, ALLOCATORS[run % 3], seconds=60, seed=seed + run, limit_s=540)


def refused_run(seconds: float, limit_s: float, allocator: str) -> None:
    """Random bytes: the guest's own pool fills, writes are refused, and the guest lives on."""
    with Lab(limit_s) as lab:
        guest = lab.boot(SELF_SERVING)
        server = serve_inside(guest, refusing("all", allocator))
        swap_on_two(lab, guest, server)
        result = lab.watch(lambda: noise_that_must_leave(guest, seconds))
        assert not server.job.done()
        assert_answers(guest)
        assert_refused_and_kept(guest, result, server.stats())


@pytest.mark.timeout(400)
def test_a_guest_survives_its_own_full_pool() -> None:
    refused_run(seconds=3, limit_s=360, allocator="z3fold")


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", range(3))
def test_a_guest_survives_its_own_full_pool_for_long(run: int) -> None:
    refused_run(seconds=20, limit_s=540, allocator=ALLOCATORS[run])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("commit", ["all", pytest.param("ahead", marks=pytest.mark.soak)])
def test_a_guest_survives_what_fits_nowhere(commit: str) -> None:
    """300 MiB of random bytes, with a pool in the guest's own memory: there is no room at all.

    With commit=ahead the pool would have to grow when there is no memory: one run of five
    did not end before the committer looked at what is left.
    The kernel does not give up for minutes (it writes again what was refused).  PID 1 answers all
    the while, and once the hog is killed, everything is as before.
    """
    with Lab(limit_s=360) as lab:
        guest, server = self_serving(lab, "288M", "64M", commit)
        job = hog(guest, 300, None, noise_percent=100)
        guest.link.wait_for(lambda: refused(guest), None, "a refused write")
        moved = guest.samples[-1].moved_pages
        guest.link.wait_for(
            lambda: job.done() or guest.samples[-1].moved_pages > moved + 20_000,
            None,
            "the server to go on answering",
        )
        if not job.done():
            job.kill()
        job.wait()
        assert not server.job.done()
        assert_answers(guest)
        stats = server.stats()
        assert stats["failed_stores"] > 0
        assert stats["corrupt_loads"] == stats["lost_pages"] == 0
        swap_off(guest)
        detach(guest)
        assert trouble(guest.log, expected=(*REFUSED, "oom")) == []


def refused(guest: Guest) -> bool:
    return any("Write-error" in line.text for line in guest.log)


def assert_answers(guest: Guest) -> None:
    """A new program can be started, and runs to its end."""
    assert guest.call(["/bin/busybox", "echo", "alive"]).strip() == "alive"
