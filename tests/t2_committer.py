"""The committer: grows only by what the system has, and what is not taken back stays ours.

How much memory the system has left is a file of the test's own here (what /proc/zoneinfo
would say); that a guest which serves itself goes on is tests/t8_swaplab.py's.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin_helpers import wait_for
from zcache_core import counters
from zcache_core.errors import MemoryFileError
from zcache_core.memfile import MemoryFile
from zcache_core.probe import Probe
from zcache_core.store import Store

PAGE = 4096
FRAMES = 2048
RESERVE = 64
ROOT = Path(__file__).resolve().parents[1]

# One zone that is nearly empty, and one whose free pages are kept for others.  The high
# watermark is past all memory, so that nobody thinks there is plenty.
ZONES = """\
Node 0, zone    DMA32
  per-node stats
      nr_free_cma  99999999
  pages free     {other_free}
        boost    0
        min      100
        low      125
        high     150
        protection: (0, 0, 5000, 5000)
  pagesets
    cpu: 0
              count: 326
              high:  378
Node 0, zone   Normal
  pages free     {free}
        boost    0
        min      1000
        low      1250
        high     1099511627776
        spanned  99999999
        protection: (0, 0, 0, 0)
  pagesets
    cpu: 0
              count: 326
              high:  378
Node 0, zone  Movable
  pages free     0
        min      32
        low      32
        high     32
        protection: (0, 0, 0, 0)
"""


class System:
    """What the committer is told of the system's memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.has(free=0)

    def has(self, free: int, other_free: int = 0) -> None:
        """In place, and of one length: the file is kept open, and read at any moment."""
        text = ZONES.format(free=f"{free:<9}", other_free=f"{other_free:<9}")
        with open(self.path, "r+b", buffering=0) as file:
            file.write(text.encode())


@pytest.fixture
def memory() -> MemoryFile:
    # Not closed here: the probe of a test that failed still works on it, and keeps it.
    return MemoryFile.create(None, PAGE, FRAMES * PAGE)


def count(memory: MemoryFile, name: str) -> int:
    return counters.read(memory)[name]


def take_all(probe: Probe) -> list[int]:
    """Raw pages until none is to be had."""
    return list(iter(lambda: probe.alloc(PAGE), None))


def take_exactly(probe: Probe, frames: int) -> list[int]:
    """So many raw pages and no more; on a busy machine one may be refused at first."""
    taken: list[int] = []

    def enough() -> bool:
        taken.extend(take_all(probe))
        return len(taken) >= frames

    wait_for("the frames", enough)
    assert len(taken) == frames
    return taken


def looked_again(memory: MemoryFile) -> None:
    """Returns when it has looked, and found too little, since the call."""
    before = count(memory, "commit_pauses")
    wait_for("another look", lambda: count(memory, "commit_pauses") > before + 2)


def test_no_memory_is_asked_for_that_the_system_does_not_have(
    memory: MemoryFile, tmp_path: Path
) -> None:
    system = System(tmp_path / "zoneinfo")
    probe = Probe(memory, "zbud", RESERVE, str(system.path))
    probe.start()
    assert len(take_all(probe)) == RESERVE, "what was there at the start, and no more"
    assert count(memory, "commit_pauses") > 0
    assert count(memory, "commit_failures") == 0
    for free, other_free in [(1000, 0), (1125, 0), (1141, 0), (1125, 5111), (0, 5100)]:
        system.has(free, other_free)
        looked_again(memory)
        # for a moment also what it has just taken on, and gives up; what it got it would keep
        wait_for("no more", lambda: probe.committed_frames == RESERVE)
    system.has(free=1125 + 18)  # min, an eighth of it for others, 16 frames and their headers
    wait_for("it", lambda: probe.committed_frames > RESERVE)
    system.has(free=0, other_free=5000 + 112 + 18)  # beyond what is protected from us
    wait_for("it", lambda: probe.free_frames == RESERVE)
    take_exactly(probe, FRAMES - RESERVE)  # then all of the pool


def test_who_waits_is_refused_soon_and_served_again_later(
    memory: MemoryFile, tmp_path: Path
) -> None:
    system = System(tmp_path / "zoneinfo")
    probe = Probe(memory, "zbud", RESERVE, str(system.path))
    probe.start()
    taken = take_all(probe)
    for _ in range(1000):  # each would wait 2 s if nobody told it that there is no hope
        assert probe.alloc(PAGE) is None
    probe.release(taken.pop(), PAGE)
    assert probe.alloc(PAGE) is not None, "what comes back is there at once"
    system.has(free=1_000_000)
    wait_for("it", lambda: probe.alloc(PAGE) is not None)
    assert probe.check() == 0


def test_what_is_not_wanted_any_more_is_not_short(memory: MemoryFile, tmp_path: Path) -> None:
    """All is given back while memory is short, so nothing is tried again: until somebody asks."""
    system = System(tmp_path / "zoneinfo")
    probe = Probe(memory, "zbud", RESERVE, str(system.path))
    probe.start()
    taken = take_all(probe)
    looked_again(memory)
    for where in taken:
        probe.release(where, PAGE)
    wait_for("what was given back", lambda: probe.free_frames == RESERVE)
    system.has(free=1_000_000)
    take_exactly(probe, FRAMES)


