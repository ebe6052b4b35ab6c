"""Sockets between nodes: dialled and listened on, with TLS or plain.

    PeerAddress -> connect, serve -> an asyncio protocol's connection

With certificates both sides show theirs; who has none that the CA signed is turned away in the
handshake, before a byte of ours.  A node's certificate has its name, not its address, because
addresses change; who is who is asked of the name.

Source: RFC 8446 (TLS 1.3 only).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cluster import addresses, unixsock
from cluster.peeraddress import NODE, PeerAddress, bad_certificates, certificates_in

BACKLOG = 64
HANDSHAKE_S = 5.0  # a stranger holds a descriptor for so long, and no more
HANDSHAKES = (
    32  # at once; a member's takes 2 ms, so who has not finished when one more comes is none
)
ACCEPT_AGAIN_S = 0.1  # when the kernel gives no descriptor
NO_INODE = "0"  # in /proc/net/tcp: no process has the socket any more, and its user reads as root


async def connect(
    address: PeerAddress,
    protocol: Callable[[], asyncio.Protocol],
    tls: ssl.SSLContext | None,
) -> None:
    """Dial it; the protocol is told.  OSError (ssl.SSLError is one) when it fails."""
    loop = asyncio.get_running_loop()
    if address.path:
        await loop.create_unix_connection(protocol, address.path)
    else:
        name = "zcache" if tls else None  # not compared: certificates have nodes' names
        await loop.create_connection(
            protocol, address.host, address.port, ssl=tls, server_hostname=name
        )


class Listener(Protocol):
    """What listens; connections that are there go on after its end."""

    def close(self) -> None:
        """No connection more."""


class _TlsListener:
    """Accepts, and shakes hands, with HANDSHAKES at a time: the oldest goes for the next."""

    def __init__(
        self, sock: socket.socket, protocol: Callable[[], asyncio.Protocol], tls: ssl.SSLContext
    ) -> None:
        self._sock, self._protocol, self._tls = sock, protocol, tls
        self._shaking: dict[asyncio.Task[None], None] = {}  # in the order they came
        self._task = asyncio.get_running_loop().create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError:  # no descriptors are left, or its peer is gone already
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            sock.setblocking(False)
            while len(self._shaking) >= HANDSHAKES:
                oldest = next(iter(self._shaking))
                del self._shaking[oldest]
                oldest.cancel()
            task = loop.create_task(self._shake(sock))
            self._shaking[task] = None
            task.add_done_callback(lambda done: self._shaking.pop(done, None))
            await asyncio.sleep(0)  # it begins, before the next one may take its place

    async def _shake(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            with contextlib.suppress(OSError, TimeoutError):
                await loop.connect_accepted_socket(
                    self._protocol, sock, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE_S
                )
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        for task in (self._task, *self._shaking):
            task.cancel()
        self._sock.close()


async def serve(
    address: PeerAddress,
    key: str,
    protocol: Callable[[], asyncio.Protocol],
    tls: ssl.SSLContext | None,
) -> tuple[Listener, str]:
    """Listen there; what listens, and the address with the port that it got."""
    loop = asyncio.get_running_loop()
    if address.path:
        sock = unixsock.listen(address.path, "the peers' socket", f"{key}=PATH", BACKLOG)
        return await loop.create_unix_server(protocol, sock=sock), address.path
    sock = addresses.listen(key, str(address))
    bound = addresses.bound_address(sock)
    if tls is not None:
        return _TlsListener(sock, protocol, tls), bound
    return await loop.create_server(protocol, sock=sock), bound


def context(folder: str | Path, server: bool) -> ssl.SSLContext:
    """TLS 1.3 with the folder's node.pem, asked of the other side too.  Raises ConfigError."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    authority = certificates_in(folder)[-1]
    try:
        made.load_cert_chain(Path(folder) / NODE)
        made.load_verify_locations(cadata=authority)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise bad_certificates(folder, error) from None
    return made


def user_of(sock: Any) -> int | None:
    """The user whose process has the other end, on this machine; None when it cannot be told.

    For a plain connection: the kernel says it, so it can be believed (unix(7), proc(5)).
    """
    if sock.family == socket.AF_UNIX:
        told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", told)[1])
    try:
        ends = _in_proc(sock.family, sock.getpeername()), _in_proc(sock.family, sock.getsockname())
        table = "tcp6" if sock.family == socket.AF_INET6 else "tcp"
        with open(f"/proc/self/net/{table}", encoding="ascii") as file:
            for line in file:
                words = line.split()
                if (words[1], words[2]) == ends and words[9] != NO_INODE:
                    return int(words[7])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _in_proc(family: int, address: Any) -> str:
    """An address as /proc/net/tcp writes it: 32-bit words as they lie in memory, and the port."""
    packed = socket.inet_pton(family, address[0].partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


def name_of(peer: dict[str, Any] | None) -> str:
    """The common name in a peer's certificate (ssl's getpeercert); "" without one."""
    for row in (peer or {}).get("subject", ()):
        for key, value in row:
            if key == "commonName":
                return str(value)
    return ""
