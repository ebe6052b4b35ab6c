"""asyncio's transport over a lane: what Python has of a connection with a thread of its own.

    lane's thread --handed over--> LanePort --data_received--> protocol (Channel)
                  <---turn back---          <---write--------

To its protocol it is a transport like any other, and only gets to see what the lane's handler does
not know.  While the protocol has its turn, nothing is read; what it writes is sent when the turn is
over.  With more than the high-water mark unsent the protocol is paused, and has its turn again
when that is gone.

Bound: `set_write_buffer_limits` and one message.  `close` is `abort`: nothing is lost by it that
the other side could rely on.
What it is not: TLS; such connections are asyncio's own (`peersocket`).
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
from cluster.peersocket import BACKLOG

FLUSH_S = 0.02  # how soon a socket that was full is tried again; answers do not wait for it
HIGH_BYTES = 64 * 1024
GONE = (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINTR)


class Laned(Protocol):
    """A protocol for both kinds of transport (peerchannel.Channel)."""

    def make_lane(self) -> LaneEnd | None:
        """The lane for its connection; None: it has none, Python does everything."""

    @property
    def is_between(self) -> bool:
        """Whether all that was received is dealt with, to the last byte."""


class LanePort(asyncio.Transport):
    """The transport of a connected, blocking socket; `start`, once."""

    def __init__(self, sock: socket.socket, lane: LaneEnd, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._sock, self._lane, self._protocol = sock, lane, protocol
        self._high_bytes = HIGH_BYTES
        self._paused = self._closing = False
        self._flusher: asyncio.TimerHandle | None = None
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        """Tell the protocol, and begin to read.  Raises OSError, all closed, without a thread."""
        self._protocol.connection_made(self)
        if self._closing:
            return
        self._loop.add_reader(self._lane.wake_fd, self._woken)
        try:
            self._lane.start(self._sock.fileno())
        except OSError as error:
            self.abort(error)
            raise

    # ---- what the lane tells ---------------------------------------------------------

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._lane.wake_fd, 8)
        if self._lane.is_handed:
            self._our_turn()
        elif self._lane.over is not None:
            self._end(self._lane.over)
        elif not self._lane.flush():
            self._flush_later()

    def _our_turn(self) -> None:
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
        if not self._closing:
            self.abort(OSError(why, os.strerror(why)) if why else None)

    # ---- what the protocol asks --------------------------------------------------------

    def write(self, data: Any) -> None:
        """Sent at once if it can be, in order in any case."""
        if self._closing:
            return
        kept = self._lane.write(bytes(data))
        if kept is None:
            self._loop.call_soon(self._end, errno.EPIPE)
        elif kept > self._high_bytes and not self._paused:
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
        """`lane` and `socket`; there is no certificate."""
        return {"lane": self._lane, "socket": self._sock}.get(name, default)


# ---- dialled and listened for --------------------------------------------------------------


class Listening:
    """A listening socket whose connections have lanes; until `close`."""

    def __init__(self, sock: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        sock.setblocking(False)
        self._sock, self._protocol = sock, protocol
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._accept)

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if error.errno in GONE and error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    self._loop.remove_reader(self._sock)  # as asyncio does: again in a second
                    self._loop.call_later(1.0, self._again)
                return
            with contextlib.suppress(OSError):
                open_port(sock, self._protocol())

    def _again(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Connections that are there stay."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()


def open_port(sock: socket.socket, protocol: asyncio.Protocol) -> None:
    """Give a connected socket to the protocol.  OSError, the socket closed, without a thread."""
    sock.setblocking(True)
    lane = cast(Laned, protocol).make_lane()
    assert lane is not None
    LanePort(sock, lane, protocol).start()


async def serve(
    address: PeerAddress, key: str, protocol: Callable[[], asyncio.Protocol]
) -> tuple[Listening, str]:
    """As peersocket.serve without TLS; connections have lanes."""
    if address.path:
        sock = unixsock.listen(address.path, "the peers' socket", f"{key}=PATH", BACKLOG)
        return Listening(sock, protocol), address.path
    sock = addresses.listen(key, str(address))
    return Listening(sock, protocol), addresses.bound_address(sock)


async def connect(address: PeerAddress, protocol: asyncio.Protocol) -> None:
    """Dial it, one after the other of a name's addresses; OSError when all fail."""
    loop = asyncio.get_running_loop()
    found: list[Any] = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", address.path)]
    if not address.path:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
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
            open_port(sock, protocol)
            return
    raise failed
