"""A real owner and real donors: killed, stopped, started empty; no read fails or is wrong."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from tests.lender_helpers import PAGES, Lender, Model, live, stats
from tests.plugin_helpers import (
    PLUGIN,
    WAIT_S,
    Server,
    environment,
    remove_memory,
    segments,
    wait_for,
)
from zcache_core import ringside
from zcache_core.memfile import MemoryFile
from zcache_core.ringside import rows_of_where


@pytest.fixture
def lenders(tmp_path: Path) -> Iterator[list[Lender]]:
    made = [Lender(tmp_path, f"d{i}") for i in range(3)]
    yield made
    for lender in made:
        lender.end()


def words(lenders: list[Lender], *more: str) -> list[str]:
    addresses = ",".join(lender.address for lender in lenders)
    return ["size=16M", "pool=2M", f"peers={addresses}", *more]


def zcache_status(server: Server) -> str:
    """What a person reads."""
    command = [sys.executable, "-m", "plugin.cli", "status", "--control", str(server.control)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    return done.stdout


@pytest.mark.timeout(300)
def test_donors_fail_one_after_the_other(
    tmp_path: Path, lenders: list[Lender], rng: random.Random
) -> None:
    """Two copies: kill -9, SIGSTOP, and back; the device never notices."""
    with Server(tmp_path, *words(lenders)) as server:
        wait_for("all donors", lambda: live(server) == 3)
        wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
        model = Model(server, rng)
        for page in range(PAGES):
            model.write(page)
        assert stats(server)["pers_pages_remoted"] > 1500
        model.check()
        for lender in lenders:
            lender.kill()
            model.churn(300)
            wait_for("it is missed", lambda: stats(server)["remote_short_pages"])
            lender.start()
            wait_for("it is back", lambda: live(server) == 3)
            wait_for("copies are renewed", lambda: not stats(server)["remote_short_pages"])
            model.churn(100)
            lender.signal(signal.SIGSTOP)
            model.churn(100)
            lender.signal(signal.SIGCONT)
            wait_for("it answers again", lambda: live(server) == 3)
        model.check()
        assert "3 of 3 answer" in zcache_status(server)
        now = stats(server)
        assert now["remote_pers_pages_unsucc_get"] == now["lost_pages"] == 0
        assert now["failed_requests"] == now["remote_corrupt_pages"] == 0
        assert now["remote_moved_pages"] > 0
        model.handle.trim(16 << 20, 0)
        wait_for(
            "everything is dropped at the donors",
            lambda: sum(peer["held_bytes"] for peer in server.rpc("peers")) == 0,
        )
        assert stats(server)["pers_pages_remoted"] == 0


@pytest.mark.timeout(300)
def test_the_owner_is_killed_and_finds_its_pages(
    tmp_path: Path, lenders: list[Lender], rng: random.Random
) -> None:
    name = f"t7peers{os.getpid()}x{rng.getrandbits(32)}"
    try:
        with Server(tmp_path, *words(lenders, f"memory={name}")) as server:
            wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
            model = Model(server, rng)
            for page in range(PAGES):
                model.write(page)
            before = stats(server)["pers_pages_remoted"]
            assert before > 1500
            node = server.node_pid
            os.kill(node, signal.SIGKILL)  # its node first: gets wait for the next one
            model.check(50)
            assert server.ping()["pid"] != node
            server.disconnect()
            server.process.kill()
            server.process.wait(WAIT_S)
            server.socket.unlink()
            with Server(tmp_path, *words(lenders, f"memory={name}")) as successor:
                model.server, model.handle = successor, successor.connect()
                model.check()
                now = stats(successor)
                assert now["lost_pages"] == now["remote_pers_pages_unsucc_get"] == 0
                assert now["pers_pages_remoted"] > 1000
            remove_memory(name)
    finally:
        remove_memory(name)


@contextlib.contextmanager
def stopped_for_a_moment(*lenders: Lender) -> Iterator[None]:
    """They stand still for the block, but not for more than half a second."""

    def go_on() -> None:
        for lender in lenders:
            lender.signal(signal.SIGCONT)

    for lender in lenders:
        lender.signal(signal.SIGSTOP)
    timer = threading.Timer(0.5, go_on)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.timeout(300)
def test_a_donor_that_lies(tmp_path: Path, lenders: list[Lender], rng: random.Random) -> None:
    """It flips bits and answers with other pages: found, counted, answered by the other copy."""
    lenders[1].kill()
    lenders[1] = Lender(tmp_path, "liar", "tests.lying_lender")
    with Server(tmp_path, *words(lenders)) as server:
        wait_for("all donors", lambda: live(server) == 3)
        wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
        model = Model(server, rng)
        for page in range(PAGES):
            model.write(page)
        model.check()
        for _ in range(
            20
        ):  # whoever answers fastest is asked first, and that may never be the liar
            if stats(server)["remote_corrupt_pages"] >= 3:
                break
            with stopped_for_a_moment(lenders[0], lenders[2]):
                model.check(20)
        now = stats(server)
        assert now["remote_corrupt_pages"] >= 3
        assert now["lost_pages"] == now["failed_requests"] == 0
        liar = next(p for p in server.rpc("peers") if p["address"] == lenders[1].address)
        assert liar["wrong_copies"] >= 3
        assert "copies of peers were found wrong" in str(server.rpc("health"))
        wait_for("its copies are renewed", lambda: not stats(server)["remote_short_pages"])
        model.check()


def in_both(server: Server, of: Collection[int] = range(ringside.ROWS)) -> set[int]:
    """Pages that are at donors of these rows only, and in RAM too."""
    [shmid] = segments(server.pid)
    memory = MemoryFile.attach(shmid)
    try:
        found, _ = ringside.pages_on_peers(memory, 0, 4096, 4096)
        return {
            page
            for page, version, where, _ in found
            if ringside.is_in_ram_too(memory, page, version)
            and set(rows_of_where(where)) <= set(of)
        }
    finally:
        memory.close()


@pytest.mark.timeout(300)
def test_all_donors_are_killed_and_come_back_empty(
    tmp_path: Path, lenders: list[Lender], rng: random.Random
) -> None:
    """What the owner's RAM has still is right afterwards, page by page, though room is needed."""
    lenders.pop().end()
    own = ["pool=8M", "high=30", "low=20"]
    with Server(tmp_path, "size=16M", *words(lenders, *own)[2:]) as server:
        wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
        model = Model(server, rng)
        model.fill()
        wait_for("pages have left", lambda: stats(server)["eph_zpages"] > 500)
        wait_for("it rests", lambda: not stats(server)["outstanding_writeback_pages"])
        for lender in lenders:
            lender.kill()
        kept = in_both(server)
        assert len(kept) > 400
        for lender in lenders:
            lender.start()
        wait_for("they are back", lambda: live(server) == 2)
        for page in range(PAGES, 4000):  # room is needed
            model.write(page)
        there = [page for page in model.pages if page in kept or page >= PAGES]
        for page in there:
            assert model.handle.pread(4096, page * 4096) == model.pages[page], page
        now = stats(server)
        assert now["rescued_pages"] > 400
        assert now["failed_requests"] == now["lost_pages"] == 0
        wait_for("nothing counts on who is gone", lambda: not in_both(server, {0, 1}))


