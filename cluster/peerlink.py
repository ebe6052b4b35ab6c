"""An owner's connection to one donor: dialled, said hello, kept up, measured.

    CONNECTING --hello--> UP --an answer is overdue--> SUSPECT --an answer--> UP
         |                |                               '--none for dead_s--.
         '----refused-----+---------------- closed ---------------------> DOWN
                                 back-off with jitter, then dialled again

What `peerwire.Donor` says is what this gives.  Calls are pipelined, CALLS_MOST at a time, each
with a deadline; who comes while the donor is away is told so at once.

Bound: back-off from RETRY_FIRST_S doubling to RETRY_MOST_S, each between half and all of that, so
that a hundred owners of a donor that comes back do not all come at once.  Every second one
ping, unless other answers came.

What it is not: it decides nothing about pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from cluster import laneport, peerwire
from cluster.courier import Courier, OwnerLane
from cluster.lane import LaneEnd
from cluster.laneport import LanePort
from cluster.link import RpcError
from cluster.peeraddress import PeerAddress
from cluster.peerchannel import Channel, ChannelClosedError, ChannelOptions, give_up
from cluster.peerwire import (
    BadAnswerError,
    Changed,
    Health,
    Hello,
    LinkState,
    Offer,
    PeerError,
    Recall,
)
from cluster.session import TooManyCallsError
from cluster.tls import TlsRules
from cluster.wire import EncodeError, WireError

NO_OFFER = Offer(0, 0, Health.SHORT)
TURN_BITS = 20  # of a turn that count the dials of one process: one each 0.1 s for a day and more
# A donor that says so does not hear this connection any more, whatever it is asked.
DEAF = ("epoch_over", "turn_over", "no_hello")
SMOOTH = 8  # a new measurement counts one part in so many, as TCP does it (RFC 6298)
Read = TypeVar("Read")
log = logging.getLogger("zcache.peer")


@dataclass(frozen=True)
class LinkTimes:
    """Seconds."""

    dial_s: float = 3.0  # to connect, TLS and hello included
    call_s: float = 2.0  # for an answer
    dead_s: float = 6.0  # overdue for so long: dial anew
    ping_s: float = 1.0
    retry_first_s: float = 0.1
    retry_most_s: float = 10.0
    channel: ChannelOptions = field(default=ChannelOptions())


def first_turn() -> int:
    """Before the first dial of this process: later than all turns of processes before it.

    Pages do not outlive the machine's boot, and neither does the memory file.
    """
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000) << TURN_BITS


class _OwnersEnd(Channel):
    """The owner's end: it answers nothing, and is told of recalls and offers."""

    def __init__(self, link: PeerLink, options: ChannelOptions) -> None:
        super().__init__(options)
        self._link = link
        self.owners_lane: OwnerLane | None = None

    def make_lane(self) -> LaneEnd:
        """The courier asks over the same connection (courier)."""
        if self._link.courier is None:
            return super().make_lane()
        self.owners_lane = OwnerLane(self._link.courier)
        self._session.settled_elsewhere = self.owners_lane.settled
        return self.owners_lane

    async def put(self, records: bytes, payload: bytes, deadline_s: float) -> Any:
        """As `call`: the lane's, which needs no session, or through that."""
        lane = self.owners_lane
        if lane is None or not self.is_open or not self._writable.is_set():
            return await self.call("put", records, payload, deadline_s=deadline_s)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        msgid = lane.begin_put(future, records, payload)
        if msgid is None:
            return await self.call("put", records, payload, deadline_s=deadline_s)
        cast(LanePort, self._transport).wrote(lane.kept_bytes)
        overdue = loop.call_later(deadline_s, give_up, future)
        try:
            return await future
        finally:
            overdue.cancel()
            lane.forget_put(msgid)

    def notified(self, method: str, params: list[Any]) -> None:
        if method == "recall":
            records, left_s = peerwire.recall(params)
            if self._link.on_recall is not None:
                self._link.on_recall(self._link, records, left_s)
        elif method == "offer":
            self._link.offer = peerwire.offer_notice(params)
            if self._link.on_offer is not None:
                self._link.on_offer(self._link)

    def lost(self, why: str) -> None:
        if self.owners_lane is not None:
            self.owners_lane.end_puts(ChannelClosedError(why))
        self._link.lost.set()


