"""Who may say hello for an owner, and what its earlier connections may still do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import laneport
from cluster.donor import Donor, DonorOptions
from cluster.laneport import HANDSHAKES
from cluster.link import RpcError
from cluster.peeraddress import PeerAddress
from cluster.peerchannel import Channel
from cluster.peerlink import PeerLink, first_turn
from cluster.peersocket import rules, user_of
from cluster.peerwire import PEER_LIMITS, Code, Hello, LinkState, Page, PeerError, pack
from cluster.wire import Request, encode
from tests.donor_helpers import (
    QUICK,
    Calm,
    ask,
    asyncio_serve,
    linked,
    listening,
    make_cluster,
    make_sealed,
    opened_donation,
    wait_until,
)

PAGE = Page(0, 5, 9, 999 << 4)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def opened(address: PeerAddress, hello: Hello) -> PeerLink:
    link = PeerLink(address, hello, times=replace(QUICK, dead_s=1000.0))
    link.start()
    await wait_until("the link is up", lambda: link.state is LinkState.UP)
    return link


# ---- late drops -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a successor", "the same process"])
def test_a_drop_on_its_way_there_does_not_end_what_is_put_after_it(
    rng: random.Random, kind: str
) -> None:
    """It lies in the donor's socket when the next connection's put of the page is answered."""

    async def test() -> None:
        with opened_donation() as donation:
            # (a lane's thread cannot be held up from here; t5_lanes stops it in the middle)
            async with listening(donation, lanes=False) as (donor, address):
                turn = first_turn()
                old = await opened(address, Hello("owner", 7, turn=turn))
                end = next(iter(donor._connections))
                sealed = make_sealed(rng, PAGE)
                assert await old.put(pack([PAGE]), sealed) == bytes(1)
                transport: Any = end._transport
                transport.pause_reading()
                late = asyncio.create_task(old.drop(pack([PAGE])))
                await asyncio.sleep(0.05)
                turn += 1 << 20 if kind == "a successor" else 5
                new = await opened(address, Hello("owner", 7, turn=turn))
                assert await new.put(pack([PAGE]), sealed) == bytes(1)
                if not transport.is_closing():
                    transport.resume_reading()
                with pytest.raises(PeerError):
                    await late
                assert await new.get(pack([PAGE])) == (bytes([Code.OK]), sealed)
                await old.stop()
                await new.stop()

    run(test)


@pytest.mark.parametrize("lanes", [True, False])
def test_what_comes_on_an_earlier_connection_changes_nothing(
    rng: random.Random, lanes: bool
) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation, lanes=lanes) as (_, address):
                old = await opened(address, Hello("owner", 7, turn=100))
                channel: Any = old._channel
                new = await opened(address, Hello("owner", 7, turn=200))
                sealed = make_sealed(rng, PAGE)
                assert await new.put(pack([PAGE]), sealed) == bytes(1)
                for method, params in (("drop", [pack([PAGE])]), ("put", [pack([PAGE]), sealed])):
                    channel._transport.write(encode(Request(9, method, params), PEER_LIMITS))
                await asyncio.sleep(0.1)
                assert await new.get(pack([PAGE])) == (bytes([Code.OK]), sealed)
                assert donation.check() == 0
                await old.stop()
                await new.stop()

    run(test)


def test_an_earlier_turn_is_refused_and_ends_nothing(rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (_, address):
                link = await opened(address, Hello("owner", 7, turn=100))
                sealed = make_sealed(rng, PAGE)
                await link.put(pack([PAGE]), sealed)
                with pytest.raises(RpcError, match="a later connection by now"):
                    await ask(address, "hello", *Hello("owner", 7, turn=50).params())
                await ask(address, "hello", *Hello("other", 7, turn=50).params())
                assert await link.get(pack([PAGE])) == (bytes([Code.OK]), sealed)
                await link.stop()

    run(test)


def test_connections_of_one_turn_live_together() -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with (
                listening(donation) as (_, address),
                linked(address) as first,
                linked(address) as second,
            ):
                await first.ping()
                await second.ping()

    run(test)


def test_turns_climb() -> None:
    before = first_turn()
    assert 0 < before < 1 << 64
    assert first_turn() >= before
    hello = Hello("owner", 7)
    assert "turn" in hello.params()[0], "a donor is told"


def test_a_link_whose_epoch_is_over_is_down_at_once(rng: random.Random) -> None:
    """It was up, and failed each call, until nothing was answered for dead_s."""

    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (_, address):
                old = await opened(address, Hello("owner", 7))
                new = await opened(address, Hello("owner", 8))
                await wait_until("it is down", lambda: old.state is LinkState.DOWN)
                await wait_until("it says why", lambda: "another epoch" in old.why_down)
                await new.ping()
                await old.stop()
                await new.stop()

    run(test)


class Deaf(Channel):
    """A donor that lets its owner in, and does not know it then."""

    def request(self, method: str, params: list[Any]) -> Any:
        if method == "hello":
            return [[1, 0, 0], {"protocol": 1, "donor": "deaf", "epoch": 1}]
        raise RpcError("epoch_over", "another epoch by now")


def test_a_donor_that_knows_us_no_more_is_dialled_again() -> None:
    async def test() -> None:
        address = PeerAddress.read("listen", "127.0.0.1:0")
        server, bound = await asyncio_serve(address, Deaf)
        times = replace(QUICK, dead_s=1000.0)
        link = PeerLink(PeerAddress.read("peers", bound), Hello("owner", 7), times=times)
        states: list[LinkState] = []
        link.on_state = lambda changed: states.append(changed.state)
        link.start()
        await wait_until("up, down, up", lambda: states.count(LinkState.UP) > 1)
        await link.stop()
        server.close()

    run(test)


# ---- users of this machine --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix"])
def test_whose_process_it_is(kind: str, tmp_path: Path) -> None:
    family = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}[kind]
    where: Any = {"tcp": ("127.0.0.1", 0), "tcp6": ("::1", 0), "unix": str(tmp_path / "s")}[kind]
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind(where)
        except OSError:
            pytest.skip(f"no {kind} here")
        listener.listen()
        client.connect(listener.getsockname())
        ours, _ = listener.accept()
        with ours:
            assert user_of(ours) == os.getuid()
            client.close()
            if kind != "unix":  # whose it was is not known for certain any more: nobody's
                assert user_of(ours) is None


SCRIPT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as s:
    s.sendall(bytes.fromhex(sys.argv[3]))
    print(s.recv(4096).hex())
"""
NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_ends_nothing(rng: random.Random) -> None:
    """Its hello in our name is that of another owner, whatever epoch and turn it says."""

    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (_, address):
                link = await opened(address, Hello("owner", 7, turn=3))
                sealed = make_sealed(rng, PAGE)
                await link.put(pack([PAGE]), sealed)
                for hello in (Hello("owner", 8, turn=9), Hello("owner", 7, turn=2**63)):
                    raw = encode(Request(0, "hello", hello.params()), PEER_LIMITS)
                    words = [address.host, str(address.port), raw.hex()]
                    done = await asyncio.to_thread(
                        subprocess.run,
                        ["/usr/bin/python3", "-I", "-c", SCRIPT, *words],
                        user=NOBODY, capture_output=True, text=True, cwd="/", timeout=30,
                    )  # fmt: skip
                    assert bytes.fromhex(done.stdout)[:4] == b"\x94\x01\x00\xc0", "it is welcome"
                    assert await link.get(pack([PAGE])) == (bytes([Code.OK]), sealed)
                users = {(name, user): pages for _, name, _, _, pages, _, user in donation.owners()}
                assert users == {("owner", 0): 1, ("owner", NOBODY): 0}
                assert donation.check() == 0

    run(test)


