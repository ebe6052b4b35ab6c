"""Generations: what an older attach still holds is not applied once a newer one has answered."""

from __future__ import annotations

import errno
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.core_helpers import PAGE, opened_store
from tests.tiers_helpers import cold_store, wait_for
from zcache_core import counters
from zcache_core.device import Device
from zcache_core.errors import InUseError
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

PAGES = 256


def failure(call: Any, *arguments: Any) -> int:
    """The errno of a call that has to fail."""
    with pytest.raises(OSError, match="shutdown") as caught:
        call(*arguments)
    assert caught.value.errno is not None
    return caught.value.errno


def read(device: Device, handle: object, page: int) -> bytes:
    data = bytearray(PAGE)
    device.pread(handle, data, page * PAGE)
    return bytes(data)


def test_the_newest_has_the_device() -> None:
    with opened_store(PAGES * PAGE, PAGES * PAGE) as store:
        device = Device(store)
        first = device.open(0, 5)
        device.pwrite(first, b"1" * PAGE, 0)
        second, beside = device.open(0, 6), device.open(0, 6)
        for call, arguments in (
            (device.pwrite, (b"x" * PAGE, 0)),
            (device.pread, (bytearray(PAGE), 0)),
            (device.trim, (PAGE, 0)),
            (device.zero, (PAGE, 0)),
            (device.flush, ()),
        ):
            assert failure(call, first, *arguments) == errno.ESHUTDOWN
        assert counters.read(store.memory)["fenced_requests"] == 5
        assert read(device, second, 0) == b"1" * PAGE
        device.pwrite(second, b"2" * PAGE, 0)
        assert read(device, beside, 0) == b"2" * PAGE, "connections of one attach share it"
        assert read(device, None, 0) == b"2" * PAGE, "without a generation nothing is fenced"
        device.pwrite(device.open(0), b"3" * PAGE, 0)
        assert read(device, second, 0) == b"3" * PAGE
        for late in (1, 5):
            with pytest.raises(InUseError, match=f"generation {late} is over: 6 has the device"):
                device.open(0, late)
        top = device.open(0, (1 << 64) - 1)
        assert read(device, top, 0) == b"3" * PAGE


def test_it_survives_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    memory = MemoryFile.create("generations", PAGES * PAGE, PAGES * PAGE)
    store = Store(memory)
    store.start()
    Device(store).open(0, 77)
    store.stop()
    memory.close()
    memory = MemoryFile.open("generations")
    try:
        assert memory.devices() == [("", PAGES * PAGE, 77, 0)]
        store = Store(memory)
        store.start()
        with pytest.raises(InUseError, match="generation 76 is over: 77 has the device"):
            Device(store).open(0, 76)
        Device(store).open(0, 77)
        store.stop()
    finally:
        memory.destroy()


