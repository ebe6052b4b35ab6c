"""What leaves and what stays: raw pages, hot copies on a short disk, ghosts; and mending.

Also the bounds of waiting: what one request waits in all, and for a disk that fails.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.core_helpers import PAGE
from tests.tiers_helpers import Cold, cold_store, errno_of, noise, open_file, wait_for
from zcache_core import counters
from zcache_core.device import Device

MIB = 1 << 20


def fill(cold: Cold, rng: random.Random, pages: int) -> dict[int, bytes]:
    model = {page: noise(rng) for page in range(pages)}
    for page, data in model.items():
        cold.store.put(page, data)
    return model


def half_noise(rng: random.Random) -> bytes:
    """A page that compresses to less than half."""
    return rng.randbytes(1500) + bytes(PAGE - 1500)


def assert_holds(cold: Cold, model: dict[int, bytes]) -> None:
    for page, data in model.items():
        assert cold.store.get(page) == data, page


# ---- who goes first ------------------------------------------------------------------------


def test_raw_pages_leave_early(tmp_path: Path, rng: random.Random) -> None:
    """They cost a frame each: of pages that nobody read they go before all others."""
    with cold_store(tmp_path, 6000 * PAGE, 16 * MIB, 48 * MIB, high=50, low=45) as cold:
        raw = set(rng.sample(range(2700), 800))
        for page in range(2700):
            cold.store.put(page, noise(rng) if page in raw else half_noise(rng))
            if page in raw and page % 8 == 0:
                cold.store.get(page)  # but not those that somebody does read
        cold.settle()
        assert cold.counters()["written_back_pages"] == 0
        for page in range(2700, 3600):  # compressible: over the watermark
            cold.store.put(page, half_noise(rng))
        cold.settle()
        gone = [page for page in range(3600) if cold.state(page) in ("ephemeral", "disk")]
        assert len(gone) > 100
        assert len(raw & set(gone)) > 0.9 * len(gone)
        assert not any(page % 8 == 0 for page in raw & set(gone))
        cold.assert_sound()


def test_hot_pages_give_up_their_copies_on_a_short_disk(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 6000 * PAGE, 8 * MIB, 16 * MIB) as cold:
        model = fill(cold, rng, 3300)
        cold.drain()
        full = cold.counters()["disk_live_bytes"]
        hot = rng.sample(range(3300), 700)
        for _ in range(3):
            for page in hot:
                assert cold.store.get(page) == model[page]
        wait_for(lambda: cold.counters()["kept_pages"] > 0)
        cold.settle()
        stats = cold.counters()
        assert stats["disk_live_bytes"] < full
        assert {cold.state(page) for page in hot} <= {"ram", "ephemeral", "disk"}
        assert stats["kept_pages"] == sum(cold.state(page) == "ram" for page in model)
        assert_holds(cold, model)
        for page in range(3100, 3500):  # and there is room for more than before
            model[page] = noise(rng)
            cold.store.put(page, model[page])
        assert_holds(cold, model)
        cold.assert_sound()


def test_a_disk_with_room_keeps_its_copies(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 6000 * PAGE, 8 * MIB, 48 * MIB) as cold:
        model = fill(cold, rng, 3300)
        cold.drain()
        for _ in range(3):
            assert_holds(cold, model)
        cold.settle()
        assert cold.counters()["kept_pages"] == 0
        assert cold.counters()["eph_zpages"] > 500


def test_ghosts_remember_a_window_and_no_more(tmp_path: Path, rng: random.Random) -> None:
    """Read again within 2 * pool reads from below: known, mostly.  Later: not."""
    with cold_store(tmp_path, 9000 * PAGE, 4 * MIB, 64 * MIB) as cold:
        for page in range(9000):
            cold.store.put(page, half_noise(rng))
        cold.drain()

        def promoted(pages: range) -> int:
            before = cold.counters()["promoted_pages"]
            for page in pages:
                cold.store.get(page)
            return cold.counters()["promoted_pages"] - before

        assert promoted(range(1000)) < 10
        assert promoted(range(1000)) > 800
        assert promoted(range(1000, 2000)) < 10
        assert promoted(range(4000, 9000)) < 50
        assert promoted(range(1000, 2000)) < 50


# ---- mending -------------------------------------------------------------------------------


def ephemeral_pages(cold: Cold, rng: random.Random) -> dict[int, bytes]:
    """Pages that have both copies, and what they hold."""
    model = fill(cold, rng, 1000)
    cold.settle()
    return {page: data for page, data in model.items() if cold.state(page) == "ephemeral"}


def damage(cold: Cold, offset: int, bit: int) -> None:
    byte = cold.memory.peek(offset, 1)[0]
    cold.memory.poke(offset, bytes([byte ^ 1 << bit]))


def test_damaged_ram_copy_is_answered_from_the_disk(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 2000 * PAGE, 4 * MIB, 16 * MIB, high=50, low=10) as cold:
        model = ephemeral_pages(cold, rng)
        assert len(model) > 300
        hit = set(rng.sample(sorted(model), 60))
        for page in hit:
            at = cold.memory.offsets()["arena"] + cold.where(page) + rng.randrange(PAGE)
            damage(cold, at, rng.randrange(8))
        assert_holds(cold, model)
        assert {cold.state(page) for page in hit} == {"disk"}, "the damaged copy is gone"
        stats = cold.counters()
        assert stats["mended_loads"] == 60
        assert stats["corrupt_loads"] == stats["disk_corrupt_pages"] == 0
        cold.assert_sound()


def test_damaged_on_both_sides_is_an_error(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 2000 * PAGE, 4 * MIB, 16 * MIB, high=50, low=10) as cold:
        model = ephemeral_pages(cold, rng)
        hit = rng.sample(sorted(model), 20)
        for page in hit:
            damage(cold, cold.memory.offsets()["arena"] + cold.where(page) + 77, 3)
        cold.faulty.set(spoil=1000)
        for page in hit:
            assert errno_of(cold.store.get, page) == errno.EIO
        assert cold.counters()["corrupt_loads"] == 20
        assert cold.counters()["mended_loads"] == 0
        cold.faulty.set()
        for page in hit:
            assert cold.store.get(page) == model[page], "both copies are as they were"
        cold.assert_sound()


def test_damaged_header_is_not_believed(tmp_path: Path, rng: random.Random) -> None:
    """Whatever bit of a header is wrong: right data or EIO, and no other page suffers."""
    with cold_store(tmp_path, 2000 * PAGE, 4 * MIB, 16 * MIB, high=50, low=10) as cold:
        model = ephemeral_pages(cold, rng)
        headers = cold.memory.offsets()["frame_headers"]
        hit = set(rng.sample(sorted(model), 100))
        for page in hit:  # raw pages: their headers stand in the table of frames
            damage(
                cold, headers + cold.where(page) // PAGE * 24 + rng.randrange(24), rng.randrange(8)
            )
        right = wrong = 0
        for page, data in model.items():
            error = errno_of(cold.store.get, page)
            if error == 0:
                assert cold.store.get(page) == data
            right += page in hit and error == 0
            wrong += page in hit and error == errno.EIO
            assert page in hit or error == 0
        assert right + wrong == 100
        assert right > 30, "at least those whose address below is whole"
        for page in hit:
            cold.store.put(page, model[page])
        assert_holds(cold, model)
        cold.drain()  # and nothing keeps the others from going down
        assert_holds(cold, model)


# ---- waiting -------------------------------------------------------------------------------


def test_more_writers_than_slots_wait_and_are_served(tmp_path: Path, rng: random.Random) -> None:
    """The thread that makes room must not need a slot of those who wait for it."""
    writers, each = 48, 60
    with cold_store(tmp_path, 4096 * PAGE, 128 * PAGE, 64 * MIB) as cold:
        data = {page: noise(rng) for page in range(writers * each)}
        refused: list[int] = []

        def write(own: int) -> None:
            mine = range(own, writers * each, writers)
            refused.extend(page for page in mine if errno_of(cold.store.put, page, data[page]))

        threads = [threading.Thread(target=write, args=(own,)) for own in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refused == []
        assert_holds(cold, data)
        cold.assert_sound()


def test_waits_of_one_request_add_up(tmp_path: Path, rng: random.Random) -> None:
    """Each page would find room after 1 s; the request may not wait for all of them."""
    with cold_store(tmp_path, 4000 * PAGE, 1 * MIB, 32 * MIB) as cold:
        device = Device(cold.store)
        cold.faulty.set(put_delay_us=1_000_000)
        error = errno_of(device.pwrite, None, rng.randbytes(2560 * PAGE), 0, 0)
        assert error == errno.ENOSPC
        cold.faulty.set()
        for first in range(0, 2560, 64):  # each has its own time, however busy the disk is
            device.pwrite(None, rng.randbytes(64 * PAGE), first * PAGE, 0)


@pytest.mark.parametrize("taken_over", [False, True])
def test_who_waits_while_pages_leave_waits_on(
    tmp_path: Path, rng: random.Random, taken_over: bool
) -> None:
    """A slow disk, a full pool, and a write that needs more rounds than one wait is long.

    Taken over: the predecessor left a pool in which nothing may be dropped.
    """
    with cold_store(tmp_path, 4000 * PAGE, 1 * MIB, 32 * MIB, high=99, low=50) as first:
        held = {page: noise(rng) for page in range(250)}
        for page, data in held.items():
            first.store.put(page, data)
        with taking_over(first, tmp_path / "disk") if taken_over else nullcontext(first) as cold:
            cold.faulty.set(put_delay_us=350_000)  # for 64 pages
            assert cold.counters()["eph_zpages"] == 0
            more = rng.randbytes(384 * PAGE)  # 2 s, where what never moves is given up after 1.5
            Device(cold.store).pwrite(None, more, 1000 * PAGE, 0)
            assert cold.counters()["failed_stores"] == 0
            assert cold.counters()["pool_wait_us"] > 1_500_000, "this proves nothing"
            cold.faulty.set()
            held |= {1000 + n: more[n * PAGE : (n + 1) * PAGE] for n in range(384)}
            assert_holds(cold, held)
            cold.assert_sound()


def test_who_makes_room_has_the_class_of_who_waits_for_it(
    tmp_path: Path, rng: random.Random
) -> None:
    """Else a real-time writer waits for whoever has the CPU; and no longer than it waits."""
    usual = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # this thread's
    except PermissionError:
        pytest.skip("needs CAP_SYS_NICE")
    with ExitStack() as stack:
        try:
            cold = stack.enter_context(cold_store(tmp_path, 2000 * PAGE, 1 * MIB, 16 * MIB))
        finally:
            os.sched_setscheduler(0, *usual)
        assert class_of("zc-cool") == os.SCHED_OTHER
        cold.faulty.set(put_delay_us=60_000_000)
        stack.callback(cold.faulty.set)
        for page in range(256):
            cold.store.put(page, noise(rng))
        data = noise(rng)
        writer = threading.Thread(target=errno_of, args=(cold.store.put, 300, data))
        writer.start()
        wait_for(lambda: class_of("zc-cool") == os.SCHED_FIFO)
        writer.join()
        cold.faulty.set()
        wait_for(lambda: class_of("zc-cool") == os.SCHED_OTHER)
        cold.store.put(300, data)


def class_of(name: str) -> int:
    """The scheduling class of our thread of that name."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            return os.sched_getscheduler(int(task.name))
    raise AssertionError(f"no thread {name}")


