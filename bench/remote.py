"""Pages from another node's RAM, against a bare TCP exchange of the same sizes written in C.

    owner (this process, PeerLink) --get: 1 page, or 32 in a batch--> zcache node (a process)
    asker (tcpecho.c)              --as many bytes each way--------> answerer (tcpecho.c)
    asyncio protocol               --as many bytes each way--------> asyncio protocol

All over loopback, plain, and ours with TLS on both sides too; one exchange open at a time, in
turn in every round.  The third says what the event loop alone costs: nothing built on it can be
faster.  The pages have the lengths that real ones have with lz4, and 24 bytes of seal more; what
sealing itself costs is the owner's (crypt).  Ratios are taken in each round.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from bench.build import program
from bench.report import Goal, Section, figure
from bench.servers import ROOT
from bench.setup import Setup
from cluster import certificates
from cluster.lending import HEAP_BYTES
from cluster.peeraddress import PeerAddress
from cluster.peerlink import PeerLink
from cluster.peersocket import context
from cluster.peerwire import (
    PEER_LIMITS,
    Code,
    Health,
    Hello,
    LinkState,
    Offer,
    Page,
    pack,
    payload_bytes,
)
from cluster.wire import Request, Response, encode
from zcache_core.codec import Codec
from zcache_core.process import keep_heap

PAGE_BYTES = 4096
BATCHES = (1, 32)
HELD_PAGES = 1024
LENT_BYTES = 64 << 20
START_S = 20.0
MOST = {1: 2.5, 32: 1.3}
ANSWERER = """
import asyncio, sys
ask, answer = int(sys.argv[1]), bytes(int(sys.argv[2]))

class Answerer(asyncio.Protocol):
    came = 0
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.came += len(data)
        if self.came == ask:
            self.came = 0
            self.transport.write(answer)

async def main():
    server = await asyncio.get_running_loop().create_server(Answerer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@contextmanager
def lending(folder: Path, tls: Path | None) -> Iterator[PeerAddress]:
    """`zcache node` on a free port of loopback."""
    folder.mkdir()
    control = folder / "node.ctl"
    words = ["--listen", "127.0.0.1:0", "--donate", str(LENT_BYTES), "--control", str(control)]
    words += ["--tls", str(tls)] if tls else []
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.lending", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"ZCACHE_RUNTIME_DIR": str(folder)},
    ) as process:
        try:
            assert process.stdout
            said = process.stdout.readline()
            yield PeerAddress.read("peers", said.rsplit(" on ", 1)[1].strip())
        finally:
            process.send_signal(signal.SIGTERM)


def sealed_pages(setup: Setup) -> list[Page]:
    """As many pages as are held, with the lengths of the corpus' first ones."""
    codec = Codec("lz4")
    found = []
    for number in range(HELD_PAGES):
        at = number * PAGE_BYTES % len(setup.pages)
        blob = codec.compress(bytes(setup.pages[at : at + PAGE_BYTES]))
        length = len(blob) if blob else PAGE_BYTES
        found.append(Page(0, number, 1, (length - 1) << 4))
    return found