def test_a_successor_answers_before_it_knows_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new generation on a file that is just taken over need not wait for the index.

    In one of ten takeovers at least: this thread may sleep through one of some milliseconds.
    """
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    memory = MemoryFile.create("generations", (4 << 20) * PAGE, PAGES * PAGE)
    early = 0
    for generation in range(1, 11):
        before = counters.read(memory)["rebuild_us"]
        store = Store(memory)
        store.start()
        device = Device(store)
        handle = device.open(0, generation)
        assert read(device, handle, 1) == bytes(PAGE)
        early += generation > 1 and counters.read(memory)["rebuild_us"] == before
        store.wait_ready()
        store.stop()
        if early:
            break
    memory.destroy()
    assert early


def test_devices_are_fenced_each_on_its_own() -> None:
    memory = MemoryFile.create(None, 64 * PAGE, 64 * PAGE, [("a", 48 * PAGE), ("b", 16 * PAGE)])
    store = Store(memory)
    store.start()
    try:
        device = Device(store)
        a, b = device.open(0, 9), device.open(1, 1)
        assert (device.size_of(a), device.size_of(b)) == (48 * PAGE, 16 * PAGE)
        device.pwrite(a, b"a" * PAGE, 0)
        device.pwrite(b, b"b" * PAGE * 16, 0)
        device.pwrite(a, b"A" * PAGE, 47 * PAGE)
        assert read(device, a, 47) == b"A" * PAGE
        assert read(device, b, 0) == read(device, b, 15) == b"b" * PAGE
        with pytest.raises(OSError, match="space"):
            device.pwrite(b, b"x" * PAGE, 16 * PAGE)
        with pytest.raises(OSError, match="nvalid"):
            device.pread(a, bytearray(2 * PAGE), 47 * PAGE)
        device.trim(b, 16 * PAGE, 0)
        assert read(device, a, 47) == b"A" * PAGE, "the neighbour's page"
        assert device.extents(b, 16 * PAGE, 0) == [(0, 16 * PAGE, 3)]
        assert device.extents(a, 2 * PAGE, 46 * PAGE)[1] == (47 * PAGE, PAGE, 0)
        device.open(1, 2)
        assert failure(device.pwrite, b, b"x" * PAGE, 0) == errno.ESHUTDOWN
        device.pwrite(a, b"." * PAGE, 0)
        assert (memory.stored_pages(0, 48), memory.stored_pages(48, 16)) == (2, 0)
        with pytest.raises(IndexError):
            device.open(2)
    finally:
        store.stop()
        memory.close()


def test_writers_that_are_cut_off_at_any_moment(rng: random.Random) -> None:
    """When `open` returns, what older writers do changes nothing any more."""
    with opened_store(PAGES * PAGE, 2 * PAGES * PAGE) as store:
        device = Device(store)

        ends: list[int | None] = []
        writers: list[threading.Thread] = []

        def write_on(handle: object, seed: int) -> None:
            own = random.Random(seed)
            while True:
                length = own.choice((512, PAGE, 32 * PAGE))
                offset = own.randrange(PAGES * PAGE - length)
                try:
                    device.pwrite(handle, own.randbytes(8) * (length // 8), offset)
                except OSError as error:
                    ends.append(error.errno)
                    return

        def everything() -> bytes:
            data = bytearray(PAGES * PAGE)
            device.pread(None, data, 0)
            return bytes(data)

        for generation in range(1, 120):
            handle = device.open(0, generation)
            before = everything()
            for writer in writers:
                writer.join()
            assert everything() == before, f"after generation {generation}"
            writers = [
                threading.Thread(target=write_on, args=(handle, rng.getrandbits(32)))
                for _ in range(3)
            ]
            for writer in writers:
                writer.start()
            time.sleep(rng.random() * 0.004)
        device.open(0, 1000)
        for writer in writers:
            writer.join()
        assert set(ends) == {errno.ESHUTDOWN}
        assert store.check() == 0


def in_thread(call: Any, *arguments: Any) -> tuple[threading.Thread, list[int]]:
    """Run it aside; the errno goes into the list, 0 when it does not fail."""
    result: list[int] = []

    def run() -> None:
        try:
            call(*arguments)
        except OSError as error:
            result.append(error.errno or -1)
        else:
            result.append(0)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def test_a_write_that_waits_for_room(tmp_path: Path, rng: random.Random) -> None:
    """It is parked, so the fence does not wait for it; it fails when it wakes up."""
    with cold_store(tmp_path, 512 * PAGE, 64 * PAGE, 64 << 20) as cold:
        device = Device(cold.store)
        old = device.open(0, 1)
        cold.faulty.set(put_delay_us=700_000)
        page = 0
        while not cold.counters()["pool_waits"]:
            parked, result = in_thread(device.pwrite, old, rng.randbytes(PAGE), page * PAGE)
            parked.join(0.1)
            page += not parked.is_alive()
            if parked.is_alive():
                break
        assert parked.is_alive(), "a write waits for room"
        new = device.open(0, 2)
        assert parked.is_alive(), "the fence does not wait for the disk"
        parked.join()
        assert result == [errno.ESHUTDOWN]
        cold.faulty.set()
        assert read(device, new, page) == bytes(PAGE)
        cold.assert_sound()


def test_a_change_that_waits_for_its_page_from_below(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 512 * PAGE, 64 * PAGE, 64 << 20) as cold:
        device = Device(cold.store)
        old = device.open(0, 1)
        data = rng.randbytes(PAGE)
        device.pwrite(old, data, 7 * PAGE)
        cold.drain()
        cold.faulty.set(get_delay_us=1_500_000)
        parked, result = in_thread(device.pwrite, old, b"late" * 128, 7 * PAGE)
        wait_for(lambda: cold.counters()["cold_loads"] == 1)
        device.open(0, 2)
        parked.join()
        assert result == [errno.ESHUTDOWN]
        cold.faulty.set()
        assert read(device, None, 7) == data
        cold.assert_sound()
