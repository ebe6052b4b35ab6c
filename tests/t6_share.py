"""Work in the background takes its share, and no more, while requests are served.

The CPU time of the thread itself is measured (of its clock), against the time that goes by: a busy
machine makes that share smaller, never larger.  A request that is held inside at a gate is one
that is served, however long it takes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_helpers import PAGE, opened_store
from tests.gate_helpers import Gate
from tests.plugin_helpers import wait_for
from tests.t3_dictionaries import page_of, phrases
from tests.t6_interleavings import Running
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.store import Store

PAGES = 24_000
MOST_SHARE = 0.15
"""Of one CPU; 0.025 and 0.05 are meant, 0.9 is what a thread takes that does not rest."""


def now(store: Store, counter: str) -> int:
    return counters.read(store.memory)[counter]


def thread_number(name: str) -> int:
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            return int(task.name)
    raise AssertionError(f"no thread {name}")


def cpu_s(number: int) -> float:
    """CPU time of a thread of this process: its own clock, as clock_gettime(2) numbers them."""
    return time.clock_gettime((~number << 3) | 6)


@pytest.fixture
def store() -> Iterator[Store]:
    with opened_store(PAGES * PAGE, 2 * PAGES * PAGE, allocator="zsmalloc") as store:
        yield store


def fill_and_thin_out(store: Store, rng: random.Random) -> dict[int, bytes]:
    """Pages with holes between them, and nothing is moved yet."""
    store.pause_background()
    model = {
        page: rng.randbytes(rng.randrange(8, 2600)).ljust(PAGE, b"\0") for page in range(PAGES)
    }
    for page, data in model.items():
        store.put(page, data)
    for page in rng.sample(range(2, PAGES), PAGES * 6 // 10):
        store.invalidate(page)
        del model[page]
    return model


def share_of(name: str, store: Store, counter: str, most: int) -> float:
    """What a thread takes of one CPU while it does so much, or 3 s."""
    number, start, begun_s = thread_number(name), now(store, counter), time.monotonic()
    begun_cpu_s = cpu_s(number)
    while now(store, counter) - start < most and time.monotonic() < begun_s + 3:
        time.sleep(0.01)
    assert now(store, counter) > start, "it does nothing at all"
    return (cpu_s(number) - begun_cpu_s) / (time.monotonic() - begun_s)


def test_compaction_beside_a_request(store: Store, rng: random.Random) -> None:
    model = fill_and_thin_out(store, rng)
    with Gate(2) as gate:
        device = Device(store)
        reader = Running(lambda: device.pread(None, gate.memory, 0))
        gate.wait_for(0)
        store.pause_background(False)
        assert share_of("zc-tidy", store, "moved_pages", 4000) < MOST_SHARE
        gate.open(0)
        gate.open(1)
        reader.end()
        assert gate.memory == model[0] + model[1]
    wait_for("the rest", lambda: not store.compact())
    assert all(store.get(page) == data for page, data in model.items())
    assert store.check() == 0


def test_recompression_beside_a_request(store: Store, rng: random.Random) -> None:
    common = phrases(rng)
    for page in range(PAGES // 3):
        store.put(page, page_of(common, rng))
    with Gate(2) as gate:
        device = Device(store)
        reader = Running(lambda: device.pread(None, gate.memory, 0))
        gate.wait_for(0)
        store.set_recompress("zstd:1", 1)
        wait_for("a dictionary", lambda: now(store, "recompressed_pages") > 0)
        assert share_of("zc-dense", store, "recompressed_pages", 1500) < MOST_SHARE
        gate.open(0)
        gate.open(1)
        reader.end()
    wait_for("the rest", lambda: now(store, "recompressed_pages") >= PAGES // 3 * 9 // 10)
    assert store.check() == 0
