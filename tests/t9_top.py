"""`zcache top`: pictures of any state in any size, and keys.  (In a terminal: t9_top_command.)"""

from __future__ import annotations

from typing import Any

import pytest
from rich.text import Text

from cluster.link import RpcError
from plugin import show, top, topview
from plugin.rates import History
from plugin.topview import View
from tests.top_helpers import FakeServer
from zcache_core.counters import COUNTERS
from zcache_core.errors import ConfigError, ControlError


def shown(view: View, width: int = 120, height: int = 60) -> str:
    return "\n".join(line.plain for line in topview.frame(view, width, height, "12:00:00"))


def looked(**stats: Any) -> tuple[top.Top, FakeServer]:
    server = FakeServer(**stats)
    live = top.Top(server, "/run/x.ctl", 2.0)
    live.look()
    return live, server


def press(live: top.Top, keys: str) -> None:
    for key in keys:
        assert live.key(key)


# ---- pictures ------------------------------------------------------------------------


def test_a_picture_has_everything() -> None:
    live, server = looked(draining=1)
    server.stats["loads"] += 500
    live.look()
    text = shown(live.view)
    for words in (
        "zcache 1.2.3", "server 77", "up 1 h 1 min", "health degraded", "RAM", "disk", "device",
        "58.6 MiB of 97.7 MiB", "30,000 pages", "29,000 pages", "1.93:1", "3.12:1", "zbud lz4",
        "pages/s", "last minute", "1,500", "reserve", "writeback", "DRAINING", "90 %",
        "! The pool is drained", "zcache drain --off", "q quit",
    ):  # fmt: skip
        assert words in text, words
    assert "█" in text


def test_every_size_fits() -> None:
    """No size makes it fail, no line is longer than the window, the keys stay."""
    live, _ = looked(draining=1, lost_pages=3)
    for live.view.counters in (False, True):
        for width in (1, 20, 40, 80, 81, 120, 300):
            for height in (1, 2, 3, 8, 24, 25, 60):
                lines = topview.frame(live.view, width, height, "12:00:00")
                assert len(lines) == height
                assert height == 1 or "q quit" in lines[-1].plain


def test_what_does_not_fit_is_left_out_whole() -> None:
    live, _ = looked(draining=1)
    reason = ("! The pool is drained", "Run 'zcache drain --off'")
    sections = [("pages/s", "from below"), ("reserve", "writeback"), reason]
    seen = set()
    for height in range(2, 60):
        text = shown(live.view, 100, height)
        for first, last in sections:
            assert (first in text) == (last in text), height
        seen.add(tuple(first in text for first, _ in sections))
    assert {(False,) * 3, (True,) * 3} < seen


def test_only_a_wide_window_has_sparklines() -> None:
    live, server = looked()
    for _ in range(5):
        server.stats["loads"] += 100
        live.look()

    def out(width: int) -> str:
        (line,) = [ln for ln in shown(live.view, width).splitlines() if ln.startswith("out")]
        return line

    assert any(mark in out(120) for mark in "▁▂▃▄▅▆▇█")
    assert not any(mark in out(70) for mark in "▁▂▃▄▅▆▇█")


def test_a_narrow_window_has_whole_numbers() -> None:
    """A column that does not fit is left out: cut in the middle it would be another number."""
    live, server = looked(loads=123_456, **waits(0, 0, 98))
    server.stats["loads"] += 500
    live.look()
    for width in range(30, 121):
        lines = shown(live.view, width).splitlines()
        for label in ("out", "room wait"):
            (line,) = [line for line in lines if line.startswith(label)]
            assert len(line) <= width or line.strip() == label
        (out,) = [line for line in lines if line.startswith("out")]
        assert ("123,956" in out) == (width >= 13 + 10 + 12 + 13 + 17)
    at_80 = [line[:80] for line in shown(live.view, 80).splitlines()]
    assert any("1.93:1" in line for line in at_80 if line.startswith("RAM"))
    at_60 = shown(live.view, 60).splitlines()
    (first,) = [at for at, line in enumerate(at_60) if line.startswith("reserve")]
    assert at_60[first + 1].startswith(" " * 13), "wrapped, not cut"
    assert at_60[first + 1].endswith("server beside it")


