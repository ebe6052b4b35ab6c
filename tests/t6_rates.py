"""Rates: differences of counters over time, against a plain list of looks."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from plugin.rates import ASCII_BLOCKS, BLOCKS, History, newer, sparkline


def test_nothing_is_known_from_one_look() -> None:
    history = History()
    assert history.per_second("a") is None
    assert history.mean("a", 60) is None
    history.add(1.0, {"a": 5})
    assert history.per_second("a") is None
    assert history.mean("a", 60) is None
    assert history.series("a", 10) == []


def test_rates_of_two_looks() -> None:
    history = History()
    history.add(1.0, {"a": 5})
    history.add(3.0, {"a": 25, "b": 4})
    assert history.per_second("a") == 10
    assert history.per_second("b") == 2  # a counter that the older server had not
    assert history.mean("a", 60) == 10


def test_another_memory_file_gives_no_negative_rate() -> None:
    history = History()
    history.add(1.0, {"a": 500})
    history.add(2.0, {"a": 3})
    assert history.per_second("a") is None
    history.add(3.0, {"a": 10})
    assert history.per_second("a") == 7
    assert history.series("a", 5) == [None, 7]


def test_against_a_list(rng: random.Random) -> None:
    keep = 20
    history, looks = History(keep), [(0.0, 0)]
    history.add(0.0, {"a": 0})
    for _ in range(100):
        at_s = looks[-1][0] + rng.choice([0.0, 0.5, 1.0, 7.0])
        looks.append((at_s, looks[-1][1] + rng.randrange(50)))
        history.add(at_s, {"a": looks[-1][1]})
        kept = looks[-keep:]
        pairs = itertools.pairwise(kept)
        expected = [
            (new - old) / (to - since) if to > since else None for (since, old), (to, new) in pairs
        ]
        cells = rng.randrange(1, 30)
        assert history.series("a", cells) == expected[-cells:]
        assert history.per_second("a") == expected[-1]
        span_s = rng.choice([0.1, 3.0, 1000.0])
        first = next(look for look in kept if look[0] >= at_s - span_s)
        mean = history.mean("a", span_s)
        if first is kept[-1] or first[0] == at_s:
            assert mean is None
        else:
            assert mean == (looks[-1][1] - first[1]) / (at_s - first[0])


def test_newer_part_of_a_histogram() -> None:
    def made(*buckets: int) -> dict[str, Any]:
        return {"count": sum(buckets), "sum": 10 * sum(buckets), "buckets": list(buckets)}

    assert newer(made(1, 2), made(1, 5, 7)) == made(0, 3, 7)
    assert newer(made(), made()) == made()
    assert newer(made(5, 5), made(1)) == made(1)  # another memory file
    assert newer(made(1, 9), made(9, 1)) == made(9, 1)


def test_the_first_look_of_a_span() -> None:
    history = History()
    for at in range(10):
        history.add(float(at), {"a": at})
    assert history.first_since(3)["a"] == 6
    assert history.first_since(100)["a"] == 0
    assert history.first_since(0)["a"] == 9


@pytest.mark.parametrize(
    ("values", "blocks", "line"),
    [
        ([], BLOCKS, ""),
        ([0, 0], BLOCKS, "  "),
        ([0, 1, 2, None, 8], BLOCKS, " ▁▂ █"),
        ([0.001, 1e12], BLOCKS, "▁█"),
        ([1, 8], ASCII_BLOCKS, "_@"),
    ],
)
def test_sparkline(values: list[float | None], blocks: str, line: str) -> None:
    assert sparkline(values, blocks) == line
