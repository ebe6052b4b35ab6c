"""Requests held in the middle (`gate_helpers`), and everything that may happen meanwhile.

What threads that race find by luck, once in many runs, is done here on purpose and in
order: each test names the instant at which the request stands still.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core_helpers import PAGE, opened_store
from tests.gate_helpers import Gate
from tests.tiers_helpers import cold_store, noise, wait_for
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.store import Store

MAY_TRIM = 1
SECTOR = 512


class Running(threading.Thread):
    """A request under way; `end` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        self.join(30)
        assert not self.is_alive(), "the request never ends"
        if self._error is not None:
            raise self._error


def text(letter: str, seed: int = 0) -> bytes:
    """A page that compresses, to about half: other bytes for each letter and seed."""
    half = random.Random(f"{letter} {seed}").randbytes(PAGE // 2)
    return half + letter.encode() * (PAGE - len(half))


# ---- readers ---------------------------------------------------------------------------------


def test_an_overtaken_reader_looks_again() -> None:
    """Held after header and checksum were found good, before the first byte is written."""
    with opened_store(256 * PAGE, 256 * PAGE) as store, Gate(2) as gate:
        device = Device(store)
        store.put(0, text("o"))
        store.put(1, text("n"))
        gate.open(1)
        reader = Running(lambda: device.pread(None, gate.memory, 0))
        gate.wait_for(0)
        store.put(0, text("N"))
        for page in range(2, 256):  # somebody else's bytes where the old ones were
            store.put(page, text("x", page))
        gate.open(0)
        reader.end()
        assert gate.memory == text("N") + text("n")
        assert counters.read(store.memory)["read_retries"] == 1


def claimed_or_punched(store: Store) -> bool:
    """Whether the committer has taken a batch off the free list, nothing being in use."""
    store.put(0, random.Random(1).randbytes(PAGE))
    store.invalidate(0)  # giving a frame back publishes how many are free
    now = counters.read(store.memory)
    return now["punched_frames"] > 0 or now["committed_frames"] > now["free_frames"]


def test_no_frame_is_punched_while_a_reader_may_look_at_it() -> None:
    """Held in the middle of a blob whose frame is freed: the committer waits for it."""
    pool = 64 << 20
    with opened_store(pool, pool) as store, Gate(2) as gate:
        device = Device(store)
        gate.open(1)
        device.pwrite(None, random.Random(2).randbytes(32 << 20), 0)
        store.put(0, text("o"))
        reader = Running(lambda: device.pread(None, gate.memory, 0))
        gate.wait_for(0)
        device.trim(None, pool, 0)
        wait_for(lambda: claimed_or_punched(store))
        time.sleep(0.1)  # nothing is measured: time for what must not happen
        assert counters.read(store.memory)["punched_frames"] == 0
        gate.open(0)
        reader.end()
        assert gate.memory == bytes(2 * PAGE)
        wait_for(lambda: counters.read(store.memory)["punched_frames"] > 0)


# ---- changes of a part of a page ----------------------------------------------------------------


def change(device: Device, what: str, model: bytearray) -> None:
    """Something that happens to page 0, done to the model too."""
    if what == "write":
        model[:] = text("w")
        device.pwrite(None, bytes(model), 0)
    elif what == "same":
        model[:] = b"samesame" * (PAGE // 8)
        device.pwrite(None, bytes(model), 0)
    elif what == "trim":
        model[:] = bytes(PAGE)
        device.trim(None, PAGE, 0)
    else:
        model[:] = bytes(PAGE)
        device.zero(None, PAGE, 0, MAY_TRIM if what == "zero hole" else 0)


CHANGES = ("write", "same", "trim", "zero", "zero hole")
ORDERS = [order for n in (1, 2, 3) for order in itertools.permutations(CHANGES, n)]


@pytest.mark.parametrize("before", ["text", "same", "empty"])
def test_a_change_of_a_part_starts_again_when_the_page_changed(before: str) -> None:
    """Held between reading the page and storing it; another one waits for its page lock.

    Up to three other changes of the whole page in between, in every order: the parts are
    written onto what they left.
    """
    for order in ORDERS:
        with opened_store(4 * PAGE, 64 * PAGE) as store, Gate(1) as gate:
            device, model = Device(store), bytearray(PAGE)
            if before != "empty":
                model[:] = text("b") if before == "text" else b"before!!" * (PAGE // 8)
                store.put(0, bytes(model))
            part = gate.memory[:SECTOR]
            first = Running(lambda: device.pwrite(None, part, SECTOR))  # noqa: B023
            gate.wait_for(0)
            second = Running(lambda: device.pwrite(None, b"2" * SECTOR, 7 * SECTOR))  # noqa: B023
            for what in order:
                change(device, what, model)
            gate.open(0, b"1" * PAGE)
            first.end()
            second.end()
            model[SECTOR : 2 * SECTOR] = b"1" * SECTOR
            model[7 * SECTOR :] = b"2" * SECTOR
            assert store.get(0) == model, order
            assert store.check() == 0


@pytest.mark.parametrize("then", ["sector", *CHANGES])
def test_of_overlapping_writes_each_is_whole_and_the_later_flip_counts(then: str) -> None:
    """A write of two pages, held before the second with its versions already taken.

    What others do to that page meanwhile is older than the write, although newer by version.
    """
    with opened_store(4 * PAGE, 64 * PAGE) as store, Gate(2) as gate:
        device = Device(store)
        device.pwrite(None, text("a") + text("b"), 0)
        gate.open(0, text("C"))
        long = Running(lambda: device.pwrite(None, gate.memory, 0))
        gate.wait_for(1)
        if then == "sector":
            device.pwrite(None, b"s" * SECTOR, PAGE + SECTOR)
        else:
            change_second(device, then)
        overtaken = store.entry(1)[1] >> 12
        gate.open(1, text("D"))
        long.end()
        assert store.get(0) == text("C")
        assert store.get(1) == text("D")
        assert store.entry(1)[1] >> 12 > overtaken
        device.pwrite(None, b"t" * SECTOR, PAGE)
        assert store.get(1) == b"t" * SECTOR + text("D")[SECTOR:]
        assert store.check() == 0


def change_second(device: Device, what: str) -> None:
    """As `change`, to page 1."""
    if what in ("write", "same"):
        data = text("w") if what == "write" else b"samesame" * (PAGE // 8)
        device.pwrite(None, data, PAGE)
    elif what == "trim":
        device.trim(None, PAGE, PAGE)
    else:
        device.zero(None, PAGE, PAGE, MAY_TRIM if what == "zero hole" else 0)


def test_who_waits_for_a_page_lock_does_not_stop_the_committer(
    tmp_path: Path, rng: random.Random
) -> None:
    """One change of a part waits for a disk that stalls, another one for the first one's lock.

    Neither looks at a frame: memory is given back meanwhile (and committed, which is what a
    third writer may be waiting for).
    """
    pool = 64 << 20
    with cold_store(tmp_path, pool, pool, pool) as cold:
        device = Device(cold.store)
        cold.store.put(0, noise(rng))
        cold.drain()
        assert cold.state(0) == "disk"
        cold.faulty.set(get_delay_us=60_000_000)
        first = Running(lambda: device.pwrite(None, b"1" * SECTOR, 0))
        wait_for(lambda: cold.faulty.counts()["delays"] == 1)
        second = Running(lambda: device.pwrite(None, b"2" * SECTOR, SECTOR))
        wait_for(lambda: cold.counters()["partial_writes"] == 2)
        device.pwrite(None, rng.randbytes(32 << 20), PAGE)
        device.trim(None, 32 << 20, PAGE)
        wait_for(lambda: cold.counters()["punched_frames"] > 0)
        assert first.is_alive()
        assert second.is_alive()
        cold.faulty.set()
        first.end()
        second.end()
        assert cold.store.get(0)[: 2 * SECTOR] == b"1" * SECTOR + b"2" * SECTOR
        cold.assert_sound()
