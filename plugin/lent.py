"""What is lent to other machines, as lines: by `zcache node`, by a server with listen=.

    owners' rows    name, pages, bytes they take, bytes offered now, seconds since heard of
    foreign_*       counters: came, were read, dropped, refused, asked back

Nothing here asks anybody.  What it is not: how the owners see it (their `peers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plugin import show
from plugin.show import Line

# What moves between a lender and its owners: words for it, counter.
MOVES = (
    ("came", "foreign_puts"),
    ("read", "foreign_gets"),
    ("dropped", "foreign_drops"),
    ("refused", "foreign_refused_puts"),
    ("asked back", "foreign_recalled_pages"),
)


def owner_text(owner: Mapping[str, Any]) -> str:
    """One owner in a line: who, what it has here, what it may put, when it was heard of."""
    return (
        f"{owner['name']}: {show.count(owner['pages'])} pages in {show.size(owner['bytes'])}, room "
        f"for {show.size(owner['offered_bytes'])}, heard of "
        f"{show.duration(owner['heard_seconds'])} ago"
    )


def holds(stats: Mapping[str, Any]) -> str:
    """'3,000 pages of 2 owners'."""
    pages, owners = stats["foreign_pers_pages"], stats["foreign_owners"]
    return f"{show.count(pages)} pages of {show.count(owners)} owner{'' if owners == 1 else 's'}"


def status_lines(
    control: str,
    ping: Mapping[str, Any],
    stats: Mapping[str, Any],
    config: Mapping[str, Any],
    health: Mapping[str, Any],
    owners: Sequence[Mapping[str, Any]],
) -> list[Line]:
    """The status of a node that only lends."""
    used, limit = stats["pers_pageframes"], stats["pool_set_frames"]
    return [
        Line(
            "zcache node",
            f"{ping['version']}, {config['name']}, process {ping['pid']}, up "
            f"{show.duration(ping['uptime_seconds'])}, control socket {control}",
        ),
        *show.health_lines(health),
        Line(
            "lends",
            f"{show.bar(used / limit if limit else 0)} {show.size(used * show.PAGE_BYTES)} of "
            f"{show.size(limit * show.PAGE_BYTES)} ({show.percent(used, limit)}) on "
            f"{config['listen']}, {show.size(stats['ram_bytes'])} of RAM in all",
        ),
        *owner_lines(stats, owners),
    ]


def server_lines(
    stats: Mapping[str, Any], config: Mapping[str, Any], owners: Sequence[Mapping[str, Any]]
) -> list[Line]:
    """The part of a server that lends as well."""
    amount = f"{show.size(stats['foreign_pers_bytes'])} of {show.size(config['donate'])}"
    return [Line("lends", f"{amount} on {config['listen']}"), *owner_lines(stats, owners)]


def owner_lines(stats: Mapping[str, Any], owners: Sequence[Mapping[str, Any]]) -> list[Line]:
    """What came and went, each owner, and what is wrong."""
    moves = ", ".join(f"{show.count(stats[name])} {words}" for words, name in MOVES)
    found = [Line("", f"{holds(stats)}; {moves}")]
    found += [Line("", owner_text(owner)) for owner in owners]
    if damaged := stats["foreign_damaged_pages"]:
        found.append(
            Line("", f"{show.count(damaged)} pages were found damaged, and dropped", "degraded")
        )
    return found