# ---- strangers ---------------------------------------------------------------------------------


def test_who_says_no_hello_is_closed() -> None:
    async def test() -> None:
        with opened_donation() as donation:
            options = DonorOptions("lender", hello_s=0.1)
            async with listening(donation, options) as (donor, address):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                assert await reader.read() == b""
                writer.close()
                async with linked(address) as link:
                    await asyncio.sleep(0.3)
                    await link.ping()
                    assert len(donor._connections) == 1

    run(test)


@contextlib.asynccontextmanager
async def lender(folder: Path) -> AsyncIterator[tuple[laneport.Listening, Donor, PeerAddress]]:
    with opened_donation() as donation:
        donor = Donor(donation, DonorOptions("lender"), Calm())
        where = PeerAddress.read("listen", "127.0.0.1:0")
        tls = rules(folder / "lender", server=True)
        server, bound = await laneport.serve(where, "listen", donor.connection, tls)
        yield server, donor, PeerAddress.read("peers", bound)
        server.close()
        donor.close()


def test_strangers_that_never_finish_their_handshake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cost a bounded number of descriptors, and members come in meanwhile."""
    folder = make_cluster(tmp_path / "ca")
    monkeypatch.setattr(laneport, "FAIR_S", 0.02)

    async def test() -> None:
        async with lender(folder) as (server, _, address):
            strangers: list[socket.socket] = []
            for n in range(4 * HANDSHAKES):
                strangers.append(socket.socket())
                strangers[-1].setblocking(False)
                strangers[-1].connect_ex((address.host, address.port))
                if n % 48 == 47:  # more than there are handshakes, less than the queue holds
                    await asyncio.sleep(0.05)
                assert len(server._shaking) <= HANDSHAKES
            await wait_until("some were let go", lambda: sum(map(closed, strangers)) > HANDSHAKES)
            link = PeerLink(address, Hello("owner", 7), rules(folder / "owner", False), QUICK)
            link.start()
            await wait_until("a member is in", lambda: link.state is LinkState.UP)
            await link.stop()
            for stranger in strangers:
                stranger.close()

    run(test)


def test_members_that_come_all_at_once_are_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody goes for the next one before it has had its time; nobody has to dial twice."""
    folder = make_cluster(tmp_path / "ca")
    monkeypatch.setattr(laneport, "FAIR_S", 1000.0)
    monkeypatch.setattr(laneport, "HANDSHAKE_S", 1000.0)
    times = replace(QUICK, dial_s=1000.0, call_s=1000.0, dead_s=1000.0)

    async def test() -> None:
        async with lender(folder) as (_, donor, address):
            tls = rules(folder / "owner", False)
            links = [
                PeerLink(address, Hello(f"owner/{n}", 7, turn=first_turn()), tls, times)
                for n in range(60)
            ]
            turns = [link._hello.turn for link in links]
            for link in links:
                link.start()
            await wait_until(
                "all are in", lambda: all(link.state is LinkState.UP for link in links)
            )
            assert [link._hello.turn for link in links] == [turn + 1 for turn in turns]
            assert len(donor._connections) == len(links)
            for link in links:
                await link.stop()

    run(test)


def closed(sock: socket.socket) -> bool:
    """Whether the other end has closed it."""
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
