"""Damage in the RAM headers of pages that also lie on the disk: it never frees what is alive there.

The address of a page's copy below stands in its blob's header, in RAM.  Every flip of up to three
bits in it is found before the address is used, at each of its three uses: the page is
overwritten or trimmed (the copy's room is let go of), it leaves RAM (the address goes into
the index), and a successor counts what is alive.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.tiers_helpers import Cold, cold_store, errno_of, open_file
from zcache_core.memfile import MemoryFile
from zcache_core.several import ALLOCATORS

MIB = 1 << 20
PAGES = 600
DISK_BYTES = 16 * MIB
POOL = 4 * MIB


def half_noise(rng: random.Random) -> bytes:
    return rng.randbytes(1200) + bytes(PAGE - 1200)


@pytest.fixture
def cold(tmp_path: Path, rng: random.Random) -> Iterator[Cold]:
    """A store with PAGES pages, all of them in RAM and on the disk."""
    with cold_store(tmp_path, PAGES * PAGE, POOL, DISK_BYTES, 2, 1) as cold:
        fill(cold, rng)
        yield cold


def fill(cold: Cold, rng: random.Random) -> dict[int, bytes]:
    pages = {page: half_noise(rng) for page in range(PAGES)}
    for page, data in pages.items():
        cold.store.put(page, data)
    cold.settle()
    return pages


def ephemeral(cold: Cold) -> list[int]:
    return [page for page in range(PAGES) if cold.state(page) == "ephemeral"]


def flip(cold: Cold, page: int, bits: list[int]) -> None:
    """Flip these bits of 128: the identity word and the place word of a page's header."""
    at = cold.memory.offsets()["arena"] + cold.where(page)
    header = int.from_bytes(cold.memory.peek(at, 24), "little")
    for bit in bits:
        header ^= 1 << (bit if bit < 64 else bit + 64)
    cold.memory.poke(at, header.to_bytes(24, "little"))


def some_bits(rng: random.Random) -> list[int]:
    """One to three bits, of the lower address more often than not."""
    places = range(80, 128) if rng.random() < 0.7 else range(128)
    return rng.sample(places, rng.randrange(1, 4))


def assert_nothing_freed(cold: Cold, hit: dict[int, int]) -> None:
    """What was let go of is at most what was alive; every other page is there."""
    for page in range(PAGES):
        if page not in hit:
            assert errno_of(cold.store.get, page) == 0, page
    counted = cold.counters()
    assert counted["disk_corrupt_pages"] == counted["disk_read_errors"] == 0
    assert counted["disk_live_bytes"] >= cold.live_bytes()


@pytest.mark.parametrize("how", ["overwritten", "trimmed"])
def test_replaced_after_damage(cold: Cold, rng: random.Random, how: str) -> None:
    hit = rng.sample(ephemeral(cold), 150)
    before = cold.counters()["disk_live_bytes"]
    for page in hit:
        flip(cold, page, some_bits(rng))
        if how == "trimmed":
            cold.store.invalidate(page)
        else:
            cold.store.put(page, bytes([page & 0xFF]) * PAGE)
    assert cold.counters()["damaged_lower_addresses"] == len(hit)
    assert cold.counters()["disk_live_bytes"] == before, "room is lost, none is freed"
    assert_nothing_freed(cold, {})
    cold.cooling.drain()
    cold.settle()
    assert_nothing_freed(cold, {})


def test_left_ram_after_damage(cold: Cold, rng: random.Random) -> None:
    """Only the lower address is hit: the RAM copy is the only one again, and goes down anew."""
    hit = rng.sample(ephemeral(cold), 150)
    before = {page: cold.store.get(page) for page in range(PAGES)}
    for page in hit:
        flip(cold, page, rng.sample(range(80, 128), rng.randrange(1, 4)))
    cold.drain()
    assert cold.counters()["damaged_lower_addresses"] == len(hit)
    for page, data in before.items():
        assert cold.state(page) == "disk"
        assert cold.store.get(page) == data
    assert_nothing_freed(cold, {})


def test_taken_over_after_damage(tmp_path: Path, rng: random.Random) -> None:
    """A successor believes no damaged address, and counts exactly what it believes."""
    memory = MemoryFile.create(None, PAGES * PAGE, POOL)
    cold = Cold(memory, open_file(tmp_path / "disk", DISK_BYTES), DISK_BYTES, 2, 1)
    pages = fill(cold, rng)
    hit = rng.sample(ephemeral(cold), 150)
    for page in hit:
        flip(cold, page, rng.sample(range(80, 128), rng.randrange(1, 4)))
    cold.stop()
    again = Cold(memory, open_file(tmp_path / "disk", DISK_BYTES), DISK_BYTES, 100, 99)
    again.store.wait_ready()
    assert {again.state(page) for page in hit} == {"ram"}
    again.assert_sound()
    for page, data in pages.items():
        assert again.store.get(page) == data
    again.drain()
    again.assert_sound()
    again.stop()
    memory.close()


def test_mended_while_taken_over(tmp_path: Path, rng: random.Random) -> None:
    """A damaged RAM copy is read before the takeover came to it: its room is not freed yet."""
    device_pages = 1 << 21  # the takeover needs a while
    last = range(device_pages - PAGES, device_pages)
    memory = MemoryFile.create(None, device_pages * PAGE, POOL)
    cold = Cold(memory, open_file(tmp_path / "disk", DISK_BYTES), DISK_BYTES, 2, 1)
    pages = {page: half_noise(rng) for page in last}
    for page, data in pages.items():
        cold.store.put(page, data)
    cold.settle()
    hit = rng.sample([page for page in last if cold.state(page) == "ephemeral"], 60)
    for page in hit:
        at = memory.offsets()["arena"] + cold.where(page) + 24 + rng.randrange(1000)
        memory.poke(at, bytes([memory.peek(at, 1)[0] ^ 0x10]))
    cold.stop()
    fd = open_file(tmp_path / "disk", DISK_BYTES)
    again = Cold(memory, fd, DISK_BYTES, 100, 99, tidy=False)  # else nothing is ever quiet
    for page in hit:
        assert again.store.get(page) == pages[page]
    again.store.wait_ready()
    for page, data in pages.items():
        assert again.store.get(page) == data
    assert again.store.check() == 0
    again.stop()
    memory.close()


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_below_when_the_frames_are_not_known(
    tmp_path: Path, allocator: str, rng: random.Random
) -> None:
    """Whose a frame is was damaged: of its pages those that lie on the disk too are read there."""
    memory = MemoryFile.create(None, PAGES * PAGE, POOL)
    disk = tmp_path / "disk"
    cold = Cold(memory, open_file(disk, DISK_BYTES), DISK_BYTES, 2, 1, allocator=allocator)
    pages = fill(cold, rng)
    hit = set(rng.sample(ephemeral(cold), 30))
    for frame in {cold.where(page) // PAGE for page in hit}:
        memory.poke(memory.offsets()["frame_headers"] + 24 * frame, b"\xff" * 8)
    cold.stop()
    again = Cold(memory, open_file(disk, DISK_BYTES), DISK_BYTES, 100, 99, allocator=allocator)
    again.store.wait_ready()
    assert {again.state(page) for page in hit} == {"disk"}
    again.assert_sound()
    for page, data in pages.items():
        if again.state(page) != "lost":  # it was in RAM alone
            assert again.store.get(page) == data
    again.stop()
    memory.close()
