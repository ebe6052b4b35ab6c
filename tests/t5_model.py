"""Hundreds of short lives of a store over a disk, each from a seed of its own.

    3 clients, a dict each | meanwhile: faults, drains, other watermarks, another pool,
                           | memory pressure, compaction, other allocators, and all of it gone again
    at the end: every page is what its client knows, every count is exact

t5_tiers has the same with few and long lives.  One that failed is named by its seed,
`play(folder, SEED)` is it again (as far as threads repeat themselves).
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.tiers_helpers import Cold, cold_store
from tests.tiers_worker import FAULTS, THREADS, Worker
from zcache_core.device import Device
from zcache_core.errors import ConfigError
from zcache_core.several import ALLOCATORS

MIB = 1 << 20
LIVES = 200
STEPS = 400  # of each client
# Stalls of seconds are for the long lives.
SHORT_FAULTS = (
    *(fault for fault in FAULTS if fault.get("put_delay_us", 0) < 100_000),
    {"put_delay_us": 20_000},
)


MUST_HAPPEN = (
    "written_back_pages",
    "failed_writeback_pages",
    "evicted_eph_pageframes",
    "cold_loads",
    "promoted_pages",
    "pool_waits",
    "disk_corrupt_pages",
    "disk_read_errors",
    "punched_frames",
    "moved_pages",
    "invalidates",
    "partial_writes",
)


def disturb(cold: Cold, rng: random.Random, workers: list[Worker]) -> None:
    """One thing that happens to a running server."""
    dice = rng.randrange(10)
    if dice < 4:
        fault = rng.choice(SHORT_FAULTS)
        if {"spoil", "get_fail"} & set(fault):
            for worker in workers:
                worker.expect_failures(True)
        cold.faulty.set(**fault)
    elif dice == 4:
        cold.cooling.drain(rng.random() < 0.5)
    elif dice == 5:
        high = rng.randrange(1, 101)
        cold.cooling.set_watermarks(high, rng.randrange(1, high + 1))
    elif dice == 6:
        try:
            cold.store.set_pool(rng.randrange(16, 129) * PAGE)
        except ConfigError:
            raise AssertionError("with a tier below any pool is possible") from None
    elif dice == 7:
        cold.faulty.set()
    elif dice == 8:
        cold.store.compact()
    else:
        cold.store.set_allocator(rng.choice(ALLOCATORS))


def play(folder: Path, seed: int) -> dict[str, int]:
    """One life; its counters."""
    rng = random.Random(seed)
    pages = rng.choice([200, 600])
    allocator = rng.choice(ALLOCATORS)
    with cold_store(
        folder, pages * PAGE, 128 * PAGE, 16 * MIB, seed=seed, allocator=allocator
    ) as cold:
        device = Device(cold.store)
        workers = [
            Worker(cold, device, own, pages, rng.getrandbits(32), STEPS) for own in range(THREADS)
        ]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            disturb(cold, rng, workers)
            time.sleep(rng.random() * 0.01)
        for worker in workers:
            worker.join()
        assert [worker.problem for worker in workers if worker.problem] == []
        cold.faulty.set()
        cold.cooling.drain(False)
        cold.cooling.stop()
        lost = set(cold.faulty.lost().values())
        for worker in workers:
            for page in worker.pages:
                if page not in lost:
                    expected = worker.model.get(page, bytes(PAGE))
                    assert cold.store.get(page) == expected, page
        stats = cold.counters()
        assert sum(w.unreadable for w in workers) == (
            stats["disk_corrupt_pages"] + stats["disk_read_errors"]
        )
        assert stats["committed_frames"] <= stats["pool_limit_frames"]
        cold.assert_sound_now()
        return stats


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_short_lives(tmp_path: Path, rng: random.Random) -> None:
    lives(tmp_path, rng, LIVES)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_short_lives(tmp_path: Path, rng: random.Random) -> None:
    lives(tmp_path, rng, int(os.environ.get("ZCACHE_SOAK_ROUNDS", "10000")))


def lives(folder: Path, rng: random.Random, number: int) -> None:
    happened: Counter[str] = Counter()
    for _ in range(number):
        seed = rng.getrandbits(32)
        try:
            happened.update(play(folder, seed))
        except BaseException:
            print(f"life with seed {seed}")
            raise
        (folder / "disk").unlink()
    for name in MUST_HAPPEN:
        assert happened[name] > 0, f"no life ever came to {name}"
