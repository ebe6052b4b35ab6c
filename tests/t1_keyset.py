"""The set of pages in a version, beside Python's."""

from __future__ import annotations

import random

from cluster.keyset import KeySet
from cluster.peerwire import Page, pack


def records_of(keys: list[tuple[int, int]]) -> bytes:
    return pack(Page(0, page, version, 7 << 4) for page, version in keys)


def test_beside_pythons_set(rng: random.Random) -> None:
    """Few pages, so that they meet; now and then thousands, and now and then none is left."""
    edges = [(0, 0), (2**32 - 1, 2**52 - 1), (0, 2**52 - 1), (2**32 - 1, 0)]
    pool = edges + [(rng.randrange(2**32), rng.randrange(2**52)) for _ in range(60)]
    pool += [(page, 5) for page in range(3000)] + [(page, page + 1) for page in range(3000)]
    ours, model = KeySet(), set[tuple[int, int]]()
    for turn in range(3000):
        some = rng.choices(pool[: rng.choice([8, 64, len(pool)])], k=rng.choice([0, 1, 3, 40]))
        match rng.randrange(8):
            case 0 | 1 | 2:
                ours.add(records_of(some))
                model |= set(some)
            case 3 | 4 | 5:
                ours.remove(records_of(some))
                model -= set(some)
            case 6:
                assert ours.meets(records_of(some)) == bool(model & set(some)), turn
            case 7 if rng.random() < 0.02:
                ours.remove(records_of(list(model)))
                model.clear()
            case 7 if rng.random() < 0.02:
                ours.add(records_of(pool))
                model |= set(pool)
        assert len(ours) == len(model), turn
        probe = rng.choice(pool)
        assert (probe in ours) == (probe in model), turn
    assert all((key in ours) == (key in model) for key in pool)


def test_made_of_records() -> None:
    ours = KeySet(records_of([(1, 2), (1, 2), (3, 4)]))
    assert len(ours) == 2
    assert (1, 2) in ours
    assert (2, 1) not in ours
    assert not KeySet()
    assert (1, 2) not in KeySet()
