"""backup=disk with a real owner, real donors and a disk that fails on command: each in turn.

What one failure at a time does: nothing that a reader notices.  The store's part alone, with more
of the races, is in t5_backup.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.link import BlockingClient
from tests.faulty_disk import FaultyDisk, missing
from tests.lender_helpers import PAGES, Lender, Model, live, stats
from tests.plugin_helpers import WAIT_S, Server, remove_memory, wait_for

DISK_BYTES = 32 << 20


@pytest.fixture
def lenders(tmp_path: Path) -> Iterator[list[Lender]]:
    made = [Lender(tmp_path, f"d{i}") for i in range(2)]
    yield made
    for lender in made:
        if lender.process is not None:
            lender.signal(signal.SIGCONT)
        lender.kill()


def words(lenders: list[Lender], disk: Path, *more: str) -> list[str]:
    addresses = ",".join(lender.address for lender in lenders)
    return [
        *("size=16M", "pool=2M", f"peers={addresses}"),
        *(f"disk={disk}", f"disk_size={DISK_BYTES >> 20}M", *more),
    ]


def fill(server: Server, rng: random.Random) -> Model:
    """More than the pool holds; all that left it has both copies at the end."""
    wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
    model = Model(server, rng)
    for page in range(PAGES):
        model.write(page)
    wait_for("both copies", lambda: is_backed_up(server))
    assert stats(server)["backed_pages"] > 1500
    return model


def is_backed_up(server: Server) -> bool:
    """Whether every page that left RAM has a copy at a peer and one on the disk."""
    now = stats(server)
    return bool(now["backup_missing_pages"] == 0 and now["disk_pages"] == now["backed_pages"])


def assert_nothing_failed(now: dict[str, Any]) -> None:
    assert now["lost_pages"] == now["failed_requests"] == now["remote_corrupt_pages"] == 0


@pytest.mark.timeout(300)
@pytest.mark.skipif(missing() != "", reason=missing())
def test_donor_and_disk_fail_in_turn(
    tmp_path: Path, lenders: list[Lender], rng: random.Random
) -> None:
    with (
        FaultyDisk(tmp_path, DISK_BYTES) as disk,
        Server(tmp_path, *words(lenders, disk.path)) as server,
    ):
        began_s = time.monotonic()
        wait_for("all donors", lambda: live(server) == 2)
        assert server.rpc("config")["backup"] == "disk"
        model = fill(server, rng)
        model.check()
        # a donor is killed: the disk answers, and its pages go to the other one
        lenders[0].kill()
        model.churn(200)
        wait_for("it is missed", lambda: stats(server)["remote_short_pages"])
        model.check(300)
        wait_for("its pages have gone on", lambda: not stats(server)["remote_short_pages"])
        wait_for("copies are made again", lambda: is_backed_up(server))
        assert stats(server)["backup_renewed_pages"] > 100
        # the disk cannot be read: peers answer
        disk.fail_reads(True)
        model.check()
        disk.fail_reads(False)
        asked = stats(server)["histograms"]["remote_get"]
        assert asked["count"] > 100
        assert asked["sum"] < 2e6 * (time.monotonic() - began_s), "longer than all of it took"
        lenders[0].start()
        wait_for("it is back", lambda: live(server) == 2)
        # the disk cannot be written: replicas, also of what was there
        disk.fail_writes(True)
        model.churn(500)
        wait_for("none counts on the disk", lambda: not stats(server)["backed_pages"])
        assert "Writing to the disk fails" in str(server.rpc("health"))
        disk.fail_reads(True)
        model.check()
        disk.fail_reads(False)
        disk.fail_writes(False)
        # (it is tried again when something is to be written)
        wait_for("it is well", lambda: churned(model) and not stats(server)["disk_degraded"])
        for page in range(PAGES):
            model.write(page)
        wait_for("both copies again", lambda: is_backed_up(server))
        assert stats(server)["backed_pages"] > 1000
        model.check()
        assert_nothing_failed(stats(server))


@pytest.mark.timeout(300)
def test_one_donor_and_an_owner_that_is_killed(
    tmp_path: Path, lenders: list[Lender], rng: random.Random
) -> None:
    """One peer is enough with a disk; server and node are killed, and all is found again."""
    name = f"t7backup{os.getpid()}x{rng.getrandbits(32)}"
    some = words(lenders[:1], tmp_path / "disk", f"memory={name}")
    try:
        with Server(tmp_path, *some) as server:
            model = fill(server, rng)
            before = stats(server)["backed_pages"]
            os.kill(server.node_pid, signal.SIGKILL)
            model.check(100)  # from the disk, if it is not there yet
            server.disconnect()
            server.process.kill()
            server.process.wait(WAIT_S)
            server.socket.unlink()
            lenders[0].signal(signal.SIGSTOP)
            with Server(tmp_path, *some) as successor:
                model.server, model.handle = successor, successor.connect()
                model.check()
                assert stats(successor)["backed_pages"] > before // 2
                assert stats(successor)["backup_loads"] + stats(successor)["cold_loads"] > 0
                lenders[0].signal(signal.SIGCONT)
                wait_for("both copies", lambda: is_backed_up(successor))
                model.check()
                assert_nothing_failed(stats(successor))
                model.handle.trim(16 << 20, 0)
                wait_for(
                    "everything is dropped at the donor",
                    lambda: sum(peer["held_bytes"] for peer in successor.rpc("peers")) == 0,
                )
                assert stats(successor)["backed_pages"] == stats(successor)["disk_pages"] == 0
            remove_memory(name)
    finally:
        remove_memory(name)


@pytest.mark.timeout(300)
def test_a_donor_is_drained(tmp_path: Path, lenders: list[Lender], rng: random.Random) -> None:
    """Its pages go to the other one while they are read; else they stay on the disk."""
    with Server(tmp_path, *words(lenders, tmp_path / "disk")) as server:
        wait_for("all donors", lambda: live(server) == 2)
        model = fill(server, rng)
        for lender in lenders:
            with BlockingClient(str(lender.folder / "ctl")) as client:
                client.call("drain", True)
            wait_for("it is empty", functools.partial(is_empty, server, lender))
            model.check(300)
        wait_for("it is told", lambda: stats(server)["backup_missing_pages"] > 1500)
        assert "on the disk alone" in str(server.rpc("health"))
        model.check()
        assert_nothing_failed(stats(server))


def is_empty(server: Server, lender: Lender) -> bool:
    """Whether nothing of ours is at that donor."""
    here = [peer for peer in server.rpc("peers") if peer["address"] == lender.address]
    return all(peer["held_bytes"] == 0 for peer in here)


def test_refused(tmp_path: Path) -> None:
    """In one sentence that says what to write."""
    from tests.plugin_helpers import run_nbdkit

    for more, sentence in (
        (("backup=disk",), "give it peers= and disk="),
        (("backup=ram", f"disk={tmp_path / 'disk'}"), "write backup=disk or backup=none"),
        (("backup=none",), "means something only with peers="),
    ):
        code, _, log = run_nbdkit(tmp_path, "size=16M", "pool=2M", *more)
        assert code != 0
        assert sentence in log


def churned(model: Model) -> bool:
    model.churn(50)
    return True
