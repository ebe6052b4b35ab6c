"""Donors and a server whose memory file goes, or stays: their pages go, or stay, too."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.lender_helpers import Lender, Model, lent, stats
from tests.plugin_helpers import Server, remove_memory, wait_for
from tests.serve_helpers import served

WORDS = ("size=16M", "pool=2M")


def pages_at(lenders: list[Lender]) -> int:
    """How many they hold, of whomever."""
    return sum(owner["pages"] for lender in lenders for owner in lender.rpc("owners"))


def peers(lenders: list[Lender]) -> str:
    return f"peers={','.join(lender.address for lender in lenders)}"


def fill(server: Server, rng: random.Random) -> Model:
    wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
    model = Model(server, rng)
    model.fill()
    assert stats(server)["pers_pages_remoted"] > 1500
    return model


def test_a_private_memory_file_goes_with_its_server(tmp_path: Path, rng: random.Random) -> None:
    with lent(tmp_path, 3) as lenders:
        with Server(tmp_path, *WORDS, peers(lenders)) as server:
            fill(server, rng)
            assert pages_at(lenders) > 3000
            lenders[2].signal(signal.SIGSTOP)  # it hears nothing, and holds nobody up
            assert server.end() == 0
        assert not any(pages_at([lender]) for lender in lenders[:2])
        lenders[2].signal(signal.SIGCONT)


def test_a_named_memory_file_keeps_its_pages(tmp_path: Path, rng: random.Random) -> None:
    """However its server ends, and its node process."""
    name = f"t7bye{os.getpid()}x{rng.getrandbits(32)}"
    try:
        with (
            lent(tmp_path, 2) as lenders,
            Server(tmp_path, *WORDS, peers(lenders), f"memory={name}") as first,
        ):
            model = fill(first, rng)
            os.kill(first.node_pid, signal.SIGTERM)
            wait_for("another node", lambda: (first.ping() or {}).get("pid") != first.node_pid)
            model.check(100)
            first.end()
            assert pages_at(lenders) > 3000
            with Server(tmp_path, *WORDS, peers(lenders), f"memory={name}") as server:
                model.server, model.handle = server, server.connect()
                model.check()
            remove_memory(name)
    finally:
        remove_memory(name)


def test_zcache_stop_tells_the_donors_when_the_file_is_gone(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with --keep: the next server finds them."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    with lent(tmp_path, 2) as lenders, served(tmp_path, f"t7-{os.getpid()}") as it:
        it.serve(*WORDS, peers(lenders))
        wait_for("room", lambda: it.rpc("stats")["remote_room_bytes"] > 0)
        handle = it.connect()
        for page in range(3000):
            handle.pwrite(rng.randbytes(4096), page * 4096)
        it.disconnect()
        it.zcache("stop", "--keep")
        assert pages_at(lenders) > 3000
        it.zcache("stop")
        wait_for("they are dropped", lambda: pages_at(lenders) == 0)
        assert not any(lender.rpc("owners") for lender in lenders)
