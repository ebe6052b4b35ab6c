"""Where copies go: different donors, the emptier and faster of two at random each.

    candidates -> two at random -> the better one -> the next copy, of those left

Two choices instead of one make the fullest of N donors fuller than the mean by about log log N
batches, not by log N / log log N, and need no list that is sorted anew for each batch
(Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).  As each batch
draws anew, the pages of one donor have their other copies with all the others: the loss of one
donor is mended by all, and a second loss takes only what those two had in common.

A donor is better when it is less full; of two about equally full, when it answers faster.

What it is not: it knows no clock and asks nobody.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

# A donor of 10 ms is put behind one of 0.1 ms that is 9 % of its room fuller: fast ones fill up
# first, but never so far that slow ones stay empty.
LATENCY_WEIGHT = 0.1
LATENCY_MIDDLE_US = 1000.0


class Candidate(NamedTuple):
    """A donor that may take a copy: `row` names it, `free_bytes` is what it has left for us."""

    row: int
    free_bytes: int
    total_bytes: int  # what it lends us in all
    latency_us: float


def burden(candidate: Candidate) -> float:
    """How little one wants to put there: the share that is full, and a little for being slow."""
    used = 1 - candidate.free_bytes / max(1, candidate.total_bytes)
    slow = candidate.latency_us / (candidate.latency_us + LATENCY_MIDDLE_US)
    return used + LATENCY_WEIGHT * slow


def choose(
    candidates: Sequence[Candidate], copies: int, need_bytes: int, rng: random.Random
) -> list[int]:
    """Rows of `copies` different donors with room for `need_bytes` each; [] when there are not."""
    left = [c for c in candidates if c.free_bytes >= need_bytes]
    if len(left) < copies:
        return []
    rows: list[int] = []
    for _ in range(copies):
        at = min(rng.sample(range(len(left)), min(2, len(left))), key=lambda i: burden(left[i]))
        rows.append(left.pop(at).row)
    return rows


def room_bytes(free_bytes: Sequence[int], copies: int) -> int:
    """How many bytes of pages find `copies` different donors of these free bytes.

    Never more than a share of all, nor than what is left without the largest donors.
    """
    if len(free_bytes) < copies:
        return 0
    sizes = sorted(free_bytes, reverse=True)
    rest = sum(sizes)
    room = rest // copies
    for n in range(1, copies):
        rest -= sizes[n - 1]
        room = min(room, rest // (copies - n))
    return room
