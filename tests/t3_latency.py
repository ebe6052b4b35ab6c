"""Histograms: each is fed by what it says, cheaply, and by nothing else; quantiles of them."""

from __future__ import annotations

import math
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.core_helpers import PAGE, opened_store, try_put
from tests.tiers_helpers import cold_store
from zcache_core import counters
from zcache_core.counters import BUCKETS, HISTOGRAMS, SAMPLED_ONE_OF, quantile_s
from zcache_core.device import Device
from zcache_core.memfile import MemoryFile
from zcache_core.several import ALLOCATORS
from zcache_core.store import Store


def timed(memory: MemoryFile) -> dict[str, Any]:
    """Those that have values; their sums lie within what their buckets allow."""
    found = {name: h for name, h in counters.histograms(memory).items() if h["count"]}
    for name, h in found.items():
        least = sum(n * (1 << k >> 1) for k, n in enumerate(h["buckets"]))
        most = sum(n << k for k, n in enumerate(h["buckets"]))
        assert least <= h["sum"], name
        assert h["sum"] <= most or len(h["buckets"]) == BUCKETS, name
    return found


def about(calls: int) -> range:
    """How many of so many calls may have been timed: one of 17 to 48, and one at the start."""
    return range(calls // (SAMPLED_ONE_OF + 16), calls // (SAMPLED_ONE_OF - 15) + 2)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_puts_and_gets_are_timed_now_and_then(allocator: str, rng: random.Random) -> None:
    pages = 1000
    with opened_store(pages * PAGE, 2 * pages * PAGE, allocator=allocator) as store:
        assert timed(store.memory) == {}
        for page in range(pages):
            store.put(page, rng.randbytes(1000) + bytes(PAGE - 1000))
        assert timed(store.memory).keys() == {"put"}
        assert timed(store.memory)["put"]["count"] in about(pages)
        for page in range(pages):
            store.get(page)
        now = timed(store.memory)
        assert now.keys() == {"put", "get_ram"}
        assert now["get_ram"]["count"] in about(pages)
        assert quantile_s(now["get_ram"], 0.5) < quantile_s(now["put"], 0.99)
        store.invalidate(0, pages // 2)
        for page in range(pages // 2):
            store.get(page)
        now = timed(store.memory)
        assert now["get_same"]["count"] in about(pages // 2)
        assert now["get_ram"]["count"] in about(pages)


def test_requests_of_many_pages_are_timed_at_any_place(rng: random.Random) -> None:
    """Not only their first pages: of 32 pages a request, as many as of single ones."""
    pages = 1024
    with opened_store(pages * PAGE, 2 * pages * PAGE) as store:
        device = Device(store)
        for page in range(0, pages, 32):
            device.pwrite(None, rng.randbytes(32 * PAGE), page * PAGE, 0)
        for page in range(0, pages, 32):
            device.pread(None, bytearray(32 * PAGE), page * PAGE, 0)
        assert timed(store.memory)["get_ram"]["count"] in about(pages)


def test_the_disk_is_timed_each_time(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 2000 * PAGE, 256 * PAGE, 16 << 20) as cold:
        model = {page: rng.randbytes(PAGE) for page in range(1000)}
        for page, data in model.items():
            cold.store.put(page, data)
        for page in rng.sample(list(model), 300):
            assert cold.store.get(page) == model[page]
        now, stats = timed(cold.memory), cold.counters()
        assert now["get_disk"]["count"] == stats["cold_loads"] > 100
        assert 0 < now["writeback"]["count"] <= stats["disk_writes"]
        if "pool_wait" in now:
            assert now["pool_wait"]["sum"] == stats["pool_wait_us"]
        if "commit_wait" in now:
            assert now["commit_wait"]["sum"] == stats["commit_wait_us"]
        assert not {"get_peer", "remote_put", "remote_get"} & now.keys()


def test_waits_for_a_slot(tmp_path: Path, rng: random.Random) -> None:
    """60 threads for 28 slots, each of which is held for as long as the disk takes."""
    with cold_store(tmp_path, 4000 * PAGE, 256 * PAGE, 32 << 20) as cold:
        cold.faulty.set(put_delay_us=100_000)
        blocks = [rng.randbytes(PAGE) for _ in range(60)]
        together = threading.Barrier(60)

        def write(first: int) -> None:
            together.wait()
            for page in range(first, first + 20):
                try_put(cold.store, page, blocks[first // 20])

        threads = [threading.Thread(target=write, args=(20 * n,)) for n in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        now, stats = timed(cold.memory), cold.counters()
        assert now["slot_wait"]["count"] == stats["slot_waits"] > 0


def test_size_classes_are_no_latencies(rng: random.Random) -> None:
    """zsmalloc counts objects in the same cells of a shard that no request writes."""
    with opened_store(500 * PAGE, 1000 * PAGE, allocator="zsmalloc") as store:
        for page in range(500):
            n = rng.randrange(1, 3000)
            store.put(page, rng.randbytes(n) + bytes(PAGE - n))
        assert timed(store.memory).keys() == {"put"}


def test_they_outlive_their_server(rng: random.Random) -> None:
    name = f"t3-latency-{rng.getrandbits(40):x}"
    memory = MemoryFile.create(name, 100 * PAGE, 200 * PAGE)
    store = Store(memory)
    store.start()
    for page in range(100):
        store.put(page, rng.randbytes(PAGE))
    before = timed(memory)
    store.stop()
    memory.close()
    memory = MemoryFile.open(name)
    try:
        assert timed(memory) == before
        assert before
    finally:
        memory.destroy()


def test_quantiles_against_sorted_values(rng: random.Random) -> None:
    """Within the bucket that the value is in; never outside of it."""
    for _ in range(200):
        unit = rng.choice(["nanoseconds", "microseconds"])
        values = sorted(
            rng.randrange(1 << rng.randrange(1, 30)) for _ in range(rng.randrange(1, 99))
        )
        buckets = [0] * BUCKETS
        for value in values:
            buckets[min(value.bit_length(), BUCKETS - 1)] += 1
        histogram = {"unit": unit, "count": len(values), "buckets": buckets}
        for share in (0.01, 0.5, 0.99, 1.0):
            value = values[max(0, math.ceil(share * len(values)) - 1)]
            found = quantile_s(histogram, share) / counters.UNITS_S[unit]
            low, high = 1 << value.bit_length() >> 1, 1 << value.bit_length()
            assert low * 0.999 <= found <= high * 1.001
    assert quantile_s({"unit": unit, "count": 0, "buckets": []}, 0.5) == 0


def test_the_table() -> None:
    names = [histogram.name for histogram in HISTOGRAMS]
    assert len(set(names)) == len(names)
    assert {histogram.unit for histogram in HISTOGRAMS} <= counters.UNITS_S.keys()
