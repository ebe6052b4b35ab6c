"""The second thread of long writes: whoever compressed a page, it reads back."""

from __future__ import annotations

import errno
import os
import random
import threading

import pytest

from tests.core_helpers import PAGE, make_page, opened_store
from tests.gate_helpers import Gate
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.store import Store

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU has no crew")

HALF = 512  # pages


def crew_pages(store: Store) -> int:
    return counters.read(store.memory)["crew_pages"]


def write_at_random(device: Device, model: bytearray, first: int, rng: random.Random) -> None:
    """Writes of all lengths, aligned and not, into the half of the device from page `first` on."""
    pages = [make_page(rng) for _ in range(64)]
    for _ in range(200):
        n = rng.choice([1, 7, 8, 9, 31, 32, 33, 70])
        offset = (first + rng.randrange(HALF - n)) * PAGE + rng.choice([0, 0, 512])
        data = b"".join(rng.choice(pages) for _ in range(n))
        device.pwrite(None, data, offset)
        model[offset : offset + len(data)] = data


def test_the_first_write_is_not_read_past_its_end(rng: random.Random) -> None:
    """What stands behind it in memory is nobody's to read: with a new store each time."""
    data = rng.randbytes(1000) * 41  # eight pages, and some bytes more than ten
    for _ in range(30):
        with opened_store(64 * PAGE, 128 * PAGE) as store:
            device = Device(store)
            for _ in range(3):
                device.pwrite(None, data[: 8 * PAGE], 0)
            assert crew_pages(store) <= 24


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("writers", [1, 2])
def test_against_a_bytearray(rng: random.Random, codec: str, writers: int) -> None:
    size = 2 * HALF * PAGE
    with opened_store(size, 2 * size, codec=codec) as store:
        device, model = Device(store), bytearray(size)
        for _ in range(50):  # on a busy machine the crew may be late every time
            threads = [
                threading.Thread(
                    target=write_at_random,
                    args=(device, model, i * HALF, random.Random(rng.getrandbits(32))),
                )
                for i in range(writers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if crew_pages(store):
                break
        assert crew_pages(store)
        got = bytearray(size)
        device.pread(None, got, 0, 0)
        assert got == model
        assert store.check() == 0


def write_everywhere(device: Device, rng: random.Random) -> None:
    for first in range(0, 2 * HALF, 32):
        device.pwrite(None, rng.randbytes(32 * PAGE), first * PAGE)


def test_a_refused_write_gives_the_crew_back(rng: random.Random) -> None:
    """The pool is full in the middle of a shared stretch: later writes are shared again."""
    with opened_store(2 * HALF * PAGE, 1 << 20) as store:
        device = Device(store)
        with pytest.raises(OSError, match="space") as refused:
            write_everywhere(device, rng)
        assert refused.value.errno == errno.ENOSPC
        device.trim(None, 2 * HALF * PAGE, 0)
        before = crew_pages(store)
        data = b"".join((rng.randbytes(1024) + bytes(3072)) for _ in range(32))
        for _ in range(2000):
            device.pwrite(None, data, 0)
            if crew_pages(store) > before:
                break
        assert crew_pages(store) > before
        assert store.check() == 0


@pytest.mark.parametrize("pages", [8, 31])
def test_the_crew_looks_at_nothing_but_the_request(pages: int, rng: random.Random) -> None:
    """The first job of its life is a short one: behind its data lies somebody else's memory."""
    with opened_store(HALF * PAGE, HALF * PAGE) as store, Gate(32) as gate:
        device = Device(store)
        for page in range(pages):
            gate.open(page, rng.randbytes(PAGE))
        device.pwrite(None, gate.memory[: pages * PAGE], 0)
        assert not gate.reached(0.2)
