"""A guest swaps, and what it swaps onto is killed, cut off and started again: nothing is lost.

    server on the host      kill -9 while stress-ng verifies; with pages on the disk; network cut
    (t8_survival_inside: the server in the guest that swaps; t8_updown: up and down, step by step)

The server on the host is nbdkit with the plugin on TCP, on a named memory file; the test starts it
again.  Every run prints how long nothing moved.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.corpus import pages_file
from tests.survival_helpers import Kills, assert_survived
from tests.swaplab import (
    Guest,
    GuestConfig,
    HostServer,
    Job,
    Lab,
    Recipe,
    fitness,
    hog,
    read_hog,
    read_stress,
    stress_ng,
    swap_off,
    swap_on,
    zcache,
)
from tests.swaplab.clock import until
from tests.swaplab.zattach import attach_ours, detach_ours, kill_mender, state, zcache_in
from zcache_core import memfile

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its network"
)
SWAPPER = GuestConfig(mem_mib=128, sample_ms=50, sysctl={"vm.min_free_kbytes": "8192"})
STRESS_MIB = 160
CUT_S = 20
HANG_S = 10  # --timeout is 3 s


class Survivor:
    """A guest that swaps onto a server on the host, through our helper."""

    def __init__(self, lab: Lab, recipe: Recipe) -> None:
        self.lab = lab
        self.server: HostServer = lab.serve(recipe)
        self.guest: Guest = lab.boot(SWAPPER)
        self.uri = f"nbd://{self.server.address}:{self.server.port}/"
        attach_ours(self.guest, self.uri)
        swap_on(self.guest)

    def kill_server(self) -> None:
        self.server.kill()
        self.server.start(self.lab.deadline)

    def end(self) -> None:
        """Everything back: every page that is out comes in, or this fails."""
        swap_off(self.guest)
        detach_ours(self.guest)


@pytest.fixture
def memory_name() -> Iterator[str]:
    """A memory file's name of this test's own; what is left of it is removed."""
    name = f"t8-{os.getpid()}-{time.monotonic_ns() % 1_000_000}"
    yield name
    shmid = memfile.find(name)
    if shmid is not None:
        memfile.remove(shmid)


def stress_run(name: str, count: int, rng: random.Random, limit_s: float) -> None:
    """stress-ng --verify over more than the guest has, and `count` kills of the server."""
    with Lab(limit_s) as lab:
        one = Survivor(lab, zcache(memory=name, size="512M", pool="256M"))
        kills: list[Kills] = []

        def while_running(job: Job) -> None:
            kills.append(Kills(one.guest, job, rng))
            kills[0].run(count, one.kill_server)

        passes = 1 + count // 5
        result = lab.watch(
            lambda: stress_ng(one.guest, STRESS_MIB, passes, limit_s),
            one.server,
            while_running=while_running,
        )
        print(kills[0].report("server on the host"))
        report = read_stress(result)
        assert report.failures == ()
        assert report.passed
        assert report.passes(STRESS_MIB) > passes, "no pass of verification was completed"
        assert_survived(one.guest, result)
        assert state(one.guest)["mended"] >= count
        one.end()


@pytest.mark.timeout(200)
def test_kill_9_while_stress_ng_verifies(memory_name: str, rng: random.Random) -> None:
    stress_run(memory_name, 4, rng, limit_s=180)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_twenty_kills_while_stress_ng_verifies(memory_name: str, rng: random.Random) -> None:
    stress_run(memory_name, 20, rng, limit_s=880)


def disk_run(name: str, disk: Path, count: int, rng: random.Random, limit_s: float) -> None:
    """A pool that is too small by far: most pages are on the disk when the server is killed."""
    corpus = pages_file(64)
    with Lab(limit_s) as lab:
        keys: dict[str, Any] = {"disk": str(disk), "disk_size": "320M", "high": "60", "low": "40"}
        one = Survivor(lab, zcache(memory=name, size="288M", pool="16M", **keys))
        kills: list[Kills] = []

        def while_running(job: Job) -> None:
            kills.append(Kills(one.guest, job, rng))
            kills[0].run(count, one.kill_server)

        seconds = 4.0 * count
        result = lab.watch(
            lambda: hog(one.guest, 192, corpus, seconds, seconds, seed=rng.getrandbits(30)),
            one.server,
            while_running=while_running,
        )
        print(kills[0].report("with the disk tier"))
        assert result.exit.code == 0, result.stdout + result.stderr
        assert read_hog(result.stdout).bad == 0
        assert result.stats["peak"]["disk_pages"] > 1000
        assert result.stats["after"]["corrupt_loads"] == 0
        assert_survived(one.guest, result)
        one.end()


@pytest.mark.timeout(180)
def test_kill_9_with_pages_on_the_disk(
    memory_name: str, tmp_path: Path, rng: random.Random
) -> None:
    disk_run(memory_name, tmp_path / "disk", 3, rng, limit_s=160)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_twenty_kills_with_pages_on_the_disk(
    memory_name: str, tmp_path: Path, rng: random.Random
) -> None:
    disk_run(memory_name, tmp_path / "disk", 20, rng, limit_s=880)


@pytest.mark.timeout(200)
def test_the_network_is_cut_and_the_helper_killed(memory_name: str, rng: random.Random) -> None:
    """20 s without packets; a server that hangs; kill -9 of the helper, of the server, and a new
    helper."""
    corpus = pages_file(64)
    with Lab(180) as lab:
        one = Survivor(lab, zcache(memory=memory_name, size="512M", pool="256M"))
        kills: list[Kills] = []

        def cut() -> None:
            lab.network.cut(one.guest.tap)
            time.sleep(CUT_S)
            lab.network.mend(one.guest.tap)

        def hang() -> None:
            """It answers nothing, and its connection stands: somebody has to end that.

            (The guest is asked afterwards: meanwhile it may want a page that is out.)
            """
            before = state(one.guest).get("stuck", 0)
            one.server.kill(signal.SIGSTOP)
            time.sleep(HANG_S)
            one.server.kill(signal.SIGCONT)
            until(
                lambda: state(one.guest).get("stuck", 0) > before,
                lab.deadline.nearer(30),
                "the helper to end the link",
            )

        def helper_and_server() -> None:
            old = kill_mender(one.guest)
            one.kill_server()
            zcache_in(one.guest, "attach", one.uri)
            assert state(one.guest)["pid"] != old

        def while_running(job: Job) -> None:
            kills.append(Kills(one.guest, job, rng))
            kills[0].run(1, cut)
            kills[0].run(1, hang)
            kills[0].run(1, helper_and_server)
            kills[0].run(1, one.kill_server)

        result = lab.watch(
            lambda: hog(one.guest, 192, corpus, 30, 40, seed=rng.getrandbits(30)),
            one.server,
            while_running=while_running,
        )
        print(kills[0].report("network cut for 20 s, hang, helper and server, server"))
        assert result.exit.code == 0, result.stdout + result.stderr
        assert read_hog(result.stdout).bad == 0
        assert_survived(one.guest, result)
        one.end()
