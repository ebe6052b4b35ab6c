"""asyncio's transport over a lane: what Python has of a connection with a thread of its own.

    lane's thread --handed over--> LanePort --data_received--> protocol (Channel)
                  <---turn back---          <---write--------

To its protocol it is a transport like any other, and only gets to see what the lane's handler does
not know.  While the protocol has its turn, nothing is read; what it writes is sent when the turn is
over.  With more than the high-water mark unsent the protocol is paused, and has its turn again
when that is gone.

With TLS the lane's thread shakes hands first; its protocol hears of a connection when the peer is
let in, and of one that is not, nothing.

Bound: `set_write_buffer_limits` and one message.  `close` is `abort`: nothing is lost by it that
the other side could rely on.  Who listens has HANDSHAKES of HANDSHAKE_S at a time; the oldest goes
for the next, but not before it has had FAIR_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Protocol, cast

from cluster import addresses, unixsock
from cluster.lane import LaneEnd
from cluster.peeraddress import PeerAddress
from cluster.tls import TlsRules

BACKLOG = 64
FLUSH_S = 0.02  # how soon a socket that was full is tried again; answers do not wait for it
HIGH_BYTES = 64 * 1024
HANDSHAKE_S = 5.0  # a stranger holds a descriptor and a thread for so long, and no more
HANDSHAKES = 32  # at once; others wait in the socket's queue
FAIR_S = 0.25  # a member's takes 2 ms: who has not finished by then goes when another comes
GONE = (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINTR)


class Laned(Protocol):
    """A protocol for both kinds of transport (peerchannel.Channel)."""

    def make_lane(self) -> LaneEnd:
        """The lane for its connection."""

    @property
    def is_between(self) -> bool:
        """Whether all that was received is dealt with, to the last byte."""


class LanePort(asyncio.Transport):
    """The transport of a connected, blocking socket; `start`, once.

    `shaken` is done when the protocol has its connection, and OSError when it gets none.
    """

    def __init__(
        self,
        sock: socket.socket,
        lane: LaneEnd,
        protocol: asyncio.Protocol,
        tls: TlsRules | None = None,
    ) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._sock, self._lane, self._protocol, self._tls = sock, lane, protocol, tls
        self.shaken: asyncio.Future[None] = self._loop.create_future()
        self._name: str | None = None
        self._high_bytes = HIGH_BYTES
        self._paused = self._closing = False
        self._flusher: asyncio.TimerHandle | None = None
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        """Begin, and tell the protocol, with TLS later.  OSError, all closed, without a thread."""
        if self._tls is None:
            self._made()
        if self._closing:
            return
        self._loop.add_reader(self._lane.wake_fd, self._woken)
        try:
            self._lane.start(self._sock.fileno(), self._tls)
        except OSError as error:
            self.abort(error)
            raise

    def _made(self) -> None:
        self.shaken.set_result(None)
        self._protocol.connection_made(self)

    # ---- what the lane tells ---------------------------------------------------------

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._lane.wake_fd, 8)
        self._lane.collect()
        if self._lane.is_handed:
            self._our_turn()
        elif self._lane.over is not None:
            self._end(self._lane.over)
        elif not self._lane.flush():
            self._flush_later()

    def _our_turn(self) -> None:
        if not self.shaken.done():
            self._name = self._lane.peer_name()
            self._made()
        if self._closing:
            return
        if self._paused:  # all that was written before has been sent
            self._paused = False
            self._protocol.resume_writing()
        data = self._lane.take()
        if data:
            self._protocol.data_received(data)
        self._loop.call_soon(self._turn_back)  # resume_writing may go on from there as well

    def _turn_back(self) -> None:
        if not self._closing:
            is_between = cast(Laned, self._protocol).is_between
            self._lane.turn_back(passing=not is_between, again=self._paused)

    def _end(self, why: int) -> None:
        if self._closing:
            return
        if reason := self._lane.reason:
            self.abort(ConnectionError(f"TLS: {reason}"))
        else:
            self.abort(OSError(why, os.strerror(why)) if why else None)

    # ---- what the protocol asks --------------------------------------------------------

    def write(self, data: Any) -> None:
        """Sent at once if it can be, in order in any case."""
        if self._closing:
            return
        kept = self._lane.write(bytes(data))
        if kept is None:
            self._loop.call_soon(self._end, errno.EPIPE)
        else:
            self.wrote(kept)

    def wrote(self, kept: int) -> None:
        """Something was sent, here or by the lane: so much is kept now."""
        if kept > self._high_bytes and not self._paused:
            self._paused = True
            self._protocol.pause_writing()
            if not self._lane.is_handed:
                self._flush_later()

    def _flush_later(self) -> None:
        if self._flusher is None:
            self._flusher = self._loop.call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._flusher = None
        if self._closing or self._lane.is_handed:
            return
        if not self._lane.flush():
            self._flush_later()
        elif self._paused:
            self._paused = False
            self._protocol.resume_writing()

    def abort(self, error: Exception | None = None) -> None:
        """The connection and its thread are gone when this returns; the protocol is told soon."""
        if self._closing:
            return
        self._closing = True
        if self._flusher is not None:
            self._flusher.cancel()
        self._loop.remove_reader(self._lane.wake_fd)
        self._lane.stop()
        self._sock.close()
        if not self.shaken.done():
            self.shaken.set_exception(error or ConnectionResetError("the peer has closed it"))
            self.shaken.exception()  # (nobody may wait for it)
        elif not self.shaken.cancelled():
            self._loop.call_soon(self._protocol.connection_lost, error)

    def close(self) -> None:
        """As abort."""
        self.abort()

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        """Nothing to do: the lane does not read while an answer waits to be sent."""

    def resume_reading(self) -> None:
        """Nothing to do."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = HIGH_BYTES if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._lane.kept_bytes

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`lane` and `socket`; of `peercert`, as ssl has it, the name."""
        peer = None if self._name is None else {"subject": ((("commonName", self._name),),)}
        return {"lane": self._lane, "socket": self._sock, "peercert": peer}.get(name, default)


# ---- dialled and listened for --------------------------------------------------------------


class Listening:
    """A listening socket whose connections have lanes; until `close`."""

    def __init__(
        self,
        sock: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        tls: TlsRules | None = None,
    ) -> None:
        sock.setblocking(False)
        self._sock, self._protocol, self._tls = sock, protocol, tls
        self._shaking: dict[LanePort, asyncio.TimerHandle] = {}  # in the order they came
        self._resting: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._accept)

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            if (full_s := self._full_s()) > 0:
                self._rest(full_s)
                return
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if error.errno in GONE and error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    self._rest(1.0)  # as asyncio does
                return
            if len(self._shaking) >= HANDSHAKES:
                oldest = next(iter(self._shaking))
                self._forget(oldest)
                oldest.abort()
            with contextlib.suppress(OSError):
                self._watch(open_port(sock, self._protocol(), self._tls))

    def _watch(self, port: LanePort) -> None:
        """Until it is let in: HANDSHAKE_S."""
        if port.shaken.done():
            return
        self._shaking[port] = self._loop.call_later(HANDSHAKE_S, port.abort)
        port.shaken.add_done_callback(lambda _: self._forget(port))

    def _forget(self, port: LanePort) -> None:
        if (timer := self._shaking.pop(port, None)) is not None:
            timer.cancel()
            if self._resting is not None:
                self._again()

    def _full_s(self) -> float:
        """Seconds until one may go for the next; 0 or less: there is room, or will be by that."""
        if len(self._shaking) < HANDSHAKES:
            return 0.0
        oldest = next(iter(self._shaking.values()))
        return oldest.when() - HANDSHAKE_S + FAIR_S - self._loop.time()

    def _rest(self, seconds: float) -> None:
        """Take nobody in for so long, or until a handshake is over."""
        self._loop.remove_reader(self._sock)
        self._resting = self._loop.call_later(seconds, self._again)

    def _again(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Connections that are there stay."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
        for port in list(self._shaking):
            port.abort()


def open_port(
    sock: socket.socket, protocol: asyncio.Protocol, tls: TlsRules | None = None
) -> LanePort:
    """Give a connected socket to the protocol.  OSError, the socket closed, without a thread."""
    try:
        sock.setblocking(True)
        port = LanePort(sock, cast(Laned, protocol).make_lane(), protocol, tls)
    except BaseException:
        sock.close()
        raise
    port.start()
    return port


async def serve(
    address: PeerAddress,
    key: str,
    protocol: Callable[[], asyncio.Protocol],
    tls: TlsRules | None = None,
) -> tuple[Listening, str]:
    """Listen there; what listens, and the address with the port that it got."""
    if address.path:
        sock = unixsock.listen(address.path, "the peers' socket", f"{key}=PATH", BACKLOG)
        return Listening(sock, protocol), address.path
    sock = addresses.listen(key, str(address))
    return Listening(sock, protocol, tls), addresses.bound_address(sock)


async def connect(
    address: PeerAddress, protocol: asyncio.Protocol, tls: TlsRules | None = None
) -> None:
    """Dial it, one after the other of a name's addresses; OSError when all fail."""
    loop = asyncio.get_running_loop()
    found: list[Any] = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", address.path)]
    if not address.path:
        wanted, kind = (address.host, address.port), socket.SOCK_STREAM
        try:  # no thread for what needs nobody asked
            found = socket.getaddrinfo(*wanted, type=kind, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = await loop.getaddrinfo(*wanted, type=kind)
    failed = OSError(errno.EADDRNOTAVAIL, "it has no address")
    for family, kind, number, _, where in found:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, number)
        try:
            await loop.sock_connect(sock, where)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            port = open_port(sock, protocol, None if address.path else tls)
            try:
                await port.shaken
            except asyncio.CancelledError:
                port.abort()
                raise
            return
    raise failed
