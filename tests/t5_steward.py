"""The steward: another pool limit at any time, and memory pressure; nothing refused for it.

The machine's memory is a file of the test's own here (tests/t7_pressure.py makes real
pressure); seconds pass PACE times faster.  What is demanded at every moment:

    committed frames <= the limit, which never grows but by `set`
    a write that would have been accepted without pressure is accepted
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.core_helpers import PAGE, make_page, opened_store, try_put
from tests.tiers_helpers import Cold, cold_store, errno_of, noise, wait_for
from zcache_core import commands, counters
from zcache_core.errors import ConfigError
from zcache_core.steward import SYSTEM_WIDE, Steward
from zcache_core.store import Store

MIB = 1 << 20
PACE = 20
TRIGGER, STALLS, AVAILABLE = 1, 2, 3  # values of pressure_watch
TEXT = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0.00 total=0\n"


class Memory:
    """A pressure file that tells of stalls for as long as one wants."""

    def __init__(self, path: Path) -> None:
        self.path, self.total_us = path, 1000
        self.path.write_text(TEXT.format(self.total_us))
        self._short = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.005):
            if self._short.is_set():
                self.total_us += 50_000  # always more than a tenth of the time, at any pace
                temporary = self.path.with_suffix(".new")
                temporary.write_text(TEXT.format(self.total_us))
                with open(self.path, "r+b") as file:  # in place: the file is kept open
                    file.write(temporary.read_bytes())

    def short(self, is_short: bool = True) -> None:
        (self._short.set if is_short else self._short.clear)()

    def close(self) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    memory = Memory(tmp_path / "pressure")
    yield memory
    memory.close()


@contextmanager
def steward(
    store: Store, cold: Cold | None = None, fd: int = -1, pressure: str = "none", meminfo: str = ""
) -> Iterator[Steward]:
    more = {"meminfo": meminfo} if meminfo else {}
    cooling = cold.cooling if cold is not None else None
    steward = Steward(store, cooling, fd, pressure, PACE, **more)
    steward.start()
    try:
        yield steward
    finally:
        steward.stop()


def count(store: Store, name: str) -> int:
    return counters.read(store.memory)[name]


def reaches_limit(store: Store, frames: int) -> None:
    wait_for(lambda: count(store, "pool_limit_frames") == frames)


# ---- another limit -------------------------------------------------------------------------


def test_limit_changes_without_a_tier(rng: random.Random) -> None:
    """Against a dict: whatever is set in between, no page is lost and no bound broken."""
    with opened_store(6000 * PAGE, 12 * MIB) as store:
        model: dict[int, bytes] = {}
        refusals = changes = 0
        for _ in range(6000):
            dice = rng.random()
            page = rng.randrange(6000)
            if dice < 0.72:
                data = make_page(rng)
                if try_put(store, page, data):
                    model[page] = data
                else:
                    refusals += 1
            elif dice < 0.985:
                first = rng.randrange(5900)
                if rng.random() < 0.1:
                    store.invalidate(first, 100)
                    for page in range(first, first + 100):
                        model.pop(page, None)
                else:
                    assert store.get(page) == model.get(page, bytes(PAGE))
            else:
                stats = counters.read(store.memory)
                used = stats["pers_pageframes"]
                wanted = rng.choice([rng.randrange(256, 3073), min(3072, used + rng.randrange(9))])
                if wanted < used:
                    with pytest.raises(ConfigError, match="less than is in use"):
                        store.set_pool(wanted * PAGE)
                    assert count(store, "pool_set_frames") == stats["pool_set_frames"]
                else:
                    store.set_pool(wanted * PAGE)
                    changes += 1
                    reaches_limit(store, wanted)
            if dice > 0.9:
                stats = counters.read(store.memory)
                assert stats["pers_pageframes"] <= stats["pool_set_frames"]
        assert changes > 20
        assert refusals > 0, "the limit was never reached"
        for page, data in model.items():
            assert store.get(page) == data
        assert store.check() == 0


def test_limit_that_is_impossible() -> None:
    with opened_store(6000 * PAGE, 4 * MIB) as store:
        for pool in (5 * MIB, 4 * MIB - 1, 0):
            with pytest.raises(ConfigError):
                store.set_pool(pool)
        assert count(store, "pool_set_frames") == count(store, "pool_limit_frames") == 1024


def test_memory_is_given_back_and_taken_again(rng: random.Random) -> None:
    with opened_store(6000 * PAGE, 32 * MIB) as store:
        for page in range(6000):
            store.put(page, noise(rng))
        store.invalidate(0, 4000)
        store.set_pool(2000 * PAGE)
        wait_for(lambda: count(store, "committed_frames") <= 2000)
        assert not try_put(store, 0, noise(rng)), "2000 pages of noise are all of it"
        store.set_pool(2100 * PAGE)
        for page in range(100):
            store.put(page, noise(rng))
        assert not try_put(store, 100, noise(rng))
        assert count(store, "committed_frames") == 2100
        assert store.check() == 0


def test_smaller_pool_sends_pages_down(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 4000 * PAGE, 12 * MIB, 48 * MIB) as cold:
        model = {page: noise(rng) for page in range(2700)}
        for page, data in model.items():
            cold.store.put(page, data)
        cold.store.set_pool(4 * MIB)
        assert count(cold.store, "pool_set_frames") == 1024
        for page in range(2700, 3400):  # and goes on serving meanwhile
            model[page] = noise(rng)
            cold.store.put(page, model[page])
            stats = cold.counters()
            assert stats["pool_limit_frames"] <= 3072
        wait_for(lambda: count(cold.store, "pool_limit_frames") == 1024)
        assert count(cold.store, "committed_frames") <= 1024
        for page, data in model.items():
            assert cold.store.get(page) == data
        assert count(cold.store, "failed_stores") == 0
        cold.assert_sound()
        cold.store.set_pool(12 * MIB)
        assert count(cold.store, "pool_limit_frames") == 3072
        cold.assert_sound()


def test_commands_change_the_pool(tmp_path: Path, rng: random.Random) -> None:
    reader, writer = os.pipe()
    try:
        with cold_store(tmp_path, 4000 * PAGE, 4 * MIB, 16 * MIB) as cold:
            with steward(cold.store, cold, reader):
                os.write(writer, commands.pool(512) + commands.watermarks(60, 50))
                wait_for(lambda: count(cold.store, "high_percent") == 60)
                assert count(cold.store, "pool_set_frames") == 512
                os.write(writer, commands.pool(1025))  # more than the file has room for
                wait_for(lambda: count(cold.store, "refused_commands") == 1)
                cold.faulty.set(put_delay_us=1_500_000)  # a stalled disk keeps no command waiting
                for page in range(800):
                    errno_of(cold.store.put, page, noise(rng))
                os.write(writer, commands.drain(True))
                os.write(writer, commands.drain(False) + commands.pool(900))
                wait_for(lambda: count(cold.store, "pool_set_frames") == 900, 1.0)
                cold.faulty.set()
            assert count(cold.store, "pool_set_frames") == 900
    finally:
        os.close(writer)
        os.close(reader)


def test_commands_without_a_tier(rng: random.Random) -> None:
    reader, writer = os.pipe()
    try:
        with opened_store(2000 * PAGE, 4 * MIB) as store, steward(store, None, reader):
            for page in range(600):
                store.put(page, noise(rng))
            os.write(writer, commands.pool(500) + commands.drain(True))
            wait_for(lambda: count(store, "refused_commands") == 2)
            os.write(writer, commands.pool(600))
            wait_for(lambda: count(store, "pool_limit_frames") == 600)
            assert not try_put(store, 700, noise(rng))
            os.close(writer)
            writer = os.dup(reader)  # nobody writes any more: the steward goes on, and sleeps
    finally:
        os.close(writer)
        os.close(reader)


# ---- memory pressure -----------------------------------------------------------------------


def test_pool_shrinks_under_pressure_and_recovers(
    tmp_path: Path, rng: random.Random, memory: Memory
) -> None:
    with cold_store(tmp_path, 9000 * PAGE, 32 * MIB, 64 * MIB) as cold:
        store = cold.store
        model = {page: noise(rng) for page in range(6000)}
        for page, data in model.items():
            store.put(page, data)
        with steward(store, cold, pressure=str(memory.path)):
            assert count(store, "pressure_watch") == STALLS
            assert count(store, "pool_target_frames") == 8192
            before = count(store, "committed_frames")
            memory.short()
            wait_for(lambda: count(store, "pool_target_frames") == 2048)  # to a quarter
            assert count(store, "memory_pressure") == 1
            assert count(store, "pressure_steps") == 15
            wait_for(lambda: count(store, "committed_frames") <= 2048)
            assert count(store, "pool_limit_frames") == 8192, "the limit itself is as it was set"
            assert count(store, "punched_frames") >= before - 2048
            for page, data in model.items():
                assert store.get(page) == data
            memory.short(False)
            wait_for(lambda: count(store, "memory_pressure") == 0)
            wait_for(lambda: count(store, "pool_target_frames") == 8192)
            for page in range(6000, 7000):
                model[page] = noise(rng)
                store.put(page, model[page])
        for page, data in model.items():
            assert store.get(page) == data
        assert count(store, "failed_stores") == 0
        cold.assert_sound()


def test_pressure_refuses_nothing_when_the_tier_fails(
    tmp_path: Path, rng: random.Random, memory: Memory
) -> None:
    """A quarter of the pool is the target; the other three are there when nothing else is."""
    with cold_store(tmp_path, 9000 * PAGE, 16 * MIB, 32 * MIB) as cold:
        cold.faulty.set(put_fail=1000, put_errno=errno.EIO)
        with steward(cold.store, cold, pressure=str(memory.path)):
            memory.short()
            wait_for(lambda: count(cold.store, "pool_target_frames") == 1024)
            for page in range(4096):
                cold.store.put(page, noise(rng))
            assert count(cold.store, "pool_target_frames") == 1024
            assert errno_of(cold.store.put, 5000, noise(rng)) == errno.ENOSPC
            assert count(cold.store, "failed_stores") == 1
        cold.faulty.set()


def test_pressure_without_a_tier_takes_only_what_is_free(
    rng: random.Random, memory: Memory
) -> None:
    with opened_store(9000 * PAGE, 32 * MIB) as store:
        for page in range(8192):
            store.put(page, noise(rng))
        store.invalidate(0, 3000)  # the arena may keep 2 * 1024 + 256 frames of these
        wait_for(lambda: count(store, "free_frames") <= 2304)
        assert count(store, "free_frames") > 2000
        with steward(store, pressure=str(memory.path)):
            memory.short()
            wait_for(lambda: count(store, "free_frames") <= 1024 + 64)
            assert count(store, "pool_target_frames") == 8192
            for page in range(3000):  # all of the pool, as if nothing were the matter
                store.put(page, noise(rng))
            assert count(store, "failed_stores") == 0
        assert store.check() == 0


def test_available_memory_is_watched_without_psi(tmp_path: Path, rng: random.Random) -> None:
    meminfo = tmp_path / "meminfo"

    def available(kib: int) -> None:
        meminfo.write_text(f"MemTotal:        1600 kB\nMemFree:  7 kB\nMemAvailable:   {kib} kB\n")

    available(101)
    nothing = tmp_path / "not a pressure file"
    nothing.write_text("")
    with (
        cold_store(tmp_path, 9000 * PAGE, 8 * MIB, 32 * MIB) as cold,
        steward(cold.store, cold, pressure=str(nothing), meminfo=str(meminfo)),
    ):
        assert count(cold.store, "pressure_watch") == AVAILABLE
        available(99)
        wait_for(lambda: count(cold.store, "pool_target_frames") < 2000)
        available(101)
        wait_for(lambda: count(cold.store, "pool_target_frames") == 2048)


def test_system_wide_trigger() -> None:
    """The kernel takes our trigger where it has PSI, with or without CAP_SYS_RESOURCE."""
    if not os.access(SYSTEM_WIDE, os.W_OK):
        pytest.skip("this kernel has no PSI, or not for us")
    with opened_store(2000 * PAGE, 4 * MIB) as store, steward(store, pressure="psi"):
        assert count(store, "pressure_watch") in (TRIGGER, STALLS)


def test_pressure_file_that_is_not_there(tmp_path: Path) -> None:
    with (
        opened_store(2000 * PAGE, 4 * MIB) as store,
        pytest.raises(ConfigError, match=r"use a cgroup's memory\.pressure"),
    ):
        Steward(store, pressure=str(tmp_path / "none"))
