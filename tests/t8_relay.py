"""A guest swaps through the TLS relay, its memory exhausted; everything is killed in turn.

    guest: hog or stress-ng ── /dev/nbd0 ── relay ── TLS ── nbdkit with the plugin, on the host

Relay, helper and spare run in the guest that swaps: whichever needed a page that is out would
hang it.  Every run prints how long nothing moved.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.corpus import pages_file
from cluster import certificates
from plugin import tlsfiles
from tests.survival_helpers import Kills, assert_survived
from tests.swaplab import (
    Guest,
    GuestConfig,
    HostServer,
    Job,
    Lab,
    Result,
    fitness,
    hog,
    read_hog,
    read_stress,
    stress_ng,
    swap_off,
    swap_on,
    zcache,
)
from tests.swaplab.zattach import (
    attach_ours,
    detach_ours,
    kill_in,
    kill_mender,
    start_zcache,
    state,
    zcache_in,
)
from zcache_core import memfile

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its network"
)
# Helper, spare and two relays lock 40 MiB.  What a relay sends needs memory of the kernel's, as a
# server in the guest does: its sysctls.
SWAPPER = GuestConfig(
    mem_mib=160,
    sample_ms=50,
    sysctl={"vm.min_free_kbytes": "8192", "vm.watermark_boost_factor": "0"},
)
HOG_MIB, STRESS_MIB = 200, 160
RESERVE_KB = 24 << 10  # free memory that is nobody's to take: the kernel's watermarks
CUT_S = 20


class Secured:
    """A guest that swaps onto a server on the host, through relays."""

    def __init__(self, lab: Lab, memory_name: str, ca: Path, **keys: str) -> None:
        self.lab = lab
        words = ("--tls=require", "--tls-verify-peer", f"--tls-certificates={ca / 'host.tls'}")
        sizes = keys or {"size": "512M"}
        recipe = zcache(None, words, memory=memory_name, pool="256M", **sizes)
        self.server: HostServer = lab.serve(recipe)
        self.guest: Guest = lab.boot(SWAPPER)
        self.uri = f"nbds://{self.server.address}:{self.server.port}/"
        self.options = ("--tls", self.guest.bring(ca / "guest"), "--tls-name", "host")
        attach_ours(self.guest, self.uri, *self.options)
        swap_on(self.guest)

    def kill_server(self) -> None:
        self.server.kill()
        self.server.start(self.lab.deadline)

    def kill_relay(self) -> None:
        """The one that carries the link; the other one goes on, and a new one has to come."""
        self.exhausted()
        before = set(state(self.guest)["relays"])
        kill_in(self.guest, int(state(self.guest)["relays"][0]))
        self.guest.link.wait_for(
            lambda: len(set(state(self.guest)["relays"]) - before) == 1, 60, "a new relay"
        )

    def kill_helper(self) -> None:
        """Its spare goes on, and gets one of its own; who kills that before ends both."""
        self.exhausted()
        spare = int(state(self.guest)["spare_pid"])
        kill_mender(self.guest)
        self.guest.link.wait_for(lambda: self.has_another(spare), 60, "a new helper and spare")

    def has_another(self, spare: int) -> bool:
        found = state(self.guest)
        return found["pid"] == spare and int(found["spare_pid"]) not in (0, spare)

    def cut(self) -> None:
        self.lab.network.cut(self.guest.tap)
        time.sleep(CUT_S)
        self.lab.network.mend(self.guest.tap)

    def exhausted(self) -> None:
        assert self.guest.meminfo_kb()["MemAvailable"] < RESERVE_KB, "this proves nothing"

    def end(self) -> None:
        """Everything back: every page that is out comes in, or this fails."""
        swap_off(self.guest)
        detach_ours(self.guest)
        names = self.guest.call(["/bin/sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"])
        assert "@zcache-relay" not in names
        assert "@zcache-attach" not in names


@pytest.fixture
def memory_name() -> Iterator[str]:
    """A memory file's name of this test's own; what is left of it is removed."""
    name = f"t8r-{os.getpid()}-{time.monotonic_ns() % 1_000_000}"
    yield name
    shmid = memfile.find(name)
    if shmid is not None:
        memfile.remove(shmid)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    folder = tmp_path / "ca"
    certificates.init(folder)
    for name in ("host", "guest"):
        certificates.add(folder, name)
    tlsfiles.lay_out(str(folder / "host"), folder / "host.tls")
    return folder


def run(
    one: Secured,
    workload: Callable[[], Job],
    ends: list[tuple[str, int, Callable[[], None]]],
    rng: random.Random,
) -> Result:
    """What the workload did; meanwhile so many ends of each kind, in random order."""
    kills: dict[str, Kills] = {}
    turns = [(what, end) for what, count, end in ends for _ in range(count)]
    rng.shuffle(turns)

    def while_running(job: Job) -> None:
        for what, end in turns:
            kills.setdefault(what, Kills(one.guest, job, rng)).run(1, end)

    result = one.lab.watch(workload, one.server, while_running=while_running)
    for what, its in kills.items():
        print(its.report(f"TLS, {what}"))
    assert result.exit.code == 0, result.stdout + result.stderr
    assert_survived(one.guest, result)
    return result


@pytest.mark.timeout(240)
def test_swap_through_relays(memory_name: str, ca: Path, rng: random.Random) -> None:
    """Memory exhausted, every page checked: kill -9 of relay, helper, server; then a helper and
    its spare are killed both, and a new one adopts the device."""
    with Lab(220) as lab:
        one = Secured(lab, memory_name, ca)
        said = run(
            one,
            lambda: hog(one.guest, HOG_MIB, pages_file(64), 12, 12, seed=rng.getrandbits(30)),
            [
                ("relay killed", 2, one.kill_relay),
                ("helper killed", 1, one.kill_helper),
                ("server killed", 1, one.kill_server),
            ],
            rng,
        )
        assert read_hog(said.stdout).bad == 0
        found = state(one.guest)
        assert found["takeovers"] == 1
        assert len(found["relays"]) == 2
        kill_mender(one.guest, spare_too=True)
        zcache_in(one.guest, "attach", one.uri, *one.options)
        one.end()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_twenty_ends_while_stress_ng_verifies(
    memory_name: str, ca: Path, rng: random.Random
) -> None:
    with Lab(880) as lab:
        one = Secured(lab, memory_name, ca)
        said = run(
            one,
            lambda: stress_ng(one.guest, STRESS_MIB, 8, 880),
            [
                ("relay killed", 8, one.kill_relay),
                ("helper killed", 5, one.kill_helper),
                ("server killed", 5, one.kill_server),
                ("network cut for 20 s", 2, one.cut),
            ],
            rng,
        )
        report = read_stress(said)
        assert report.failures == ()
        assert report.passed
        one.end()


def wait_to_say(job: Job, sentence: str) -> None:
    """Until it says that.  It must not end before."""
    try:
        job.guest.link.wait_for(
            lambda: job.done() or sentence in job.stdout(), 60, f"{job.name} to say '{sentence}'"
        )
    finally:
        print(job.stdout(), job.stderr())
    assert sentence in job.stdout(), job.stdout() + job.stderr()


@pytest.mark.timeout(200)
def test_two_devices_and_attach_in_the_foreground(memory_name: str, ca: Path) -> None:
    """Two devices of one pool, each attached, swapped onto and detached on its own; the second in
    the foreground: told to end it detaches, but not what is swap.  Who is refused is told why."""
    with Lab(180) as lab:
        one = Secured(lab, memory_name, ca, devices="a:128M,b:128M")
        second = ("--name", "two", "--device", "/dev/nbd1", "--foreground")
        job = start_zcache(one.guest, "attach", f"{one.uri}b", *one.options, *second)
        wait_to_say(job, "is attached")
        swap_on(one.guest, "/dev/nbd1", priority=200)
        result = lab.watch(lambda: hog(one.guest, HOG_MIB, pages_file(64), 4, 4), one.server)
        assert result.exit.code == 0, result.stdout + result.stderr
        assert read_hog(result.stdout).bad == 0
        assert_survived(one.guest, result)
        assert not job.done()
        swap_off(one.guest, "/dev/nbd1")
        job.kill(15)
        assert job.wait(60).code == 0, job.stdout() + job.stderr()
        assert "/dev/nbd1 is detached" in job.stdout()
        assert one.guest.read("/sys/block/nbd1/size").strip() == "0"

        # over the one that is swap already
        job = start_zcache(one.guest, "attach", one.uri, *one.options, "--foreground")
        kill_mender(one.guest, spare_too=True)
        wait_to_say(job, "has a new helper")
        job.kill(2)
        assert job.wait(60).code == 5, job.stdout() + job.stderr()
        assert "It stays attached" in job.stderr()
        assert state(one.guest)["state"] == "connected"

        said = zcache_in(one.guest, "attach", one.uri, *one.options, "--name", "x", expect=5)
        assert "is attached already, as zcache on /dev/nbd0" in said
        refused = zcache_in(
            one.guest, "attach", f"{one.uri}b", *one.options[:2], "--tls-name", "rack",
            "--name", "three", expect=7,
        )  # fmt: skip
        assert "a certificate that is not rack's" in refused
        one.end()
