"""The log relay: nothing is lost of what differs, nothing floods that repeats."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.logrelay import LINE_BYTES, LINES, SHAPES, WINDOW_S, LogRelay

FAILED = b"nbdkit: python.%d: error: plugin: pwrite: error: No space left on device\n"


def test_lines_pass_as_they_are() -> None:
    relay = LogRelay()
    assert relay.feed(b"one\ntwo\nthr", 0) == b"one\ntwo\n"
    assert relay.feed(b"ee\n", 0) == b"three\n"
    assert relay.feed(b"no end", 0) == b""
    assert relay.close() == b"no end\n"
    assert relay.close() == b""


def test_what_repeats_is_thinned_out_and_counted() -> None:
    relay = LogRelay()
    flood = b"".join(FAILED % number for number in range(1000))
    assert relay.feed(flood, 0) == b"".join(FAILED % number for number in range(LINES))
    assert relay.feed(b"something else\n", 1) == b"something else\n"
    assert relay.feed(FAILED % 7, WINDOW_S - 1) == b""
    again = relay.feed(FAILED % 8, WINDOW_S)
    assert again == b"zcache: %d more lines like one above were left out\n" % (996) + FAILED % 8
    relay.feed(flood, WINDOW_S)
    assert b"996 more lines" in relay.close()


def test_memory_is_bounded() -> None:
    relay = LogRelay()
    for number in range(10 * SHAPES):
        word = b"".join(bytes([97 + int(digit)]) for digit in str(number))
        assert relay.feed(word + b"\n", 0) == word + b"\n"
    assert len(relay._windows) == SHAPES
    assert relay.feed(b"x" * LINE_BYTES, 0) == b""
    assert relay.feed(b"x", 0) == b"x" * (LINE_BYTES + 1) + b"\n"


@given(st.lists(st.sampled_from([b"a\n", b"b 1\n", b"b 2\n", b"c" * 50 + b"\n"]), max_size=60),
       st.lists(st.integers(1, 20), max_size=50))  # fmt: skip
def test_every_line_is_passed_on_or_counted(lines: list[bytes], sizes: list[int]) -> None:
    relay, data, out = LogRelay(), b"".join(lines), b""
    for size in [*sizes, len(data)]:
        piece, data = data[:size], data[size:]
        out += relay.feed(piece, 0)
    out += relay.close()
    passed = [line for line in out.splitlines() if b"more lines" not in line]
    counted = sum(int(line.split()[1]) for line in out.splitlines() if b"more lines" in line)
    assert len(passed) + counted == len(lines)
