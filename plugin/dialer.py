"""Reaching an NBD server: a target, a generation, a connection that is ready for the kernel.

    target  Unix path or (address, port), device name      where
    Generations.next() -> 1700000000123456                   strictly rising, over restarts too
    dial(target, generation) -> Link(sock, size, flags)      connect, handshake, or an error
    dial(target, generation, relays)                         with TLS: the Link is a relay's end

Each connection set opens `DEVICE@GENERATION`, so that the server fences what is older: a worker
of a dead connection may still hold a write that the kernel has sent again.

Bound: CONNECT_S to be accepted, HANDSHAKE_S for every answer.  A server that has just been
started accepts connections before it answers them; dialling again then does no harm, because the
newest generation wins.

Part of the attach helper: plain sockets, numbers instead of names, no import that is not needed.
"""

from __future__ import annotations

import errno
import os
import socket
import time

from plugin.handshake import UNKNOWN_EXPORT, Handshake, RefusedError
from plugin.relays import Relays
from zcache_core.errors import AttachError

CONNECT_S = 1.0  # a lost SYN is sent again after one second; a new attempt does that as well
HANDSHAKE_S = 5.0  # a server that opens its memory file first answers late
RECEIVE_BYTES = 4096
YEAR_US = 366 * 86_400 * 1_000_000
CLIMB_US_MAX = 1000 * YEAR_US  # a server that refuses for another reason must not use up 64 bits
KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 5))


class Target:
    """Where a server is, and which of its devices.

    unix: path of its socket, or host: numeric address, and port.  device: "" is its first one.
    plain: it knows no generations (any other NBD server); then `device` is the export's name.
    tls: the name, or address, that its certificate must have; "" without TLS.
    """

    __slots__ = ("device", "host", "plain", "port", "tls", "unix")

    def __init__(
        self, unix: str, host: str = "", port: int = 0, device: str = "", plain: bool = False,
        tls: str = "",
    ) -> None:  # fmt: skip
        self.unix, self.host, self.port, self.device, self.plain = unix, host, port, device, plain
        self.tls = tls

    def __str__(self) -> str:
        return self.unix or f"{self.host} port {self.port}"

    def export(self, generation: int | None) -> str:
        """The export's name for a connection of this generation; None: one that fences nothing."""
        return self.device if self.plain or generation is None else f"{self.device}@{generation}"


class Generations:
    """Numbers that only rise, even when the clock does not.  `last`: the last one that was used."""

    __slots__ = ("_step_us", "last")

    def __init__(self, last: int = 0) -> None:
        self.last = last
        self._step_us = 1

    def next(self) -> int:
        """One above the last, and never below the wall clock in microseconds."""
        now_us = time.time_ns() // 1000
        if self.last > now_us + CLIMB_US_MAX:
            self._step_us = 1
        self.last = max(self.last + self._step_us, now_us)
        return self.last

    def refused(self) -> None:
        """The server knows a higher one (its clock was ahead): climb, twice as far each time."""
        self._step_us = min(2 * max(self._step_us, 1_000_000), YEAR_US)

    def taken(self) -> None:
        """The server has opened the last one."""
        self._step_us = 1


class Link:
    """A connection whose handshake is done: nothing but requests may follow."""

    __slots__ = ("flags", "size_bytes", "sock")

    def __init__(self, sock: socket.socket, size_bytes: int, flags: int) -> None:
        self.sock, self.size_bytes, self.flags = sock, size_bytes, flags


def dial(target: Target, generations: Generations | None, relays: Relays | None = None) -> Link:
    """A new connection, the newest generation of its device.  Raises AttachError, OSError.

    Without generations it is one to look at things, and disturbs no other.  relays: for TLS.
    """
    export = target.export(generations.next() if generations else None)
    shake = Handshake(export, tls=bool(target.tls))
    sock = _connect(target)
    try:
        sock.settimeout(HANDSHAKE_S)
        while not shake.done:
            data = sock.recv(RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            if answer := shake.receive(data):
                sock.sendall(answer)
            if shake.wants_tls and relays is not None:
                sock = relays.secure(sock, target.tls, target)
                sock.settimeout(HANDSHAKE_S)
                sock.sendall(shake.after_tls())
        sock.setblocking(True)
    except RefusedError as error:
        sock.close()
        if error.code == UNKNOWN_EXPORT and generations:
            generations.refused()
        raise
    except (BrokenPipeError, ConnectionResetError):
        sock.close()
        if shake.in_tls and relays is not None:
            raise relays.why_ended(target, target.tls) from None
        raise
    except BaseException:
        sock.close()
        raise
    if generations:
        generations.taken()
    return Link(sock, shake.size_bytes, shake.flags)


def _connect(target: Target) -> socket.socket:
    if target.unix:
        family, address = socket.AF_UNIX, target.unix
    else:
        family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
        address = (target.host, target.port)  # type: ignore[assignment]
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if not target.unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.settimeout(CONNECT_S)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def explain(error: Exception, target: Target) -> AttachError:
    """What went wrong while dialling, as one sentence that says what to do."""
    if isinstance(error, AttachError):
        return error
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return AttachError(f"no NBD server answers at {target}; start it, then attach again")
    if isinstance(error, TimeoutError):
        return AttachError(f"the NBD server at {target} does not answer; look after it, or attach "
                           f"again later")  # fmt: skip
    if isinstance(error, OSError):
        return AttachError(f"the NBD server at {target} cannot be reached: {error.strerror}")
    raise error
