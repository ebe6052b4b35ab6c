"""A donor's connections with threads of their own answer as those without."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.donor import DonorOptions
from cluster.peeraddress import PeerAddress
from cluster.peersocket import rules
from cluster.peerwire import (
    BATCH_PAGES,
    PEER_LIMITS,
    Code,
    Hello,
    Page,
    PeerError,
    pack,
)
from cluster.wire import NEED_DATA, Decoder, Request, Response, encode
from tests.donor_helpers import (
    QUICK,
    linked,
    listening,
    make_cluster,
    make_pages,
    make_sealed,
    opened_donation,
    python_tls,
    wait_until,
)

ROUNDS = 60
SEALED_ROUNDS = 30  # the same rules; here how records lie is new


def run(test: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await test()

    asyncio.run(bounded())


class Script:
    """What a peer says from beginning to end: good requests, odd and broken ones, in pieces."""

    def __init__(self, rng: random.Random, name: str = "raw") -> None:
        self.rng, self.name = rng, name
        self.msgid = rng.choice([0, 120, 65530, 2**32 - 40])
        self.pages = make_pages(rng, 30)
        self.sealed = {page: make_sealed(rng, page) for page in self.pages}
        parts = [self.request("hello", *Hello(name, 3).params())]
        parts += [self.one() for _ in range(rng.randrange(3, 25))]
        if rng.random() < 0.3:
            parts.insert(0, self.get())  # before the hello
        self.bytes = b"".join(parts)

    def request(self, method: str, *params: Any) -> bytes:
        self.msgid += 1
        return encode(Request(self.msgid % 2**32, method, list(params)), PEER_LIMITS)

    def some(self) -> list[Page]:
        return self.rng.sample(self.pages, self.rng.randrange(1, 12))

    def get(self) -> bytes:
        return self.request("get", pack(self.some()))

    def put(self) -> bytes:
        pages = self.some()
        return self.request("put", pack(pages), b"".join(self.sealed[page] for page in pages))

    def one(self) -> bytes:
        dice = self.rng.random()
        if dice < 0.35:
            return self.get()
        if dice < 0.7:
            return self.put()
        if dice < 0.8:
            return self.request("drop", pack(self.some()))
        if dice < 0.86:
            return self.request(self.rng.choice(["ping", "nonsense"]))
        if dice < 0.9:
            return self.request("put", pack(self.some()), b"too short")
        if dice < 0.94:
            return self.longer(self.get())
        if dice < 0.96:
            return self.request("hello", *Hello(self.name, 3).params())
        return self.spoil(self.rng.choice([self.get, self.put])())

    def longer(self, data: bytes) -> bytes:
        """The same request with its number in the longest form: not ours, but right."""
        number = self.msgid % 2**32
        return b"\x94\x00\xce" + number.to_bytes(4, "big") + data[data.index(b"\xa3get") :]

    def spoil(self, data: bytes) -> bytes:
        spoiled = bytearray(data)
        spoiled[self.rng.randrange(min(len(data), 30))] = self.rng.randrange(256)
        return bytes(spoiled)

    def pieces(self) -> list[bytes]:
        """Cut anywhere; sometimes to single bytes."""
        data = self.bytes
        found: list[bytes] = []
        most = self.rng.choice([1, 7, 300, 5000, 1 << 20])
        while data and len(found) < 2000:
            n = self.rng.randrange(1, most + 1)
            found.append(data[:n])
            data = data[n:]
        return [*found, data]


async def conversation(
    address: PeerAddress, pieces: list[bytes], tls: ssl.SSLContext | None = None
) -> bytes:
    """Everything that is answered, to the end of the connection."""
    if tls is not None:
        return await sealed_conversation(address, pieces, tls)
    return await asyncio.to_thread(talk, address, pieces)


async def sealed_conversation(
    address: PeerAddress, pieces: list[bytes], tls: ssl.SSLContext
) -> bytes:
    """The same over Python's TLS: its records lie otherwise than the pieces, and those than ours.

    It ends with half a record, so that all that was said before is answered.
    """
    sock = socket.create_connection((address.host, address.port))
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    come, go, answer, ended = ssl.MemoryBIO(), ssl.MemoryBIO(), b"", False
    talk = tls.wrap_bio(come, go)

    async def exchange() -> None:
        """What is to be sent is sent, and what is there taken."""
        nonlocal answer, ended
        while go.pending:
            await loop.sock_sendall(sock, go.read())
        with contextlib.suppress(BlockingIOError):
            while not ended:
                data = sock.recv(1 << 20)
                ended = not data
                come.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            while data := talk.read(1 << 20):
                answer += data

    with sock, contextlib.suppress(OSError):
        while True:
            try:
                talk.do_handshake()
                break
            except ssl.SSLWantReadError:
                await loop.sock_sendall(sock, go.read())
                come.write(await loop.sock_recv(sock, 1 << 16))
        for piece in pieces:
            if piece:
                talk.write(piece)
            await exchange()
        talk.write(b"\x94")
        await loop.sock_sendall(sock, go.read()[:-1])
        sock.shutdown(socket.SHUT_WR)
        while not ended:
            await exchange()
            await asyncio.sleep(0.001)
    return answer


def talk(address: PeerAddress, pieces: list[bytes]) -> bytes:
    """Said and heard at the same time; what came before a reset is heard too."""
    with socket.create_connection((address.host, address.port), timeout=30) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def say() -> None:
            with contextlib.suppress(OSError):
                for piece in pieces:
                    sock.sendall(piece)
                sock.shutdown(socket.SHUT_WR)

        saying = threading.Thread(target=say)
        saying.start()
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(1 << 20):
                answer += data
        saying.join()
    return answer


def heard(answer: bytes) -> list[Any]:
    """The answers, without what differs between two donors: their epoch, and their room."""
    decoder = Decoder(PEER_LIMITS)
    found: list[Any] = []
    decoder.receive(answer)
    while (message := decoder.next_message()) is not NEED_DATA:
        assert isinstance(message, Response)
        if message.error is None:
            assert encode(message, PEER_LIMITS) in answer, "in the shortest form"
            message.result[0][0] = 0
            for part in message.result[1:]:
                if isinstance(part, dict):
                    part.pop("epoch", None)
                    part.pop("foreign_pers_bytes", None)
        found.append((message.msgid, message.error, message.result))
    return found


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "TLS"])
def test_the_same_answers_as_without(sealed: bool, rng: random.Random, tmp_path: Path) -> None:
    """In the same order, to every whole request before the one that ends the connection."""
    ca = make_cluster(tmp_path / "ca")
    tls = python_tls(ca / "owner", server=False) if sealed else None
    lenders = rules(ca / "lender", server=True) if sealed else None

    async def test() -> None:
        with opened_donation() as one, opened_donation() as other:
            async with (
                listening(one, tls=lenders) as (_, with_lanes),
                listening(other, lanes=False) as (_, without),
            ):
                for _ in range(SEALED_ROUNDS if sealed else ROUNDS):
                    script = Script(rng, "owner" if sealed else "raw")
                    pieces = script.pieces()
                    expected = heard(await conversation(without, pieces))
                    got = heard(await conversation(with_lanes, pieces, tls))
                    # (asyncio's own transport drops what it has not sent when it is aborted)
                    assert got[: len(expected)] == expected
                    assert len(got) <= script.bytes.count(b"\x94\x00")
                assert one.check() == other.check() == 0
                assert sorted(one.owners())[0][4] == sorted(other.owners())[0][4]

    run(test)


def test_bad_bytes_behind_good_ones_end_it_after_their_answers(rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (_, address):
                script = Script(rng)
                hello = script.request("hello", *Hello("raw", 3).params())
                asked = [script.put() for _ in range(5)]
                answers = heard(await conversation(address, [hello, *asked, b"\xc1", asked[0]]))
                assert len(answers) == 6

    run(test)


def test_an_epoch_that_is_over_is_told_so_by_the_session(rng: random.Random) -> None:
    """Also when another connection ends it between two requests; nothing lands in the new one."""

    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (_, address), linked(address, "one", 1) as old:
                pages = make_pages(rng, 20)
                sealed = [make_sealed(rng, page) for page in pages]
                assert not any(await old.put(pack(pages), b"".join(sealed)))
                stop = False

                async def hammer() -> int:
                    good = 0
                    while not stop:
                        try:
                            codes = await old.put(pack(pages), b"".join(sealed))
                        except PeerError:
                            return good
                        good += not any(codes)
                    return good

                hammering = asyncio.ensure_future(hammer())
                await asyncio.sleep(0.05)
                async with linked(address, "one", 2) as new:
                    await hammering
                    with pytest.raises(PeerError):
                        await old.get(pack(pages))
                    await wait_until("it says why", lambda: "another epoch" in old.why_down)
                    codes, _ = await new.get(pack(pages))
                    assert set(codes) == {Code.ABSENT}
                stop = True
                assert donation.check() == 0

    run(test)


def test_many_at_once(rng: random.Random) -> None:
    """Several owners put, get and drop at the same time, each its own pages, as a dict has them."""

    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (donor, address):

                async def owner(number: int, rng: random.Random) -> None:
                    model: dict[Page, bytes] = {}
                    async with linked(address, f"owner{number}") as link:
                        for step in range(60):
                            pages = make_pages(rng, rng.randrange(1, 30), 50 * step, 1000 * step)
                            sealed = [make_sealed(rng, page) for page in pages]
                            codes = await link.put(pack(pages), b"".join(sealed))
                            told = zip(pages, sealed, codes, strict=True)
                            model |= {page: data for page, data, code in told if code == Code.OK}
                            wanted = rng.sample(sorted(model), min(20, len(model)))
                            codes, payload = await link.get(pack(wanted))
                            assert not any(codes)
                            assert payload == b"".join(model[page] for page in wanted)
                            gone = wanted[: len(wanted) // 2]
                            if gone:
                                assert await link.drop(pack(gone)) == len(gone)
                            for page in gone:
                                del model[page]

                await asyncio.gather(*(owner(n, random.Random(rng.random())) for n in range(4)))
                donor.tick()
                assert donation.check() == 0

    run(test)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_and_descriptors_go_with_their_connections() -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (donor, address):
                gc.collect()  # what earlier tests have left is not to go in the middle
                before = threads(), len(os.listdir("/proc/self/fd"))
                for _ in range(20):
                    async with linked(address):
                        assert threads() > before[0]
                    await wait_until("it is gone", lambda: not donor._connections)
                await wait_until(
                    "all is as before",
                    lambda: (threads(), len(os.listdir("/proc/self/fd"))) == before,
                )

    run(test)


def test_a_peer_that_is_slow_with_a_put_holds_nobody_up(rng: random.Random) -> None:
    """Half a put of ours has a deadline as any other message has."""

    async def test() -> None:
        with opened_donation() as donation:
            options = DonorOptions("lender", channel=QUICK.channel)
            async with listening(donation, options) as (donor, address), linked(address) as link:
                script = Script(rng)
                _, writer = await asyncio.open_connection(address.host, address.port)
                writer.write(script.request("hello", *Hello("slow", 3).params()))
                writer.write(script.put()[:-1])
                ends = [end for end in donor._connections if end.owner != "owner"]
                await wait_until("half is there", lambda: any(e._times()[1] for e in ends))
                assert not any(
                    await link.put(pack(script.pages[:1]), script.sealed[script.pages[0]])
                )
                writer.close()

    run(test)


def test_a_flood_of_odd_gets_is_answered_as_it_is_read(rng: random.Random) -> None:
    """Each answer is as large as the high-water mark: the session is paused, and goes on."""

    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (donor, address), linked(address, "raw", 3) as link:
                pages = [Page(0, i, 1, 4095 << 4) for i in range(BATCH_PAGES)]
                sealed = b"".join(make_sealed(rng, page) for page in pages)
                assert not any(await link.put(pack(pages), sealed))
                hello = encode(Request(0, "hello", Hello("raw", 3).params()), PEER_LIMITS)
                odd = b"".join(
                    b"\x94\x00\xce"
                    + n.to_bytes(4, "big")
                    + b"\xa3get\x91\xc5\x08\x00"
                    + pack(pages)
                    for n in range(1, 31)
                )
                reader, writer = await asyncio.open_connection(
                    address.host, address.port, limit=1 << 16
                )
                writer.write(hello + odd)
                ends = [end for end in donor._connections if end.row >= 0]
                await wait_until(
                    "it is stuck", lambda: any(e._times()[2] for e in donor._connections)
                )
                assert len(ends) == 1
                decoder, answers = Decoder(PEER_LIMITS), 0
                while answers < 31:
                    decoder.receive(await reader.read(1 << 16))
                    while (message := decoder.next_message()) is not NEED_DATA:
                        assert isinstance(message, Response)
                        assert message.msgid == answers
                        assert not answers or message.result[2] == sealed
                        answers += 1
                writer.close()

    run(test)
