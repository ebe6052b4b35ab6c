"""Donors and a server whose memory file goes, or stays: their pages go, or stay, too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import certificates, farewell
from cluster.peeraddress import PeerAddress
from cluster.peerring import owner_name
from cluster.peerwire import Page, pack, sealed_bytes
from plugin import serve
from tests.donor_helpers import linked
from tests.lender_helpers import Lender, Model, lent, stats
from tests.plugin_helpers import Server, remove_memory, wait_for
from tests.serve_helpers import Served, served
from zcache_core import memfile
from zcache_core.errors import InUseError

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


@contextlib.contextmanager
def lent_with_tls(folder: Path, ca: Path) -> Iterator[list[Lender]]:
    """Two on TCP, each with a certificate of its own."""
    made: list[Lender] = []
    try:
        for name in ("a", "b"):
            certificates.add(ca, name)
            made.append(Lender(folder, name, listen="127.0.0.1:0", tls=ca / name))
            made[-1].address = made[-1].rpc("config")["listen"]
        yield made
    finally:
        for lender in made:
            lender.end()


def filled(it: Served, rng: random.Random, lenders: list[Lender], *more: str) -> Any:
    """A server with pages at donors; a handle, and what the pages are."""
    it.serve(*WORDS, peers(lenders), *more)
    wait_for("room", lambda: it.rpc("stats")["remote_room_bytes"] > 0)
    handle, pages = it.connect(), [rng.randbytes(4096) for _ in range(3000)]
    for page, content in enumerate(pages):
        handle.pwrite(content, page * 4096)
    assert pages_at(lenders) > 3000
    return handle, pages


def leaver_of(name: str, tls: Path | None = None) -> farewell.Leaver:
    """Who a named memory file is to donors now."""
    shmid = memfile.find(name)
    assert shmid is not None
    memory = memfile.MemoryFile.attach(shmid)
    try:
        return farewell.Leaver(owner_name(str(tls) if tls else None, memory), memory.epoch)
    finally:
        memory.close()


@pytest.mark.parametrize("encrypted", [False, True])
def test_zcache_stop_tells_the_donors_when_the_file_is_gone(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    """Not with --keep: the next server finds them."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    certificates.init(tmp_path / "ca")
    certificates.add(tmp_path / "ca", "owner")
    donors = lent_with_tls(tmp_path, tmp_path / "ca") if encrypted else lent(tmp_path, 2)
    with donors as lenders, served(tmp_path, f"t7-{os.getpid()}") as it:
        filled(it, rng, lenders, *([f"tls={tmp_path / 'ca/owner'}"] if encrypted else []))
        it.disconnect()
        it.zcache("stop", "--keep")
        assert pages_at(lenders) > 3000
        it.zcache("stop")
        wait_for("they are dropped", lambda: pages_at(lenders) == 0)
        assert not any(lender.rpc("owners") for lender in lenders)


def test_a_late_farewell_leaves_the_next_server_its_pages(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One donor has been started again and remembers no epoch that is over, one never met it."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    name = f"t7-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        lenders = []
        for who in ("a", "b"):
            memory = f"t7late{who}{os.getpid()}x{rng.getrandbits(32)}"
            lenders.append(Lender(tmp_path, who, memory=memory))
            stack.callback(lenders[-1].end)
        it = stack.enter_context(served(tmp_path, name))
        it.serve(*WORDS, f"peers={lenders[0].address}", "replicas=2")
        wait_for("they have met", lambda: lenders[0].rpc("owners"))
        late = leaver_of(name)
        it.zcache("stop")
        handle, pages = filled(it, rng, lenders)
        assert leaver_of(name).owner == late.owner
        lenders[0].kill()
        lenders[0].start()
        up = ["up", "up"]
        wait_for("both up", lambda: [peer["state"] for peer in it.rpc("peers")] == up)
        before = pages_at(lenders)
        assert before > 3000
        addresses = [lender.address for lender in lenders]
        assert farewell.say_from_outside(late, addresses, None) == 2
        assert pages_at(lenders) >= before
        for page, content in enumerate(pages):
            assert handle.pread(4096, page * 4096) == content, page
        assert [peer["state"] for peer in it.rpc("peers")] == up
        assert it.rpc("stats")["lost_pages"] == 0


def test_a_stop_that_is_refused_forgets_no_donor(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody still has the memory file; asked again, it tells them, those of etcd too."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(serve, "NODE_S", 0.5)
    name = f"t7-{os.getpid()}"
    with lent(tmp_path, 3) as lenders, served(tmp_path, name) as it:
        filled(it, rng, lenders[:2])
        it.disconnect()
        it.zcache("stop", "--keep")
        leaver = leaver_of(name)
        asyncio.run(put_one(lenders[2].address, leaver))  # as if etcd had named it
        noted = serve.noted_members(it.instance)
        noted.write_text(json.dumps([lenders[2].address]))
        assert pages_at(lenders[2:]) == 1
        shmid = memfile.find(name)
        assert shmid is not None
        memory = memfile.MemoryFile.attach(shmid)
        try:
            with pytest.raises(InUseError):
                serve.stop(it.instance)
        finally:
            memory.close()
        assert noted.exists()
        assert pages_at(lenders) > 3000
        serve.stop(it.instance)
        wait_for("they are dropped", lambda: pages_at(lenders) == 0)
        assert not noted.exists()
        assert not it.instance.serve.exists()


async def put_one(address: str, leaver: farewell.Leaver) -> None:
    page = Page(0, 5000, 1, 0)
    async with linked(PeerAddress.read("peers", address), *leaver) as link:
        assert await link.put(pack([page]), bytes(sealed_bytes(0))) == b"\0"
