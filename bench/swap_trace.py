"""Which pages a swapping kernel asks for: recorded once, kept small, replayed by `bench.policy`.

    python -m bench.swap_trace        records anew, in three guests of tests/swaplab

    hog      96 MiB in a guest of 64 MiB: filled, touched in order, then at random
    stress   stress-ng fills 80 MiB with a pattern and verifies it
    scan     a hot set of 40 MiB, touched all the time, while 96 MiB are read once, in order

What is recorded is what nbdkit's log filter saw: reads, writes and discards in their order, as page
numbers, without content or time.  A file is lines `r FIRST COUNT`, compressed with LZMA; the three
are in bench/traces, for they depend on no machine, only on the kernel's choices.

Bound: MOST_REQUESTS of each, so that all three stay below 300 KiB.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.swaplab import Guest, GuestConfig, Job, Lab, Recipe, attach, hog, stress_ng, swap_on
from tests.swaplab.servers import Place, ServerCommand, nbdkit_memory

FOLDER = Path(__file__).parent / "traces"
SIZE = "256M"
PAGE_BYTES = 4096
MOST_REQUESTS = 30_000
RUN_LIMIT_S = 240.0
WORK_S = 12.0
GUEST = GuestConfig(mem_mib=64, sysctl={"vm.min_free_kbytes": "4096"})
LOGGED = re.compile(r" (Read|Write|Trim|Zero) id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+) ")
OPS = {"Read": "r", "Write": "w", "Trim": "t", "Zero": "t"}

# Python in the guest: a list of touches of the hot set for each page of the scan.
SCAN = """
import random, time
MIB, PAGE = 1 << 20, 4096
rng = random.Random(1)
hot = bytearray(40 * MIB)
cold = bytearray(96 * MIB)
for data in (hot, cold):
    for at in range(0, len(data), PAGE):
        data[at : at + 8] = rng.randbytes(8)
end = time.monotonic() + SECONDS
at = 0
while time.monotonic() < end:
    for _ in range(4):
        hot[rng.randrange(len(hot) // PAGE) * PAGE] += 0
    at = (at + PAGE) % len(cold)
    cold[at]
"""


@dataclass(frozen=True)
class Request:
    """op: "r" read, "w" write, "t" trim.  first, count: pages."""

    op: str
    first: int
    count: int

    @property
    def pages(self) -> range:
        return range(self.first, self.first + self.count)


Trace = list[Request]


def names() -> list[str]:
    return list(WORKLOADS)


def load(name: str) -> Trace:
    """A recorded trace.  Raises FileNotFoundError when there is none of that name."""
    text = lzma.decompress((FOLDER / f"{name}.xz").read_bytes()).decode()
    return [_request(line) for line in text.splitlines()]


def _request(line: str) -> Request:
    op, first, count = line.split()
    return Request(op, int(first), int(count))


def most_pages(trace: Trace) -> int:
    """Most pages that were stored at any time."""
    stored: set[int] = set()
    most = 0
    for request in trace:
        if request.op == "w":
            stored.update(request.pages)
            most = max(most, len(stored))
        elif request.op == "t":
            stored.difference_update(request.pages)
    return most


def save(name: str, trace: Iterable[Request]) -> Path:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.xz"
    text = "".join(f"{r.op} {r.first} {r.count}\n" for r in trace)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    return path


def parse_log(lines: Iterable[str]) -> Iterator[Request]:
    """Requests of nbdkit's log filter, in the order in which they came."""
    for line in lines:
        if found := LOGGED.search(line):
            offset, count = int(found[2], 16), int(found[3], 16)
            yield Request(OPS[found[1]], offset // PAGE_BYTES, -(-count // PAGE_BYTES))


# ---- recording --------------------------------------------------------------------------


def _scan(guest: Guest) -> Job:
    script = SCAN.replace("SECONDS", str(WORK_S))
    return guest.start(["/usr/bin/python3", "-c", script], "scan")


WORKLOADS: dict[str, Callable[[Guest], Job]] = {
    "hog": lambda guest: hog(guest, 96, None, WORK_S / 2, WORK_S, noise_percent=100),
    "stress": lambda guest: stress_ng(guest, 80, limit_s=RUN_LIMIT_S - 30),
    "scan": _scan,
}


def _logging(log: Path) -> Recipe:
    def recipe(place: Place) -> ServerCommand:
        memory = nbdkit_memory(SIZE, 1)(place)
        argv = (memory.argv[0], "--filter=log", *memory.argv[1:], f"logfile={log}")
        return replace(memory, name="nbdkit, logging", argv=argv)

    return recipe


def record(name: str) -> Trace:
    """Run the workload in a fresh guest; what its kernel asked for.  Raises LabError."""
    with Lab(RUN_LIMIT_S) as lab:
        log = lab.folder / "requests.log"
        server = lab.serve(_logging(log))
        guest = lab.boot(GUEST)
        attach(guest, server)
        swap_on(guest)
        WORKLOADS[name](guest).wait()
        server.kill()  # asked to end, nbdkit would wait for the guest's goodbye
        return list(parse_log(log.read_text().splitlines()))[:MOST_REQUESTS]


def main() -> None:
    for name in WORKLOADS:
        trace = record(name)
        path = save(name, trace)
        print(f"{path}: {len(trace)} requests, {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
