"""In the lab: 192 MiB of real pages in a guest of 128 MiB, swapped onto four systems in turn.

    zram          the guest's own kernel, lz4, in the guest's own memory
    memory        nbdkit on the host, uncompressed, over TCP
    memory-zstd   the same with zstd
    zcache        this project, over TCP

Each run is a fresh guest (User Mode Linux, one CPU), stock tools and the same hog: it fills its
memory, touches it in order and at random, and checks every page at every touch.  zram takes no
server and no socket, and takes its pool from the very memory that is short.  A run that a system
does not survive counts as lost, not as slow.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from bench import quiet, servers
from bench.report import Section, figure
from bench.rounds import turned
from bench.setup import Setup
from tests.swaplab import (
    Guest,
    GuestConfig,
    HostServer,
    Lab,
    LabError,
    Recipe,
    Result,
    attach,
    hog,
    nbdkit_memory,
    read_hog,
    swap_on,
    trouble,
    zcache,
)
from tests.swaplab.fitness import missing

GUEST_MIB = 128
HOG_MIB = 192
SIZE = "512M"
POOL = "128M"
AUDIT_S = 0.5  # every touch has checked its page before
RUN_LIMIT_S = 90.0
ZRAM = "/dev/zram0"
ZRAM_MODULES = ("lz4_compress", "lz4", "zsmalloc", "zram")
MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """One guest's life.  Latencies are of major faults in the random phase.

    ram_bytes: the server's peak resident size, or zram's own mem_used_max.
    """

    fill_pages_per_s: float
    sequential_per_s: float
    random_per_s: float
    fault_p50_us: float
    fault_p99_us: float
    server_cpu_s: float
    ram_bytes: float
    pages_out: float
    pages_in: float


Prepare = Callable[[Lab], tuple[Guest, HostServer | None, Callable[[], int]]]
"""A booted guest that swaps, the server if there is one, and who knows the RAM it has used."""


def _zram(lab: Lab) -> tuple[Guest, HostServer | None, Callable[[], int]]:
    guest = lab.boot(GuestConfig(mem_mib=GUEST_MIB, modules=ZRAM_MODULES))
    guest.write("/sys/block/zram0/comp_algorithm", "lz4")
    guest.write("/sys/block/zram0/disksize", SIZE)
    swap_on(guest, ZRAM)
    return guest, None, lambda: int(guest.read("/sys/block/zram0/mm_stat").split()[4])


def _served(recipe: Recipe, client: Sequence[str] = ()) -> Prepare:
    def prepare(lab: Lab) -> tuple[Guest, HostServer | None, Callable[[], int]]:
        server = lab.serve(recipe)
        guest = lab.boot(GuestConfig(mem_mib=GUEST_MIB))
        attach(guest, server, extra=client)
        swap_on(guest)
        return guest, server, lambda: server.usage().peak_bytes

    return prepare


def systems() -> dict[str, Prepare]:
    return {
        "zram": _zram,
        "memory": _served(nbdkit_memory(SIZE, servers.THREADS)),
        "memory-zstd": _served(nbdkit_memory(SIZE, servers.THREADS, allocator="zstd")),
        "zcache": _served(zcache(size=SIZE, pool=POOL)),
    }


def ways_to_serve() -> dict[str, Prepare]:
    """zcache with its own choices (over TCP: inline, no real-time priority), and with others."""

    def ours(threads: int | None = None, **keys: str) -> Recipe:
        return zcache(threads, (), size=SIZE, pool=POOL, **keys)

    return {
        "as it is": _served(ours()),
        "as it is, nbd-client -C 2": _served(ours(), ("-C", "2")),
        "realtime=yes": _served(ours(realtime="yes")),
        "-t 4": _served(ours(4)),
        "-t 4 realtime=yes": _served(ours(4, realtime="yes")),
    }


def run_one(setup: Setup, prepare: Prepare) -> Run:
    """Raises LabError, or ValueError when the hog did not get to its report."""
    with Lab(limit_s=RUN_LIMIT_S) as lab:
        guest, server, ram = prepare(lab)
        quiet.prefer(lab.network.pids())
        result = lab.watch(
            lambda: hog(
                guest,
                HOG_MIB,
                setup.plan.data,
                sequential_s=setup.lab_seconds,
                random_s=setup.lab_seconds,
                audit_s=AUDIT_S,
                seed=setup.plan.seed,
            ),
            server,
        )
        run = _run_of(result, ram())
        if server is not None:
            server.kill()  # asked to end, nbdkit would wait ten seconds for the guest's goodbye
        return run


def _run_of(result: Result, ram_bytes: int) -> Run:
    report = read_hog(result.stdout)
    # In a guest this small the network's allocations may fail, and are tried again: no harm.
    said = trouble(result.log, expected=("allocation",))
    if result.exit.code or report.bad or said:
        raise ValueError(f"exit {result.exit.code}, {report.bad} bad pages; kernel log: {said[:3]}")
    random = report.phase("random")
    return Run(
        fill_pages_per_s=report.phase("fill").touches_per_s,
        sequential_per_s=report.phase("sequential").touches_per_s,
        random_per_s=random.touches_per_s,
        fault_p50_us=random.major_us["p50"],
        fault_p99_us=random.major_us["p99"],
        server_cpu_s=result.server_cpu_s or 0.0,
        ram_bytes=ram_bytes,
        pages_out=result.counted("pswpout"),
        pages_in=result.counted("pswpin"),
    )


HEAD = (
    "",
    "fill, pages/s",
    "in order, touches/s",
    "random, touches/s",
    "fault p50 us",
    "fault p99 us",
    "server CPU s",
    "RAM MiB",
    "runs",
)


def measure(setup: Setup) -> Section:
    title = f"{HOG_MIB} MiB of real pages in a guest of {GUEST_MIB} MiB"
    return _measure(Section("lab", title, HEAD), systems(), setup)


def measure_threads(setup: Setup) -> Section:
    title = f"zcache's threads, under a hog of {HOG_MIB} MiB in a guest of {GUEST_MIB} MiB"
    return _measure(Section("lab-threads", title, HEAD), ways_to_serve(), setup)


def _measure(section: Section, rivals: dict[str, Prepare], setup: Setup) -> Section:
    if reasons := missing():
        section.notes = [f"left out: {reason}" for reason in reasons]
        return section
    runs: dict[str, list[Run]] = {name: [] for name in rivals}
    lost: list[str] = []
    for number in range(setup.lab_rounds):
        for name in turned(list(rivals), number):
            try:
                runs[name].append(run_one(setup, rivals[name]))
            except (LabError, ValueError) as error:
                lost.append(f"{name}, round {number + 1}: {str(error).strip()[:200]}")
    section.rows = [_row(name, runs[name], setup.lab_rounds) for name in rivals]
    section.notes = [
        "fault: major faults of the random phase; RAM: server's peak resident, zram's mem_used_max",
        *(f"lost: {sentence}" for sentence in lost),
    ]
    section.raw = {"runs": {n: [asdict(run) for run in rs] for n, rs in runs.items()}, "lost": lost}
    return section


def _row(name: str, runs: Sequence[Run], rounds: int) -> list[str]:
    if not runs:
        return [name, *["-"] * 7, f"0 of {rounds}"]

    def middle(field: str) -> float:
        return statistics.median([float(getattr(run, field)) for run in runs])

    return [
        name,
        *(
            figure(middle(field))
            for field in (
                "fill_pages_per_s",
                "sequential_per_s",
                "random_per_s",
                "fault_p50_us",
                "fault_p99_us",
                "server_cpu_s",
            )
        ),
        figure(middle("ram_bytes") / MIB),
        f"{len(runs)} of {rounds}",
    ]
