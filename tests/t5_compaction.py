"""Compaction over a disk: pages that may be dropped move too, and still know their copy there.

    RAM only | ephemeral | on the disk     all at once, each overwritten and trimmed by its
                                           client while objects are moved together

A moved ephemeral page carries its lower address in its header: lost or mixed up, the page would
be read from another's place, or its copy on the disk would stay for ever.  Both are looked for.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.tiers_helpers import Cold, cold_store, wait_for
from tests.tiers_worker import THREADS, Worker
from zcache_core.device import Device
from zcache_core.several import ALLOCATORS

MIB = 1 << 20
PAGES = 3000
POOL = 3000 * PAGE


def compressible(rng: random.Random) -> bytes:
    noise = rng.randrange(8, 2600)
    return rng.randbytes(noise) + bytes(PAGE - noise)


def states(cold: Cold) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for page in range(PAGES):
        found.setdefault(cold.state(page), set()).add(page)
    return found


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_ephemeral_pages_move_with_their_copy(
    tmp_path: Path, allocator: str, rng: random.Random
) -> None:
    with cold_store(
        tmp_path, PAGES * PAGE, POOL, 64 * MIB, allocator=allocator, tidy=False
    ) as cold:
        model = {page: compressible(rng) for page in range(PAGES)}
        for page, data in model.items():
            cold.store.put(page, data)
        cold.cooling.set_watermarks(2, 1)
        wait_for(lambda: len(states(cold).get("ephemeral", ())) > PAGES * 9 // 10)
        cold.settle()
        for page in rng.sample(sorted(model), PAGES * 6 // 10):
            cold.store.invalidate(page)
            del model[page]
        cold.settle()
        before = {page: cold.where(page) for page in states(cold)["ephemeral"]}
        cold.store.compact()
        moved = {page for page in before if cold.where(page) != before[page]}
        assert len(moved) > len(before) // 20, "pages that may be dropped were moved"
        assert states(cold)["ephemeral"] == set(before), "and may be dropped still"
        cold.assert_sound()
        cold.drain()
        assert not states(cold).get("ephemeral"), "all were dropped, without their RAM copy"
        for page, data in model.items():
            assert cold.store.get(page) == data, page
        for page in model:
            cold.store.invalidate(page)
        wait_for(lambda: cold.counters()["disk_live_bytes"] == 0)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_moved_while_everything_goes_on(tmp_path: Path, allocator: str, rng: random.Random) -> None:
    """Clients, cooling, dropping, cleaning of the disk and compaction, all at the same pages."""
    pages = 2000
    with cold_store(tmp_path, pages * PAGE, 300 * PAGE, 16 * MIB, allocator=allocator) as cold:
        device = Device(cold.store)
        workers = [
            Worker(cold, device, own, pages, rng.getrandbits(32), 8000) for own in range(THREADS)
        ]
        stop = threading.Event()

        def compacting() -> None:
            while not stop.is_set():
                cold.store.compact()

        mover = threading.Thread(target=compacting)
        for thread in (mover, *workers):
            thread.start()
        while any(worker.is_alive() for worker in workers):
            high = rng.randrange(1, 101)
            cold.cooling.set_watermarks(high, rng.randrange(1, high + 1))
            stop.wait(0.01)
        stop.set()
        mover.join()
        assert [worker.problem for worker in workers if worker.problem] == []
        assert sum(worker.unreadable for worker in workers) == 0
        now = cold.counters()
        assert now["moved_pages"] > 20
        assert now["written_back_pages"] > 100
        assert now["evicted_eph_pageframes"] > 0
        cold.assert_sound()
        for worker in workers:
            for page in worker.pages:
                assert cold.store.get(page) == worker.model.get(page, bytes(PAGE)), page