@contextmanager
def taking_over(first: Cold, disk: Path) -> Iterator[Cold]:
    """A successor on the same memory and disk."""
    first.stop()
    fd = open_file(disk, 32 * MIB)
    cold = Cold(first.memory, fd, 32 * MIB, 99, 50)
    try:
        yield cold
    finally:
        cold.stop()
        os.close(fd)


def test_a_short_failure_of_the_disk_is_waited_for(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 2000 * PAGE, 2 * MIB, 16 * MIB) as cold:
        cold.faulty.set(put_fail=1000, put_errno=errno.EIO)
        for page in range(512):
            cold.store.put(page, noise(rng))
        assert cold.counters()["eph_zpages"] == 0, "nothing to drop"
        healing = threading.Timer(0.3, cold.faulty.set)
        healing.start()
        cold.store.put(600, noise(rng))
        healing.join()
        waits = counters.histograms(cold.memory)["pool_wait"]
        assert waits["count"] == cold.counters()["pool_waits"] > 0
        assert waits["sum"] == cold.counters()["pool_wait_us"]
        shortest = sum(n * (1 << k >> 1) for k, n in enumerate(waits["buckets"]))
        longest = sum(n << k for k, n in enumerate(waits["buckets"]))
        assert shortest <= cold.counters()["pool_wait_us"] <= longest
        assert counters.quantile_s(waits, 1.0) * 1e6 >= waits["sum"] // waits["count"]


