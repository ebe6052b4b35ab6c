"""A reader held in the middle of a page that leaves its place and comes back to it.

    P at A -> reader: header and checksum are right -> first half read
              P elsewhere, X at A                      ^ of X
              P at A again, same version, same entry -> second half read, of P

The entry looks as it did before, and half of what was read is another page's.  That P has come
to a place meanwhile is counted (`note_arrival`), by whoever moves it: compaction, and a read that
brings it back from below.  (Recompression changes the codec, so that the entry is another one.)

The reader stands still at two gates (`gate_helpers`): before the first byte it writes, and half
way.  Where objects are given room is the allocator's: others come and go at random until it is so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core_helpers import PAGE, opened_store
from tests.gate_helpers import Gate
from tests.t6_interleavings import Running
from tests.tiers_helpers import cold_store
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.several import ALLOCATORS
from zcache_core.store import Store

PAGES = 32
OTHERS = range(2, 14)
TURNS = 20_000


def page_of(number: int, turn: int = 0) -> bytes:
    """Two fill a frame.  Blobs differ in their literals alone: half of one fits half of another."""
    rng = random.Random(f"{number} {turn}")
    return b"".join(rng.randbytes(56) + bytes(72) for _ in range(PAGE // 128))


def where(store: Store, page: int) -> int | None:
    """Where a page lies in RAM; None: it does not."""
    location, version = store.entry(page)
    return location >> 16 if version & 0xF in (2, 3) else None


def come_and_go(store: Store, model: dict[int, bytes], rng: random.Random, turn: int) -> None:
    """Some of the others are written or go: until hardly any are left, or nearly all are there."""
    share = rng.choice((0.05, 0.3, 0.6, 0.9))
    for page in rng.sample(OTHERS, rng.randrange(1, len(OTHERS))):
        if rng.random() < share:
            model[page] = page_of(page, turn)
            store.put(page, model[page])
        elif model.pop(page, None):
            store.invalidate(page)


def until(done: Callable[[], bool], step: Callable[[int], None]) -> None:
    for turn in range(TURNS):
        if done():
            return
        step(turn)
    raise AssertionError("it never came to that")


def held_while_it_goes_and_returns(
    store: Store, model: dict[int, bytes], step: Callable[[int], None]
) -> None:
    """Read page 0 at the gates; `step` moves it and the others.  (Page 1: or the GIL is kept.)"""
    device = Device(store)
    with Gate(3) as gate:
        gate.open(2)
        room = gate.memory[PAGE // 2 : PAGE // 2 + 2 * PAGE]
        at = where(store, 0)
        assert at is not None
        reader = Running(lambda: device.pread(None, room, 0))
        gate.wait_for(0)
        until(lambda: any(where(store, page) == at for page in OTHERS), step)
        gate.open(0)
        gate.wait_for(1)
        until(lambda: where(store, 0) == at, step)
        gate.open(1)
        reader.end()
        assert bytes(room) == page_of(0) + bytes(PAGE)
    assert counters.read(store.memory)["read_retries"] > 0
    for page in OTHERS:
        assert store.get(page) == model.get(page, bytes(PAGE))
    assert store.check() == 0


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_moved_away_and_back(allocator: str, rng: random.Random) -> None:
    with opened_store(PAGES * PAGE, 256 * PAGE, allocator=allocator, tidy=False) as store:
        model: dict[int, bytes] = {}
        store.put(0, page_of(0))

        def step(turn: int) -> None:
            come_and_go(store, model, rng, turn)
            store.compact()

        held_while_it_goes_and_returns(store, model, step)
        assert counters.read(store.memory)["moved_pages"] >= 2


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_down_to_the_disk_and_back(tmp_path: Path, allocator: str, rng: random.Random) -> None:
    size = PAGES * PAGE
    with cold_store(tmp_path, size, 256 * PAGE, 16 << 20, allocator=allocator, tidy=False) as cold:
        model: dict[int, bytes] = {}
        cold.store.put(0, page_of(0))

        def step(turn: int) -> None:
            if where(cold.store, 0) is not None:
                cold.drain()
            come_and_go(cold.store, model, rng, turn)
            if rng.random() < 0.3:
                cold.store.get(0)
                cold.store.get(0)

        held_while_it_goes_and_returns(cold.store, model, step)
        assert cold.counters()["promoted_pages"] > 0
        cold.assert_sound()
