"""Compaction: what is freed in pieces is given back whole, and no page notices that it moved."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from tests.core_helpers import PAGE, make_page, opened_store, try_put
from tests.plugin_helpers import wait_for
from zcache_core import counters
from zcache_core.errors import ConfigError
from zcache_core.several import ALLOCATORS
from zcache_core.sizeclass import fragmentation, size_classes
from zcache_core.store import Store

PAGES = 4000
POOL = 4000 * PAGE


@pytest.fixture(params=ALLOCATORS)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    with opened_store(PAGES * PAGE, POOL, allocator=request.param, tidy=False) as store:
        yield store


def compressible(rng: random.Random) -> bytes:
    noise = rng.randrange(8, 2600)
    return rng.randbytes(noise) + bytes(PAGE - noise)


def fill(store: Store, rng: random.Random) -> dict[int, bytes]:
    model = {page: compressible(rng) for page in range(PAGES)}
    for page, data in model.items():
        store.put(page, data)
    return model


def thin_out(store: Store, model: dict[int, bytes], share: float, rng: random.Random) -> None:
    for page in rng.sample(sorted(model), int(share * len(model))):
        store.invalidate(page)
        del model[page]


def frames(store: Store) -> int:
    now = counters.read(store.memory)
    return now["pers_pageframes"] + now["eph_pageframes"]


def assert_all_there(store: Store, model: dict[int, bytes]) -> None:
    for page in range(PAGES):
        assert store.get(page) == model.get(page, bytes(PAGE)), f"page {page}"
    assert store.check() == 0


def test_after_churn_as_dense_as_a_fresh_fill(store: Store, rng: random.Random) -> None:
    model = fill(store, rng)
    full = frames(store)
    thin_out(store, model, 0.6, rng)
    before = frames(store)
    assert store.compact() > 0
    after = frames(store)
    assert_all_there(store, model)
    with opened_store(PAGES * PAGE, POOL, allocator=store.allocator_name, tidy=False) as fresh:
        for page, data in model.items():
            fresh.put(page, data)
        least = frames(fresh)
    assert after <= before < full
    # (z3fold: 0.956 to 0.988 in 12 runs, whichever frames have room for what)
    assert least / after >= (0.93 if store.allocator_name == "z3fold" else 0.98), (least, after)
    assert store.compact() == 0, "and then nothing is left to do"
    now = counters.read(store.memory)
    assert now["moved_pages"] >= now["compacted_frames"] > 0


@pytest.mark.parametrize("changing", [False, True])
def test_pages_in_use_all_the_time(store: Store, rng: random.Random, changing: bool) -> None:
    """Readers, writers and trims while objects are moved: each page is what its writer last put.

    `changing`: and now and then another allocator is chosen.
    """
    model = fill(store, rng)
    stop = threading.Event()
    problems: list[str] = []

    def compacting() -> None:
        while not stop.is_set():
            if changing:
                store.set_allocator(rng.choice(ALLOCATORS))
            store.compact()

    def work(first: int, own: random.Random) -> None:
        mine = list(range(first, PAGES, 3))
        for _ in range(15000):
            page = own.choice(mine)
            dice = own.random()
            if dice < 0.2:
                data = make_page(own)
                if try_put(store, page, data):
                    model[page] = data
            elif dice < 0.5:
                store.invalidate(page)
                model.pop(page, None)
            elif store.get(page) != model.get(page, bytes(PAGE)):
                problems.append(f"page {page} is not what was written")

    threads = [
        threading.Thread(target=work, args=(n, random.Random(rng.getrandbits(32))))
        for n in range(3)
    ]
    mover = threading.Thread(target=compacting)
    for thread in [mover, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    mover.join()
    assert not problems, problems[:3]
    assert counters.read(store.memory)["moved_pages"] > 100
    assert_all_there(store, model)


def assert_all_with(store: Store, model: dict[int, bytes], allocator: str) -> None:
    """No page is with another allocator, but for those that have a frame to themselves."""
    now = counters.read(store.memory)
    in_zspages = sum(row["objects"] for row in fragmentation(store.memory))
    if allocator == "zsmalloc":
        assert in_zspages == len(model)
        assert now["buddied_count"] + now["unbuddied_count"] == 0
    else:
        assert in_zspages == 0
    assert ALLOCATORS[now["allocator"]] == store.allocator_name == allocator
    assert now["migrating"] == 0


def moved_all(store: Store) -> bool:
    """After another look: a round ends when there is no room to move to, and may be none yet."""
    return store.compact() == 0 and counters.read(store.memory)["migrating"] == 0


@pytest.mark.parametrize("chosen", ALLOCATORS)
def test_another_allocator_is_chosen(store: Store, rng: random.Random, chosen: str) -> None:
    """Old pages move to it, new ones go there, and it is as dense as if it had been first."""
    model = fill(store, rng)
    store.set_allocator(chosen)
    for page in rng.sample(range(PAGES), 500):
        model[page] = compressible(rng)
        store.put(page, model[page])
    wait_for("moving", lambda: moved_all(store))
    assert_all_with(store, model, chosen)
    assert_all_there(store, model)
    with opened_store(PAGES * PAGE, POOL, allocator=chosen, tidy=False) as fresh:
        for page, data in model.items():
            fresh.put(page, data)
        # (what z3fold's frames still have room for depends on the order: 0.93 to 0.99 in 40 runs)
        assert frames(fresh) / frames(store) >= (0.9 if chosen == "z3fold" else 0.98)
    with pytest.raises(ConfigError, match="use zbud or z3fold or zsmalloc"):
        store.set_allocator("buddy")


def test_chosen_in_a_pool_that_is_full(rng: random.Random) -> None:
    """Without room to move to nothing moves, and nothing is lost; with some it goes on."""
    with opened_store(PAGES * PAGE, 2000 * PAGE, allocator="zbud", tidy=False) as store:
        model: dict[int, bytes] = {}
        for page in range(PAGES):
            data = compressible(rng)
            if not try_put(store, page, data):
                break
            model[page] = data
        store.set_allocator("zsmalloc")
        store.compact()
        assert_all_there(store, model)
        assert counters.read(store.memory)["migrating"] == 1
        thin_out(store, model, 0.3, rng)
        wait_for("moving", lambda: moved_all(store))
        assert_all_with(store, model, "zsmalloc")
        assert_all_there(store, model)


@pytest.mark.parametrize("chosen", ALLOCATORS)
def test_started_with_another(store: Store, rng: random.Random, chosen: str) -> None:
    model = fill(store, rng)
    memory = store.memory
    store.stop()
    successor = Store(memory, allocator=chosen, tidy=False)
    successor.start()
    successor.wait_ready()
    wait_for("moving", lambda: moved_all(successor))
    assert_all_with(successor, model, chosen)
    assert_all_there(successor, model)
    successor.stop()


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_the_background_does_it_too(allocator: str, rng: random.Random) -> None:
    """Without being asked: frames are emptied, and their memory goes back to the system."""
    with opened_store(PAGES * PAGE, 2 * POOL, allocator=allocator) as store:

        def now(counter: str) -> int:
            return counters.read(store.memory)[counter]

        model = fill(store, rng)
        thin_out(store, model, 0.7, rng)
        wait_for("compaction", lambda: now("compacted_frames") > 0)
        wait_for("giving back", lambda: now("punched_frames") > 200)
        wait_for("settling", lambda: now("free_frames") <= 1024 + 128 + 1)
        assert_all_there(store, model)
        chosen = ALLOCATORS[ALLOCATORS.index(allocator) - 1]
        store.set_allocator(chosen)
        wait_for("moving", lambda: now("migrating") == 0)
        assert_all_with(store, model, chosen)


def test_statistics_by_class(rng: random.Random) -> None:
    with opened_store(PAGES * PAGE, POOL, allocator="zsmalloc", tidy=False) as store:
        model = fill(store, rng)
        thin_out(store, model, 0.5, rng)
        rows = fragmentation(store.memory)
        assert sum(row["objects"] for row in rows) == len(model)
        assert sum(row["frames"] for row in rows) == frames(store)
        assert all(row["objects"] <= row["places"] for row in rows)
        assert {row["bytes"] for row in rows} <= {room for room, _, _ in size_classes()}
        wasted = sum(row["places"] - row["objects"] for row in rows)
        store.compact()
        left = sum(row["places"] - row["objects"] for row in fragmentation(store.memory))
        assert left < wasted / 2
        store.invalidate(0, PAGES)
        assert fragmentation(store.memory) == []
