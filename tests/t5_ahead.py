"""Reading ahead: what is read in order comes before it is asked for, and never costs who asks."""

from __future__ import annotations

import errno
import random
from pathlib import Path

from tests.core_helpers import PAGE
from tests.tiers_helpers import Cold, cold_store, errno_of, noise, wait_for
from zcache_core.device import Device

MIB = 1 << 20
PAGES = 2000


def all_below(cold: Cold, rng: random.Random, pages: int = PAGES) -> dict[int, bytes]:
    """Pages of two sizes, written in order, and all of them on the disk."""
    model = {
        page: noise(rng) if rng.random() < 0.3 else rng.randbytes(1800) + bytes(PAGE - 1800)
        for page in range(pages)
    }
    for page, data in model.items():
        cold.store.put(page, data)
    cold.drain()
    return model


def read_all(cold: Cold, model: dict[int, bytes]) -> tuple[int, int]:
    """Read every page, in order, from below: how many came ahead, and how many for nobody."""
    before = cold.counters()
    cold.faulty.set(get_delay_us=200)  # as a disk: else nothing can be ahead
    for page, data in model.items():
        assert cold.store.get(page) == data
    cold.faulty.set()
    stats = cold.counters()
    assert stats["cold_loads"] - before["cold_loads"] == PAGES
    left = stats["ahead_pages"] - stats["ahead_useful_pages"] - stats["ahead_wasted_pages"]
    assert 0 <= left <= 256
    kinds = ("ahead_useful_pages", "ahead_wasted_pages")
    useful, wasted = (stats[kind] - before[kind] for kind in kinds)
    print(f"useful {useful} wasted {wasted}")
    return useful, wasted


def test_read_in_order(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, PAGES * PAGE, 16 * MIB, 32 * MIB) as cold:
        model = all_below(cold, rng)
        useful, wasted = read_all(cold, model)
        assert cold.counters()["eph_zpages"] == 0, "what is fetched ahead is not in the pool"
        for _ in range(9):  # a busy machine may not run the thread in time, but not for ever
            if useful > PAGES // 2 and wasted < PAGES // 20:
                break
            cold.drain()
            useful, wasted = read_all(cold, model)
        assert useful > PAGES // 2
        assert wasted < PAGES // 4
        cold.assert_sound()


def test_read_at_random(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, PAGES * PAGE, 16 * MIB, 32 * MIB) as cold:
        model = all_below(cold, rng)
        for page in rng.sample(range(PAGES), 1500):
            assert cold.store.get(page) == model[page]
        assert cold.counters()["ahead_pages"] < 150


def test_neighbours_that_left_apart(tmp_path: Path, rng: random.Random) -> None:
    """They lie far from each other on the disk: one read each, and right all the same."""
    with cold_store(tmp_path, PAGES * PAGE, 16 * MIB, 32 * MIB) as cold:
        model = {}
        for part in range(4):  # pages 0, 4, 8, ... leave together, then 1, 5, ...
            for page in range(part, PAGES, 4):
                model[page] = noise(rng)
                cold.store.put(page, model[page])
            cold.drain()
        assert abs(cold.where(5) - cold.where(4)) > 1 * MIB
        for page in range(PAGES):
            assert cold.store.get(page) == model[page]
        assert cold.counters()["ahead_failed_pages"] == 0
        cold.assert_sound()


def test_who_asks_never_waits_for_it(tmp_path: Path, rng: random.Random) -> None:
    """While the thread hangs in a read below, pages are read as if it were not there."""
    with cold_store(tmp_path, PAGES * PAGE, 16 * MIB, 32 * MIB) as cold:
        model = all_below(cold, rng)
        cold.faulty.set(many_delay_us=60_000_000)
        for page in range(600):
            assert cold.store.get(page) == model[page]
        stats = cold.counters()
        assert (stats["cold_loads"], stats["ahead_pages"]) == (600, 0), "600 reads in its minute"
        cold.faulty.set()
        wait_for(lambda: cold.counters()["ahead_pages"] > 0)
        cold.assert_sound()


def test_what_came_up_meanwhile_is_read_anew(tmp_path: Path, rng: random.Random) -> None:
    """It may have been recompressed in RAM: below again, it is not what was fetched before."""
    with cold_store(tmp_path, PAGES * PAGE, 16 * MIB, 32 * MIB) as cold:
        model = all_below(cold, rng)
        cold.faulty.set(many_delay_us=60_000_000)
        for page in range(3):
            cold.store.get(page)
        wait_for(lambda: cold.faulty.counts()["delays"] > 0)  # it reads pages from 3 on
        for page in reversed(range(3, 40)):
            cold.store.get(page)
            cold.store.get(page)
            assert cold.state(page) == "ephemeral"
        cold.faulty.set()
        wait_for(lambda: cold.counters()["ahead_pages"] > 0)
        cold.drain()
        for page in reversed(range(3, 11)):
            assert cold.store.get(page) == model[page]
        assert cold.counters()["ahead_useful_pages"] == 0
        cold.assert_sound()


def test_content_is_never_old(tmp_path: Path, rng: random.Random) -> None:
    """Reads in order while pages change, go, are moved and fail: against a dict."""
    with cold_store(tmp_path, 600 * PAGE, 1 * MIB, 16 * MIB) as cold:
        device = Device(cold.store)
        model = all_below(cold, rng, 600)
        useful = 0
        for _ in range(250):
            first = rng.randrange(600)
            end = min(600, first + rng.randrange(60))
            dice = rng.random()
            if dice < 0.6:
                room = bytearray((end - first) * PAGE)
                error = errno_of(device.pread, None, room, first * PAGE, 0)
                expected = b"".join(model.get(page, bytes(PAGE)) for page in range(first, end))
                assert error in (0, errno.EIO)
                assert error or room == expected
                useful += error == 0
            elif dice < 0.85:
                for page in rng.sample(range(first, end), min(end - first, 10)):
                    model[page] = noise(rng)
                    cold.store.put(page, model[page])
            elif dice < 0.9 and end > first:
                cold.store.invalidate(first, end - first)
                for page in range(first, end):
                    model.pop(page, None)
            elif dice < 0.95:
                cold.drain()
            else:
                cold.faulty.set(**rng.choice([{}, {}, {"spoil": 100}, {"get_fail": 100}]))
        cold.faulty.set()
        assert useful > 50
        assert cold.counters()["ahead_useful_pages"] > 0
        for page in range(600):
            assert cold.store.get(page) == model.get(page, bytes(PAGE))
        cold.assert_sound()
