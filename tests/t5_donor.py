"""A donor and its owners over real sockets: pages, limits, recalls, bad and slow peers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.donor import CONNECTIONS, DonorOptions
from cluster.link import RpcError
from cluster.peeraddress import PeerAddress
from cluster.peerchannel import Channel
from cluster.peerlink import LinkTimes, PeerLink
from cluster.peerwire import (
    BATCH_PAGES,
    PEER_LIMITS,
    PROTOCOL,
    Code,
    Health,
    Hello,
    LinkState,
    Page,
    PeerError,
    pack,
    pieces,
    unpack,
)
from cluster.wire import Request, encode
from tests.donor_helpers import (
    QUICK,
    ask,
    asyncio_connect,
    asyncio_serve,
    linked,
    listening,
    make_pages,
    make_sealed,
    opened_donation,
    short_channel,
    wait_until,
)
from zcache_core import counters

HELLO = encode(Request(0, "hello", Hello("raw", 3).params()), PEER_LIMITS)
QUICK_DONOR = DonorOptions("lender", channel=short_channel())


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def put(link: PeerLink, pages: list[Page], rng: random.Random) -> list[bytes]:
    sealed = [make_sealed(rng, page) for page in pages]
    assert await link.put(pack(pages), b"".join(sealed)) == bytes(len(pages))
    return sealed


async def held(link: PeerLink) -> list[Page]:
    """Everything that the donor holds, as reconcile tells it."""
    cursor: int | None = 0
    found: list[Page] = []
    while cursor is not None:
        cursor, records = await link.reconcile(cursor)
        found += unpack(records)
    return found


@pytest.mark.parametrize("unix", [False, True])
def test_pages_go_and_come_back(rng: random.Random, unix: bool, tmp_path: Any) -> None:
    async def test() -> None:
        where = f"{tmp_path}/peer" if unix else "127.0.0.1:0"
        with opened_donation() as donation:
            async with listening(donation, where=where) as (_, address), linked(address) as link:
                assert (link.name, link.epoch) == ("lender", donation.memory.epoch)
                room = link.offer.room_bytes
                pages = make_pages(rng, BATCH_PAGES)
                sealed = await put(link, pages, rng)
                assert link.offer.held_bytes > 0
                assert link.offer.room_bytes < room
                missing = Page(0, 1, 77, 5)
                records = pack([*pages[:20], missing, *pages[20:40]])
                codes, payload = await link.get(records)
                wanted = [*sealed[:20], None, *sealed[20:40]]
                assert list(pieces(records, codes, payload)) == wanted
                assert codes[20] == Code.ABSENT
                assert await link.drop(pack([*pages[:100], missing])) == 100
                assert sorted(await held(link)) == sorted(pages[100:])
                assert (await link.stats())["foreign_pers_pages"] == BATCH_PAGES - 100
                await link.ping()
                assert link.latency_us > 0
                assert donation.check() == 0

    run(test)


def test_owners_do_not_meet_and_a_new_epoch_begins_empty(rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with (
                listening(donation) as (donor, address),
                linked(address, "one", 1) as one,
                linked(address, "two", 1) as two,
            ):
                pages = make_pages(rng, 30)
                mine, other = await put(one, pages, rng), await put(two, pages, rng)
                for link, sealed in ((one, mine), (two, other)):
                    assert (await link.get(pack(pages)))[1] == b"".join(sealed)
                async with linked(address, "one", 2) as again:
                    assert await held(again) == []
                    with pytest.raises(PeerError):
                        await one.get(pack(pages))
                    await wait_until("it says why", lambda: "another epoch" in one.why_down)
                    # A hello of the old one that comes late must not end the new one.
                    theirs = await put(again, pages, rng)
                    with pytest.raises(RpcError, match="another epoch by now"):
                        await ask(address, "hello", *Hello("one", 1).params())
                    assert (await again.get(pack(pages)))[1] == b"".join(theirs)
                donor.tick()
                assert (await two.get(pack(pages)))[1] == b"".join(other)
                assert donation.check() == 0

    run(test)


def test_quota_is_an_owners_own(rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            options = DonorOptions("lender", quota_bytes=8 * 4096)
            async with (
                listening(donation, options) as (_, address),
                linked(address) as link,
                linked(address, "other") as other,
            ):
                pages = [Page(0, i, 1, 4095 << 4) for i in range(20)]
                payload = b"".join(make_sealed(rng, page) for page in pages)
                codes = await link.put(pack(pages), payload)
                assert list(codes) == [Code.OK] * 8 + [Code.FULL] * 12
                assert link.offer.room_bytes == 0
                await other.ping()
                assert other.offer.room_bytes == 8 * 4096

    run(test)


def test_recall_and_drain(rng: random.Random) -> None:
    """An owner that obeys is empty in the end; one that does not keeps every page."""

    async def test() -> None:
        with opened_donation() as donation:
            async with (
                listening(donation) as (donor, address),
                linked(address, "good") as good,
                linked(address, "deaf") as deaf,
            ):
                obeying: set[asyncio.Task[int]] = set()
                good.on_recall = lambda link, records, _: obeying.add(
                    asyncio.ensure_future(link.drop(records))
                )
                pages = make_pages(rng, 100)
                await put(good, pages, rng)
                kept = await put(deaf, pages, rng)
                donor.drain(True)
                await wait_until("told", lambda: deaf.offer.health is Health.DRAINING)
                assert good.offer.room_bytes == 0
                assert set(await deaf.put(pack(pages[:2]), kept[0] + kept[1])) == {Code.LEAVING}

                for _ in range(200):
                    donor.tick()
                    await asyncio.sleep(0.01)
                    if good.offer.held_bytes == 0:
                        break
                assert await held(good) == []
                assert (await deaf.get(pack(pages)))[1] == b"".join(kept)
                donor.drain(False)
                donor.tick()
                await good.ping()
                assert good.offer.room_bytes > 0
                assert donation.check() == 0

    run(test)


def test_pressure_shrinks_the_offer_then_recalls(rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (donor, address), linked(address) as link:
                recalled: list[Page] = []
                link.on_recall = lambda _, records, left_s: recalled.extend(unpack(records))
                pages = [Page(0, i, 1, 4095 << 4) for i in range(1500)]
                for first in range(0, 1500, 100):
                    await put(link, pages[first : first + 100], rng)
                calm = donor._generosity
                calm.pressed = True  # type: ignore[attr-defined]
                donor.tick()
                await wait_until("an offer", lambda: link.offer.health is Health.SHORT)
                assert recalled == [], "first the offer"
                for _ in range(15):  # a quarter of the frames is left, half of them are used
                    donor.tick()
                await wait_until("a recall", lambda: recalled)
                assert set(recalled) <= set(pages)
                calm.pressed = False  # type: ignore[attr-defined]
                for _ in range(70):
                    donor.tick()
                await link.ping()
                assert link.offer.health is Health.OK
                assert link.offer.room_bytes > 0
                assert counters.read(donation.memory)["foreign_pers_pages"] == 1500

    run(test)


@pytest.mark.expect_log("owner was not heard of")
def test_an_owner_not_heard_of_is_abandoned(rng: random.Random) -> None:
    async def test() -> None:
        now = [1000.0]
        with opened_donation() as donation:
            options = DonorOptions("lender", abandon_s=100)
            async with listening(donation, options) as (donor, address):
                donor._clock = lambda: now[0]
                async with linked(address) as link:
                    await put(link, make_pages(rng, 10), rng)
                    now[0] += 1000
                    donor.tick()
                    assert len(await held(link)) == 10, "connected is heard of"
                await wait_until("gone", lambda: not donor._connections)
                now[0] += 99
                donor.tick()
                assert counters.read(donation.memory)["foreign_abandoned_pages"] == 0
                now[0] += 2
                donor.tick()
                assert counters.read(donation.memory)["foreign_abandoned_pages"] == 10
                assert counters.read(donation.memory)["foreign_pers_pages"] == 0
                async with linked(address) as link:
                    assert await held(link) == []

    run(test)


# ---- bad peers ---------------------------------------------------------------------------


async def dial(address: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(address.host, address.port, limit=1 << 20)


@pytest.mark.parametrize(
    ("method", "params", "match"),
    [
        ("hello", [{"protocol": PROTOCOL + 1}], f"speaks version {PROTOCOL}, not {PROTOCOL + 1}"),
        ("hello", [], "parameters"),
        ("get", [pack([Page(0, 0, 1, 0)])], "hello first"),
        ("nonsense", [], "there is no method nonsense; use one of hello, put"),
    ],
)
def test_clean_errors(method: str, params: list[Any], match: str) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (_, address):
                with pytest.raises(Exception, match=match):
                    await ask(address, method, *params)

    run(test)


BAD_BYTES = [
    b"\xc1",
    b"\x90",
    HELLO[:-1] + b"\xc1",
    b"GET / HTTP/1.1\r\n\r\n",
    encode(Request(0, "put", [bytes(16), bytes(25)]), PEER_LIMITS) * 3 + b"\xff",
    b"\x94\x00\x00\xa3put\x92\xc4\x00\xc6\xff\xff\xff\xff",  # a payload of 4 GiB is announced
]


@pytest.mark.parametrize("sent", BAD_BYTES)
def test_bad_bytes_end_their_own_connection(sent: bytes, rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with (
                listening(donation, QUICK_DONOR) as (donor, address),
                linked(address) as link,
            ):
                pages = make_pages(rng, 5)
                await put(link, pages, rng)
                reader, writer = await dial(address)
                writer.write(sent)
                try:
                    while await reader.read(65536):
                        pass
                except ConnectionError:
                    pass
                writer.close()
                await wait_until("only the good one is left", lambda: len(donor._connections) == 1)
                assert link.state is LinkState.UP
                assert sorted(await held(link)) == sorted(pages)

    run(test)


def test_half_a_message_and_unread_answers_end_in_time(rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation, QUICK_DONOR) as (donor, address):
                _, half = await dial(address)
                half.write(HELLO[:-1])
                async with linked(address, "raw", 3) as link:
                    records = pack(pages := [Page(0, i, 1, 4095 << 4) for i in range(100)])
                    await put(link, pages, rng)
                _, deaf = await dial(address)
                deaf.transport.pause_reading()  # type: ignore[attr-defined]
                deaf.write(HELLO)
                for i in range(40):  # 16 MiB of answers, that nobody reads
                    deaf.write(encode(Request(1 + i, "get", [records]), PEER_LIMITS))
                await wait_until("both are gone", lambda: not donor._connections)
                half.close()
                deaf.close()

    run(test)


def test_a_slow_reader_gets_every_answer(rng: random.Random) -> None:
    """Who reads late is not read from meanwhile; nothing is lost, and the connection goes on."""

    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (donor, address), linked(address, "raw", 3) as link:
                records = pack(pages := [Page(0, i, 1, 4095 << 4) for i in range(100)])
                sealed = b"".join(await put(link, pages, rng))
                channel = Channel()
                await asyncio_connect(address, lambda: channel)
                await channel.call("hello", *Hello("raw", 3).params(), deadline_s=20)
                assert channel._transport is not None
                channel._transport.pause_reading()
                gets = [
                    asyncio.ensure_future(channel.call("get", records, deadline_s=20))
                    for _ in range(14)
                ]
                ends = [end for end in donor._connections if end.epoch == 3]
                await wait_until("it is stuck", lambda: any(end._times()[2] for end in ends))
                channel._transport.resume_reading()
                for result in await asyncio.gather(*gets):
                    assert result[2] == sealed
                assert await channel.call("ping", deadline_s=20)
                channel.close("done")

    run(test)


def test_connections_are_bounded() -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (donor, address):
                writers = [(await dial(address))[1] for _ in range(CONNECTIONS)]
                await wait_until("all are in", lambda: len(donor._connections) == CONNECTIONS)
                reader, one_more = await dial(address)
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await reader.readexactly(1)
                assert donor.refused_connections == 1
                for writer in [*writers, one_more]:
                    writer.close()

    run(test)


# ---- the link ---------------------------------------------------------------------------------


def test_link_comes_back_and_tells(rng: random.Random) -> None:
    """Donor gone: calls fail at once and the state says so; back: it is dialled again."""

    async def test() -> None:
        states: list[LinkState] = []
        with opened_donation() as donation:
            async with listening(donation) as (donor, address), linked(address) as link:
                link.on_state = lambda changed: states.append(changed.state)
                donor.close()
                await wait_until("down", lambda: LinkState.DOWN in states)
                await wait_until("up", lambda: states[-1] is LinkState.UP)
                await put(link, make_pages(rng, 3), rng)
            link = PeerLink(address, Hello("owner", 1), times=QUICK)  # to nobody
            link.start()
            await wait_until("down", lambda: link.state is LinkState.DOWN)
            with pytest.raises(PeerError):
                await link.ping()
            await link.stop()

    run(test)


def test_a_silent_donor_is_suspect_and_then_dialled_anew() -> None:
    async def test() -> None:
        states: list[LinkState] = []
        times = LinkTimes(call_s=0.1, dead_s=0.4, ping_s=0.02, retry_first_s=0.01)
        with opened_donation() as donation:
            async with (
                listening(donation, lanes=False) as (donor, address),
                linked(address, times=times) as link,
            ):
                link.on_state = lambda changed: states.append(changed.state)
                await wait_until("measured", lambda: link.latency_us > 0)
                for end in donor._connections:
                    end._transport.pause_reading()  # type: ignore[union-attr]
                await wait_until("up again", lambda: states[-1:] == [LinkState.UP])
                assert states == [LinkState.SUSPECT, LinkState.DOWN, LinkState.UP]

    run(test)


OFFER = [1000, 0, 0]
NONSENSE: list[tuple[str, Any]] = [
    ("ping", None),
    ("ping", [[1, 2]]),
    ("ping", [OFFER, 1]),
    ("put", [OFFER, b"\0\0"]),
    ("put", [[-1, 0, 0], b"\0"]),
    ("get", [OFFER, b"\0", b"too short"]),
    ("get", [OFFER, b"\0"]),
    ("drop", [OFFER, "many"]),
    ("reconcile", [OFFER, None, b"no records"]),
    ("reconcile", [OFFER, "next", b""]),
    ("recall", [b"no records", 5]),
    ("recall", [pack([Page(0, 0, 1, 0)]), 0]),
    ("offer", []),
    ("hello", [OFFER, {"protocol": PROTOCOL + 1, "donor": "liar", "epoch": 1}]),
    ("hello", [OFFER, {"protocol": PROTOCOL, "donor": "", "epoch": 1}]),
    ("hello", "hello"),
]


class Liar(Channel):
    """Answers one method with nonsense (a notification: sends it), and all others well."""

    def __init__(self, method: str, nonsense: Any) -> None:
        super().__init__()
        self.method, self.nonsense = method, nonsense

    def request(self, method: str, params: list[Any]) -> Any:
        if method == self.method:
            return self.nonsense
        if method == "hello":
            return [OFFER, {"protocol": PROTOCOL, "donor": "liar", "epoch": 1}]
        if method == "ping" and self.method in ("recall", "offer"):
            self.notify(self.method, *self.nonsense)
        return [OFFER]


@pytest.mark.parametrize(("method", "nonsense"), NONSENSE)
def test_a_donor_that_answers_nonsense_loses_its_connection(method: str, nonsense: Any) -> None:
    """The call fails as PeerError, and the link is dialled again; nobody else is told anything."""

    async def test() -> None:
        address = PeerAddress.read("listen", "127.0.0.1:0")
        server, bound = await asyncio_serve(address, lambda: Liar(method, nonsense))
        link = PeerLink(PeerAddress.read("peers", bound), Hello("owner", 7), times=QUICK)
        states: list[LinkState] = []
        link.on_state = lambda changed: states.append(changed.state)
        link.on_recall = lambda _, records, left_s: pytest.fail("told of nonsense")
        record = pack([Page(0, 0, 1, 0)])
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "put": lambda: link.put(record, bytes(25)),
            "get": lambda: link.get(record),
            "drop": lambda: link.drop(record),
            "reconcile": lambda: link.reconcile(0),
        }
        link.start()
        if method in calls:
            await wait_until("up", lambda: link.state is LinkState.UP)
            with pytest.raises(PeerError):
                await calls[method]()
        await wait_until("down", lambda: LinkState.DOWN in states)
        await link.stop()
        server.close()

    run(test)
