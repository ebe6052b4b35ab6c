"""Pages from another node's RAM, against a bare TCP exchange of the same sizes written in C.

    owner's peer tier (here) --ring--> its node process --get: 1 page, or 32--> zcache node
                             <--opened, checked-------- <-------------------- (two have a copy)
    asker (tcpecho.c)              --as many bytes each way--------> answerer (tcpecho.c)
    asyncio protocol               --as many bytes each way--------> asyncio protocol

All over loopback, plain, and ours with TLS on both sides too; one exchange open at a time, in
turn in every round.  Ours is all that a read from below waits for: one process more than the
others have, and every page opened.  The third row is what an event loop alone would cost.
The pages have the lengths that real ones have with lz4, and 24 bytes of seal more.  Ratios are
taken in each round.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bench.build import program
from bench.report import Goal, Section, figure
from bench.ringread import Reading, reading
from bench.servers import ROOT
from bench.setup import Setup
from cluster import certificates
from cluster.peeraddress import PeerAddress
from cluster.peerwire import (
    PEER_LIMITS,
    Code,
    Health,
    Offer,
    Page,
    pack,
    payload_bytes,
)
from cluster.wire import Request, Response, encode
from zcache_core.codec import Codec

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


@dataclass(frozen=True)
class Lender:
    """A `zcache node` that runs."""

    address: PeerAddress
    process: subprocess.Popen[str]


@contextmanager
def lending(folder: Path, tls: Path | None, lent_bytes: int = LENT_BYTES) -> Iterator[Lender]:
    """`zcache node` on a free port of loopback."""
    folder.mkdir(parents=True)
    control = folder / "node.ctl"
    words = ["--listen", "127.0.0.1:0", "--donate", str(lent_bytes), "--control", str(control)]
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
            yield Lender(PeerAddress.read("peers", said.rsplit(" on ", 1)[1].strip()), process)
        finally:
            process.send_signal(signal.SIGTERM)


def compressed_lengths(setup: Setup) -> list[int]:
    """Of as many pages as are held: those of the corpus' first ones."""
    codec = Codec("lz4")
    found = []
    for number in range(HELD_PAGES):
        at = number * PAGE_BYTES % len(setup.pages)
        blob = codec.compress(bytes(setup.pages[at : at + PAGE_BYTES]))
        found.append(len(blob) if blob else PAGE_BYTES)
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


def rounds(setup: Setup, owners: dict[str, Reading], lengths: list[int]) -> dict[str, Any]:
    raw: dict[str, list[dict[str, float]]] = {}
    seconds = setup.plan.seconds
    for number in range(setup.plan.rounds):
        for n in BATCHES:
            first = number * n
            pages = [Page(0, i, 1, (lengths[i] - 1) << 4) for i in range(first, first + n)]
            ask, answer = sizes(pack(pages))
            raw.setdefault(f"bare, {n}", []).append(bare(ask, answer, seconds))
            found = asyncio.run(looped(ask, answer, seconds))
            raw.setdefault(f"asyncio alone, {n}", []).append(found)
            for name, owner in owners.items():
                raw.setdefault(f"{name}, {n}", []).append(owner.gets(first, n, seconds))
    return raw


def measure(setup: Setup) -> Section:
    head = ["", "p50", "p99", "of bare p50", "of bare p99"]
    section = Section("remote", "A page from another node's RAM, over loopback", head)
    lengths = compressed_lengths(setup)
    ca = setup.folder / "cluster"
    certificates.init(ca)
    named = {name: certificates.add(ca, name).parent for name in ("node0", "node1", "owner")}
    with ExitStack() as stack:
        owners = {}
        for kind, tls in (("plain", False), ("TLS", True)):
            addresses = [
                stack.enter_context(
                    lending(setup.folder / f"{kind}{n}", named[f"node{n}"] if tls else None)
                ).address
                for n in range(2)
            ]
            own = named["owner"] if tls else None
            owners[kind] = stack.enter_context(reading(setup.folder, addresses, own, lengths))
        section.raw = rounds(setup, owners, lengths)
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
