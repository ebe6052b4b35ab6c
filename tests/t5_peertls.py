"""Certificates on both sides: who has none of this cluster's, or an old one, gets nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import ssl
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import certificates
from cluster.donor import Donor
from cluster.peeraddress import PeerAddress
from cluster.peerlink import LinkTimes, PeerLink
from cluster.peersocket import rules
from cluster.peerwire import PEER_LIMITS, Code, Hello, LinkState, Page, PeerError, pack
from cluster.tls import TlsRules
from cluster.wire import Request, encode
from tests.donor_helpers import (
    QUICK,
    listening,
    make_cluster,
    make_pages,
    make_sealed,
    opened_donation,
    python_tls,
    wait_until,
)
from zcache_core.errors import ConfigError

HELLO = encode(Request(0, "hello", Hello("owner", 7).params()), PEER_LIMITS)
RECORDS, SEALED = pack([Page(0, 1, 2, 9 << 4)]), bytes(34)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    return make_cluster(tmp_path / "cluster")


@contextlib.asynccontextmanager
async def lender(ca: Path) -> AsyncIterator[tuple[Donor, PeerAddress]]:
    with opened_donation() as donation:
        async with listening(donation, tls=rules(ca / "lender", server=True)) as found:
            yield found


@contextlib.asynccontextmanager
async def owner(
    address: PeerAddress, tls: TlsRules | None, name: str = "owner", times: LinkTimes = QUICK
) -> AsyncIterator[PeerLink]:
    link = PeerLink(address, Hello(name, 7), tls, times)
    link.start()
    try:
        yield link
    finally:
        await link.stop()


def of_owner(ca: Path) -> TlsRules:
    return rules(ca / "owner", server=False)


def test_members_talk(ca: Path) -> None:
    async def test() -> None:
        async with (
            lender(ca) as (donor, address),
            owner(address, of_owner(ca)) as link,
            owner(address, of_owner(ca), "owner/swap") as second,
        ):
            await wait_until("up", lambda: link.state is second.state is LinkState.UP)
            assert await link.put(RECORDS, SEALED) == b"\0"
            assert await link.get(RECORDS) == (b"\0", SEALED)
            assert await second.get(RECORDS) == (b"\1", b""), "an owner of its own"
            assert {end.peer_name for end in donor._connections} == {"owner"}

    asyncio.run(test())


async def dialled(address: PeerAddress, tls: ssl.SSLContext | None) -> bytes:
    """What the donor answers to a hello over Python's own TLS; b"" when nothing."""
    answer = b""
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection(
            address.host, address.port, ssl=tls, server_hostname="lender" if tls else None
        )
        writer.write(HELLO)
        async with asyncio.timeout(20):
            answer = await reader.read(1000)
        writer.close()
    return answer


def member(ca: Path) -> ssl.SSLContext:
    return python_tls(ca / "owner", server=False)


def stranger(ca: Path) -> ssl.SSLContext:
    """A node of another cluster, which would talk to anybody."""
    other = ca.parent / "other"
    certificates.init(other)
    certificates.add(other, "owner")
    return careless(python_tls(other / "owner", server=False))


def careless(tls: ssl.SSLContext) -> ssl.SSLContext:
    tls.verify_mode = ssl.CERT_NONE
    return tls


def without_certificate(ca: Path) -> ssl.SSLContext:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    return careless(tls)


def expired(ca: Path) -> ssl.SSLContext:
    certificates.add(ca, "old", days=-1)
    return python_tls(ca / "old", server=False)


def of_the_node_itself(ca: Path) -> ssl.SSLContext:
    """A certificate that a node signed, and not the CA."""
    forged = ca.parent / "forged"
    forged.mkdir()
    pem = (ca / "owner" / "node.pem").read_text()
    key, _, rest = pem.partition("-----BEGIN CERTIFICATE-----")
    (forged / "ca.key").write_text(key)
    (forged / "ca.pem").write_text("-----BEGIN CERTIFICATE-----" + rest.split("-----BEGIN")[0])
    certificates.add(forged, "victim")
    return careless(python_tls(forged / "victim", server=False))


def older_tls(ca: Path) -> ssl.SSLContext:
    tls = python_tls(ca / "owner", server=False)
    tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_2
    return tls


def plain(ca: Path) -> None:
    return None


OTHERS = [stranger, without_certificate, expired, of_the_node_itself, older_tls, plain]


@pytest.mark.parametrize("kind", [member, *OTHERS])
def test_others_get_nothing(kind: object, ca: Path) -> None:
    async def test() -> None:
        tls = kind(ca)  # type: ignore[operator]
        async with lender(ca) as (donor, address):
            answer = await dialled(address, tls)
            if kind is member:
                assert answer[:4] == b"\x94\x01\x00\xc0", "it is welcome"
            else:
                assert b"\x94\x01" not in answer, "at most an alert"
                assert not donor.donation.owners(), "nobody's hello was heard"
                assert not donor._connections

    asyncio.run(test())


