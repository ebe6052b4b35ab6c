"""A lane's end where something fails: no descriptor or memory, half a record, nobody there."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import laneport, peerlink
from cluster.donor import Donor, DonorOptions
from cluster.donorlane import DonorLane, Lending
from cluster.lane import LaneEnd
from cluster.peeraddress import PeerAddress
from cluster.peerlink import PeerLink
from cluster.peersocket import rules
from cluster.peerwire import PEER_LIMITS, Hello, LinkState
from cluster.tls import TlsRules
from cluster.unixsock import listen
from cluster.wire import Request, encode
from tests.donor_helpers import (
    QUICK,
    Calm,
    linked,
    listening,
    make_cluster,
    opened_donation,
    python_tls,
    short_channel,
    wait_until,
)

ROOM_BYTES = 1 << 20  # more than an end has for what comes, and less than that and an answer's


def run(test: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await test()

    asyncio.run(bounded())


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    return make_cluster(tmp_path / "ca")


# ---- no descriptor, no memory -------------------------------------------------------------


@contextlib.contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@contextlib.contextmanager
def descriptors(left: int) -> Iterator[None]:
    """As if the process could open so many more, and no others."""
    taken: list[int] = []
    highest = max(map(int, os.listdir("/proc/self/fd")))
    try:
        with limited(resource.RLIMIT_NOFILE, highest + 2):
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for _ in range(left):
                os.close(taken.pop())
            yield
    finally:
        for fd in taken:
            os.close(fd)


def test_an_end_that_cannot_be_made_is_an_oserror() -> None:
    """Who dials and who listens are ready for those."""
    with opened_donation() as donation:
        lending = Lending(donation)
        with descriptors(0), pytest.raises(OSError, match="limit of open files") as error:
            LaneEnd()
        assert error.value.errno == errno.EMFILE
        for kind, spare_bytes in ((LaneEnd, 0), (DonorLane, ROOM_BYTES)):
            make: Callable[[], LaneEnd] = LaneEnd if kind is LaneEnd else lambda: DonorLane(lending)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            with (
                limited(resource.RLIMIT_AS, pages * resource.getpagesize() + spare_bytes),
                pytest.raises(OSError, match="no memory") as error,
            ):
                make()
            assert error.value.errno == errno.ENOMEM


def test_a_link_without_descriptors_is_dialled_until_there_are_some(tmp_path: Path) -> None:
    async def test() -> None:
        path = str(tmp_path / "peer")
        address = PeerAddress.read("peers", path)
        with opened_donation() as donation:
            sock = listen(path, "the peers' socket", "listen=PATH", 64)
            donor = Donor(donation, DonorOptions("lender"), Calm())
            link = PeerLink(address, Hello("owner", 7), None, QUICK)
            before = len(os.listdir("/proc/self/fd"))
            with descriptors(1):  # for the socket, and none for its lane
                link.start()
                await wait_until("it has failed", lambda: "open files" in link.why_down)
            assert len(os.listdir("/proc/self/fd")) == before, "its sockets are closed"
            server = laneport.Listening(sock, donor.connection)
            await wait_until("it is up", lambda: link.state is LinkState.UP)
            await link.stop()
            server.close()
            donor.close()

    run(test)


@pytest.mark.expect_log("the link to .* failed; it is dialled again")
def test_a_link_is_dialled_again_whatever_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [MemoryError("none left"), RuntimeError("no thread")]
    make_lane = peerlink._OwnersEnd.make_lane

    def unlucky(end: Any) -> LaneEnd:
        if failures:
            raise failures.pop()
        return make_lane(end)

    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (_, address):
                monkeypatch.setattr(peerlink._OwnersEnd, "make_lane", unlucky)
                async with linked(address):
                    assert not failures

    run(test)


# ---- half a record ------------------------------------------------------------------------


class Sealed:
    """A connection over Python's TLS whose records are sent by hand."""

    def __init__(self, address: PeerAddress, tls: ssl.SSLContext) -> None:
        self.sock = socket.create_connection((address.host, address.port))
        self.sock.setblocking(False)
        self._come, self._go = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._talk = tls.wrap_bio(self._come, self._go)

    async def shake(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._talk.do_handshake()
                return
            except ssl.SSLWantReadError:
                await loop.sock_sendall(self.sock, self._go.read())
                self._come.write(await loop.sock_recv(self.sock, 1 << 16))

    def records(self, data: bytes) -> bytes:
        """Those of the handshake that are not sent yet, too."""
        self._talk.write(data)
        return self._go.read()


HELLO = encode(Request(0, "hello", Hello("owner", 7).params()), PEER_LIMITS)
PING = encode(Request(1, "ping", []), PEER_LIMITS)


@pytest.mark.parametrize("sent", ["a head", "not the last byte", "one and a half"])
def test_half_a_record_has_a_deadline(sent: str, ca: Path) -> None:
    """As half a message has; a whole one ends it."""

    async def test() -> None:
        with opened_donation() as donation:
            options = DonorOptions("lender", channel=short_channel())
            tls = rules(ca / "lender", server=True)
            async with listening(donation, options, tls=tls) as (donor, address):
                peer = Sealed(address, python_tls(ca / "owner", server=False))
                loop = asyncio.get_running_loop()
                with peer.sock:
                    await peer.shake()
                    await loop.sock_sendall(peer.sock, peer.records(HELLO))
                    await wait_until(
                        "it is in", lambda: any(e.row >= 0 for e in donor._connections)
                    )
                    (end,) = donor._connections
                    assert end._times()[1] is None
                    last = peer.records(PING)
                    if sent == "one and a half":
                        last += peer.records(PING)
                    half = 5 if sent == "a head" else -1
                    await loop.sock_sendall(peer.sock, last[:half])
                    await wait_until("it is closed", lambda: end.closed_because)
                    assert "did not end within" in end.closed_because

    run(test)


def test_a_record_in_two_parts_is_as_good_as_one(ca: Path) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            tls = rules(ca / "lender", server=True)
            async with listening(donation, tls=tls) as (donor, address):
                peer = Sealed(address, python_tls(ca / "owner", server=False))
                loop = asyncio.get_running_loop()
                with peer.sock:
                    await peer.shake()
                    data = peer.records(HELLO)
                    await loop.sock_sendall(peer.sock, data[:-1])
                    await wait_until(
                        "half is there", lambda: any(e._times()[1] for e in donor._connections)
                    )
                    (end,) = donor._connections
                    await loop.sock_sendall(peer.sock, data[-1:])
                    await wait_until("all is there", lambda: end.row >= 0 and not end._times()[1])

    run(test)


# ---- what is written, and to whom -----------------------------------------------------------


def readable(lane: LaneEnd, ready: Callable[[], Any]) -> None:
    """Wait until the lane has said so."""
    while not ready():
        assert select.select([lane.wake_fd], [], [], 30)[0], "nothing is told"
        os.read(lane.wake_fd, 8)


@contextlib.contextmanager
def two_ends(ca: Path | None) -> Iterator[tuple[LaneEnd, LaneEnd, socket.socket]]:
    """A lender's, an owner's that is not started, and the owner's socket."""
    ours, theirs = socket.socketpair()
    lender, owner = LaneEnd(), LaneEnd()
    with ours, theirs:
        lender.start(ours.fileno(), rules(ca / "lender", server=True) if ca else None)
        try:
            yield lender, owner, theirs
        finally:
            lender.stop()
            owner.stop()


def of_owner(ca: Path) -> TlsRules:
    return rules(ca / "owner", server=False)


def test_what_is_written_while_hands_are_shaken_is_sent_after_it(ca: Path) -> None:
    with two_ends(ca) as (lender, owner, sock):
        assert lender.write(b"kept") == 4
        assert not lender.flush()
        owner.start(sock.fileno(), of_owner(ca))
        for end in (lender, owner):
            readable(end, lambda end=end: end.is_handed)  # type: ignore[misc]
            end.turn_back(passing=False)
        readable(owner, lambda: owner.is_handed)
        assert owner.take() == b"kept"


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "TLS"])
def test_what_is_kept_for_a_peer_that_is_gone_is_dropped(sealed: bool, ca: Path) -> None:
    """It cannot be sent, and is not put into records again."""
    with two_ends(ca if sealed else None) as (lender, owner, sock):
        if sealed:
            owner.start(sock.fileno(), of_owner(ca))
            for end in (lender, owner):
                readable(end, lambda end=end: end.is_handed)  # type: ignore[misc]
            lender.turn_back(passing=False)  # and the owner's stays: it reads nothing
        sock.shutdown(socket.SHUT_WR)
        readable(lender, lambda: lender.over is not None)  # nobody but us sends any more
        data, kept = bytes(1 << 16), 0
        while kept < 1 << 20:
            kept = lender.write(data) or 0
        assert not lender.flush()
        owner.stop()
        sock.close()
        assert lender.flush()
        assert lender.kept_bytes == 0
