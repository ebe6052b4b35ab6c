"""Certificates on both sides: who has none of this cluster's, or an old one, gets nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster import certificates, peersocket
from cluster.donor import Donor, DonorOptions
from cluster.peeraddress import PeerAddress
from cluster.peerlink import PeerLink
from cluster.peersocket import context
from cluster.peerwire import Hello, LinkState, Page, pack
from tests.donor_helpers import QUICK, Calm, opened_donation, wait_until
from zcache_core.errors import ConfigError


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """A cluster of `lender` and `owner`."""
    folder = tmp_path / "cluster"
    certificates.init(folder)
    for name in ("lender", "owner"):
        certificates.add(folder, name)
    return folder


@contextlib.asynccontextmanager
async def lender(ca: Path) -> AsyncIterator[tuple[Donor, PeerAddress]]:
    with opened_donation() as donation:
        donor = Donor(donation, DonorOptions("lender"), Calm())
        tls = context(ca / "lender", server=True)
        address = PeerAddress.read("listen", "127.0.0.1:0")
        server, bound = await peersocket.serve(address, "listen", donor.connection, tls)
        try:
            yield donor, PeerAddress.read("peers", bound)
        finally:
            server.close()
            donor.close()


@contextlib.asynccontextmanager
async def owner(
    address: PeerAddress, tls: ssl.SSLContext | None, name: str = "owner"
) -> AsyncIterator[PeerLink]:
    link = PeerLink(address, Hello(name, 7), tls, QUICK)
    link.start()
    try:
        yield link
    finally:
        await link.stop()


def test_members_talk(ca: Path) -> None:
    async def test() -> None:
        async with (
            lender(ca) as (donor, address),
            owner(address, context(ca / "owner", server=False)) as link,
            owner(address, context(ca / "owner", server=False), "owner/swap") as second,
        ):
            await wait_until("up", lambda: link.state is second.state is LinkState.UP)
            records = pack([Page(0, 1, 2, 9 << 4)])
            assert await link.put(records, bytes(34)) == b"\0"
            assert await link.get(records) == (b"\0", bytes(34))
            assert await second.get(records) == (b"\1", b""), "an owner of its own"
            assert {end.peer_name for end in donor._connections} == {"owner"}

    asyncio.run(test())


def stranger(tmp_path: Path) -> ssl.SSLContext:
    other = tmp_path / "other"
    certificates.init(other)
    certificates.add(other, "owner")
    tls = context(other / "owner", server=False)
    tls.verify_mode = ssl.CERT_NONE  # it would talk to anybody
    return tls


def without_certificate(tmp_path: Path) -> ssl.SSLContext:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return tls


def expired(tmp_path: Path) -> ssl.SSLContext:
    certificates.add(tmp_path / "cluster", "old", days=-1)
    return context(tmp_path / "cluster" / "old", server=False)


def plain(tmp_path: Path) -> None:
    return None


@pytest.mark.parametrize("kind", [stranger, without_certificate, expired, plain])
def test_others_get_nothing(kind: object, ca: Path, tmp_path: Path) -> None:
    async def test() -> None:
        tls = kind(tmp_path)  # type: ignore[operator]
        async with lender(ca) as (donor, address), owner(address, tls) as link:
            await wait_until("refused", lambda: link.state is LinkState.DOWN)
            assert link.why_down
            assert not donor.donation.owners(), "nobody's hello was heard"
            assert not any(end.is_owner for end in donor._connections)

    asyncio.run(test())


def test_an_owner_refuses_a_donor_of_another_cluster(ca: Path, tmp_path: Path) -> None:
    async def test() -> None:
        other = tmp_path / "other"
        certificates.init(other)
        certificates.add(other, "owner")
        tls = context(other / "owner", server=False)
        async with lender(ca) as (_, address), owner(address, tls) as link:
            await wait_until("refused", lambda: "certificate" in link.why_down.lower())

    asyncio.run(test())


def test_nobody_takes_another_members_name(ca: Path) -> None:
    async def test() -> None:
        tls = context(ca / "owner", server=False)
        async with lender(ca) as (donor, address), owner(address, tls, "victim") as link:
            await wait_until("refused", lambda: "certificate is owner's" in link.why_down)
            assert not donor.donation.owners()

    asyncio.run(test())


def test_a_donor_has_its_certificates_name(ca: Path) -> None:
    async def test() -> None:
        certificates.add(ca, "thief")
        tls = context(ca / "owner", server=False)
        os.replace(ca / "thief" / "node.pem", ca / "lender" / "node.pem")
        async with lender(ca) as (_, address), owner(address, tls) as link:
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
    with pytest.raises(ConfigError, match="remove it first"):
        certificates.add(ca, "owner")
    with pytest.raises(ConfigError, match="no name of a node"):
        certificates.add(ca, "../owner")
    with pytest.raises(ConfigError, match="cluster-init"):
        certificates.add(tmp_path / "nowhere", "a")
    with pytest.raises(ConfigError, match="cluster-add"):
        certificates.name_in(tmp_path)
    with pytest.raises(ConfigError, match="cluster-add"):
        context(tmp_path, server=True)
    (tmp_path / "node.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="cluster-add"):
        context(tmp_path, server=True)


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
