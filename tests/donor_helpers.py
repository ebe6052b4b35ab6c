"""What the tests of donors share: sealed-looking pages, a donation, a donor that listens."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from cluster import addresses, certificates, laneport, unixsock
from cluster.donor import Donor, DonorOptions
from cluster.generosity import Generosity
from cluster.peeraddress import NODE, PeerAddress, certificates_in
from cluster.peerchannel import Channel, ChannelOptions
from cluster.peerlink import LinkTimes, PeerLink
from cluster.peerwire import Hello, LinkState, Page, sealed_bytes
from cluster.tls import TlsRules
from zcache_core.donation import DEVICE, Donation, sizes
from zcache_core.memfile import MemoryFile

LENT_BYTES = 16 << 20
QUICK = LinkTimes(dial_s=5.0, call_s=5.0, dead_s=5.0, retry_first_s=0.01, retry_most_s=0.05)


WAIT_S = 30.0


async def wait_until(what: str, condition: Callable[[], Any]) -> None:
    """Until it is true; fails after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        await asyncio.sleep(0.005)


class Calm(Generosity):
    """A machine that is short of memory when the test says so."""

    pressed = False

    def _is_pressed(self, seconds: float) -> bool:
        return self.pressed


def make_pages(rng: random.Random, n: int, first: int = 0, version: int = 1) -> list[Page]:
    """Pages of all lengths, those that fill a frame and nearly do among them."""
    lengths = [1, 64, 1000, 2000, 4008, 4009, 4095, 4096, rng.randrange(1, 4097)]
    pages = []
    for i in range(n):
        length_codec = (rng.choice(lengths) - 1) << 4 | rng.randrange(3)
        pages.append(Page(rng.randrange(8), first + i, version + i, length_codec))
    return pages


def make_sealed(rng: random.Random, page: Page) -> bytes:
    return rng.randbytes(sealed_bytes(page.length_codec))


def create_memory(name: str | None = None, lent_bytes: int = LENT_BYTES) -> MemoryFile:
    device_bytes, pool_bytes = sizes(lent_bytes)
    return MemoryFile.create(name, device_bytes, pool_bytes, [(DEVICE, device_bytes)])


@contextlib.contextmanager
def opened_donation(name: str | None = None, lent_bytes: int = LENT_BYTES) -> Iterator[Donation]:
    """A started donation on a memory file of its own; both gone after."""
    memory = create_memory(name, lent_bytes)
    donation = Donation(memory)
    donation.start()
    try:
        yield donation
    finally:
        donation.stop()
        memory.destroy()


# ---- asyncio's own connections and Python's own TLS: another make of the same ---------------


async def asyncio_connect(address: PeerAddress, protocol: Callable[[], asyncio.Protocol]) -> None:
    """Dial it, plain."""
    loop = asyncio.get_running_loop()
    if address.path:
        await loop.create_unix_connection(protocol, address.path)
    else:
        await loop.create_connection(protocol, address.host, address.port)


async def asyncio_serve(
    address: PeerAddress, protocol: Callable[[], asyncio.Protocol]
) -> tuple[asyncio.Server, str]:
    """Listen there, plain; what listens, and where."""
    loop = asyncio.get_running_loop()
    if address.path:
        sock = unixsock.listen(address.path, "the peers' socket", "listen=PATH", 64)
        return await loop.create_unix_server(protocol, sock=sock), address.path
    sock = addresses.listen("listen", str(address))
    return await loop.create_server(protocol, sock=sock), addresses.bound_address(sock)


def python_tls(folder: Path, server: bool) -> ssl.SSLContext:
    """The rules of peersocket.rules, as Python's ssl has them."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(folder / NODE)
    made.load_verify_locations(cadata=certificates_in(folder)[-1])
    return made


def make_cluster(folder: Path) -> Path:
    """A cluster of `lender` and `owner`."""
    certificates.init(folder)
    for name in ("lender", "owner"):
        certificates.add(folder, name)
    return folder


@contextlib.asynccontextmanager
async def listening(
    donation: Donation,
    options: DonorOptions | None = None,
    where: str = "127.0.0.1:0",
    lanes: bool = True,
    tls: TlsRules | None = None,
) -> AsyncIterator[tuple[Donor, PeerAddress]]:
    """A donor that answers at an address; nobody ticks it but the test.

    Its connections have lanes, or are asyncio's and plain.
    """
    donor = Donor(donation, options or DonorOptions("lender"), Calm())
    address = PeerAddress.read("listen", where)
    server: laneport.Listening | asyncio.Server
    if lanes:
        server, bound = await laneport.serve(address, "listen", donor.connection, tls)
    else:
        server, bound = await asyncio_serve(address, donor.connection)
    try:
        yield donor, PeerAddress.read("peers", bound)
    finally:
        server.close()
        donor.close()


@contextlib.asynccontextmanager
async def linked(
    address: PeerAddress,
    owner: str = "owner",
    epoch: int = 7,
    times: LinkTimes = QUICK,
    tls: TlsRules | None = None,
) -> AsyncIterator[PeerLink]:
    """An owner's link that is up."""
    link = PeerLink(address, Hello(owner, epoch), tls, times)
    link.start()
    try:
        await wait_until("the link is up", lambda: link.state is LinkState.UP)
        yield link
    finally:
        await link.stop()


def short_channel() -> ChannelOptions:
    """Deadlines that a test can wait for."""
    return ChannelOptions(frame_s=0.1, write_s=0.1, idle_s=30.0, watch_s=0.02)


async def ask(address: PeerAddress, method: str, *params: Any) -> Any:
    """The answer of one call by somebody who has not said hello; its error as an exception."""
    channel = Channel()
    await asyncio_connect(address, lambda: channel)
    try:
        return await channel.call(method, *params, deadline_s=10)
    finally:
        channel.close("done")
