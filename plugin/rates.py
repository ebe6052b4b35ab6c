"""What happens per second: differences between looks at one server's counters.

    add(at_s, counters) ... -> per_second("loads")       since the look before
                               mean("loads", 60)         over the last 60 s
                               series("loads", 30)       one rate a look, newest last

Counters live in the memory file and only grow while it lives; one that has become smaller
is another memory file's, and a rate over that moment is unknown (None), not negative.

Bound: `keep` looks.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*#@"


class History:
    """The last `keep` looks."""

    def __init__(self, keep: int = 600) -> None:
        assert keep >= 2
        self._looks: deque[tuple[float, Mapping[str, Any]]] = deque(maxlen=keep)

    def __len__(self) -> int:
        return len(self._looks)

    def add(self, at_s: float, stats: Mapping[str, Any]) -> None:
        """A look at all counters at `at_s`, later than the last."""
        assert not self._looks or at_s >= self._looks[-1][0]
        self._looks.append((at_s, stats))

    def per_second(self, name: str) -> float | None:
        """Of a counter that only grows, since the look before; None when that is unknown."""
        return self._rate(name, -2) if len(self) > 1 else None

    def mean(self, name: str, span_s: float) -> float | None:
        """The same over the last `span_s` seconds, or since the first look."""
        since_s = self._looks[-1][0] - span_s if self._looks else 0.0
        for at, (at_s, _) in enumerate(self._looks):
            if at_s >= since_s and at + 1 < len(self):
                return self._rate(name, at)
        return None

    def first_since(self, span_s: float) -> Mapping[str, Any]:
        """All counters as they were at most `span_s` seconds ago; there has been a look."""
        since_s = self._looks[-1][0] - span_s
        return next(stats for at_s, stats in self._looks if at_s >= since_s)

    def series(self, name: str, cells: int) -> list[float | None]:
        """The last `cells` rates, or as many as there are."""
        first = max(0, len(self) - cells - 1)
        looks = itertools.islice(self._looks, first, None)
        return [between(name, *pair) for pair in itertools.pairwise(looks)]

    def _rate(self, name: str, since: int) -> float | None:
        return between(name, self._looks[since], self._looks[-1])


def between(
    name: str, old: tuple[float, Mapping[str, Any]], new: tuple[float, Mapping[str, Any]]
) -> float | None:
    """Of a counter a second, between two looks (seconds, counters); None when unknown."""
    grown: int = new[1].get(name, 0) - old[1].get(name, 0)
    took_s = new[0] - old[0]
    return grown / took_s if took_s > 0 and grown >= 0 else None


def newer(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What came into a histogram between two looks; all of the new one when it began anew."""
    before = [*old["buckets"], *[0] * len(new["buckets"])]
    grown = [n - before[at] for at, n in enumerate(new["buckets"])]
    if min(grown, default=0) < 0 or new["count"] < old["count"]:
        return dict(new)
    since = {what: new.get(what, 0) - old.get(what, 0) for what in ("count", "sum")}
    return {**new, **since, "buckets": grown}


def sparkline(rates: Sequence[float | None], blocks: str = BLOCKS) -> str:
    """One character a rate, the highest is a whole block; nothing happened or unknown: a blank.

    >>> sparkline([0, 1, 2, None, 8])
    ' ▁▂ █'
    """
    top = max((rate for rate in rates if rate is not None), default=0.0)
    return "".join(
        blocks[min(len(blocks) - 1, int(rate / top * len(blocks) - 1e-9))] if rate else " "
        for rate in rates
    )
