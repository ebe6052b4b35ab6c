"""Sockets between nodes: dialled and listened on, with TLS or plain.

    PeerAddress -> connect, serve -> an asyncio protocol's connection

With certificates both sides show theirs; who has none that the CA signed is turned away in the
handshake, before a byte of ours.  A node's certificate has its name, not its address, because
addresses change; who is who is asked of the name.

Source: RFC 8446 (TLS 1.3 only).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import addresses, unixsock
from cluster.peeraddress import NODE, PeerAddress, bad_certificates, certificates_in

BACKLOG = 64
HANDSHAKE_S = 5.0  # a stranger holds a descriptor for so long, and no more


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


async def serve(
    address: PeerAddress,
    key: str,
    protocol: Callable[[], asyncio.Protocol],
    tls: ssl.SSLContext | None,
) -> tuple[asyncio.Server, str]:
    """Listen there; the server, and the address with the port that it got."""
    loop = asyncio.get_running_loop()
    if address.path:
        sock = unixsock.listen(address.path, "the peers' socket", f"{key}=PATH", BACKLOG)
        return await loop.create_unix_server(protocol, sock=sock), address.path
    sock = addresses.listen(key, str(address))
    wait_s = HANDSHAKE_S if tls else None
    server = await loop.create_server(protocol, sock=sock, ssl=tls, ssl_handshake_timeout=wait_s)
    return server, addresses.bound_address(sock)


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


def name_of(peer: dict[str, Any] | None) -> str:
    """The common name in a peer's certificate (ssl's getpeercert); "" without one."""
    for row in (peer or {}).get("subject", ()):
        for key, value in row:
            if key == "commonName":
                return str(value)
    return ""