def test_without_zoneinfo_the_pool_grows(memory: MemoryFile, tmp_path: Path) -> None:
    probe = Probe(memory, "zbud", RESERVE, str(tmp_path / "none"))
    probe.start()
    take_exactly(probe, FRAMES)
    assert count(memory, "commit_pauses") == 0


def segment(memory: MemoryFile) -> int:
    """Where the memory file is mapped in this process."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        rows = [row.split() for row in file]
    (at,) = [row[0] for row in rows if row[4] == str(memory.shmid)]
    return int(at.split("-")[0], 16)


def test_frames_that_are_not_taken_back_stay_in_the_account(memory: MemoryFile) -> None:
    """The kernel punches no hole into an mlocked mapping."""
    libc = ctypes.CDLL(None, use_errno=True)
    arena = ctypes.c_void_p(segment(memory) + memory.offsets()["arena"])
    probe = Probe(memory, "zbud", RESERVE)
    probe.start()
    taken = take_exactly(probe, FRAMES)
    if libc.mlock(arena, ctypes.c_size_t(FRAMES * PAGE)):
        pytest.skip("may not lock memory")
    for where in taken:
        probe.release(where, PAGE)
    wait_for("it", lambda: count(memory, "punch_failures") > 1)
    assert probe.committed_frames == probe.free_frames == FRAMES
    assert count(memory, "committed_frames") == count(memory, "free_frames") == FRAMES
    assert count(memory, "punched_frames") == 0
    take_exactly(probe, FRAMES)  # they can be used
    for where in taken:
        probe.release(where, PAGE)
    assert libc.munlock(arena, ctypes.c_size_t(FRAMES * PAGE)) == 0
    # a batch that is being punched is off the list before it is out of the account
    wait_for("it", lambda: probe.committed_frames == probe.free_frames <= 2 * RESERVE + 256)
    assert count(memory, "punched_frames") == FRAMES - probe.free_frames
    assert probe.check() == 0


def with_memory(memory: MemoryFile) -> tuple[list[bool], list[bool]]:
    """Of each frame: what the frame map says, and what the kernel says."""
    at = memory.offsets()
    words = memory.peek(at["frame_map"], FRAMES // 8)
    said = [bool(words[frame // 8] >> frame % 8 & 1) for frame in range(FRAMES)]
    base = segment(memory)
    answer = (ctypes.c_ubyte * FRAMES)()
    length = ctypes.c_size_t(FRAMES * PAGE)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(base + at["arena"]), length, answer) == 0
    return said, [bool(byte & 1) for byte in answer]


def test_the_frame_map_tells_a_successor_what_has_memory(memory: MemoryFile) -> None:
    """And who takes the file over finds exactly that free."""
    probe = Probe(memory, "zbud", RESERVE)
    probe.start()
    taken = take_exactly(probe, FRAMES)
    assert with_memory(memory) == ([True] * FRAMES, [True] * FRAMES)
    for where in taken:
        probe.release(where, PAGE)
    wait_for("it", lambda: count(memory, "punched_frames") >= FRAMES - 2 * RESERVE - 256)
    wait_for("quiet", lambda: with_memory(memory)[0] == with_memory(memory)[1])
    said, _ = with_memory(memory)
    assert RESERVE <= sum(said) < FRAMES // 2
    kept = probe.alloc(PAGE)
    assert kept is not None
    successor = Probe(memory, "zbud", RESERVE)
    assert successor.adopt(kept, PAGE)
    successor.adopted()
    assert successor.committed_frames == sum(with_memory(memory)[0])
    assert successor.free_frames == successor.committed_frames - 1


def test_an_index_without_memory_is_refused(memory: MemoryFile) -> None:
    """A hole in the mapping stands for memory that the kernel does not have."""
    libc = ctypes.CDLL(None, use_errno=True)
    hole = ctypes.c_void_p(segment(memory) + memory.offsets()["index"])
    store = Store(memory)
    assert libc.munmap(hole, ctypes.c_size_t(PAGE)) == 0
    with pytest.raises(MemoryFileError, match="memory for the index; choose a smaller device"):
        store.start()


STACKS = """
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store
import sys
def resident_stacks():
    sizes, found = {}, []
    for line in open("/proc/self/smaps", errors="replace"):
        name, _, value = line.partition(":")
        if name in ("Size", "Rss"):
            sizes[name] = int(value.split()[0])
        elif name == "VmFlags" and sizes["Size"] == 256:
            found.append(sizes["Rss"])
    return sorted(found)
memory = MemoryFile.create(None, 4096, 1 << 20)
before = resident_stacks()
store = Store(memory)
store.start()
for _ in range(1000):
    now = resident_stacks()
    for known in before:
        now.remove(known)
    if now and min(now) >= 96:
        break
print(now)
store.stop()
memory.close()
"""


def test_stacks_are_resident_from_the_start() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STACKS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = [int(word) for word in done.stdout.strip("[]\n ").split(",")]
    assert found, "no thread was found by its stack of 256 KiB"
    assert min(found) >= 96, found
