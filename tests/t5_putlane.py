"""Puts that go without the session: each gets its own answer, whatever a donor does."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import peerwire
from cluster.courier import Courier
from cluster.link import RpcError
from cluster.peeraddress import PeerAddress
from cluster.peerchannel import Channel
from cluster.peerlink import LinkTimes, PeerLink
from cluster.peerwire import (
    BATCH_PAGES,
    Health,
    Hello,
    LinkState,
    Offer,
    Page,
    PeerError,
    Welcome,
    pack,
    payload_bytes,
    unpack,
)
from cluster.wire import Request
from tests.donor_helpers import asyncio_serve
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.ringside import RingSide

OFFER = Offer(1 << 30, 5, Health.OK)
PUT_MSGID = 3 << 30
LANE_PUTS = 8
CALL_S = 0.3
MANNERS = ["well"] * 6 + ["late", "behind a notice", "an error", "a new health"]


def codes_of(records: bytes) -> bytes:
    """What the donor says of these pages: no other batch has the same."""
    return bytes(page.page % 5 for page in unpack(records))


class Donor:
    """How puts are answered now, and by which numbers they came."""

    def __init__(self) -> None:
        self.manner = "well"
        self.rng: random.Random | None = None  # each put in another manner
        self.numbers: list[int] = []
        self.unanswered: list[tuple[End, Request]] = []

    def answer_late(self) -> None:
        late, self.unanswered = self.unanswered, []
        for end, request in late:
            end.answer_now(request, "well")


class End(Channel):
    """The donor's end of a connection."""

    def __init__(self, donor: Donor) -> None:
        super().__init__()
        self.donor = donor

    def _answer(self, request: Request) -> None:
        if request.method != "put":
            super()._answer(request)
            return
        donor = self.donor
        donor.numbers.append(request.msgid)
        manner = donor.rng.choice(MANNERS) if donor.rng else donor.manner
        if manner == "the end":
            self.close("enough")
        elif manner == "late":
            donor.unanswered.append((self, request))
        else:
            self.answer_now(request, manner)

    def answer_now(self, request: Request, manner: str) -> None:
        if self._transport is None or self.closed_because:
            return
        records, _ = peerwire.put(request.params)
        offer, codes = [*OFFER[:2], 7 if manner == "a new health" else 0], codes_of(records)
        if manner == "one code more":
            codes += b"\0"
        if manner in ("an error", "deaf"):
            code = "turn_over" if manner == "deaf" else "internal"
            data = self._session.refuse(request.msgid, RpcError(code, "not today").as_wire())
        else:
            data = self._session.respond(request.msgid, [offer, codes])
        if manner == "behind a notice":
            data = self._session.notify("offer", OFFER) + data
        self._transport.write(data)

    def request(self, method: str, params: list[Any]) -> Any:
        return Welcome("one", 7, OFFER).result() if method == "hello" else [OFFER]


@pytest.fixture
def courier() -> Iterator[Courier]:
    memory = MemoryFile.create(None, 64 * 4096, 16 * 4096)
    tier = PeerTier(memory)
    ring = RingSide(tier.fd, tier.wake_fd)
    yield Courier(ring)
    ring.close()
    memory.close()


@asynccontextmanager
async def linked(folder: Path, courier: Courier) -> AsyncIterator[tuple[Donor, PeerLink]]:
    donor = Donor()
    address = PeerAddress.read("listen", str(folder / "donor"))
    server, bound = await asyncio_serve(address, functools.partial(End, donor))
    times = LinkTimes(call_s=CALL_S, retry_first_s=0.01, ping_s=60.0)
    link = PeerLink(PeerAddress.read("peers", bound), Hello("me", 9), times=times, courier=courier)
    link.start()
    try:
        await until(lambda: link.state is LinkState.UP)
        yield donor, link
    finally:
        await link.stop()
        server.close()


def is_suspect(link: PeerLink) -> bool:
    return link.state is LinkState.SUSPECT


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def batch(rng: random.Random, n: int) -> tuple[bytes, bytes]:
    lengths = [(rng.randrange(1, 4096)) << 4 for _ in range(n)]
    records = pack(Page(0, rng.randrange(1 << 20), rng.randrange(1 << 52), at) for at in lengths)
    return records, rng.randbytes(payload_bytes(records))


async def check(link: PeerLink, rng: random.Random, n: int = 3) -> None:
    records, payload = batch(rng, n)
    assert await link.put(records, payload) == codes_of(records)


