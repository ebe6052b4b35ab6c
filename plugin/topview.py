"""What `zcache top` shows, as lines of text for any width and height.

    title, health                    always
    tiers        bar, bytes, pages   always
    traffic      rates, sparklines   when there is room, section after section;
    took         half, 99 % below    a section that does not fit is left out whole
    peers        state, copies
    lends        whose pages are here
    behind it    background work
    why          reasons of health
    keys                             the last line

A node that only lends (`zcache node`) has one tier, what it lends, and other traffic.

`frame` makes lines from a View and asks nobody, so tests look at any state in any size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.text import Text

from plugin import lent, rates, show
from plugin.reach import further
from zcache_core.counters import COUNTERS

PAGE_BYTES = 4096
LABEL_CELLS = 12
BAR_MIN_CELLS, BAR_MAX_CELLS = 8, 40
PERCENT_CELLS, TIER_TEXT_CELLS = 11, 22  # beside a bar: so much that pages and ratio are seen
TRAFFIC_CELLS = (10, 11, 12, 16)
TOOK_CELLS = (32, 26)
SPARK_MIN_CELLS, SPARK_MAX_CELLS = 8, 60
PEERS_SHOWN = 12  # and as many owners
NOTHING: Mapping[str, Any] = {"unit": "microseconds", "count": 0, "sum": 0, "buckets": []}
KEYS = "q quit  p pause  c all counters  s sort  e change  d drain  + - interval"
LENDER_KEYS = KEYS.replace("  e change", "")
SORTS = ("table", "name", "value", "rate")
TRAFFIC = (
    ("in", "succ_stores", PAGE_BYTES),
    ("out", "loads", PAGE_BYTES),
    ("dropped", "invalidates", PAGE_BYTES),
    ("refused", "failed_stores", PAGE_BYTES),
    ("written back", "written_back_pages", PAGE_BYTES),
    ("from below", "cold_loads", PAGE_BYTES),
)
LENT_TRAFFIC = tuple((words, name, PAGE_BYTES) for words, name in lent.MOVES)
REFUSED = ("failed_stores", "foreign_refused_puts")


@dataclass
class View:
    """Everything a picture is made from."""

    control: str
    interval_s: float
    utf8: bool = True
    answers: Mapping[str, Any] = field(default_factory=dict)  # ping, stats, config, health, peers
    history: rates.History = field(default_factory=rates.History)
    silent: str = ""  # why nobody answers, when nobody does
    paused: bool = False
    counters: bool = False  # the table of all counters instead of the picture
    sort: str = SORTS[0]
    first_row: int = 0
    prompt: str = ""  # a question in the last line, instead of the keys
    message: str = ""  # what came of the last change

    @property
    def stats(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.answers.get("stats", {})
        return found

    @property
    def only_lends(self) -> bool:
        """Whether it is a node without a swap device."""
        return "config" in self.answers and show.only_lends(self.answers["config"])


class Tier(NamedTuple):
    """One bar: `also_bytes` of `used_bytes` are copies that are safe below as well."""

    label: str
    used_bytes: int
    also_bytes: int
    limit_bytes: int
    text: str
    style: str


def frame(view: View, width: int, height: int, clock: str | None = None) -> list[Text]:
    """At most `height` lines; the last one is the keys, the question, or the message."""
    clock = time.strftime("%H:%M:%S") if clock is None else clock
    if height < 2:
        return head(view, width, clock)[:height]
    if view.counters:
        body = [*head(view, width, clock)[:1], *counter_table(view, height - 2)]
    else:
        body = [*head(view, width, clock), *tier_lines(view, width)]
        for section in (
            *(traffic_lines, latency_lines, peer_lines, lent_lines, behind_lines, reason_lines),
        ):
            found = section(view, width)
            if found and len(body) + 1 + len(found) < height:
                body += [Text(), *found]
    body = body[: height - 1]
    body += [Text()] * (height - 1 - len(body))
    return [*body, last_line(view)]


def plain(view: View, clock: str | None = None) -> list[str]:
    """The same for a pipe: everything, no colour, no empty lines, no keys."""
    found = frame(view, 100, 1000, clock)[:-1]
    return [line.plain.rstrip() for line in found if line.plain.strip()]


def head(view: View, width: int, clock: str) -> list[Text]:
    """Who it is and how it is."""
    ping, health = view.answers.get("ping"), view.answers.get("health")
    if ping is None or health is None:
        return [Text(f"zcache  {clock}  {view.control}"), Text(view.silent or "asking ...")]
    who = f"node {ping['pid']}" if view.only_lends else f"server {ping['server_pid']}"
    first = Text.assemble(
        ("zcache ", "bold"),
        f"{ping['version']}  {clock}  {who}  up {show.duration(ping['uptime_seconds'])}  "
        f"{view.control}",
    )
    if view.paused:
        first.append("  PAUSED", "bold yellow")
    second = Text.assemble(
        ("health ", "bold"), (str(health["status"]), show.STYLES.get(health["status"], ""))
    )
    if view.silent:
        second = Text(f"no answer: {view.silent}", "bold red")
    elif health["reasons"]:
        more = len(health["reasons"]) - 1
        second.append(f": {health['reasons'][0]['what']}" + (f" (+{more})" if more else ""))
    second.truncate(width, overflow="ellipsis")
    return [first, second]


# ---- tiers ---------------------------------------------------------------------------


def recompressing(stats: Mapping[str, int]) -> str:
    """What cold pages are recompressed with, and how many were."""
    if not (level := stats["recompress_level"]):
        return ""
    return f", cold zstd:{level} {show.count(stats['recompressed_pages'])}"


def tiers(stats: Mapping[str, int], config: Mapping[str, Any]) -> Iterator[Tier]:
    """From the top down."""
    if show.only_lends(config):
        used, limit = stats["pers_pageframes"], stats["pool_set_frames"]
        text = f"{lent.holds(stats)}, on {config['listen']}"
        yield Tier("lent", used * PAGE_BYTES, 0, limit * PAGE_BYTES, text, "magenta")
        return
    ephemeral, only = stats["eph_pageframes"], stats["pers_pageframes"]
    used = (ephemeral + only) * PAGE_BYTES
    limit = stats["pool_limit_frames"] * PAGE_BYTES
    in_ram = stats["pers_zpages"] + stats["eph_zpages"]
    yield Tier(
        "RAM", used, ephemeral * PAGE_BYTES, limit,
        f"{show.count(in_ram)} pages, {show.ratio(in_ram * PAGE_BYTES, used)}:1, "
        f"{config.get('allocator', '')} {config.get('codec', '')}{recompressing(stats)}",
        "green",
    )  # fmt: skip
    if has_peers(config):
        there, named = stats["remote_bytes"], len(config.get("peers") or ())
        yield Tier(
            "peers", there, 0, there + stats["remote_room_bytes"],
            f"{show.count(stats['pers_pages_remoted'])} pages, {show.answering(stats, config)}",
            "red" if stats["live_peers"] < named else "magenta",
        )  # fmt: skip
    if stats["disk_limit_bytes"]:
        failing = f", fails: {os.strerror(stats['disk_errno'])}" if stats["disk_degraded"] else ""
        yield Tier(
            "disk", stats["disk_bytes"], 0, stats["disk_limit_bytes"],
            f"{show.count(stats['disk_pages'])} pages{failing}",
            "red" if failing else "blue",
        )  # fmt: skip
    yield Tier(
        "device", stats["logical_bytes"], 0, stats["device_pages"] * PAGE_BYTES,
        f"{show.count(stats['same_filled_pages'])} same-filled, "
        f"{show.ratio(stats['logical_bytes'], stats['ram_bytes'])}:1 to all RAM",
        "cyan",
    )  # fmt: skip


def tier_lines(view: View, width: int) -> list[Text]:
    """A bar for each tier."""
    if not view.stats:
        return []
    shown = list(tiers(view.stats, view.answers["config"]))
    amounts = [f"{show.size(tier.used_bytes)} of {show.size(tier.limit_bytes)}" for tier in shown]
    widest = max(map(len, amounts))
    room = width - LABEL_CELLS - widest - PERCENT_CELLS - TIER_TEXT_CELLS
    cells = max(BAR_MIN_CELLS, min(BAR_MAX_CELLS, width // 4, room))
    found = [Text()]
    for tier, amount in zip(shown, amounts, strict=True):
        percent = show.percent(tier.used_bytes, tier.limit_bytes)
        found.append(
            Text.assemble(
                (f"{tier.label:{LABEL_CELLS}} ", "bold"),
                *bar(tier, cells, view.utf8),
                f" {percent:>5}  {amount:{widest}}  {tier.text}",
            )
        )
    return found


def bar(tier: Tier, cells: int, utf8: bool) -> list[tuple[str, str]]:
    """Used by pages that are nowhere lower, by copies that may be dropped, and free."""
    full, also, free = "█▒·" if utf8 else "#+."
    share = min(1.0, tier.used_bytes / tier.limit_bytes) if tier.limit_bytes else 0.0
    used = round(share * cells) or (1 if tier.used_bytes else 0)
    dropped = round(used * tier.also_bytes / tier.used_bytes) if tier.used_bytes else 0
    return [
        (full * (used - dropped), tier.style),
        (also * dropped, tier.style),
        (free * (cells - used), "dim"),
    ]


# ---- what happens ---------------------------------------------------------------------


def traffic_lines(view: View, width: int) -> list[Text]:
    """Rates now and over a minute, totals, and how it went."""
    if not view.stats:
        return []
    spark = min(SPARK_MAX_CELLS, width - 68)
    titles = ("now", "bytes/s", "last minute", "total")
    found = [Text(row("pages/s", titles, TRAFFIC_CELLS, width), "bold")]
    for label, name, unit_bytes in LENT_TRAFFIC if view.only_lends else TRAFFIC:
        if name == "written_back_pages" and not has_below(view):
            break
        now, mean = view.history.per_second(name), view.history.mean(name, 60)
        bytes_now = "-" if now is None else show.size(now * unit_bytes)
        told = (number(now), bytes_now, number(mean), show.count(view.stats[name]))
        line = Text(row(label, told, TRAFFIC_CELLS, width))
        if name in REFUSED and now:
            line.stylize("bold red")
        if spark >= SPARK_MIN_CELLS:
            blocks = rates.BLOCKS if view.utf8 else rates.ASCII_BLOCKS
            line.append("  " + rates.sparkline(view.history.series(name, spark), blocks), "cyan")
        found.append(line)
    return found


def row(label: str, told: Sequence[str], cells: Sequence[int], width: int) -> str:
    """A label and columns; what does not fit is left out whole: half a number is another one."""
    found = f"{label:{LABEL_CELLS}}"
    for text, wide in zip(told, cells, strict=True):
        if len(found) + 1 + wide > width:
            break
        found += f" {text:>{wide}}"
    return found


def has_below(view: View) -> bool:
    """Whether there is a disk, or peers."""
    return bool(view.stats["disk_limit_bytes"] or has_peers(view.answers["config"]))


def has_peers(config: Mapping[str, Any]) -> bool:
    return "peers" in further(config)


def number(rate: float | None) -> str:
    """12345.6 -> '12,346', 0.25 -> '0.2', unknown -> '-'."""
    if rate is None:
        return "-"
    return f"{rate:,.0f}" if rate >= 10 or rate == 0 else f"{rate:.1f}"


def latency_lines(view: View, width: int) -> list[Text]:
    """How long what took: half of it and 99 % of it were below so much; nothing when idle."""
    found = []
    histograms = view.stats.get("histograms", {})
    before = view.history.first_since(60)["histograms"] if len(view.history) else {}
    for name, words in show.TIMED.items():
        histogram = histograms.get(name, NOTHING)
        if histogram["count"]:
            lately = rates.newer(before.get(name, NOTHING), histogram)
            told = (lately_text(lately), show.spread(histogram))
            found.append(Text(row(words, told, TOOK_CELLS, width)))
    if found:
        titles = ("last minute: half, 99 % below", "in all")
        found.insert(0, Text(row("took", titles, TOOK_CELLS, width), "bold"))
    return found


def lately_text(histogram: Mapping[str, Any]) -> str:
    return show.spread(histogram) if histogram["count"] else "-"


def peer_lines(view: View, width: int) -> list[Text]:
    """Each peer: how it is, and what it has of ours; those in trouble first."""
    peers = view.answers.get("peers") or []
    order = sorted(peers, key=lambda peer: (peer["state"] == "up", peer["address"]))
    found = []
    for peer in order[:PEERS_SHOWN]:
        line = pair("", show.peer_text(peer))
        if peer["state"] != "up" or peer["wrong_copies"]:
            line.stylize("red")
        found.append(line)
    if len(order) > PEERS_SHOWN:
        found.append(pair("", f"and {len(order) - PEERS_SHOWN} more that answer ('zcache status')"))
    if found:
        short = view.stats["remote_short_pages"]
        missing = f"{show.count(short)} copies are missing" if short else "no copy is missing"
        copies = view.answers["config"].get("replicas", 2)
        text = f"{copies} copies of a page, {missing}"
        found.insert(0, pair("peers", text))
    return under_label(found, width)


def lent_lines(view: View, width: int) -> list[Text]:
    """Whose pages are here, those with most first; of a server that lends, how much it is."""
    if not (config := view.answers.get("config", {})).get("listen"):
        return []
    owners = sorted(view.answers["owners"], key=lambda owner: (-owner["bytes"], owner["name"]))
    found = [pair("", lent.owner_text(owner)) for owner in owners[:PEERS_SHOWN]]
    if len(owners) > PEERS_SHOWN:
        found.append(pair("", f"and {len(owners) - PEERS_SHOWN} more ('zcache status')"))
    if view.only_lends:
        text = "" if owners else "nobody has been here yet"
        return under_label([pair("owners", text), *found], width)
    moves = ", ".join(
        f"{number(view.history.per_second(name))}/s {words}" for words, name in lent.MOVES
    )
    lends = f"{show.size(view.stats['foreign_pers_bytes'])} of {show.size(config['donate'])}"
    title = pair("lends", f"{lends}, {lent.holds(view.stats)}; {moves}")
    return under_label([title, *found], width)


def behind_lines(view: View, width: int) -> list[Text]:
    """What works in the background, and who waits for it."""
    stats = view.stats
    if not stats or view.only_lends:
        return []
    found = [
        pair(
            "reserve",
            f"{show.size(stats['free_frames'] * PAGE_BYTES)} ready, "
            f"{show.size(stats['committed_frames'] * PAGE_BYTES)} of RAM taken by the pool, "
            f"{show.size(stats['server_resident_bytes'])} by the server beside it",
        ),
        pair("waits", waits(view)),
    ]
    target = stats["pool_target_frames"]
    if stats["memory_pressure"] or target < stats["pool_set_frames"]:
        short = "memory is short" if stats["memory_pressure"] else "memory was short"
        found.append(
            pair(
                "pressure",
                f"{short}: the pool goes down to {show.size(target * PAGE_BYTES)} "
                f"({show.count(stats['pressure_steps'])} steps so far)",
            )
        )
    if stats["disk_limit_bytes"]:
        written, cleaned = (
            view.history.per_second(name) or 0.0
            for name in ("disk_written_bytes", "disk_cleaned_bytes")
        )
        found.append(
            pair(
                "writeback",
                f"from {stats['high_percent']} % to {stats['low_percent']} %, "
                f"{show.count(stats['outstanding_writeback_pages'])} pages under way, "
                f"{show.size(written)}/s to the disk, {show.size(cleaned)}/s of it cleaning"
                + (", DRAINING" if stats["draining"] else ""),
            )
        )
    return under_label(found, width)


def waits(view: View) -> str:
    """Share of the time that writes waited, by what for."""
    found = []
    for what, events, time_us in (
        ("room in the pool", "pool_waits", "pool_wait_us"),
        ("memory", "commit_waits", "commit_wait_us"),
    ):
        share = (view.history.per_second(time_us) or 0.0) / 1e6
        found.append(f"for {what} {show.count(view.stats[events])} ({100 * share:.0f} % of now)")
    return ", ".join(found)


def pair(label: str, text: str) -> Text:
    return Text.assemble((f"{label:{LABEL_CELLS}} ", "bold"), text)


def under_label(found: Iterable[Text], width: int) -> list[Text]:
    """What is too long goes on below, not below the label."""
    return [line for text in found for line in wrapped(text, width, LABEL_CELLS + 1)]


def reason_lines(view: View, width: int) -> list[Text]:
    """Every reason of health, and what to do."""
    found = []
    for reason in view.answers.get("health", {}).get("reasons", ()):
        found += [Text(f"! {reason['what']}", "yellow"), Text(f"  {reason['do']}")]
    return [line for text in found for line in wrapped(text, width, 2)]


def wrapped(text: Text, width: int, indent: int) -> list[Text]:
    """Broken between words, later lines indented."""
    lines, rest = [], text
    while len(rest) > width > 2 * indent + 8:
        cut = rest.plain.rfind(" ", indent + 4, width + 1)
        cut = width if cut < 0 else cut
        lines.append(rest[:cut])
        rest = Text(" " * indent, text.style) + rest[cut + (rest.plain[cut] == " ") :]
    return [*lines, rest]


# ---- all counters ----------------------------------------------------------------------


def counter_table(view: View, rows: int) -> list[Text]:
    """Each counter with its value and what it does a second; `first_row` scrolls."""
    ordered = sorted_counters(view)
    view.first_row = max(0, min(view.first_row, len(ordered) - rows + 1))
    shown = ordered[view.first_row : view.first_row + rows - 1]
    title = f"{'counter':30} {'value':>17} {'a second':>12}  sorted by {view.sort}"
    return [Text(title, "bold")] + [
        Text(f"{name:30} {show.count(value):>17} {number(rate) if rate else '':>12}  {unit}")
        for name, value, rate, unit in shown
    ]


def sorted_counters(view: View) -> list[tuple[str, int, float, str]]:
    """(name, value, rate, unit) of every counter that the server told of."""
    rows = [
        (c.name, view.stats[c.name], view.history.per_second(c.name) or 0.0, c.unit)
        for c in COUNTERS
        if c.name in view.stats
    ]
    if view.sort == "name":
        rows.sort(key=lambda row: row[0])
    elif view.sort == "value":
        rows.sort(key=lambda row: -row[1])
    elif view.sort == "rate":
        rows.sort(key=lambda row: -row[2])
    return rows


def last_line(view: View) -> Text:
    if view.prompt:
        return Text(view.prompt, "bold reverse")
    if view.message:
        return Text(view.message, "bold")
    keys = LENDER_KEYS if view.only_lends else KEYS
    return Text(f"{keys}  ({view.interval_s:g} s)", "dim")
