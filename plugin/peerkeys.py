"""Reading the keys about peers: whom to overflow to, how many copies, with which certificate."""

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


def check_peer_keys(peers: tuple[str, ...], tls: str | None, given: set[str]) -> None:
    """What keys of peers mean only together.  Raises ConfigError."""
    if not peers:
        for name in ("replicas", "tls"):
            if name in given:
                raise ConfigError(
                    f"{name}= means something only with peers=ADDRESS,...; add it, or leave "
                    f"{name}= out"
                )
    for address in peers:
        PeerAddress.read("peers", address).require_safe("peers", tls)
