"""Who was slow, in a recording: each tier by its histograms, each peer by its state.

    minutes -> what was timed in each -> half and 99 % of it, over all and in the worst minute
    looks   -> peers that were away: since when, how long, why; the slowest of those that answered

Bound: the histograms' cells of a minute (at most 31 each), a few numbers a peer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugin import show
from plugin.recording import Sample, histogram
from plugin.show import Line
from zcache_core.counters import HISTOGRAMS, Histogram, quantile_s

# 99 % of what it is are below so much on any machine that is well, in seconds.  Measured over 100 s
# on two cores with a load of 8 (so that whoever stands above has more against it than company),
# disk and TLS peers on the same machine: put 41 us, get from RAM 8, same-filled 1.8, from the disk
# 32 (its file cached; a device adds 0.1 to 15 ms), from a peer 2.9 ms, a peer asked 16, a batch to
# the disk 91, to peers 222.
USUAL_S = {
    "put": 0.001, "get_ram": 0.001, "get_same": 0.001, "get_disk": 0.05, "get_peer": 0.02,
    "writeback": 0.5, "remote_put": 0.25, "remote_get": 0.02, "pool_wait": 0.1,
    "commit_wait": 0.1, "slot_wait": 0.01,
}  # fmt: skip
FEW = 20  # of so few values, 99 % says nothing
MINUTES = 5  # of a recording, that the middle one may be called ordinary
SUDDEN = 8  # times an ordinary minute: three buckets of a histogram, so not their coarseness
UNFELT = 10  # and so much of USUAL_S at least: 8 times next to nothing is still nothing


@dataclass
class Away:
    """A peer over a recording."""

    name: str
    times: int = 0
    away_s: float = 0.0
    first_s: float = 0.0
    why: str = ""
    is_away: bool = False
    slowest_us: int = 0
    slowest_s: float = 0.0
    wrong_copies: int = 0


def cells(stats: Mapping[str, int]) -> list[str]:
    """Names of the histograms' cells in a sample."""
    return [name for name in stats if name.endswith("]")]


def note_peers(peers: dict[str, Away], sample: Sample, took_s: float) -> None:
    """Take note of one look at the peers."""
    for row in sample.peers:
        peer = peers.setdefault(row["address"], Away(row["name"]))
        peer.name = row["name"] or peer.name
        peer.wrong_copies = max(peer.wrong_copies, row["wrong_copies"])
        if row["state"] == "up":
            peer.is_away = False
            if row["latency_us"] > peer.slowest_us:
                peer.slowest_us, peer.slowest_s = row["latency_us"], sample.time_s
            continue
        peer.away_s += took_s
        if not peer.is_away:
            peer.is_away, peer.times = True, peer.times + 1
            peer.first_s = peer.first_s or sample.time_s
            peer.why = row["why_down"] or peer.why


def tier_lines(minutes: Sequence[Any], clock: Any) -> list[Line]:
    """What was timed, and the worst minute of each; `minutes` have start_s and grown."""
    found = []
    for which in HISTOGRAMS:
        seen = [(minute, histogram(minute.grown, which)) for minute in minutes]
        timed = [(minute, h) for minute, h in seen if h["count"]]
        if timed:
            found.append(_tier_line(which, timed, clock))
    return [line._replace(label="" if at else "took") for at, line in enumerate(found)]


def _tier_line(which: Histogram, timed: list[tuple[Any, dict[str, Any]]], clock: Any) -> Line:
    every = {
        "unit": which.unit, "count": sum(h["count"] for _, h in timed),
        "buckets": [sum(column) for column in zip(*(h["buckets"] for _, h in timed), strict=True)],
    }  # fmt: skip
    text = (
        f"{show.TIMED[which.name]}: half below {show.time_text(quantile_s(every, 0.5))}, 99 % "
        f"below {show.time_text(quantile_s(every, 0.99))} ({show.count(every['count'])} timed)"
    )
    enough = [(minute, h) for minute, h in timed if h["count"] >= FEW] or timed
    most = [(quantile_s(h, 0.99), minute.start_s) for minute, h in enough]
    worst_s, start_s = max(most)
    ordinary_s = sorted(took_s for took_s, _ in most)[len(most) // 2]
    if not is_slow(worst_s, ordinary_s if len(most) >= MINUTES else None, USUAL_S[which.name]):
        return Line("", text)
    text += f"; SLOW in the minute of {clock(start_s)}: 99 % below {show.time_text(worst_s)}"
    if len(most) >= MINUTES:
        text += f", {show.time_text(ordinary_s)} in an ordinary minute"
    return Line("", text, "degraded")


def is_slow(worst_s: float, ordinary_s: float | None, usual_s: float) -> bool:
    """By what any machine does, or by what this one does otherwise (None: not seen for long)."""
    sudden = ordinary_s is not None and worst_s >= SUDDEN * ordinary_s
    return worst_s >= usual_s or (sudden and worst_s >= usual_s / UNFELT)


def peer_lines(peers: Mapping[str, Away], clock: Any) -> list[Line]:
    """Who was away, who was slow, who gave back something else."""
    found = []
    for address, peer in peers.items():
        who = f"{peer.name} at {address}" if peer.name else address
        said = []
        if peer.times:
            why = f": {peer.why}" if peer.why else ""
            said.append(
                f"was away {peer.times} times, {peer.away_s:.0f} s in all, first at "
                f"{clock(peer.first_s)}{why}"
            )
        if peer.wrong_copies:
            said.append(f"{show.count(peer.wrong_copies)} copies of it were wrong")
        if peer.slowest_us:
            said.append(
                f"answered in {show.time_text(peer.slowest_us * 1e-6)} at the slowest, at "
                f"{clock(peer.slowest_s)}"
            )
        level = "degraded" if peer.times or peer.wrong_copies else ""
        found.append(Line("peer", f"{who} {'; '.join(said) or 'was never seen to answer'}", level))
    return found
