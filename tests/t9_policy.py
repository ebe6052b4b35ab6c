"""The rules that zcache's choice is compared with, and the traces it is compared on."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from bench import policy, swap_trace
from bench.cache_rules import (
    RULES,
    Rule,
    Sieve,
    TwoQ,
    misses_of,
    misses_of_clairvoyant,
    reads_of,
)
from bench.swap_trace import Request, Trace


def some_trace(rng: random.Random, pages: int, requests: int) -> Trace:
    """Reads of what was written before, mostly of a few pages; now and then a trim."""
    trace = [Request("w", page, 1) for page in range(pages)]
    for _ in range(requests):
        op = rng.choices("rwt", (12, 4, 1))[0]
        first = min(rng.randrange(pages), rng.randrange(pages))
        trace.append(Request(op, first, min(rng.choice((1, 1, 1, 3)), pages - first)))
    return trace


def least_misses(capacity: int, trace: Trace) -> int:
    """By trying everything: the least that any choice of pages to keep can reach."""
    best = {(frozenset[int](), frozenset[int]()): 0}  # (written, kept) -> misses
    for request in trace:
        for page in request.pages:
            after: dict[tuple[frozenset[int], frozenset[int]], int] = {}
            for (written, kept), misses in best.items():
                if request.op == "t":
                    choices = [(written - {page}, kept - {page}, misses)]
                elif request.op == "r" and page not in written:
                    choices = [(written, kept, misses)]
                else:
                    count = misses + (request.op == "r" and page not in kept)
                    wished = kept | {page}
                    most = min(capacity, len(wished))
                    choices = [
                        (written | {page}, frozenset(some), count)
                        for some in itertools.combinations(sorted(wished), most)
                    ]
                for new_written, new_kept, count in choices:
                    state = new_written, new_kept
                    after[state] = min(count, after.get(state, count))
            best = after
    return min(best.values())


def test_clairvoyant_is_the_least_of_all_choices(rng: random.Random) -> None:
    for _ in range(40):
        trace = some_trace(rng, 6, 40)
        for capacity in (1, 2, 4):
            assert misses_of_clairvoyant(capacity, trace) == least_misses(capacity, trace)


@pytest.mark.parametrize("name", RULES)
def test_rules_keep_what_fits_and_no_more(name: str, rng: random.Random) -> None:
    trace = some_trace(rng, 200, 5000)
    reads = reads_of(trace)
    assert misses_of(RULES[name](200), trace) == 0
    least = misses_of_clairvoyant(50, trace)
    assert 0 < least < misses_of(RULES[name](50), trace) < reads


def in_order(rule: Rule, pages: str) -> str:
    """Of the letters, those that were not there when they were used."""
    return "".join(page for page in pages if not rule.use(ord(page)))


@pytest.mark.parametrize(
    ("name", "used", "missed"),
    [
        ("LRU", "abcadab", "abcdb"),  # d for b, b for c
        ("CLOCK", "abcadab", "abcdb"),  # a has its second chance, b goes for d
        ("SIEVE", "abcadaeab", "abcdeb"),  # a stays: the hand is past it
        ("2Q", "abcadba", "abcda"),  # a leaves A1in by age alone
    ],
)
def test_rules_by_hand(name: str, used: str, missed: str) -> None:
    assert in_order(RULES[name](3), used) == missed


def test_a_trimmed_page_leaves_room() -> None:
    for make in RULES.values():
        rule = make(2)
        assert in_order(rule, "ab") == "ab"
        rule.drop(ord("a"))
        rule.drop(ord("z"))
        assert in_order(rule, "cb") == "c"


def test_sieve_goes_on_when_the_page_under_its_hand_is_trimmed() -> None:
    rule = Sieve(3)
    assert in_order(rule, "abcabd") == "abcd"  # the hand has gone past a and b, and taken c
    for page in "bad":
        rule.drop(ord(page))
    assert in_order(rule, "efgefgh") == "efgh"


def test_2q_keeps_what_is_asked_for_again() -> None:
    rule = TwoQ(4)
    in_order(rule, "abcde")  # a is remembered
    in_order(rule, "a")
    assert in_order(rule, "uvwxyza") == "uvwxyz"


@pytest.mark.parametrize("name", policy.WITH_DOORMAN)
def test_a_second_read_within_the_window_lets_a_page_in(name: str) -> None:
    """The window is counted in reads from below; a and b have left for c and d."""
    trace = [Request("w", page, 1) for page in range(4)]

    def misses(window: int, *pages: int) -> int:
        reads = [Request("r", page, 1) for page in pages]
        return misses_of(RULES[name](2), trace + reads, window)

    assert misses(2, 0, 0, 0) == 2
    assert misses(2, 0, 1, 0, 0) == 4  # too late, and then in time
    assert misses(3, 0, 1, 0, 0) == 3
    assert misses(2, 0, 2, 3) == 1  # nobody had to leave


def test_requests_from_a_log() -> None:
    lines = [
        "2026-01-01 00:00:00.000000 connection=1 Connect export= size=0x1000000",
        "2026-01-01 00:00:00.000001 connection=1 Write id=1 offset=0x1000 count=0x2000 fua=0 ...",
        "2026-01-01 00:00:00.000002 connection=1 ...Write id=1 return=0",
        "2026-01-01 00:00:00.000003 connection=1 Read id=2 offset=0x2000 count=0x1000 ...",
        "2026-01-01 00:00:00.000004 connection=1 Trim id=3 offset=0x0 count=0x100000 fua=0 ...",
    ]
    assert list(swap_trace.parse_log(lines)) == [
        Request("w", 1, 2),
        Request("r", 2, 1),
        Request("t", 0, 256),
    ]


def test_a_trace_is_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    monkeypatch.setattr(swap_trace, "FOLDER", tmp_path / "traces")
    trace = some_trace(rng, 100, 100)
    swap_trace.save("some", trace)
    assert swap_trace.load("some") == trace


def test_recorded_traces_are_small_and_worth_replaying() -> None:
    files = sorted(swap_trace.FOLDER.iterdir())
    assert [file.stem for file in files] == sorted(swap_trace.names())
    assert sum(file.stat().st_size for file in files) < 300 << 10
    for name in swap_trace.names():
        trace = swap_trace.load(name)
        assert reads_of(trace) > 5_000
        assert swap_trace.most_pages(trace) > 4_000


def test_zcache_replays_a_trace(tmp_path: Path, rng: random.Random) -> None:
    """With room for all nothing is read from below; with a quarter, no less than must be."""
    trace = some_trace(rng, 4000, 20_000)
    assert policy.replay(trace, 4000, tmp_path) == 0
    frames = 500
    found = policy.replay(trace, frames, tmp_path)
    least = misses_of_clairvoyant(frames * policy.PAGES_PER_FRAME, trace)
    assert least <= found < reads_of(trace)