def test_a_long_failure_is_waited_for_once(tmp_path: Path, rng: random.Random) -> None:
    """After the bound of one request nobody waits for the disk any more."""
    with cold_store(tmp_path, 2000 * PAGE, 2 * MIB, 16 * MIB) as cold:
        cold.faulty.set(put_fail=1000, put_errno=errno.EIO)
        for page in range(512):
            cold.store.put(page, noise(rng))
        assert errno_of(cold.store.put, 600, noise(rng)) == errno.ENOSPC
        waits = cold.counters()["pool_waits"]
        for page in range(600, 800):
            assert errno_of(cold.store.put, page, noise(rng)) == errno.ENOSPC
        assert cold.counters()["pool_waits"] <= waits + 1
        cold.faulty.set()
        wait_for(lambda: errno_of(cold.store.put, 600, noise(rng)) == 0)


# ---- races -----------------------------------------------------------------------------------


def test_page_overwritten_while_it_is_promoted(tmp_path: Path, rng: random.Random) -> None:
    """The RAM copy that nobody needs any more is given back, or it would be lost room."""
    with cold_store(tmp_path, 1000 * PAGE, 4 * MIB, 16 * MIB) as cold:
        model = fill(cold, rng, 80)
        pages = range(0, 80, 10)  # in no order that is read ahead
        cold.drain()
        assert_holds(cold, model)  # once: the next read earns a RAM copy
        cold.faulty.set(get_delay_us=60_000_000)
        found: dict[int, bytes] = {}

        def read(page: int) -> None:
            found[page] = cold.store.get(page)

        readers = [threading.Thread(target=read, args=(page,)) for page in pages]
        loads = cold.counters()["cold_loads"]
        for reader in readers:
            reader.start()
        wait_for(lambda: cold.counters()["cold_loads"] == loads + 8)
        for page in pages[:4]:
            model[page] = noise(rng)
            cold.store.put(page, model[page])
        cold.faulty.set()  # they go on now
        for reader in readers:
            reader.join()
        stats = cold.counters()
        assert stats["promoted_pages"] == 4
        assert stats["read_retries"] >= 4
        assert found == {page: model[page] for page in pages}
        cold.assert_sound()
        cold.store.invalidate(0, 1000)
        stats = cold.counters()
        assert stats["pers_pageframes"] + stats["eph_pageframes"] == 0
        cold.assert_sound()