@pytest.mark.parametrize("kind", ["another cluster's", "expired", "plain"])
def test_an_owner_of_ours_is_told_why_it_is_not_let_in(kind: str, ca: Path) -> None:
    async def test() -> None:
        if kind == "another cluster's":
            tls = of_owner(make_cluster(ca.parent / "other"))
        else:
            certificates.add(ca, "old", days=-1)
            tls = rules(ca / "old", server=False)
        async with lender(ca) as (donor, address):
            async with owner(address, tls if kind != "plain" else None) as link:
                if kind == "plain":
                    await wait_until("refused", lambda: link.why_down)
                else:
                    await wait_until("refused", lambda: "TLS: " in link.why_down)
                    assert "certificate" in link.why_down
            assert not donor.donation.owners()

    asyncio.run(test())


@contextlib.asynccontextmanager
async def pythons_lender(tls: ssl.SSLContext) -> AsyncIterator[tuple[list[bytes], PeerAddress]]:
    """A server over Python's TLS; what it has heard."""
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            heard.append(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0, ssl=tls)
    try:
        port = server.sockets[0].getsockname()[1]
        yield heard, PeerAddress.read("peers", f"127.0.0.1:{port}")
    finally:
        server.close()


@pytest.mark.parametrize("kind", ["member", "another cluster's", "expired", "self-made"])
def test_an_owner_refuses_a_donor_without_a_certificate_of_ours(kind: str, ca: Path) -> None:
    async def test() -> None:
        folder = ca / "lender"
        if kind == "another cluster's":
            folder = make_cluster(ca.parent / "other") / "lender"
        elif kind == "expired":
            certificates.add(ca, "old", days=-1)
            folder = ca / "old"
        elif kind == "self-made":
            made = ca.parent / "alone"
            certificates.init(made)
            folder = made / "it"
            folder.mkdir()
            text = (made / "ca.key").read_text() + 2 * (made / "ca.pem").read_text()
            (folder / "node.pem").write_text(text)
        tls = careless(python_tls(folder, server=True))
        async with pythons_lender(tls) as (heard, address), owner(address, of_owner(ca)) as link:
            if kind == "member":
                await wait_until("hello", lambda: any(b"hello" in said for said in heard))
            else:
                await wait_until("refused", lambda: "TLS: " in link.why_down)
                assert "certificate" in link.why_down
                assert not any(heard)

    asyncio.run(test())


class Meddler:
    """Between owner and donor: passes on what is said, or something else, or nothing more."""

    def __init__(self, rng: random.Random, donor: PeerAddress) -> None:
        self.rng, self._donor, self.calm, self.meddled = rng, donor, True, 0
        self.open = 0

    async def start(self) -> PeerAddress:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return PeerAddress.read("peers", f"127.0.0.1:{port}")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        there, back = await asyncio.open_connection(self._donor.host, self._donor.port)
        passing = [
            asyncio.ensure_future(self._pass(one, other))
            for one, other in ((reader, back), (there, writer))
        ]
        await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        for task, its in zip(passing, (back, writer), strict=True):
            task.cancel()
            its.transport.abort()
        self.open -= 1

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                told = data if self.calm or self.rng.random() < 0.9 else self._meddle(data)
                self.meddled += told != data
                writer.write(told)
                await writer.drain()
                if len(told) < len(data):
                    break

    def _meddle(self, data: bytes) -> bytes:
        at, rng = self.rng.randrange(len(data)), self.rng
        match rng.randrange(5):
            case 0:
                return data[:at]
            case 1:
                return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 2:
                return data + data  # said twice
            case 3:
                return rng.randbytes(rng.randrange(1, 40)) + data
            case _:  # the longest record there may be, and longer ones
                return b"\x17\x03\x03" + rng.choice([b"\x41\x00", b"\xff\xff"]) + data

    def stop(self) -> None:
        """After the owner: its connections end with it."""
        self._server.close()


