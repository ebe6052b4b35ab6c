"""Where a donor listens, and whether that may be plain.

    /run/zcache/node.peer      a Unix socket: this machine only, plain
    127.0.0.1:7900, [::1]:7900 loopback: plain, or TLS if there are certificates
    10.0.0.7:7900, host:7900   anything else: TLS with certificates on both sides, or not at all

What a node needs for that is one file, node.pem in the folder tls=: its key, its certificate,
the cluster's CA (`certificates` makes it).

What it is not: a socket (`peersocket`).  The server reads its keys with this, and must load
neither asyncio nor ssl.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from cluster import addresses
from zcache_core.errors import ConfigError

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


def certificates_in(folder: str | Path) -> list[str]:
    """The certificates of the folder's node.pem, the CA's last.  Raises ConfigError."""
    path = Path(folder) / NODE
    try:
        text = path.read_text(encoding="ascii")
        found = PEM_CERTIFICATE.findall(text)
        if len(found) < 2 or "PRIVATE KEY-----" not in text:
            raise ValueError("it is cut short")
    except (OSError, ValueError) as error:
        raise bad_certificates(folder, error) from None
    return found


def bad_certificates(folder: str | Path, error: Exception) -> ConfigError:
    """What to do when node.pem is not what it should be."""
    why = getattr(error, "strerror", None) or str(error)
    return ConfigError(
        f"tls={folder}: {Path(folder) / NODE} does not hold a key, a certificate and the CA's "
        f"({why}); 'zcache cluster-add NAME' makes such a file"
    )
