"""The suite that every allocator passes: a plain dict is the model, seeds are printed.

An allocator hands out room in frames.  Whatever the order of calls: no two objects
overlap, none leaves its frames, the counters are exact, what is freed can be used
again, and after a restart (adopt) all is as before.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.core_helpers import PAGE
from zcache_core import counters
from zcache_core.memfile import MemoryFile
from zcache_core.probe import Probe
from zcache_core.several import ALLOCATORS

FRAMES = 256
Make = Callable[[], tuple[MemoryFile, Probe]]


@pytest.fixture(params=ALLOCATORS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def memory() -> Iterator[MemoryFile]:
    memory = MemoryFile.create(None, PAGE, FRAMES * PAGE)
    yield memory
    memory.close()


def started(memory: MemoryFile, name: str) -> Probe:
    probe = Probe(memory, name)
    probe.start()
    return probe


class Model:
    """Objects as a dict, and the pieces of the arena that each covers."""

    def __init__(self) -> None:
        self.objects: dict[int, int] = {}
        self.pieces: dict[int, list[tuple[int, int]]] = {}

    def add(self, where: int, size: int, probe: Probe) -> None:
        pieces = probe.pieces(where, size)
        assert where % 32 == 0
        assert pieces[0] == (where, pieces[0][1])
        assert pieces[0][1] >= 24, "the header is in one piece"
        assert sum(length for _, length in pieces) == size
        for at, length in pieces:
            assert at // PAGE == (at + length - 1) // PAGE, "inside one frame"
            assert at + length <= FRAMES * PAGE
        self.objects[where] = size
        self.pieces[where] = pieces

    def remove(self, where: int) -> int:
        del self.pieces[where]
        return self.objects.pop(where)

    def assert_disjoint(self) -> None:
        end = 0
        for where, size in sorted(piece for pieces in self.pieces.values() for piece in pieces):
            assert where >= end, "objects overlap"
            end = where + size

    def frames(self) -> set[int]:
        return {at // PAGE for pieces in self.pieces.values() for at, _ in pieces}


def random_size(rng: random.Random, probe: Probe) -> int:
    if rng.random() < 0.1:
        return PAGE
    if rng.random() < 0.1:
        return rng.choice([25, 64, 65, probe.largest_bytes, probe.largest_bytes - 1])
    return rng.randrange(25, probe.largest_bytes + 1)


def assert_counters(memory: MemoryFile, model: Model, name: str) -> None:
    now = counters.read(memory)
    assert now["pers_zpages"] == len(model.objects)
    payload = sum(size - 24 if size < PAGE else PAGE for size in model.objects.values())
    assert now["pers_zbytes"] == payload
    if name == "zsmalloc":  # a zspage keeps its frames until it is empty
        assert now["pers_pageframes"] >= len(model.frames())
        assert bool(now["pers_pageframes"]) == bool(model.objects)
    else:
        assert now["pers_pageframes"] == len(model.frames())
    assert now["raw_pages"] == sum(size == PAGE for size in model.objects.values())


def test_against_a_model(memory: MemoryFile, name: str, rng: random.Random) -> None:
    probe = started(memory, name)
    model = Model()
    for step in range(20000):
        # waves, so that it is full at times and empty at times
        filling = 0.5 + 0.45 * (1 if step // 2500 % 2 == 0 else -1)
        if rng.random() < filling:
            size = random_size(rng, probe)
            where = probe.alloc(size)
            if where is None:
                assert probe.committed_frames == FRAMES, "refused only when the pool is full"
                assert probe.free_frames < probe.frames_at_once
            else:
                assert where not in model.objects
                model.add(where, size, probe)
        elif model.objects:
            where = rng.choice(list(model.objects))
            probe.release(where, model.remove(where))
        if step % 500 == 0:
            model.assert_disjoint()
            assert probe.check() == 0
            assert_counters(memory, model, name)
    for where, size in model.objects.items():
        probe.release(where, size)
    model = Model()
    assert probe.check() == 0
    assert_counters(memory, model, name)


def test_frame_tells_its_objects(memory: MemoryFile, name: str, rng: random.Random) -> None:
    probe = started(memory, name)
    model = Model()
    while (where := probe.alloc(size := random_size(rng, probe))) is not None:
        model.add(where, size, probe)
    for where in rng.sample(sorted(model.objects), len(model.objects) // 3):
        probe.release(where, model.remove(where))
    told = [found for frame in range(FRAMES) for found in probe.objects(frame)]
    assert {where for where, _ in told} == set(model.objects)
    assert all(size >= model.objects[where] for where, size in told)


def test_adopting_gives_the_same_again(memory: MemoryFile, name: str, rng: random.Random) -> None:
    probe = started(memory, name)
    model = Model()
    while (where := probe.alloc(size := random_size(rng, probe))) is not None:
        model.add(where, size, probe)
    for where in rng.sample(sorted(model.objects), len(model.objects) // 2):
        probe.release(where, model.remove(where))
    del probe
    offset = memory.offsets()["counters"]
    memory.poke(offset, bytes(40 * 4096))
    successor = Probe(memory, name)
    places = list(model.objects.items())
    rng.shuffle(places)
    assert all(successor.adopt(where, size) for where, size in places)
    assert not any(successor.adopt(where, size) for where, size in places), "taken already"
    assert not successor.adopt(FRAMES * PAGE, 100), "outside of the arena"
    assert not successor.adopt(64 * 63 - 8, 4000), "over the end of a frame"
    successor.adopted()
    assert successor.check() == 0
    assert_counters(memory, model, name)
    successor.start()
    while (where := successor.alloc(size := random_size(rng, successor))) is not None:
        model.add(where, size, successor)
    model.assert_disjoint()
    assert successor.check() == 0


def test_freed_frames_go_back_and_come_again(name: str) -> None:
    """Memory is given back in batches, read as zeros by nobody, and committed again."""
    frames = 4096
    memory = MemoryFile.create(None, PAGE, frames * PAGE)
    probe = Probe(memory, name, reserve_frames=64)
    probe.start()
    for _ in range(2):
        taken = [probe.alloc(PAGE) for _ in range(frames)]
        assert None not in taken
        assert probe.alloc(PAGE) is None
        assert probe.committed_frames == frames
        for where in taken:
            assert where is not None
            probe.release(where, PAGE)
        deadline = time.monotonic() + 30
        while probe.committed_frames > 2 * 64 + 256 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert probe.committed_frames <= 2 * 64 + 256
        assert probe.check() == 0
    assert counters.read(memory)["punched_frames"] >= 2 * (frames - 512)
    memory.close()


def test_many_threads(memory: MemoryFile, name: str, rng: random.Random) -> None:
    probe = started(memory, name)
    left: list[tuple[int, int]] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        own = random.Random(seed)
        held: list[tuple[int, int]] = []
        for _ in range(5000):
            if held and own.random() < 0.5:
                probe.release(*held.pop(own.randrange(len(held))))
            else:
                size = random_size(own, probe)
                where = probe.alloc(size, wait=False)
                if where is not None:
                    held.append((where, size))
        with lock:
            left.extend(held)

    threads = [threading.Thread(target=work, args=(rng.getrandbits(32),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model = Model()
    for where, size in left:
        assert where not in model.objects
        model.add(where, size, probe)
    model.assert_disjoint()
    assert probe.check() == 0
    assert_counters(memory, model, name)
