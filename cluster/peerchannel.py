"""One connection between two nodes: a session on an asyncio transport, with every wait bounded.

    transport --bytes--> session --> request   answered at once, in the same turn of the loop
                                     response  wakes the call that waits for it
                                     notification

Both ends are channels.  No task for a connection and none for a request: what a donor is
asked is answered from memory, so an answer is written before the next message is
looked at, and a turn of the loop costs one wake-up on each side.

    ours     call -> room among CALLS_MOST -> room in the socket -> answer, or the deadline
    theirs   a peer that does not read its answers is not read from (its socket fills, not we)

Bound: per connection one frame undecoded, one answer beyond the transport's high-water
mark, CALLS_MOST calls.  A frame that takes longer than frame_s, answers that are not
read for write_s, silence of idle_s, a broken rule: this connection is closed, and
nothing else happens.

What it is not: it knows no method (`donor`, `peerlink`), and dials nobody.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, cast

from cluster.lane import LaneEnd
from cluster.link import RpcError
from cluster.peersocket import name_of, user_of
from cluster.peerwire import CALLS_MOST, PEER_LIMITS, BadParamsError
from cluster.session import DONE, PAUSED, Session
from cluster.wire import NEED_DATA, Notification, Request, Response, WireError
from zcache_core.errors import ControlError

log = logging.getLogger("zcache.peer")


class ChannelClosedError(ControlError):
    """the connection is closed ({})"""


@dataclass(frozen=True)
class ChannelOptions:
    """Bounds of one connection, in seconds."""

    frame_s: float = 10.0  # from the first byte of a message to its last
    write_s: float = 10.0  # until the peer reads on
    idle_s: float = 300.0  # without a message from a peer that is not waited for
    watch_s: float = 1.0  # how often those are looked at


class Channel(asyncio.Protocol):
    """A connection; subclasses answer (`request`), listen (`notified`), and are told of the end."""

    pauses_reading = False  # while the peer does not read: for the side that answers

    def __init__(self, options: ChannelOptions | None = None) -> None:
        self.options = options or ChannelOptions()
        self.closed_because = ""
        self._session = Session(PEER_LIMITS, max_calls=2 * CALLS_MOST, max_owed=CALLS_MOST)
        self._transport: asyncio.Transport | None = None
        self._lane: LaneEnd | None = None
        self._stuck_since: float | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._room = asyncio.Semaphore(CALLS_MOST)
        self._writable = asyncio.Event()
        self._writable.set()

    # ---- for subclasses ----------------------------------------------------------------

    def request(self, method: str, params: list[Any]) -> Any:
        """The result.  Raises RpcError or BadParamsError."""
        raise RpcError("unknown_method", f"this side answers no {method}; it only asks")

    def notified(self, method: str, params: list[Any]) -> None:
        """What the peer tells.  Raises WireError when it is no sense."""

    def opened(self) -> None:
        """The connection is there."""

    def lost(self, why: str) -> None:
        """The connection is gone; told once."""

    # ---- for a transport with a lane (laneport) ------------------------------------------

    def make_lane(self) -> LaneEnd:
        """A thread of its own for what is frequent; this one's leaves all to us."""
        return LaneEnd()

    @property
    def is_between(self) -> bool:
        """Whether all that was received is dealt with, to the last byte."""
        return self._stuck_since is None and not self._session.partial_bytes

    # ---- what is sent --------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self.closed_because

    @property
    def peer_name(self) -> str:
        """The name in the peer's certificate; "" without TLS."""
        return name_of(self._transport.get_extra_info("peercert") if self._transport else None)

    def peer_user(self) -> int | None:
        """The user whose process the peer is, on this machine; None: it cannot be told."""
        sock = self._transport.get_extra_info("socket") if self._transport else None
        return user_of(sock) if sock is not None else None

    async def call(self, method: str, *params: Any, deadline_s: float) -> Any:
        """The result.  Raises RpcError, ChannelClosedError, TimeoutError at the deadline."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + deadline_s
        if self._room.locked() or not self._writable.is_set():
            async with asyncio.timeout_at(end_s), self._room:
                await self._writable.wait()
                return await self._exchange(method, params, end_s)
        async with self._room:  # at once: a timeout object costs as much as all of this
            return await self._exchange(method, params, end_s)

    async def _exchange(self, method: str, params: tuple[Any, ...], end_s: float) -> Any:
        """Send the request, wait for its answer until `end_s`."""
        if not self.is_open or self._transport is None:
            raise ChannelClosedError(self.closed_because or "not connected")
        loop = asyncio.get_running_loop()
        msgid, data = self._session.call(method, *params)
        future = self._waiting[msgid] = loop.create_future()
        overdue = loop.call_at(end_s, give_up, future)
        try:
            self._transport.write(data)
            return await future
        finally:
            overdue.cancel()
            self._session.forget(msgid)
            self._waiting.pop(msgid, None)

    def notify(self, method: str, *params: Any) -> bool:
        """Tell the peer; False when it does not read what it was told before."""
        if not self.is_open or not self._writable.is_set() or self._transport is None:
            return False
        self._transport.write(self._session.notify(method, *params))
        return True

    def close(self, why: str) -> None:
        """Abort the connection; calls that wait fail.  Harmless when it is closed."""
        if self.closed_because:
            return
        self.closed_because = why
        if self._transport is not None:
            self._watcher.cancel()
            self._transport.abort()
        self._writable.set()  # who waits to write sees that it is closed
        while self._waiting:
            _, future = self._waiting.popitem()
            if not future.done():
                future.set_exception(ChannelClosedError(why))
        self.lost(why)

    # ---- asyncio's side ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # One answer of a batch and no second one before the peer has read it.
        self._transport.set_write_buffer_limits(high=PEER_LIMITS.frame_bytes)
        self._lane = transport.get_extra_info("lane")
        loop = asyncio.get_running_loop()
        self._heard_s = loop.time()
        self._partial_since: float | None = None
        self._watcher = loop.call_later(self.options.watch_s, self._watch)
        self.opened()

    def data_received(self, data: bytes) -> None:
        if self.closed_because:
            return
        self._session.receive(data)
        self._go_on()

    def eof_received(self) -> bool:
        self.close("the peer has closed it")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.close(str(error) if error else "the peer has closed it")

    def pause_writing(self) -> None:
        self._writable.clear()
        self._stuck_since = asyncio.get_running_loop().time()
        if self.pauses_reading and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._writable.set()
        self._stuck_since = None
        if self.pauses_reading and self._transport is not None and not self.closed_because:
            self._transport.resume_reading()
            # not from here: this may be inside of a write of ours
            asyncio.get_running_loop().call_soon(self._go_on)

    # ---- what is received ----------------------------------------------------------------------

    def _go_on(self) -> None:
        try:
            self._take()
        except WireError as error:
            self.close(str(error))

    def _take(self) -> None:
        """Every whole message that is in, as long as its answer can be written."""
        while not self.closed_because and not (self.pauses_reading and self._stuck_since):
            event = self._session.next_event()
            if event is NEED_DATA or event is PAUSED or event is DONE:
                break
            self._heard_s = asyncio.get_running_loop().time()
            self._partial_since = None
            if isinstance(event, Response):
                self._settle(event)
            elif isinstance(event, Request):
                self._answer(event)
            elif isinstance(event, Notification):
                self.notified(event.method, event.params)
        if self._session.partial_bytes and self._partial_since is None:
            self._partial_since = asyncio.get_running_loop().time()

    def _settle(self, response: Response) -> None:
        future = self._waiting.pop(response.msgid, None)
        if future is None or future.done():
            return
        if response.error is not None:
            future.set_exception(RpcError.from_wire(response.error))
        else:
            future.set_result(response.result)

    def _answer(self, request: Request) -> None:
        try:
            data = self._session.respond(
                request.msgid, self.request(request.method, request.params)
            )
        except (RpcError, BadParamsError) as error:
            told = error if isinstance(error, RpcError) else RpcError("bad_params", str(error))
            data = self._session.refuse(request.msgid, told.as_wire())
        except Exception:
            log.exception("method %s failed", request.method)
            sentence = f"{request.method} failed inside the node process; its log says why"
            data = self._session.refuse(request.msgid, RpcError("internal", sentence).as_wire())
        if self._transport is not None and not self.closed_because:
            self._transport.write(data)

    def _watch(self) -> None:
        """Once a second: is something overdue?"""
        now, options = asyncio.get_running_loop().time(), self.options
        heard_s, partial_since, stuck_since = self._times()
        if partial_since is not None and now - partial_since > options.frame_s:
            self.close(f"a message did not end within {options.frame_s} s")
        elif stuck_since is not None and now - stuck_since > options.write_s:
            self.close(f"nothing was read for {options.write_s} s")
        elif now - heard_s > options.idle_s:
            self.close(f"nothing was said for {options.idle_s} s")
        else:
            loop = asyncio.get_running_loop()
            self._watcher = loop.call_later(options.watch_s, self._watch)

    def _times(self) -> tuple[float, float | None, float | None]:
        """When a message was heard; since when one is half there; since when nothing is read."""
        if self._lane is None:
            return self._heard_s, self._partial_since, self._stuck_since
        heard_s, partial_s, stuck_s = self._lane.times()
        return (
            max(heard_s, self._heard_s),
            self._partial_since or partial_s or None,
            self._stuck_since or stuck_s or None,
        )


def give_up(future: asyncio.Future[Any]) -> None:
    """It has waited long enough."""
    if not future.done():
        future.set_exception(TimeoutError())