@pytest.mark.timeout(300)
def test_a_disk_is_added_at_a_restart(
    tmp_path: Path, lenders: list[Lender], rng: random.Random
) -> None:
    """A memory file with pages at peers only takes any disk; then it means that one."""
    name = f"t7add{os.getpid()}x{rng.getrandbits(32)}"
    own = words(lenders, f"memory={name}")
    disk = [f"disk={tmp_path / 'disk'}", "disk_size=32M"]
    try:
        with Server(tmp_path, *own) as first:
            wait_for("room", lambda: stats(first)["remote_room_bytes"] > 0)
            model = Model(first, rng)
            model.fill()
            assert stats(first)["pers_pages_remoted"] > 1500
            first.end()
            for more in (disk, [*disk, "backup=disk"]):
                with Server(tmp_path, *own, *more) as server:
                    model.server, model.handle = server, server.connect()
                    model.check()
                    model.churn(500)
                    assert stats(server)["lost_pages"] == 0
            command = ["nbdkit", "-f", "-U", str(tmp_path / "no"), "python", str(PLUGIN), *own]
            done = subprocess.run(
                command, env=environment(tmp_path), capture_output=True, timeout=WAIT_S, check=False
            )
            assert b"write the same disk= again" in done.stderr
            remove_memory(name)
    finally:
        remove_memory(name)