def test_whoever_meddles_ends_the_connection_and_nothing_else(ca: Path, rng: random.Random) -> None:
    """Every page that is answered is the right one; the link is there again whenever it can be."""

    async def test() -> None:
        async with lender(ca) as (donor, address):
            meddler = Meddler(rng, address)
            times = replace(QUICK, call_s=0.2, dead_s=0.3)
            async with owner(await meddler.start(), of_owner(ca), times=times) as link:
                model: dict[Page, bytes] = {}
                for step in range(100):
                    meddler.calm = True
                    await wait_until("it is up", lambda: link.state is LinkState.UP)
                    meddler.calm = False
                    pages = make_pages(rng, rng.randrange(1, 40), 50 * step, 1000 * step)
                    sealed = [make_sealed(rng, page) for page in pages]
                    with contextlib.suppress(PeerError):
                        codes = await link.put(pack(pages), b"".join(sealed))
                        told = zip(pages, sealed, codes, strict=True)
                        model |= {page: data for page, data, code in told if code == Code.OK}
                    wanted = rng.sample(sorted(model), min(20, len(model)))
                    if wanted:
                        with contextlib.suppress(PeerError):
                            codes, payload = await link.get(pack(wanted))
                            assert not any(codes)
                            assert payload == b"".join(model[page] for page in wanted)
                    await asyncio.sleep(0)
                assert meddler.meddled > 10
                assert model
            await wait_until("all are closed", lambda: not meddler.open)
            meddler.stop()
            assert donor.donation.check() == 0

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await test()

    asyncio.run(bounded())


def test_nobody_takes_another_members_name(ca: Path) -> None:
    async def test() -> None:
        async with (
            lender(ca) as (donor, address),
            owner(address, of_owner(ca), "victim") as link,
        ):
            await wait_until("refused", lambda: "certificate is owner's" in link.why_down)
            assert not donor.donation.owners()

    asyncio.run(test())


def test_a_donor_has_its_certificates_name(ca: Path) -> None:
    async def test() -> None:
        certificates.add(ca, "thief")
        os.replace(ca / "thief" / "node.pem", ca / "lender" / "node.pem")
        async with lender(ca) as (_, address), owner(address, of_owner(ca)) as link:
            await wait_until("refused", lambda: "certificate is thief's" in link.why_down)

    asyncio.run(test())


def test_files(ca: Path, tmp_path: Path) -> None:
    for private in (ca / "ca.key", ca / "owner" / "node.pem"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert certificates.name_in(ca / "owner") == "owner"
    (ca / "ca.pem").rename(ca / "kept")
    with pytest.raises(ConfigError, match=r"interrupted; remove .*ca\.key"):
        certificates.init(ca)
    (ca / "kept").rename(ca / "ca.pem")
    with pytest.raises(ConfigError, match="has a CA already"):
        certificates.init(ca)
    (ca / "ca.key").rename(ca / "kept")
    with pytest.raises(ConfigError, match=r"without its key; bring .*ca\.key back"):
        certificates.init(ca)
    with pytest.raises(ConfigError, match=r"without its key; bring .*ca\.key back"):
        certificates.add(ca, "b")
    (ca / "kept").rename(ca / "ca.key")
    with pytest.raises(ConfigError, match="remove it first"):
        certificates.add(ca, "owner")
    with pytest.raises(ConfigError, match="no name of a node"):
        certificates.add(ca, "../owner")
    with pytest.raises(ConfigError, match="cluster-init"):
        certificates.add(tmp_path / "nowhere", "a")
    with pytest.raises(ConfigError, match="cluster-add"):
        certificates.name_in(tmp_path)
    with pytest.raises(ConfigError, match="cluster-add"):
        rules(tmp_path, server=True)
    node = tmp_path / "node.pem"
    node.write_text("nonsense")
    with pytest.raises(ConfigError, match="cluster-add"):
        rules(tmp_path, server=True)
    certificates.add(ca, "another")
    key, *rest = (ca / "owner" / "node.pem").read_text().partition("-----BEGIN CERTIFICATE")
    other, *_ = (ca / "another" / "node.pem").read_text().partition("-----BEGIN CERTIFICATE")
    for text in (other + "".join(rest), key + "".join(rest).replace("M", "N", 3)):
        node.write_text(text)
        with pytest.raises(ConfigError, match="does not hold a key, a certificate"):
            rules(tmp_path, server=True)


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("/run/peer", True),
        ("127.0.0.1:7900", True),
        ("127.9.9.9:7900", True),
        ("[::1]:7900", True),
        ("localhost:7900", True),
        ("7900", True),
        ("0.0.0.0:7900", False),
        ("[::]:7900", False),
        ("10.0.0.7:7900", False),
        ("rack-7.example:7900", False),
    ],
)
def test_plain_only_where_nobody_else_is(text: str, stays: bool) -> None:
    address = PeerAddress.read("listen", text)
    address.require_safe("listen", "folder")
    if stays:
        address.require_safe("listen", None)
    else:
        with pytest.raises(ConfigError, match="it needs certificates; write tls=FOLDER"):
            address.require_safe("listen", None)
        with pytest.raises(ConfigError, match="it needs certificates"):
            PeerLink(address, Hello("owner", 1))
