"""A server's state as lines for a person: units, ratio, pool bar.

`lines` makes (label, text, style) from the RPC's answers; `print_lines` puts them
on a terminal in colour, or as plain text into a pipe.  Nothing here asks anybody.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from zcache_core.counters import quantile_s

PAGE_BYTES = 4096
BAR_CELLS = 30
STYLES = {"ok": "green", "note": "yellow", "degraded": "yellow", "todo": "red", "critical": "red"}


class Line(NamedTuple):
    label: str
    text: str
    style: str = ""  # a key of STYLES, or nothing


def only_lends(config: Mapping[str, Any]) -> bool:
    """Whether `config` is that of a `zcache node`, without a device; a server may lend as well."""
    return "size" not in config


def size(size_bytes: float) -> str:
    """12345678 -> '11.8 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def count(number: int) -> str:
    """1234567 -> '1,234,567'."""
    return f"{number:,}"


def duration(seconds: int) -> str:
    """93784 -> '1 d 2 h'; the two largest units."""
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, seconds = divmod(seconds, length)
        if number:
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2]) or "0 s"


def bar(share: float, cells: int = BAR_CELLS) -> str:
    """0.5 -> '[###############...............]'; a share above nothing shows one cell."""
    share = min(1.0, max(0.0, share))
    full = round(share * cells) or (1 if share > 0 else 0)
    return "[" + "#" * full + "." * (cells - full) + "]"


def ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2f}" if whole else "-"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def time_text(seconds: float) -> str:
    """0.0000015 -> '1.5 us': three digits, and the unit that suits."""
    for unit, length in (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * length:
            return f"{three_digits(seconds / length)} {unit}"
    return f"{three_digits(seconds)} s"


def three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 99.5 or number == 0 else f"{number:.3g}"


def spread(histogram: Mapping[str, Any]) -> str:
    """'512 us, 65.5 ms': what half and what 99 % of a histogram are below."""
    return ", ".join(time_text(quantile_s(histogram, share)) for share in (0.5, 0.99))


def health_lines(health: Mapping[str, Any]) -> list[Line]:
    """How it is, and for each reason what is the matter and what to do."""
    found = [Line("health", str(health["status"]), str(health["status"]))]
    for reason in health["reasons"]:
        found += [Line("", reason["what"]), Line("", f"-> {reason['do']}")]
    return found


def recompress_lines(stats: Mapping[str, Any]) -> list[Line]:
    """What became of cold pages; nothing if none ever were recompressed, nor shall be."""
    level, done = stats["recompress_level"], stats["recompressed_pages"]
    if not level and not done:
        return []
    when = f"zstd:{level} after {duration(stats['recompress_age_s'])}" if level else "off"
    return [
        Line(
            "recompression",
            f"{when}; {count(done)} pages in {duration(stats['recompress_us'] // 1_000_000)}, "
            f"{size(stats['recompress_saved_bytes'])} of room saved, "
            f"{count(stats['recompress_poor'])} in vain",
        )
    ]


def lines(
    control: str,
    ping: Mapping[str, Any],
    stats: Mapping[str, Any],
    config: Mapping[str, Any],
    health: Mapping[str, Any],
    devices: Sequence[Mapping[str, Any]] = (),
    peers: Sequence[Mapping[str, Any]] = (),
) -> list[Line]:
    """The status of one server; `devices` only if it has several, `peers` if it has any."""
    frames = stats["pers_pageframes"] + stats["eph_pageframes"]
    in_ram, limit = stats["pers_zpages"] + stats["eph_zpages"], stats["pool_limit_frames"]
    stored, device = stats["logical_bytes"] // PAGE_BYTES, stats["device_pages"]
    frame_bytes = frames * PAGE_BYTES
    on_disk = f" and {size(stats['disk_bytes'])} of disk" if stats["disk_limit_bytes"] else ""
    return [
        Line(
            "zcache",
            f"{ping['version']}, server {ping['server_pid']}, up "
            f"{duration(ping['uptime_seconds'])}, control socket {control}",
        ),
        *health_lines(health),
        Line(
            "stored",
            f"{size(stats['logical_bytes'])} of pages in {size(stats['ram_bytes'])} of RAM"
            f"{on_disk}, ratio to RAM {ratio(stats['logical_bytes'], stats['ram_bytes'])} "
            f"(frames alone {ratio(in_ram * PAGE_BYTES, frame_bytes)})",
        ),
        Line(
            "pool",
            f"{bar(frames / limit if limit else 0)} {size(frame_bytes)} of "
            f"{size(limit * PAGE_BYTES)} ({percent(frames, limit)}), "
            f"{size(stats['committed_frames'] * PAGE_BYTES)} committed, "
            f"{config['allocator']}, {config['codec']}",
        ),
        *recompress_lines(stats),
        *peer_lines(stats, config, peers),
        *disk_lines(stats, config),
        Line(
            "device",
            f"{bar(stored / device if device else 0)} {size(stored * PAGE_BYTES)} of "
            f"{size(device * PAGE_BYTES)} ({percent(stored, device)})",
        ),
        *(
            Line(
                "",
                f"{one['name']}: {size(one['stored_pages'] * PAGE_BYTES)} of "
                f"{size(one['size_bytes'])}",
            )
            for one in devices
        ),
        Line(
            "pages",
            f"{count(in_ram)} compressed in RAM (of those {count(stats['raw_pages'])} kept raw), "
            f"{count(stats['same_filled_pages'])} same-filled",
        ),
        Line(
            "traffic",
            f"{count(stats['succ_stores'])} pages in, {count(stats['loads'])} out, "
            f"{count(stats['invalidates'])} dropped, {count(stats['failed_stores'])} refused",
        ),
        *took_lines(stats),
        Line(
            "server",
            f"{size(stats['server_resident_bytes'])} resident beside the pool; "
            f"{size(stats['server_locked_bytes'])} of addresses locked as they are used (VmLck)",
        ),
    ]


def worst(stats: Mapping[str, Any]) -> str:
    """What 99 % of the waits were below, when there were any."""
    waits = stats["histograms"]["pool_wait"]
    return f" (99 % below {time_text(quantile_s(waits, 0.99))})" if waits["count"] else ""


# What a histogram is called for people, from the top tier down; the rest are waits.
TIMED = {
    "put": "put", "get_ram": "get, RAM", "get_same": "get, same", "get_peer": "get, peer",
    "get_disk": "get, disk", "remote_put": "to peers", "remote_get": "peer asked",
    "writeback": "to disk", "pool_wait": "room wait", "commit_wait": "memory wait",
    "slot_wait": "slot wait",
}  # fmt: skip


def took_lines(stats: Mapping[str, Any]) -> list[Line]:
    """How long what took, half and 99 % of it; nothing before anything was timed."""
    found = [
        f"{words} {spread(stats['histograms'][name])}"
        for name, words in TIMED.items()
        if stats["histograms"].get(name, {}).get("count")
    ]
    lines = [Line("", "; ".join(found[at : at + 3])) for at in range(0, len(found), 3)]
    return [lines[0]._replace(label="took"), *lines[1:]] if lines else []


def peer_text(peer: Mapping[str, Any]) -> str:
    """One peer in a line: who, how it is, what it has of ours."""
    who = f"{peer['name']} at {peer['address']}" if peer["name"] else str(peer["address"])
    if peer["state"] != "up":
        how = f"{peer['state']} ({peer['why_down']})" if peer["why_down"] else str(peer["state"])
    else:
        health = "" if peer["health"] == "ok" else f", {peer['health']}"
        how = (
            f"up{health}, answers in {time_text(peer['latency_us'] * 1e-6)}, "
            f"room for {size(peer['room_bytes'])}"
        )
    wrong = f", {count(peer['wrong_copies'])} WRONG" if peer["wrong_copies"] else ""
    return f"{who}: {how}; {count(peer['copies'])} copies{wrong}"


def answering(stats: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """'2 of 3 answer'; with etcd= nobody knows of how many."""
    of_named = "" if config.get("etcd") else f" of {len(config['peers'])}"
    return f"{stats['live_peers']}{of_named} answer"


def peer_lines(
    stats: Mapping[str, Any], config: Mapping[str, Any], peers: Sequence[Mapping[str, Any]] = ()
) -> list[Line]:
    """What is with peers; nothing without peers=."""
    if not (config.get("peers") or config.get("etcd")):
        return []
    found = [
        Line(
            "peers",
            f"{answering(stats, config)}; "
            f"{count(stats['pers_pages_remoted'])} pages there in "
            f"{size(stats['remote_bytes'])}, room for {size(stats['remote_room_bytes'])} more",
        )
    ]
    if stats["remote_short_pages"]:
        found.append(Line("", f"{count(stats['remote_short_pages'])} copies are to be renewed"))
    for peer in peers:
        well = peer["state"] == "up" and peer["health"] == "ok" and not peer["wrong_copies"]
        found.append(Line("", peer_text(peer), "" if well else "degraded"))
    return found


def disk_lines(stats: Mapping[str, Any], config: Mapping[str, Any]) -> list[Line]:
    """What is below the pool; nothing when nothing is."""
    if not (limit := stats["disk_limit_bytes"]):
        return []
    used = stats["disk_bytes"]
    found = [
        Line(
            "disk",
            f"{bar(used / limit)} {size(used)} of {size(limit)} ({percent(used, limit)}) alive, "
            f"{config.get('disk')}",
        ),
        Line(
            "below",
            f"{count(stats['disk_pages'])} pages (of those {count(stats['eph_zpages'])} also in "
            f"RAM), {count(stats['written_back_pages'])} written back, "
            f"{count(stats['cold_loads'])} read from there",
        ),
        Line(
            "waits",
            f"{count(stats['pool_waits'])} writes for room in the pool, "
            f"{stats['pool_wait_us'] / 1e6:.1f} s in all{worst(stats)}; writeback from "
            f"{stats['high_percent']} % to {stats['low_percent']} %",
        ),
    ]
    if bad := stats["disk_corrupt_pages"] + stats["disk_read_errors"]:
        found.append(Line("", f"{count(bad)} copies wrong, damaged or unreadable", "critical"))
    if stats["disk_degraded"]:
        found.append(Line("", f"the disk fails: {os.strerror(stats['disk_errno'])}", "degraded"))
    if stats["draining"]:
        found.append(Line("", "the pool is being drained to the disk", "note"))
    return found


def print_lines(found: Iterable[Line], out: TextIO | None = None) -> None:
    """Labels in a column; coloured when `out` is a terminal."""
    out = out or sys.stdout
    found = list(found)
    width = max((len(line.label) for line in found), default=0)
    if not out.isatty():
        for line in found:
            print(f"{line.label:{width}}  {line.text}".rstrip(), file=out)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for line in found:
        style = STYLES.get(line.style, "")
        table.add_row(Text(line.label, "bold"), Text(line.text, style))
    Console(file=out, highlight=False).print(table)