def lender(**stats: Any) -> tuple[top.Top, FakeServer]:
    server = FakeServer(**stats)
    server.config = {"name": "rack-7", "listen": "10.0.0.7:7900", "donate": 1 << 30}
    server.owners = [
        {"name": f"me/{n}", "pages": n, "bytes": n << 12, "offered_bytes": 5 << 20,
         "heard_seconds": 3} for n in range(20)
    ]  # fmt: skip
    live = top.Top(server, "/run/node.ctl", 2.0)
    live.look()
    return live, server


def test_a_node_that_lends() -> None:
    live, server = lender(foreign_pers_pages=190, foreign_owners=20, foreign_recalled_pages=7)
    server.stats["foreign_puts"] += 500
    live.look()
    text = shown(live.view, 120, 70)
    for words in (
        "node 78", "lent", "39.1 MiB of 97.7 MiB", "190 pages of 20 owners, on 10.0.0.7:7900",
        "came", "asked back", "me/19: 19 pages in 76.0 KiB, room for 5.0 MiB, heard of 3 s ago",
        "and 8 more",
    ):  # fmt: skip
        assert words in text, words
    for words in ("\ndevice", "reserve", "e change", "same-filled"):
        assert words not in text, words
    press(live, "e")
    assert not live.view.prompt
    press(live, "dy")
    assert server.calls == [("drain", (True,))]
    server.owners = []
    live.look()
    assert "nobody has been here yet" in shown(live.view)


def test_a_server_that_lends_as_well() -> None:
    live, server = looked(foreign_pers_pages=1, foreign_owners=1, foreign_pers_bytes=1 << 20)
    server.config |= {"listen": "10.0.0.7:7900", "donate": 1 << 30}
    server.owners = [
        {"name": "me", "pages": 1, "bytes": 4096, "offered_bytes": 0, "heard_seconds": 90}
    ]
    live.look()
    text = shown(live.view)
    assert "device" in text
    assert "1.0 MiB of 1.0 GiB, 1 pages of 1 owner;" in text
    assert "me: 1 pages in 4.0 KiB, room for 0 B, heard of 1 min 30 s ago" in text


def test_peers_that_etcd_names_are_seen() -> None:
    peer = {"name": "p", "address": "/p", "state": "up", "why_down": "", "latency_us": 100,
            "health": "ok", "room_bytes": 1 << 20, "wrong_copies": 0, "copies": 5}  # fmt: skip
    live, server = looked(live_peers=1)
    server.config |= {"etcd": "http://127.0.0.1:2379", "peers": []}
    server.peers = [peer]
    live.look()
    text = shown(live.view)
    assert "0 pages, 1 answer" in text
    assert "p at /p: up, answers in 100 us" in text


def test_bars() -> None:
    def drawn(used: int, also: int, limit: int, utf8: bool) -> str:
        tier = topview.Tier("x", used, also, limit, "", "green")
        return "".join(text for text, _ in topview.bar(tier, 10, utf8))

    assert drawn(50, 0, 100, True) == "█████·····"
    assert drawn(50, 20, 100, False) == "###++....."
    assert drawn(1, 0, 1000, False) == "#........."
    assert drawn(2000, 0, 1000, False) == "##########"
    assert drawn(0, 0, 0, False) == ".........."


def test_without_a_disk_nothing_speaks_of_one() -> None:
    live, _ = looked(disk_limit_bytes=0, disk_bytes=0, disk_pages=0)
    text = shown(live.view)
    assert "written back" not in text
    assert "writeback" not in text
    assert "\ndisk" not in text


def waits(*buckets: int) -> dict[str, Any]:
    made = {"unit": "microseconds", "count": sum(buckets), "sum": 0, "buckets": list(buckets)}
    return {"histograms": {"pool_wait": made}}


