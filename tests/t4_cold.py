"""The suite that every cold tier passes.

A dict is the model: what was put and not dropped is there, whole, at its `where`, for
exactly its page and version; the counters tell exactly what is alive.  Sorting anew,
adopting after a restart, and running full lose nothing.  What only the disk promises is
in t4_disk.py.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cold_helpers import DISK_BYTES, MAKERS, SEGMENT, Maker, Model, refused
from tests.core_helpers import PAGE
from tests.tiers_helpers import open_file
from zcache_core.coldprobe import BATCH_MOST
from zcache_core.memfile import MemoryFile


@pytest.fixture(params=sorted(MAKERS))
def make(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


@pytest.fixture
def memory() -> Iterator[MemoryFile]:
    memory = MemoryFile.create(None, PAGE, PAGE)
    yield memory
    memory.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = open_file(tmp_path / "disk", DISK_BYTES)
    yield fd
    os.close(fd)


@pytest.fixture
def model(make: Maker, memory: MemoryFile, fd: int, rng: random.Random) -> Model:
    return Model(make(memory, fd), memory, rng)


def test_against_a_model(model: Model) -> None:
    for step in range(250):
        dice = model.rng.random()
        if dice < 0.6:
            model.put(model.rng.choice([0, 1, 3, 40, BATCH_MOST]))
        elif dice < 0.75:
            model.drop_some(model.rng.choice([0.1, 0.6]))
        elif dice < 0.9:
            model.probe.tick()
        else:
            model.resort()
        if step % 25 == 0:
            model.assert_exact()
            model.assert_disjoint()
        model.assert_readable(0.02)
    model.assert_readable()
    model.drop_some(1.1)
    model.probe.tick()
    model.assert_exact()
    assert model.probe.reason == 0


def test_full_refuses_and_loses_nothing(model: Model) -> None:
    model.fill(PAGE)
    assert not model.probe.has_room(SEGMENT)
    assert model.put(10, PAGE) == 0
    assert model.probe.reason == 0, "full is no failure"
    model.assert_exact()
    model.assert_readable(0.2)
    model.drop_some(1.1)
    model.probe.tick()
    assert model.probe.has_room(SEGMENT)
    assert model.put(20, PAGE) == 20
    model.assert_exact()


@pytest.mark.parametrize("length", [PAGE, 1500, 9])
def test_resorting_makes_room_again(model: Model, length: int) -> None:
    """However thin what is left is spread, sorting gathers it; tiny objects too."""
    model.fill(length)
    model.drop_some(0.5)
    model.probe.tick()
    rounds = 0
    while not model.probe.has_room(4 * SEGMENT):
        assert model.resort()
        rounds += 1
        assert rounds < 40
    model.assert_exact()
    model.assert_readable(0.1 if length < 100 else 1)


def test_resorting_comes_to_an_end(model: Model) -> None:
    """A tier where nothing is dead finds nothing to do, sooner or later."""
    model.fill(PAGE)
    rounds = 0
    while model.resort():
        rounds += 1
        assert rounds < 100
    model.assert_exact()


def test_wrong_identity_is_refused(model: Model) -> None:
    model.put(50)
    other = model.alive[7]
    for (page, version, length_codec, blob), where in list(model.alive.values()):
        assert refused(model.probe, page, version + 1, where, length_codec) == errno.EILSEQ
        assert refused(model.probe, page ^ 1, version, where, length_codec) == errno.EILSEQ
        assert refused(model.probe, page, version, where, length_codec ^ 0xF) == errno.EILSEQ
        if len(blob) > 1:
            short = length_codec - 16
            assert refused(model.probe, page, version, where, short) == errno.EILSEQ
        if where != other[1]:
            assert refused(model.probe, page, version, other[1], length_codec) == errno.EILSEQ
        assert refused(model.probe, page, version, where + 4, length_codec) == errno.EILSEQ
    for where in (0, DISK_BYTES - 8, DISK_BYTES, 1 << 47):
        assert refused(model.probe, 1, 1, where, 0xFFF0) == errno.EILSEQ
    model.assert_readable()


def test_adopted_after_a_restart(
    make: Maker, memory: MemoryFile, fd: int, rng: random.Random
) -> None:
    old = Model(make(memory, fd), memory, rng)
    for _ in range(6):
        old.put(300)
        old.drop_some(0.3)
    alive = old.alive
    again = MemoryFile.create(None, PAGE, PAGE)
    again.poke(4096, memory.peek(4096, 64))  # its keys
    new = Model(make(again, fd), again, rng)
    for thing, where in alive.values():
        assert new.probe.adopt(where, len(thing[3]))
    new.alive, new.next_version = alive, old.next_version
    for where in (0, 8, SEGMENT - 8, SEGMENT + 4, 2 * SEGMENT - 8, DISK_BYTES, 1 << 47):
        assert not new.probe.adopt(where, PAGE), where
    new.probe.adopted()
    new.assert_exact()
    new.assert_readable()
    new.fill()  # nothing living is written over
    new.assert_disjoint()
    new.assert_readable()
    again.close()