@pytest.mark.parametrize("n", [1, 2, 17, BATCH_PAGES])
def test_a_put_goes_without_the_session(
    n: int, tmp_path: Path, courier: Courier, rng: random.Random
) -> None:
    async def work() -> None:
        async with linked(tmp_path, courier) as (donor, link):
            for _ in range(3):
                await check(link, rng, n)
                assert link.offer == OFFER
            at_once = LANE_PUTS if n < BATCH_PAGES else 1  # (more than the socket takes would wait)
            await asyncio.gather(*(check(link, rng, n) for _ in range(at_once)))
            assert min(donor.numbers) >= PUT_MSGID
            assert len(set(donor.numbers)) == 3 + at_once
            # and more than there is room for
            await asyncio.gather(*(check(link, rng, n) for _ in range(LANE_PUTS + 3)))
            assert min(donor.numbers) < PUT_MSGID

    asyncio.run(work())


def test_answers_of_other_shapes(tmp_path: Path, courier: Courier, rng: random.Random) -> None:
    """The session reads them, and they mean what they always did."""

    async def work() -> None:
        async with linked(tmp_path, courier) as (donor, link):
            donor.manner = "behind a notice"
            await check(link, rng)
            donor.manner = "a new health"
            await check(link, rng)
            assert link.offer.health is Health.SHORT
            donor.manner = "an error"
            with pytest.raises(PeerError, match="not today"):
                await check(link, rng)
            donor.manner = "well"
            await check(link, rng)
            assert link.state is LinkState.UP
            assert min(donor.numbers) >= PUT_MSGID

    asyncio.run(work())


@pytest.mark.parametrize("manner", ["the end", "one code more", "deaf"])
def test_a_connection_that_is_of_no_use(
    manner: str, tmp_path: Path, courier: Courier, rng: random.Random
) -> None:
    """All who wait there hear of it at once, and it is dialled anew."""

    async def work() -> None:
        async with linked(tmp_path, courier) as (donor, link):
            donor.manner = "late"
            waiting = [asyncio.create_task(check(link, rng)) for _ in range(3)]
            await until(lambda: len(donor.unanswered) == 3)
            donor.manner = manner
            with pytest.raises(PeerError):
                await check(link, rng)
            for task in waiting:
                with pytest.raises(PeerError, match=r"did not answer"):
                    await task
            donor.manner = "well"
            await until(lambda: link.state is LinkState.UP)
            await check(link, rng)
            assert min(donor.numbers) >= PUT_MSGID

    asyncio.run(work())


def test_a_donor_that_is_late(tmp_path: Path, courier: Courier, rng: random.Random) -> None:
    """Its answers are nobody's; until they are there, puts go through the session."""

    async def work() -> None:
        async with linked(tmp_path, courier) as (donor, link):
            donor.manner = "late"
            tasks = [asyncio.create_task(check(link, rng)) for _ in range(LANE_PUTS)]
            for task in tasks:
                with pytest.raises(PeerError, match="no answer to put"):
                    await task
            assert is_suspect(link)
            donor.manner, donor.numbers = "well", []
            await check(link, rng)
            assert not is_suspect(link)
            assert max(donor.numbers) < PUT_MSGID
            donor.answer_late()
            await check(link, rng)  # (the answers to the others are before its own)
            donor.numbers = []
            await check(link, rng)
            assert min(donor.numbers) >= PUT_MSGID

    asyncio.run(work())


def test_each_has_its_own_answer(tmp_path: Path, courier: Courier, rng: random.Random) -> None:
    """Many at once, some given up, answered late, in the session's turn, or with an error."""

    async def one(donor: Donor, link: PeerLink, seed: int) -> str:
        mine = random.Random(seed)
        await asyncio.sleep(mine.random() / 10)
        if mine.random() < 0.3:
            donor.answer_late()
        try:
            async with asyncio.timeout(mine.choice([0.001, 0.02, 1.0])):
                await check(link, mine, mine.choice([1, 5, 128]))
        except TimeoutError:
            return "given up"
        except PeerError:
            return "failed"
        return "answered"

    async def work() -> list[str]:
        async with linked(tmp_path, courier) as (donor, link):
            donor.rng = rng
            ended: list[str] = []
            for _ in range(6):
                seeds = [rng.randrange(1 << 30) for _ in range(40)]
                ended += await asyncio.gather(*(one(donor, link, seed) for seed in seeds))
            assert max(donor.numbers) >= PUT_MSGID
            donor.rng = None
            donor.answer_late()
            await check(link, rng)
            return ended

    ended = asyncio.run(work())
    assert ended.count("answered") > 50, ended
    assert ended.count("given up") > 5, ended