def test_how_long_it_took() -> None:
    live, server = looked()
    assert "took" not in shown(live.view)
    server.stats |= waits(0, 0, 98, *[0] * 12, 2)
    live.look()
    (line,) = [ln for ln in shown(live.view).splitlines() if ln.startswith("room wait")]
    # half of 100 values: 50 of 98 that are spread over 2 to 4 us; 99 %: one of two in 16 to 33 ms
    assert line.split() == [
        "room",
        "wait",
        "3.02",
        "us,",
        "24.6",
        "ms",
        "3.02",
        "us,",
        "24.6",
        "ms",
    ]
    live.view.history = History()
    live.look()
    live.look()
    (line,) = [ln for ln in shown(live.view).splitlines() if ln.startswith("room wait")]
    assert line.split() == ["room", "wait", "-", "3.02", "us,", "24.6", "ms"]
    times = (0, 4e-8, 9.996e-7, 1.5e-6, 2.5, 123.4)
    assert [show.time_text(t) for t in times] == [
        "0 ns",
        "40 ns",
        "1 us",
        "1.5 us",
        "2.5 s",
        "123 s",
    ]


def peer(address: str, **more: Any) -> dict[str, Any]:
    return {
        "address": address, "name": "", "state": "up", "why_down": "", "latency_us": 250,
        "room_bytes": 1 << 20, "held_bytes": 0, "health": "ok", "copies": 7,
        "wrong_copies": 0, **more,
    }  # fmt: skip


def test_peers_are_seen_those_in_trouble_first() -> None:
    live, server = looked(
        live_peers=2, pers_pages_remoted=1234, remote_bytes=3 << 20, remote_room_bytes=1 << 20,
        remote_short_pages=5,
    )  # fmt: skip
    assert "copies of a page, 5" not in shown(live.view)
    server.peers = [
        peer("a:1", name="rack-7"), peer("b:1", health="short"),
        peer("c:1", state="down", why_down="Connection refused"), peer("d:1", wrong_copies=3),
    ]  # fmt: skip
    live.look()
    text = shown(live.view, 120, 80)
    for words in (
        "75 %  3.0 MiB of 4.0 MiB", "1,234 pages, 2 of 4 answer",
        "2 copies of a page, 5 copies are missing",
        "rack-7 at a:1: up, answers in 250 us, room for 1.0 MiB; 7 copies",
        "b:1: up, short", "c:1: down (Connection refused); 7 copies", "3 WRONG", "written back",
    ):  # fmt: skip
        assert words in text, f"{words}\n{text}"
    assert text.index("c:1: down") < text.index("rack-7 at a:1")
    server.peers = [peer(f"p{n}:1") for n in range(20)]
    live.look()
    assert "and 8 more that answer" in shown(live.view, 120, 80)


def test_trouble_is_seen() -> None:
    live, server = looked(disk_degraded=1, disk_errno=5, failed_stores=1, lost_pages=2)
    server.stats["failed_stores"] += 7
    live.look()
    lines = topview.frame(live.view, 120, 60, "12:00:00")
    (refused,) = [line for line in lines if line.plain.startswith("refused")]
    assert any("red" in str(span.style) for span in refused.spans)
    assert "fails: Input/output error" in shown(live.view)
    assert "health critical" in shown(live.view)
    assert "2 stored pages are lost" in shown(live.view).splitlines()[1]


def test_all_counters_sorted() -> None:
    live, server = looked()
    server.stats["loads"] += 10**6
    live.look()
    press(live, "c")
    table = shown(live.view, 120, 400)
    assert all(counter.name in table for counter in COUNTERS)
    firsts = []
    for _ in topview.SORTS:
        firsts.append(shown(live.view, 120, 400).splitlines()[2].split()[0])
        press(live, "s")
    by_name = min(counter.name for counter in COUNTERS)
    assert firsts == [COUNTERS[0].name, by_name, "disk_limit_bytes", "loads"]
    assert live.view.sort == "table"


