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

from bench import servers
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


Ram = Callable[[], int]


def _zram(lab: Lab) -> tuple[Guest, HostServer | None, Ram]:
    guest = lab.boot(GuestConfig(mem_mib=GUEST_MIB, modules=ZRAM_MODULES))
    guest.write("/sys/block/zram0/comp_algorithm", "lz4")
    guest.write("/sys/block/zram0/disksize", SIZE)
    swap_on(guest, ZRAM)
    return guest, None, lambda: int(guest.read("/sys/block/zram0/mm_stat").split()[4])


def _served(recipe: Recipe) -> Callable[[Lab], tuple[Guest, HostServer | None, Ram]]:
    def prepare(lab: Lab) -> tuple[Guest, HostServer | None, Ram]:
        server = lab.serve(recipe)
        guest = lab.boot(GuestConfig(mem_mib=GUEST_MIB))
        attach(guest, server)
        swap_on(guest)
        return guest, server, lambda: server.usage().peak_bytes

    return prepare


def systems() -> dict[str, Callable[[Lab], tuple[Guest, HostServer | None, Ram]]]:
    return {
        "zram": _zram,
        "memory": _served(nbdkit_memory(SIZE, servers.THREADS)),
        "memory-zstd": _served(nbdkit_memory(SIZE, servers.THREADS, allocator="zstd")),
        "zcache": _served(zcache(size=SIZE, pool=POOL)),
    }


def run_one(setup: Setup, name: str) -> Run:
    """Raises LabError, or ValueError when the hog did not get to its report."""
    with Lab(limit_s=RUN_LIMIT_S) as lab:
        guest, server, ram = systems()[name](lab)
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
    if result.exit.code or report.bad or trouble(result.log):
        raise ValueError(f"exit {result.exit.code}, {report.bad} bad pages, or a bad kernel log")
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
    section = Section("lab", f"{HOG_MIB} MiB of real pages in a guest of {GUEST_MIB} MiB", HEAD)
    if reasons := missing():
        section.notes = [f"left out: {reason}" for reason in reasons]
        return section
    names = list(systems())
    runs: dict[str, list[Run]] = {name: [] for name in names}
    lost: list[str] = []
    for number in range(setup.lab_rounds):
        for name in turned(names, number):
            try:
                runs[name].append(run_one(setup, name))
            except (LabError, ValueError) as error:
                lost.append(f"{name}, round {number + 1}: {str(error).strip()[:200]}")
    section.rows = [_row(name, runs[name], setup.lab_rounds) for name in names]
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
