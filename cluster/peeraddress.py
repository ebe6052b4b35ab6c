"""Where a donor listens, and whether that may be plain.

    /run/zcache/node.peer      a Unix socket: this machine only, plain
    127.0.0.1:7900, [::1]:7900 loopback: plain, or TLS if there are certificates
    10.0.0.7:7900, host:7900   anything else: TLS with certificates on both sides, or not at all

What a node needs is one file, node.pem in the folder tls=: its key, its certificate, the
cluster's CA (`certificates` makes it).  Both sides show theirs; who has none that the CA
signed is turned away in the handshake, before a byte of ours.  A node's certificate has its
name, not its address, because addresses change; who is who is asked of the name.

Source: RFC 8446 (TLS 1.3 only).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import addresses, unixsock
from zcache_core.errors import ConfigError

BACKLOG = 64
HANDSHAKE_S = 5.0  # a stranger holds a descriptor for so long, and no more
NODE = "node.pem"
PEM_CERTIFICATE = re.compile(
    r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----", re.ASCII
)


@dataclass(frozen=True)
class PeerAddress:
    """A Unix socket's path, or a host and port."""

    path: str
    host: str
    port: int

    @classmethod
    def read(cls, key: str, text: str) -> PeerAddress:
        """From what a person writes.  Raises ConfigError."""
        if text.startswith("/"):
            return cls(text, "", 0)
        host, _, port = addresses.read_address(key, text).rpartition(":")
        return cls("", host.strip("[]"), int(port))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"

    @property
    def stays_here(self) -> bool:
        """Whether it can only be reached from this machine."""
        if self.path or self.host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False

    def require_safe(self, key: str, tls: str | None) -> None:
        """Raises ConfigError for an address of a network without certificates."""
        if not self.stays_here and not tls:
            raise ConfigError(
                f"{key}={self} can be reached from other machines, so it needs certificates; "
                f"write tls=FOLDER (zcache cluster-init makes them), or {key}=127.0.0.1:{self.port}"
            )

    async def connect(
        self, protocol: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None
    ) -> None:
        """Dial it; the protocol is told.  OSError (ssl.SSLError is one) when it fails."""
        loop = asyncio.get_running_loop()
        if self.path:
            await loop.create_unix_connection(protocol, self.path)
        else:
            name = "zcache" if tls else None  # not compared: certificates have nodes' names
            await loop.create_connection(
                protocol, self.host, self.port, ssl=tls, server_hostname=name
            )

    async def serve(
        self, key: str, protocol: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None
    ) -> tuple[asyncio.Server, str]:
        """Listen there; the server, and the address with the port that it got."""
        loop = asyncio.get_running_loop()
        if self.path:
            sock = unixsock.listen(self.path, "the peers' socket", f"{key}=PATH", BACKLOG)
            return await loop.create_unix_server(protocol, sock=sock), self.path
        sock = addresses.listen(key, str(self))
        wait_s = HANDSHAKE_S if tls else None
        server = await loop.create_server(
            protocol, sock=sock, ssl=tls, ssl_handshake_timeout=wait_s
        )
        return server, addresses.bound_address(sock)


def context(folder: str | Path, server: bool) -> ssl.SSLContext:
    """TLS 1.3 with the folder's node.pem, asked of the other side too.  Raises ConfigError."""
    path = Path(folder) / NODE
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    try:
        found = PEM_CERTIFICATE.findall(path.read_text(encoding="ascii"))
        made.load_cert_chain(path)
        made.load_verify_locations(cadata=found[-1])
    except (OSError, ValueError, IndexError) as error:  # ssl.SSLError is an OSError
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"tls={folder}: {path} does not hold a key, a certificate and the CA's ({why}); "
            f"'zcache cluster-add NAME' makes such a file"
        ) from None
    return made


def name_of(peer: dict[str, Any] | None) -> str:
    """The common name in a peer's certificate (ssl's getpeercert); "" without one."""
    for row in (peer or {}).get("subject", ()):
        for key, value in row:
            if key == "commonName":
                return str(value)
    return ""
