"""Reading the keys about other machines: whom to overflow to, and who may attach the device."""

from __future__ import annotations

from cluster.peeraddress import PeerAddress
from zcache_core.errors import ConfigError

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


def check_peer_keys(peers: tuple[str, ...], tls: str | None, given: set[str]) -> None:
    """What keys of peers mean only together.  Raises ConfigError."""
    if not peers:
        for name in ("replicas", "tls"):
            if name in given:
                raise ConfigError(
                    f"{name}= means something only with peers=ADDRESS,...{also(name)}; add it, or "
                    f"leave {name}= out"
                )
    for address in peers:
        PeerAddress.read("peers", address).require_safe("peers", tls)


def also(name: str) -> str:
    return " or nbd=HOST:PORT" if name == "tls" else ""
