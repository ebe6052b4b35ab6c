"""How long a killed server is away, by the size of its pool, and what being replaceable costs.

    .venv/bin/python -m bench.restart [--gib 0.5 1 2 4] [--kills N] [--standby]

For each pool: a memory file is filled with pages that compress to a half (two in a frame: as many
entries as a pool can have), a supervised server takes it over and is killed -9 N times.  From
the kill on, in ms, medians:

    read     a new connection has its first page back: all that a stalled machine waits for
    write    its first write is answered: the index has been gone through
             (--standby: a second server waits already)
    rebuild  the going through alone, as the server counts it (rebuild_us)

Cost: 4 KiB reads of the compiled Device with a generation (the fence is looked at) and without,
in turn; and the CPU time of the supervisor while its server is under load.

Bound: a pool and its index are locked memory; the largest must fit twice into what is available.
What it is not: the stall of a machine that swaps, which has the kernel's part in it (bench.stall).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from plugin import servestate
from plugin.dialer import Generations, Target, dial
from plugin.instance import Instance
from zcache_core import counters, memfile
from zcache_core.device import Device
from zcache_core.errors import AttachError
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

PAGE_BYTES = 4096
REQUEST_BYTES = 128 << 10
GIB = 1 << 30
REQUEST, ANSWER = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")  # the NBD protocol's
READ, WRITE = 0, 1
AWAY_S = 60.0
LOAD_S = 3.0
FENCE_ROUNDS, FENCE_READS = 200, 2000


def some_pages(rng: random.Random) -> bytes:
    """1 MiB of pages that compress to a bit less than a half."""
    half = PAGE_BYTES // 2 - 100
    return b"".join(rng.randbytes(half) + bytes(PAGE_BYTES - half) for _ in range(256))


def fill(name: str, size_bytes: int, pool_bytes: int) -> int:
    """A memory file that holds as many pages as it can; how many."""
    memory = MemoryFile.create(name, size_bytes, pool_bytes)
    store = Store(memory)
    store.start()
    device = Device(store)
    pages = memoryview(some_pages(random.Random(1)))
    with contextlib.suppress(OSError):  # full
        for start in range(0, size_bytes, REQUEST_BYTES):
            at = start % len(pages)
            device.pwrite(None, pages[at : at + REQUEST_BYTES], start, 0)
    stored = counters.read(memory)["pers_zpages"]
    store.stop()
    memory.close()
    return stored


def zcache(*words: str) -> None:
    command = [sys.executable, "-m", "plugin.cli", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)


@contextmanager
def served(pool_bytes: int, standby: bool = False) -> Iterator[tuple[Instance, int]]:
    """A supervised server on a full memory file, and how many pages it holds."""
    instance = Instance(f"bench{os.getpid()}")
    size_bytes = 2 * pool_bytes
    stored = fill(instance.name, size_bytes, pool_bytes)
    try:
        zcache(
            "serve", "--name", instance.name, "--detach", f"size={size_bytes}",
            f"pool={pool_bytes}", f"standby={'yes' if standby else 'no'}",
        )  # fmt: skip
        yield instance, stored
    finally:
        zcache("stop", "--name", instance.name)


class Connection:
    """One as the attach helper makes it, and the kernel's requests on it."""

    def __init__(self, instance: Instance) -> None:
        """Dialled until there is an answer."""
        target, generations = Target(str(instance.socket)), Generations()
        deadline_s = time.perf_counter() + AWAY_S
        while True:
            try:
                self._sock = dial(target, generations).sock
            except (AttachError, OSError):
                if time.perf_counter() > deadline_s:
                    raise
                time.sleep(0.0005)
            else:
                self._sock.settimeout(AWAY_S)
                return

    def _ask(self, kind: int, offset: int, length: int, data: bytes = b"") -> None:
        self._sock.sendall(REQUEST.pack(0x25609513, 0, kind, 1, offset, length) + data)
        missing = ANSWER.size + (length if kind == READ else 0)
        answer = b""
        while len(answer) < missing and (piece := self._sock.recv(missing - len(answer))):
            answer += piece
        magic, error, _ = ANSWER.unpack_from(answer)
        assert (magic, error, len(answer)) == (0x67446698, 0, missing)

    def read(self, offset: int, length: int = PAGE_BYTES) -> None:
        self._ask(READ, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self._ask(WRITE, offset, len(data), data)

    def close(self) -> None:
        self._sock.close()


def server_of(instance: Instance) -> int:
    state = servestate.read(instance)
    assert state is not None
    return state.server_pid


def has_standby(instance: Instance) -> bool:
    state = servestate.read(instance)
    return state is not None and state.standby_ready


def rebuild_ms(instance: Instance) -> float:
    shmid = memfile.find(instance.name)
    assert shmid is not None
    memory = MemoryFile.attach(shmid)
    try:
        return counters.read(memory)["rebuild_us"] / 1000
    finally:
        memory.close()


def kill_once(instance: Instance) -> tuple[float, float, float]:
    """(read, write, rebuild) in ms."""
    before_ms = rebuild_ms(instance)
    start_s = time.perf_counter()
    os.kill(server_of(instance), 9)
    handle = Connection(instance)
    handle.read(0)
    read_s = time.perf_counter() - start_s
    handle.write(0, bytes(PAGE_BYTES))
    write_s = time.perf_counter() - start_s
    after_ms = rebuild_ms(instance)
    handle.close()
    rebuilt_ms = after_ms - before_ms if after_ms > before_ms else after_ms
    return read_s * 1000, write_s * 1000, rebuilt_ms


def restarts(gib: float, kills: int, standby: bool) -> str:
    with served(int(gib * GIB), standby) as (instance, stored):
        rows = []
        for _ in range(kills):
            while standby and not has_standby(instance):
                time.sleep(0.01)
            rows.append(kill_once(instance))
            time.sleep(6)  # the next one is a first one again: no back-off (supervisor.CALM_S)
        read, write, rebuild = (statistics.median(column) for column in zip(*rows, strict=True))
    worst = max(row[0] for row in rows)
    return (
        f"pool {gib:g} GiB, {stored} pages: read {read:.0f} ms (worst {worst:.0f}), "
        f"write {write:.0f} ms, rebuild {rebuild:.1f} ms"
    )


def cpu_ms(pid: int) -> float:
    """User and system time of all threads of a process, to a tick (10 ms)."""
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def supervision() -> str:
    with served(64 << 20) as (instance, _):
        state = servestate.read(instance)
        assert state is not None
        handle = Connection(instance)
        before_ms = cpu_ms(state.supervisor_pid)
        end_s = time.perf_counter() + LOAD_S
        reads = 0
        while time.perf_counter() < end_s:
            handle.read(reads % 256 * REQUEST_BYTES, REQUEST_BYTES)
            reads += 1
        spent_ms = cpu_ms(state.supervisor_pid) - before_ms
        handle.close()
    return f"supervisor: {spent_ms:.0f} ms of CPU during {LOAD_S:g} s and {reads} requests"


def fence() -> str:
    """Both ways in turn, so that whoever interrupts spoils both alike; medians."""
    memory = MemoryFile.create(None, 64 << 20, 64 << 20)
    store = Store(memory)
    store.start()
    try:
        device = Device(store)
        device.pwrite(None, some_pages(random.Random(2)), 0, 0)
        data = bytearray(PAGE_BYTES)
        ways = {"without": device.open(0), "with": device.open(0, 7)}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(FENCE_ROUNDS):
            for way, handle in ways.items():
                start_s = time.perf_counter()
                for n in range(FENCE_READS):
                    device.pread(handle, data, n % 256 * PAGE_BYTES, 0)
                times[way].append((time.perf_counter() - start_s) / FENCE_READS * 1e9)
    finally:
        store.stop()
        memory.close()
    without, fenced = (statistics.median(times[way]) for way in ("without", "with"))
    return f"4 KiB read: {without:.0f} ns without a generation, {fenced:.0f} ns with one"


def main(argv: Sequence[str] | None = None) -> int:
    about, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="bench.restart", description=about)
    parser.add_argument("--gib", type=float, nargs="*", default=[0.5, 1, 2, 4])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--standby", action="store_true", help="with a second server that waits")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="zcache-restart-") as folder:
        os.environ["ZCACHE_RUNTIME_DIR"] = folder
        print(fence(), flush=True)
        print(supervision(), flush=True)
        for gib in args.gib:
            print(restarts(gib, args.kills, args.standby), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
