"""Placement: different donors with room, and a thousand of them evenly loaded."""

from __future__ import annotations

import random

import pytest

from cluster.placement import Candidate, choose, room_bytes

MIB = 1 << 20


def candidate(row: int, free: int, total: int = 100 * MIB, latency_us: float = 500) -> Candidate:
    return Candidate(row, free, total, latency_us)


def test_different_donors_with_room(rng: random.Random) -> None:
    for _ in range(300):
        donors = [candidate(i, rng.randrange(100) * MIB) for i in range(rng.randrange(1, 8))]
        copies, need = rng.choice([1, 2, 3]), rng.randrange(1, 100) * MIB
        fitting = {d.row for d in donors if d.free_bytes >= need}
        rows = choose(donors, copies, need, rng)
        assert len(set(rows)) == len(rows)
        assert set(rows) <= fitting
        assert len(rows) == (copies if len(fitting) >= copies else 0)


def test_fast_ones_first_but_not_for_long(rng: random.Random) -> None:
    near, far = candidate(0, 90 * MIB, latency_us=200), candidate(1, 90 * MIB, latency_us=20000)
    assert choose([near, far], 1, 1, rng) == [0]
    assert choose([near._replace(free_bytes=70 * MIB), far], 1, 1, rng) == [1]


@pytest.mark.parametrize(
    ("free", "copies", "room"),
    [
        ([], 1, 0),
        ([5], 1, 5),
        ([5], 2, 0),
        ([5, 9], 2, 5),
        ([4, 4, 4], 2, 6),
        ([100, 1, 1], 2, 2),
        ([9, 9, 9], 3, 9),
        ([9, 9, 1], 3, 1),
    ],
)
def test_room(free: list[int], copies: int, room: int) -> None:
    assert room_bytes(free, copies) == room


def spread(rng: random.Random, nodes: int, groups: int) -> float:
    """Most loaded donor against the mean, when 80 % of `groups` groups a donor are placed.

    Each choice is made among 50 donors at random: an owner knows some, not all.
    """
    held = [0] * nodes
    latency = [rng.choice([200.0, 500.0, 2000.0]) for _ in range(nodes)]
    for _ in range(int(0.8 * nodes * groups / 2)):
        known = rng.sample(range(nodes), min(50, nodes))
        donors = [Candidate(i, groups - held[i], groups, latency[i]) for i in known]
        for row in choose(donors, 2, 1, rng):
            held[row] += 1
    return max(held) / (sum(held) / nodes)


def test_a_thousand_donors_are_evenly_loaded(rng: random.Random) -> None:
    """Max to mean at 80 % full: 1.15 at most."""
    assert spread(rng, 1000, 40) <= 1.15