def test_counters_scroll_and_stop_at_the_ends() -> None:
    live, _ = looked()
    press(live, "c")
    for key in (top.PAGE_DOWN,) * 20:
        live.key(key)
        shown(live.view, 80, 24)
    assert COUNTERS[-1].name in shown(live.view, 80, 24)
    for key in (top.PAGE_UP,) * 20:
        live.key(key)
    live.key(top.UP)
    assert COUNTERS[0].name in shown(live.view, 80, 24)
    live.key("j")
    assert COUNTERS[0].name not in shown(live.view, 80, 24)


def test_long_reasons_are_broken_between_words() -> None:
    lines = topview.wrapped(Text("a sentence of several words that is long"), 24, 2)
    assert [line.plain for line in lines] == ["a sentence of several", "  words that is long"]


# ---- keys ----------------------------------------------------------------------------


def test_a_change_is_asked_for_and_made() -> None:
    live, server = looked()
    press(live, "ehigh=8x\x7f5 low=70%")
    assert "high=85 low=70%_" in shown(live.view)
    press(live, "\n")
    assert "set high=85 low=70 on this server? y: yes" in shown(live.view)
    assert server.calls == []
    press(live, "y")
    assert server.calls == [("set", ({"high": 85, "low": 70},))]
    assert "done: high 85" in shown(live.view)
    press(live, "p")
    assert "q quit" in shown(live.view)


@pytest.mark.parametrize("keys", ["ehigh=85\nn", "ehigh=85\x1b", "e\n", "dn", "dq"])
def test_a_change_that_is_not_confirmed_is_not_made(keys: str) -> None:
    live, server = looked()
    press(live, keys)
    assert server.calls == []
    assert not live.view.prompt


def test_a_change_that_cannot_be_read() -> None:
    live, server = looked()
    press(live, "ehigh\n")
    assert "high is no change; write KEY=VALUE" in shown(live.view)
    assert server.calls == []


def test_the_servers_no_is_shown() -> None:
    live, server = looked()
    press(live, "ehigh=3\n")
    server.error = RpcError("bad_params", "high=3 and low=80 are no watermarks")
    press(live, "y")
    assert "no: high=3 and low=80 are no watermarks" in shown(live.view)


def test_sizes_are_read_as_the_keys_read_them() -> None:
    assert top.changes("pool=1G high=85% x=y") == {"pool": 1 << 30, "high": 85, "x": "y"}
    with pytest.raises(ConfigError, match="pool=1X is no size"):
        top.changes("pool=1X")


def test_memory_pressure_is_seen() -> None:
    live, _ = looked(memory_pressure=1, pool_target_frames=10_000, pressure_steps=3)
    assert "pressure     memory is short: the pool goes down to 39.1 MiB" in shown(live.view)


def test_drain_on_and_off() -> None:
    live, server = looked()
    press(live, "dy")
    server.stats["draining"] = 1
    live.look()
    press(live, "d")
    assert "end the drain" in shown(live.view)
    press(live, "y")
    assert server.calls == [("drain", (True,)), ("drain", (False,))]


def test_interval_and_end() -> None:
    live, _ = looked()
    press(live, "+")
    assert live.view.interval_s == 5
    press(live, "--------")
    assert live.view.interval_s == 0.5
    press(live, "\x1b")
    press(live, "p")
    assert "PAUSED" in shown(live.view)
    assert not live.key("q")


def test_nobody_answers_for_a_while() -> None:
    live, server = looked()
    server.error = ControlError("nobody serves it")
    live.look()
    text = shown(live.view)
    assert "no answer: nobody serves it" in text
    assert "29,000 pages" in text  # the last picture stays
    server.error = None
    live.look()
    assert "no answer" not in shown(live.view)
    never = top.Top(server, "x", 1.0)
    server.error = ControlError("nobody serves it")
    never.look()
    assert "nobody serves it" in shown(never.view)


@pytest.mark.parametrize("text", ["0", "x", "-1", "1e9", "nan", ""])
def test_intervals_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="write seconds"):
        top.interval(text)