class PeerLink:
    """The donor at `address`; `start` in a running loop, `stop` at the end.

    With a `courier`, it may ask over the same connection.
    Raises ConfigError for an address of a network without `tls`.
    """

    def __init__(
        self,
        address: PeerAddress,
        hello: Hello,
        tls: TlsRules | None = None,
        times: LinkTimes | None = None,
        rng: random.Random | None = None,
        courier: Courier | None = None,
    ) -> None:
        if tls is None:
            address.require_safe("peers", None)
        self.address, self.name = address, str(address)
        self.courier = courier
        self.state = LinkState.CONNECTING
        self.epoch = 0
        self.is_listed = True
        self.offer = NO_OFFER
        self.latency_us = 0.0
        self.why_down = ""
        self.on_recall: Recall | None = None
        self.on_state: Changed | None = None
        self.on_offer: Changed | None = None
        self.lost = asyncio.Event()
        self._hello, self._tls, self._times = hello, tls, times or LinkTimes()
        self._rng = rng or random.Random()
        self._channel: _OwnersEnd | None = None
        self._answered_s = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Dial, and go on dialling, until `stop`."""
        assert self._task is None
        self._task = asyncio.get_running_loop().create_task(self._keep())

    @property
    def lane(self) -> OwnerLane | None:
        """What a courier may ask over now."""
        channel = self._channel
        return channel.owners_lane if channel is not None and channel.is_open else None

    async def stop(self) -> None:
        """Close; calls under way fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # ---- the face ------------------------------------------------------------------------

    async def put(self, records: bytes, payload: bytes) -> bytes:
        """A Code for each page."""
        result = await self._call(
            "put", lambda channel: channel.put(records, payload, self._times.call_s)
        )
        n = len(records) // peerwire.RECORD_BYTES
        self.offer, codes = self._read(peerwire.put_answer, result, n)
        return codes

    async def get(self, records: bytes) -> tuple[bytes, bytes]:
        """Codes, and the sealed bytes of those with OK behind one another."""
        result = await self._ask("get", records)
        self.offer, codes, payload = self._read(peerwire.get_answer, result, records)
        return codes, payload

    async def drop(self, records: bytes) -> int:
        """How many were there."""
        self.offer, dropped = self._read(peerwire.drop_answer, await self._ask("drop", records))
        return dropped

    async def reconcile(self, cursor: int) -> tuple[int | None, bytes]:
        """The next cursor (None: that was all) and some of what is held."""
        result = await self._ask("reconcile", cursor)
        self.offer, following, records = self._read(peerwire.reconcile_answer, result)
        return following, records

    async def ping(self) -> None:
        """Measure the latency, fetch the offer."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self.offer = self._read(peerwire.ping_answer, await self._ask("ping"))
        us = (loop.time() - began_s) * 1e6
        self.latency_us += (us - self.latency_us) / SMOOTH if self.latency_us else us

    async def bye(self) -> int:
        """Our epoch is over: the donor drops all of it; how many pages that were."""
        result = await self._ask("bye", self._hello.owner, self._hello.epoch)
        self.offer, dropped = self._read(peerwire.bye_answer, result)
        return dropped

    async def stats(self) -> dict[str, int]:
        """The donor's own numbers."""
        self.offer, numbers = self._read(peerwire.stats_answer, await self._ask("stats"))
        return numbers

    # ---- calls ------------------------------------------------------------------------------

    async def _ask(self, method: str, *params: Any) -> Any:
        return await self._call(
            method,
            lambda channel: channel.call(method, *params, deadline_s=self._times.call_s),
        )

    async def _call(self, method: str, ask: Callable[[_OwnersEnd], Awaitable[Any]]) -> Any:
        channel = self._channel
        if channel is None or self.state not in (LinkState.UP, LinkState.SUSPECT):
            raise PeerError(self.name, self.why_down or "it is being dialled")
        try:
            result = await ask(channel)
        except TimeoutError:
            if channel is self._channel and channel.is_open:
                self._become(LinkState.SUSPECT)
            raise PeerError(self.name, f"no answer to {method} in {self._times.call_s} s") from None
        except (ChannelClosedError, RpcError, TooManyCallsError, EncodeError) as error:
            if isinstance(error, RpcError) and error.code in DEAF:
                channel.close(str(error))
            raise PeerError(self.name, str(error)) from None
        self._answered_s = asyncio.get_running_loop().time()
        if channel is self._channel and self.state is LinkState.SUSPECT:
            self._become(LinkState.UP)
        return result

    def _read(self, reader: Callable[..., Read], result: Any, *about: Any) -> Read:
        """A result as what it should be; a donor that answers nonsense loses its connection."""
        try:
            return reader(result, *about)
        except WireError as error:
            if self._channel is not None:
                self._channel.close(str(error))
            raise PeerError(self.name, str(error)) from None

    # ---- the connection -----------------------------------------------------------------------

    async def _keep(self) -> None:
        """Dial, stay, dial again."""
        wait_s = self._times.retry_first_s
        try:
            while True:
                try:
                    if await self._dial():
                        wait_s = self._times.retry_first_s
                        await self._stay()
                except Exception as error:  # a link that is dialled no more loses all its pages
                    log.exception("the link to %s failed; it is dialled again", self.address)
                    self.why_down = f"{type(error).__name__}: {error}"
                self._down()
                await asyncio.sleep(wait_s * self._rng.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, self._times.retry_most_s)
        finally:
            self.why_down = "stopped"
            self._down()

    async def _dial(self) -> bool:
        self.lost.clear()
        if self._hello.turn:
            self._hello = replace(self._hello, turn=self._hello.turn + 1)
        try:
            async with asyncio.timeout(self._times.dial_s):
                channel = _OwnersEnd(self, self._times.channel)
                await laneport.connect(self.address, channel, self._tls)
                self._channel = channel
                result = await channel.call(
                    "hello", *self._hello.params(), deadline_s=self._times.dial_s
                )
            welcome = peerwire.welcome(result)
            if channel.peer_name not in ("", welcome.donor):
                raise BadAnswerError("hello", f"its certificate is {channel.peer_name}'s")
        except TimeoutError:
            self.why_down = f"no hello in {self._times.dial_s} s"
            return False
        except (OSError, ChannelClosedError, RpcError, WireError) as error:
            self.why_down = str(error)
            return False
        self.name, self.epoch, self.offer = welcome.donor, welcome.epoch, welcome.offer
        self.why_down = ""
        self._answered_s = asyncio.get_running_loop().time()
        self._become(LinkState.UP)
        return True

    async def _stay(self) -> None:
        """Until the connection is lost, or nothing was answered for dead_s."""
        loop = asyncio.get_running_loop()
        while not self.lost.is_set():
            with contextlib.suppress(PeerError):
                await self.ping()
            if loop.time() - self._answered_s > self._times.dead_s:
                self.why_down = f"no answer for {self._times.dead_s} s"
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._times.ping_s):
                    await self.lost.wait()

    def _down(self) -> None:
        if self._channel is not None:
            self.why_down = self.why_down or self._channel.closed_because
            self._channel.close(self.why_down or "closed")
            self._channel = None
        self.offer = NO_OFFER
        self._become(LinkState.DOWN)

    def _become(self, state: LinkState) -> None:
        if state is not self.state:
            self.state = state
            if self.on_state is not None:
                self.on_state(self)
