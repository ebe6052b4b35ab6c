"""Who leaves a cache that is full: the rules that zcache's own choice is compared with.

    Lru      the page used least lately                    (writes and reads are uses)
    Clock    oldest first, a second chance for what was used meanwhile
    Sieve    one hand; what was used stays where it is      (Zhang et al., NSDI 2024)
    TwoQ     a page must be asked for again to stay         (Johnson and Shasha, VLDB 1994)
    misses_of_clairvoyant   whoever is read again last leaves (Belady, 1966): no rule does better

What is counted is reads of a page that was written before and is not in the cache: reads from
below.  A page that is written is put into the cache; a trim takes it out; a page that is read from
below goes where its rule puts it.  Capacity is in pages, and room is made at once and in full.

Every rule's step is O(1), but for the clairvoyant's, which is O(log n).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from bench.swap_trace import Trace


class Rule(Protocol):
    """`use` a page (True: it was there), `drop` one that was trimmed."""

    def __init__(self, capacity: int) -> None: ...
    def __contains__(self, page: int) -> bool: ...
    def use(self, page: int) -> bool: ...
    def drop(self, page: int) -> None: ...


class Lru:
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pages: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def use(self, page: int) -> bool:
        if page in self._pages:
            self._pages.move_to_end(page)
            return True
        if len(self._pages) == self._capacity:
            self._pages.popitem(last=False)
        self._pages[page] = None
        return False

    def drop(self, page: int) -> None:
        self._pages.pop(page, None)


class Clock:
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used: OrderedDict[int, bool] = OrderedDict()  # under the hand comes first

    def __contains__(self, page: int) -> bool:
        return page in self._used

    def use(self, page: int) -> bool:
        if page in self._used:
            self._used[page] = True
            return True
        if len(self._used) == self._capacity:
            self._make_room()
        self._used[page] = False
        return False

    def _make_room(self) -> None:
        while True:
            page, used = self._used.popitem(last=False)
            if not used:
                return
            self._used[page] = False

    def drop(self, page: int) -> None:
        self._used.pop(page, None)


class Sieve:
    """A list from the newest to the oldest; the hand goes from the oldest towards the newest."""

    HEAD = -1  # stands before the newest and behind the oldest

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used: dict[int, bool] = {}
        self._newer = {self.HEAD: self.HEAD}
        self._older = {self.HEAD: self.HEAD}
        self._hand = self.HEAD

    def __contains__(self, page: int) -> bool:
        return page in self._used

    def use(self, page: int) -> bool:
        if page in self._used:
            self._used[page] = True
            return True
        if len(self._used) == self._capacity:
            self._make_room()
        self._used[page] = False
        newest = self._older[self.HEAD]
        self._older[self.HEAD], self._newer[page] = page, self.HEAD
        self._older[page], self._newer[newest] = newest, page
        return False

    def _make_room(self) -> None:
        while True:
            if self._hand == self.HEAD:
                self._hand = self._newer[self.HEAD]
            if not self._used[self._hand]:
                self.drop(self._hand)
                return
            self._used[self._hand] = False
            self._hand = self._newer[self._hand]

    def drop(self, page: int) -> None:
        if self._used.pop(page, None) is None:
            return
        newer, older = self._newer.pop(page), self._older.pop(page)
        self._older[newer], self._newer[older] = older, newer
        if self._hand == page:
            self._hand = newer


class TwoQ:
    """A1in a quarter of the capacity, A1out remembers half of it, as its authors found best."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._in_most, self._out_most = max(1, capacity // 4), max(1, capacity // 2)
        self._in: OrderedDict[int, None] = OrderedDict()
        self._out: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._main or page in self._in

    def use(self, page: int) -> bool:
        if page in self._main:
            self._main.move_to_end(page)
            return True
        if page in self._in:
            return True
        remembered = page in self._out
        if len(self._in) + len(self._main) == self._capacity:
            self._make_room()
        if remembered:
            self._out.pop(page, None)
            self._main[page] = None
        else:
            self._in[page] = None
        return False

    def _make_room(self) -> None:
        if len(self._in) > self._in_most or not self._main:
            page, _ = self._in.popitem(last=False)
            self._out[page] = None
            if len(self._out) > self._out_most:
                self._out.popitem(last=False)
        else:
            self._main.popitem(last=False)

    def drop(self, page: int) -> None:
        for pages in (self._in, self._out, self._main):
            pages.pop(page, None)


RULES: dict[str, type[Rule]] = {"LRU": Lru, "CLOCK": Clock, "SIEVE": Sieve, "2Q": TwoQ}


def misses_of(rule: Rule, trace: Trace, window: int = 0) -> int:
    """Reads from below, in pages.

    window: if not 0, a page that is read from below goes into the cache only at its second read
    within so many reads from below, as zcache has it; else always.
    """
    written: set[int] = set()
    read_at: dict[int, int] = {}
    misses = 0
    for request in trace:
        if request.op == "t":
            for page in written.intersection(request.pages):
                written.discard(page)
                rule.drop(page)
            continue
        for page in request.pages:
            if request.op == "w":
                written.add(page)
                rule.use(page)
            elif page not in written:
                continue
            elif page in rule:
                rule.use(page)
            else:
                misses += 1
                if not window or misses - read_at.get(page, -window) < window:
                    rule.use(page)
                read_at[page] = misses
    return misses


def reads_of(trace: Trace) -> int:
    """Pages read that were written before."""
    return misses_of(_Nothing(0), trace)


class _Nothing:
    """Keeps no page."""

    def __init__(self, capacity: int) -> None: ...
    def __contains__(self, page: int) -> bool:
        return False

    def use(self, page: int) -> bool:
        return False

    def drop(self, page: int) -> None: ...


def misses_of_clairvoyant(capacity: int, trace: Trace) -> int:
    """Reads from below of who knows the future, in pages."""
    next_reads = _next_reads(trace)
    written: set[int] = set()
    kept: dict[int, float] = {}
    latest: list[tuple[float, int]] = []  # may be out of date
    misses = step = 0
    for request in trace:
        for page in request.pages if request.op != "t" else ():
            upcoming = next_reads[step]
            step += 1
            if request.op == "w":
                written.add(page)
            elif page not in written:
                continue
            elif page not in kept:
                misses += 1
            kept[page] = upcoming
            heapq.heappush(latest, (-upcoming, page))
            while len(kept) > capacity:
                when, victim = heapq.heappop(latest)
                if kept.get(victim) == -when:
                    del kept[victim]
        if request.op == "t":
            for page in written.intersection(request.pages):
                written.discard(page)
                kept.pop(page, None)
    return misses


def _next_reads(trace: Trace) -> Sequence[float]:
    """For each page read or written, in order: when its content is read next, inf for never."""
    upcoming: dict[int, float] = {}
    found: list[float] = []
    time = 0
    for request in reversed(trace):
        for page in reversed(request.pages):
            if request.op == "t":
                upcoming.pop(page, None)
                continue
            found.append(upcoming.get(page, math.inf))
            time -= 1
            if request.op == "r":
                upcoming[page] = time
            else:
                upcoming.pop(page, None)
    found.reverse()
    return found
