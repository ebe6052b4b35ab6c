"""A guest swaps, and what does not fit the pool is in the RAM of donors, which die meanwhile.

    1  a server on the host, two donors and a disk: a donor is killed while stress-ng verifies, and
       later the server itself, with pages out at peers
    2  the server inside of the guest that swaps, three donors outside, TLS: a donor is killed, and
       with memory exhausted the process that brings pages from donors (cluster/understudy.py)

The pool is a quarter of what is swapped out.  What is waited for is counted in pages.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import certificates
from tests.lender_helpers import Lender
from tests.plugin_helpers import remove_memory
from tests.survival_helpers import Kills, assert_survived
from tests.swaplab import (
    SELF_SERVING_SYSCTL,
    Guest,
    GuestConfig,
    Job,
    Lab,
    fitness,
    read_stress,
    stress_ng,
    swap_off,
    swap_on,
    zcache,
)
from tests.swaplab.clock import until
from tests.swaplab.zattach import attach_ours, detach_ours, kill_in, zcache_in

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its network"
)
MIB = 1 << 20
LENT_MIB = 160
PEERS_ADDRESS = "10.77.255.253"
SWAPPER = GuestConfig(mem_mib=128, sample_ms=50, sysctl={"vm.min_free_kbytes": "8192"})
POOL_MIB, STRESS_MIB = 24, 176


@contextmanager
def lenders(
    folder: Path, addresses: Sequence[str | None], **more: object
) -> Iterator[list[Lender]]:
    """A donor each, on a Unix socket of its own or where it says."""
    with ExitStack() as stack:
        made = []
        for n, listen in enumerate(addresses):
            tls = folder / "ca" / f"lender{n}" if listen else None
            made.append(
                Lender(folder, f"lender{n}", lent=LENT_MIB * MIB, listen=listen, tls=tls, **more)  # type: ignore[arg-type]
            )
            stack.callback(made[-1].end)
        yield made


@pytest.mark.timeout(330)
def test_a_donor_and_the_server_are_killed(tmp_path: Path, rng: random.Random) -> None:
    memory = f"t8peers{os.getpid()}x{rng.getrandbits(32)}"
    try:
        with lenders(tmp_path, [None, None]) as donors, Lab(limit_s=300) as lab:
            keys: dict[str, Any] = {
                "peers": ",".join(one.address for one in donors),
                "memory": memory,
            }
            keys |= {"disk": str(tmp_path / "disk"), "disk_size": "290M"}
            server = lab.serve(zcache(size="256M", pool=f"{POOL_MIB}M", **keys))
            guest = lab.boot(SWAPPER)
            attach_ours(guest, f"nbd://{server.address}:{server.port}/")
            swap_on(guest)
            seen: list[dict[str, int]] = []

            def while_running(job: Job) -> None:
                there = (POOL_MIB << 8) * 2
                seen.append(lab.until_stats(server, lambda s: s["pers_pages_remoted"] > there))
                Kills(guest, job, rng).run(1, donors[0].kill)
                seen.append(lab.until_stats(server, lambda s: s["written_back_pages"] > 500, 60))
                donors[0].start()
                lab.until_stats(server, lambda s: s["live_peers"] == 2)
                lab.until_stats(server, lambda s: s["pers_pages_remoted"] > 1000, 60)

                def kill_server() -> None:
                    server.kill()
                    server.start(lab.deadline)

                kills = Kills(guest, job, rng)
                kills.run(2, kill_server)
                print(kills.report("kill -9 of the server, pages at peers"))
                seen.append(lab.until_stats(server, lambda s: s["pers_pages_remoted"] > 1000, 60))

            result = lab.watch(
                lambda: stress_ng(guest, STRESS_MIB, 2, limit_s=280),
                server,
                while_running=while_running,
            )
            report = read_stress(result)
            assert report.failures == ()
            assert report.passed, result.stdout + result.stderr
            assert_survived(guest, result)
            stats = server.stats()
            for name in ("lost_pages", "remote_corrupt_pages", "corrupt_loads"):
                assert stats[name] == 0, name
            # (a get from a donor that was killed finds its copy on the disk)
            assert stats["failed_requests"] == 0
            swap_off(guest)
            detach_ours(guest)
    finally:
        remove_memory(memory)


# ---- the machine that swaps is the machine that serves; its donors are others ---------------

INSIDE = GuestConfig(mem_mib=384, sample_ms=50, sysctl=SELF_SERVING_SYSCTL)
OWN_POOL_MIB, OWN_STRESS_MIB = 22, 230
RESERVE_KB = 24 << 10  # free memory that is nobody's to take: the kernel's watermarks


@contextmanager
def inside_with_donors(folder: Path, limit_s: float) -> Iterator[tuple[Lab, Guest, list[Lender]]]:
    """A guest that swaps onto its own server, which overflows to three donors on the host."""
    certificates.init(folder / "ca")
    for name in ("owner", "lender0", "lender1", "lender2"):
        certificates.add(folder / "ca", name)
    with Lab(limit_s) as lab:
        lab.network.run([fitness.tool("ip"), "addr", "add", f"{PEERS_ADDRESS}/32", "dev", "lo"])
        addresses = [f"{PEERS_ADDRESS}:{7900 + n}" for n in range(3)]
        with lenders(folder, addresses, network=lab.network) as donors:
            guest = lab.boot(INSIDE)
            guest.bring(folder / "ca" / "owner")
            words = [f"peers={','.join(addresses)}", f"tls={folder}/ca/owner"]
            zcache_in(guest, "up", "--size", "256M", "--pool", f"{OWN_POOL_MIB}M", *words)
            yield lab, guest, donors
            zcache_in(guest, "down")


class NodeProcess:
    """The guest's node process, found without a program in the guest: there may be no memory."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        pid = json.loads(zcache_in(guest, "status", "--json"))["ping"]["pid"]
        self.origin = int(guest.read(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()[1])
        assert self.pid() == pid

    def pid(self) -> int:
        """The one that works: its understudy is younger."""
        path = f"/proc/{self.origin}/task/{self.origin}/children"
        return int(self.guest.read(path).split()[0])

    def kill(self) -> None:
        """kill -9, where memory for another one is not to be had."""
        free_kb = self.guest.meminfo_kb()["MemAvailable"]
        assert free_kb < RESERVE_KB, "there is memory: this proves nothing"
        kill_in(self.guest, self.pid())


def own_server_run(
    folder: Path, rng: random.Random, passes: int, kill_count: int, limit_s: float
) -> None:
    with inside_with_donors(folder, limit_s) as (lab, guest, donors):
        node = NodeProcess(guest)
        first = node.pid()

        def while_running(job: Job) -> None:
            there = (OWN_POOL_MIB << 8) * 2
            until(lambda: held(donors) > there, lab.deadline.nearer(120), "pages at donors")
            kills = Kills(guest, job, rng)
            kills.run(1, donors[0].kill)
            donors[0].start()
            print(kills.report("kill -9 of a donor"))
            kills = Kills(guest, job, rng)
            kills.run(kill_count, node.kill)
            print(kills.report("kill -9 of the node process, memory exhausted"))

        result = lab.watch(
            lambda: stress_ng(guest, OWN_STRESS_MIB, passes, limit_s),
            while_running=while_running,
        )
        assert node.pid() != first
        report = read_stress(result)
        assert report.failures == ()
        assert report.passed, result.stdout + result.stderr
        assert_survived(guest, result)


# A guest of one CPU brings back 250 pages a second, with TLS, when others keep the machine busy
# (load 9): a pass of 230 MiB, written and verified, takes minutes, and each end its own work.
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_guest_swaps_onto_its_own_server(tmp_path: Path, rng: random.Random) -> None:
    own_server_run(tmp_path, rng, passes=1, kill_count=2, limit_s=840)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_twenty_kills_of_its_node_process(tmp_path: Path, rng: random.Random) -> None:
    own_server_run(tmp_path, rng, passes=6, kill_count=20, limit_s=880)


def held(donors: Sequence[Lender]) -> int:
    """Pages of others at all of them."""
    time.sleep(0.1)
    return sum(donor.rpc("stats")["foreign_pers_pages"] for donor in donors)
