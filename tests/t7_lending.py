"""A server that lends too (listen=, donate=): another one's pages in its node process."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lender_helpers import PAGE, PAGES, Lender, Model, live, stats
from tests.plugin_helpers import Server, run_nbdkit, wait_for
from zcache_core import memfile
from zcache_core.errors import ControlError


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Lender]:
    made = Lender(tmp_path, "d0")
    yield made
    made.kill()


def lent(server: Server) -> int:
    """Pages of others that it holds."""
    return sum(owner["pages"] for owner in owners(server))


def owners(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.rpc("owners")
    return found


@pytest.mark.timeout(300)
def test_a_server_lends_and_is_killed_in_parts(
    tmp_path: Path, other: Lender, rng: random.Random
) -> None:
    """Its node is killed: the pages are found again.  It ends: the other donor has them all."""
    for name in ("lends", "swaps"):
        (tmp_path / name).mkdir()
    at = tmp_path / "lent"
    words = ("size=16M", "pool=4M", f"listen={at}", "donate=24M")
    with Server(tmp_path / "lends", *words) as lends:
        wait_for("it listens", at.exists)
        assert lends.rpc("config")["listen"] == str(at)
        swaps = ("size=16M", "pool=2M", f"peers={at},{other.address}")
        with Server(tmp_path / "swaps", *swaps) as server:
            wait_for("both donors", lambda: live(server) == 2)
            wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
            model = Model(server, rng)
            for page in range(PAGES):
                model.write(page)
            wait_for("they are counted", lambda: lent(lends) == stats(lends)["foreign_pers_pages"])
            assert lent(lends) > 1500
            # never mixed with its own
            own = lends.connect()
            own.pwrite(b"o" * PAGE, 0)
            own.pwrite(rng.randbytes(PAGE), PAGE)
            assert stats(lends)["pers_zpages"] + stats(lends)["same_filled_pages"] == 2
            assert stats(lends)["logical_bytes"] == 2 * PAGE
            before = lent(lends)
            os.kill(lends.node_pid, signal.SIGKILL)
            model.check(200)
            wait_for("they are found again", lambda: is_back(lends, before))
            wait_for("both donors", lambda: live(server) == 2)
            assert all(not peer["wrong_copies"] for peer in server.rpc("peers"))
            model.check()
            model.churn(300)
            lends.node_pid = lends.ping()["pid"]
            # it asks for them to be taken back: nowhere to go, so they stay, and are read
            assert lends.rpc("drain_lent")["draining"] is True
            model.check(100)
            assert lends.rpc("drain_lent", False)["draining"] is False
            lends.disconnect()
            lends.end()
            assert not [row for row in memfile.leftovers() if row.name == f"lent.{lends.pid}"]
            model.check()
            assert stats(server)["lost_pages"] == stats(server)["failed_requests"] == 0


def is_back(server: Server, pages: int) -> bool:
    try:
        return lent(server) == pages
    except ControlError:  # it is being started
        return False


def test_refused(tmp_path: Path) -> None:
    """In one sentence that says what to write."""
    for words, sentence in (
        (("listen=127.0.0.1:0",), "write both, like listen=127.0.0.1:7900 donate=4G"),
        (("donate=1G",), "write both, like listen=127.0.0.1:7900 donate=4G"),
        (("listen=127.0.0.1:0", "donate=1M"), "write 16M at least"),
        (("listen=127.0.0.1:0", "donate=99%"), "RAM of its own"),
        (("listen=127.0.0.1:0", "donate=89%", "pool=20%"), "together are more than 90 %"),
        (("listen=0.0.0.0:7900", "donate=1G"), "it needs certificates"),
        (("listen=nowhere", "donate=1G"), "listen=nowhere is no address"),
    ):
        more = words if any(word.startswith("pool=") for word in words) else (*words, "pool=2M")
        code, _, log = run_nbdkit(tmp_path, "size=16M", *more)
        assert code != 0, words
        assert sentence in log
