"""Reading the keys about other machines: whom to overflow to, and who may attach the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.etcdurl import EtcdUrl
from cluster.peeraddress import PeerAddress
from plugin.amounts import size_bytes
from zcache_core.errors import ConfigError

LEND_LEAST_BYTES = 16 << 20  # as zcache_core.donation has it
PEERS_MAX = 64  # of the 96 rows of the memory file's donor table


def read_peers(text: str, ram_bytes: int) -> tuple[str, ...]:
    """Addresses of donors."""
    found = tuple(str(PeerAddress.read("peers", part)) for part in text.split(","))
    for address in found:
        if found.count(address) > 1:
            raise ConfigError(f"peers={text} has {address} twice; name each donor once")
    if len(found) > PEERS_MAX:
        raise ConfigError(f"peers= takes at most {PEERS_MAX} donors; leave some out")
    return found


def read_replicas(text: str, ram_bytes: int) -> int:
    """How many copies of a page."""
    if text == "1":
        raise ConfigError(
            "replicas=1 would lose pages with the first donor that fails; write replicas=2 or 3"
        )
    if text not in ("2", "3"):
        raise ConfigError(f"replicas={text} is not possible; write replicas=2 or replicas=3")
    return int(text)


def read_nbd(text: str, ram_bytes: int) -> str:
    """Where other machines attach the device."""
    if text.startswith("/"):
        raise ConfigError(f"nbd={text} is no HOST:PORT; leave it out: a Unix socket is the default")
    return str(PeerAddress.read("nbd", text))


def check_nbd_key(nbd: str | None, tls: str | None) -> None:
    """Raises ConfigError for an address of a network without certificates."""
    if nbd is not None:
        PeerAddress.read("nbd", nbd).require_safe("nbd", tls)


def read_backup(text: str, ram_bytes: int) -> str:
    """Where a page's second copy is: on the disk, or (none) at another peer."""
    if text not in ("disk", "none"):
        raise ConfigError(f"backup={text} is not possible; write backup=disk or backup=none")
    return text


def default_backup(peers: bool, disk: str | None, given: set[str]) -> str:
    """Where there are both, the disk is what a second peer would be; unless replicas= is chosen."""
    return "disk" if peers and disk is not None and "replicas" not in given else "none"


def read_etcd(text: str, ram_bytes: int) -> str:
    """Where donors are registered."""
    EtcdUrl.read(text)
    return text


def read_listen(text: str, ram_bytes: int) -> str:
    """Where owners reach what this machine lends."""
    return str(PeerAddress.read("listen", text))


def read_donate(text: str, ram_bytes: int) -> int:
    """How much RAM to lend, all costs in it."""
    if text.endswith("%") and text[:-1].isdecimal():
        donate = ram_bytes * int(text[:-1]) // 100
    else:
        donate = size_bytes("donate", text, "donate=4G or donate=25%")
    if not LEND_LEAST_BYTES <= donate <= ram_bytes * 9 // 10:
        raise ConfigError(
            f"donate={text} is not possible; write {LEND_LEAST_BYTES >> 20}M at least, and "
            f"{ram_bytes * 9 // 10 >> 20}M at most, so that this machine has RAM of its own"
        )
    return donate


def check_lending(listen: str | None, donate: int, tls: str | None, pool: int, ram: int) -> None:
    """What listen= and donate= mean only together.  Raises ConfigError."""
    if (listen is None) != (donate == 0):
        raise ConfigError(
            "listen= and donate= mean something only together; write both, like "
            "listen=127.0.0.1:7900 donate=4G"
        )
    if listen is None:
        return
    PeerAddress.read("listen", listen).require_safe("listen", tls)
    if pool + donate > ram * 9 // 10:
        raise ConfigError(
            f"pool= and donate= together are more than 90 % of this machine's RAM; write at most "
            f"donate={max(0, ram * 9 // 10 - pool) >> 20}M, or a smaller pool="
        )


def check_peer_keys(
    peers: tuple[str, ...],
    tls: str | None,
    disk: str | None,
    backup: str,
    listen: str | None,
    etcd: str | None,
    given: set[str],
) -> None:
    """What keys of peers mean only together.  Raises ConfigError."""
    if etcd is not None:
        EtcdUrl.read(etcd).require_safe(tls)
    if backup == "disk" and not ((peers or etcd) and disk is not None):
        raise ConfigError(
            "backup=disk keeps one copy of a page at a peer and one on the disk; give it peers= "
            "and disk=, or leave backup= out"
        )
    if not peers and etcd is None:
        for name in ("replicas", "tls", "backup"):
            if name in given and not (name == "tls" and listen is not None):
                raise ConfigError(
                    f"{name}= means something only with peers=ADDRESS,... or etcd=URL{also(name)}; "
                    f"add it, or leave {name}= out"
                )
    for address in peers:
        PeerAddress.read("peers", address).require_safe("peers", tls)


def also(name: str) -> str:
    return " or nbd=HOST:PORT" if name == "tls" else ""


# As config.Key: name, field of the Config, default, help, how it is read.
PEER_KEYS: tuple[tuple[str, str, str, str, Callable[[str, int], Any]], ...] = (
    ("peers", "peers", "none", "donors to overflow to: HOST:PORT or a path, ...", read_peers),
    ("replicas", "replicas", "2", "copies of a page on different peers: 2 or 3", read_replicas),
    (
        "backup",
        "backup",
        "disk with peers= and disk=",
        "copies of a page that leaves RAM; disk: one at a peer and one on the disk, and as many as "
        "replicas= at peers while the disk takes nothing; none (the default when replicas= is "
        "given): at peers or on the disk",
        read_backup,
    ),
    (
        "etcd",
        "etcd",
        "none",
        "where donors are registered, instead of peers= or besides: http://HOST:2379, or "
        "https://USER:PASSWORD@HOST:2379,HOST:2379/PREFIX, or the path of a file with that in its "
        "first line; with listen= this one is, too",
        read_etcd,
    ),
    (
        "listen",
        "listen",
        "none",
        "address on which to lend RAM to other machines, as zcache node does: HOST:PORT or a path",
        read_listen,
    ),
    ("donate", "donate_bytes", "none", "how much RAM to lend there: 4G, 25%", read_donate),
)
