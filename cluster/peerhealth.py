"""What is wrong with peers, etcd and certificates, in sentences: rules of `health`.

What it is not: where they are asked, and in which order (health.py).
"""

from __future__ import annotations

from cluster.expiry import WARN_DAYS
from cluster.reasons import CRITICAL, DEGRADED, Config, Reason, Stats


def has_peers(config: Config) -> bool:
    return bool(config.get("peers") or config.get("etcd"))


def peer_copies_bad(stats: Stats, config: Config) -> Reason | None:
    """A donor answered with something else than what it was given."""
    if not (corrupt := stats["remote_corrupt_pages"]):
        return None
    return Reason(
        DEGRADED,
        f"{corrupt} copies of peers were found wrong; other copies were used where there are any.",
        "See which peer it is ('zcache status', WRONG) and check that machine's memory.",
    )


def peers_missing(stats: Stats, config: Config) -> Reason | None:
    """Fewer donors than copies: nothing goes to peers."""
    named = len(config.get("peers") or ())
    wanted = config.get("replicas", 0) if has_peers(config) else 0
    if wanted and config.get("backup") == "disk":
        wanted = 1
    if stats["live_peers"] >= wanted:
        return None
    return Reason(
        DEGRADED,
        f"{stats['live_peers']}{'' if config.get('etcd') else f' of {named}'} peers answer and "
        f"{wanted} are needed, so "
        f"no page goes to peers.",
        "See why the others do not answer ('zcache status' names them and says why).",
    )


def peer_away(stats: Stats, config: Config) -> Reason | None:
    """Enough are there; the one that is not may come back, or is gone."""
    named, live = len(config.get("peers") or ()), stats["live_peers"]
    if live >= named or live < config.get("replicas", 0):
        return None
    return Reason(
        DEGRADED,
        f"{named - live} of {named} peers do not answer.",
        "See which and why ('zcache status' names them); take it out of peers= if it is gone for "
        "good.",
    )


def peers_twins(stats: Stats, config: Config) -> Reason | None:
    """Two of peers= are one donor, or have one certificate: the second is not used."""
    if not (twins := list(config.get("twin_peers", ()))):
        return None
    return Reason(
        DEGRADED,
        " ".join(twins),
        "Name each donor once in peers=, and give each machine a node.pem of its own "
        "('zcache cluster-add NAME').",
    )


def certificate_ends(stats: Stats, config: Config) -> Reason | None:
    """Our certificate, or the CA's: afterwards nobody lets us in, and nobody comes in to us."""
    days = config.get("certificate_days", WARN_DAYS)
    if days >= WARN_DAYS:
        return None
    when = f"ends in {days} days" if days >= 0 else f"ended {-days} days ago"
    return Reason(
        DEGRADED if days >= 0 else CRITICAL,
        f"A certificate in {config['tls']} {when}: then no new connection is accepted.",
        "Make a new node.pem ('zcache cluster-add'; a new CA when that is what ends), copy it "
        "there, and run 'zcache upgrade', which loses nothing.",
    )


def etcd_silent(stats: Stats, config: Config) -> Reason | None:
    """Who lends is not known any more; who has pages goes on."""
    if not (silent_s := config.get("etcd_silent_s", 0)):
        return None
    return Reason(
        DEGRADED,
        f"etcd has not answered for {silent_s} s: donors that it names are given no new pages, "
        f"those at them stay.",
        "See that etcd runs, that this machine reaches it, and what etcd= says ('zcache status').",
    )


def peers_short(stats: Stats, config: Config) -> Reason | None:
    """Copies are missing, and are being renewed if there is a donor for them."""
    if not (short := stats["remote_short_pages"]):
        return None
    return Reason(
        DEGRADED,
        f"{short} copies of pages are with peers that are away or gone.",
        "They are renewed elsewhere when such a peer does not come back; see that there are more "
        "peers than replicas=, with room.",
    )


def backup_missing(stats: Stats, config: Config) -> Reason | None:
    """Pages that the next failure of the disk would lose."""
    if not (missing := stats["backup_missing_pages"]) or config.get("backup") != "disk":
        return None
    return Reason(
        DEGRADED,
        f"{missing} pages are on the disk alone: no peer has a copy of them yet.",
        "The copies are made from the disk as soon as peers take them; see that a peer answers and "
        "has room (RPC peers).",
    )
