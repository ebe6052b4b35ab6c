"""Where etcd is, as a person writes it: etcd=URL.

    http://10.0.0.1:2379,10.0.0.2:2379         any of them; /NAME behind it is the prefix
    https://USER:PASSWORD@10.0.0.1:2379        with node.pem of tls= on our side
    /etc/zcache/etcd                           a file with one of these in its first line:
                                               everybody can read a command line's password

What it is not: what talks to it (members.py); the server reads its keys with this, and has no loop.
"""

from __future__ import annotations

import logging
import re
import urllib.parse
from dataclasses import dataclass

from cluster.peeraddress import PeerAddress
from zcache_core.errors import ConfigError

PREFIX = "zcache"
LINE_MOST = 4096
log = logging.getLogger("zcache.etcd")


@dataclass(frozen=True)
class EtcdUrl:
    """Where etcd is, and who we are there."""

    protocol: str
    hosts: tuple[tuple[str, int], ...]
    user: str
    password: str
    prefix: str

    @classmethod
    def read(cls, text: str) -> EtcdUrl:
        """From what a person writes.  Raises ConfigError."""
        shown, text = text, _first_line(text) if text.startswith("/") else text
        match = re.fullmatch(
            r"(https?)://(?:([^:@/]+):([^@/]*)@)?([^@/]+)(?:/([\w.-]*))?", text, re.ASCII
        )
        if match is None:
            raise _bad(shown)
        protocol, user, password, hosts, prefix = match.groups()
        try:
            found = [PeerAddress.read("etcd", host) for host in hosts.split(",")]
        except ConfigError:
            raise _bad(shown) from None
        if any(address.path or not address.host for address in found):
            raise _bad(shown)
        return cls(
            protocol,
            tuple((address.host, address.port) for address in found),
            urllib.parse.unquote(user or ""),
            urllib.parse.unquote(password or ""),
            prefix or PREFIX,
        )

    @property
    def donors(self) -> str:
        return f"/{self.prefix}/donors/"

    def require_safe(self, tls: str | None) -> None:
        """Raises ConfigError for what others could read or pretend."""
        if self.protocol == "https":
            if tls is None:
                raise ConfigError("etcd=https://... needs certificates; write tls=FOLDER too")
            return
        for host, port in self.hosts:
            if tls is not None and not PeerAddress("", host, port).stays_here:
                log.warning("etcd=http://%s is not encrypted: who can change it names donors", host)


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline(LINE_MOST).strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"etcd={path} cannot be read ({error}); write a file with http://HOST:2379 in it, or "
            f"etcd=http://HOST:2379"
        ) from None


def without_password(text: str) -> str:
    """The URL as it may be shown."""
    return re.sub(r"(?<=://)([^:@/]*):[^@/]*@", r"\1:***@", text)


def _bad(text: str) -> ConfigError:
    """Whatever is wrong with it: the one sentence that says what to write."""
    return ConfigError(
        f"etcd={without_password(text)} is no address of etcd; write etcd=http://HOST:2379, with "
        f"several hosts etcd=http://HOST:2379,HOST:2379"
    )