def sizes(records: bytes) -> tuple[int, int]:
    """Bytes of a get and of its answer."""
    ask = encode(Request(1000, "get", [records]), PEER_LIMITS)
    n, payload = len(records) // 16, bytes(payload_bytes(records))
    offer = Offer(LENT_BYTES, LENT_BYTES // 2, Health.OK)
    answer = encode(Response(1000, None, [offer, bytes([Code.OK]) * n, payload]), PEER_LIMITS)
    return len(ask), len(answer)


def bare(ask: int, answer: int, seconds: float) -> dict[str, float]:
    """p50_us and p99_us of a bare exchange."""
    command = [str(program("tcpecho")), str(ask), str(answer), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


class _Asker(asyncio.Protocol):
    """One exchange at a time, nothing made of the bytes."""

    def __init__(self, answer: int) -> None:
        self._answer, self._came = answer, 0
        self.done: asyncio.Future[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        if self._came == self._answer:
            self._came = 0
            self.done.set_result(None)


async def looped(ask: int, answer: int, seconds: float) -> dict[str, float]:
    """The same exchange between two asyncio protocols, a process each."""
    command = [sys.executable, "-c", ANSWERER, str(ask), str(answer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port, loop = int(process.stdout.readline()), asyncio.get_running_loop()
            _, asker = await loop.create_connection(lambda: _Asker(answer), "127.0.0.1", port)
            request = bytes(ask)

            async def exchange() -> None:
                asker.done = loop.create_future()
                asker.transport.write(request)
                await asker.done

            return await timed(exchange, seconds)
        finally:
            process.kill()


async def gets(link: PeerLink, records: bytes, seconds: float) -> dict[str, float]:
    """p50_us and p99_us of getting this batch again and again."""

    async def exchange() -> None:
        codes, _ = await link.get(records)
        assert not any(codes)

    return await timed(exchange, seconds)


async def timed(exchange: Callable[[], Awaitable[None]], seconds: float) -> dict[str, float]:
    took = []
    before = time.perf_counter()
    end = before + seconds
    while before < end:
        await exchange()
        now = time.perf_counter()
        took.append(1e6 * (now - before))
        before = now
    took.sort()
    return {
        "requests": len(took),
        "p50_us": took[len(took) // 2],
        "p99_us": took[len(took) - 1 - len(took) // 100],
    }


async def linked(address: PeerAddress, tls: Path | None, pages: list[Page]) -> PeerLink:
    """A link to a node that holds these pages."""
    link = PeerLink(address, Hello("bench", 1), context(tls, False) if tls else None)
    link.start()
    deadline = time.monotonic() + START_S
    while link.state is not LinkState.UP:
        assert time.monotonic() < deadline, link.why_down
        await asyncio.sleep(0.01)
    for first in range(0, len(pages), max(BATCHES)):
        records = pack(pages[first : first + max(BATCHES)])
        codes = await link.put(records, os.urandom(payload_bytes(records)))
        assert not any(codes)
    return link


async def rounds(setup: Setup, links: dict[str, PeerLink], pages: list[Page]) -> dict[str, Any]:
    raw: dict[str, list[dict[str, float]]] = {}
    for number in range(setup.plan.rounds):
        for n in BATCHES:
            records = pack(pages[number * n : (number + 1) * n])
            ask, answer = sizes(records)
            raw.setdefault(f"bare, {n}", []).append(bare(ask, answer, setup.plan.seconds))
            found = await looped(ask, answer, setup.plan.seconds)
            raw.setdefault(f"asyncio alone, {n}", []).append(found)
            for name, link in links.items():
                found = await gets(link, records, setup.plan.seconds)
                raw.setdefault(f"{name}, {n}", []).append(found)
    return raw


def measure(setup: Setup) -> Section:
    head = ["", "p50", "p99", "of bare p50", "of bare p99"]
    section = Section("remote", "A page from another node's RAM, over loopback", head)
    keep_heap(HEAP_BYTES)  # as a node does
    pages = sealed_pages(setup)
    ca = setup.folder / "cluster"
    certificates.init(ca)
    folders = {name: certificates.add(ca, name).parent for name in ("lender", "bench")}
    with ExitStack() as stack:
        plain = stack.enter_context(lending(setup.folder / "plain", None))
        secure = stack.enter_context(lending(setup.folder / "secure", folders["lender"]))

        async def run() -> dict[str, Any]:
            links = {
                "plain": await linked(plain, None, pages),
                "TLS": await linked(secure, folders["bench"], pages),
            }
            try:
                return await rounds(setup, links, pages)
            finally:
                for link in links.values():
                    await link.stop()

        section.raw = asyncio.run(run())
    for n in BATCHES:
        for name in ("bare", "asyncio alone", "plain", "TLS"):
            _row(section, name, n)
    return section


def _row(section: Section, name: str, n: int) -> None:
    """One row, and the goal that belongs to it."""
    own, bare_ones = section.raw[f"{name}, {n}"], section.raw[f"bare, {n}"]
    cells = [statistics.median(one[key] for one in own) for key in ("p50_us", "p99_us")]
    ratios = [
        statistics.median(one[key] / other[key] for one, other in zip(own, bare_ones, strict=True))
        for key in ("p50_us", "p99_us")
    ]
    what = f"{n} page{'s' if n > 1 else ''}, {name}"
    section.rows.append(
        [what, *(f"{figure(us)} us" for us in cells), *(f"{ratio:.2f}" for ratio in ratios)]
    )
    if name in ("plain", "TLS"):
        text = "get p50, of a bare TCP exchange's"
        section.goals.append(Goal(f"remote: {what}", ratios[0], MOST[n], True, text))
