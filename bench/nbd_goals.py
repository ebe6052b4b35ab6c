"""Over NBD on a Unix socket, with real pages as data: null, memory, memory-zstd and zcache.

What a swapping kernel sends comes first: one request at a time, 4 and 32 KiB reads and 128 KiB
writes.  There the goals are about latency, and the codec's own time is added to what an
uncompressed server takes.  Then deep queues, where they are about requests per second.

    goal                              bound
    4 KiB read, depth 1               1.15 x memory
    32 KiB read, depth 1              memory + 1.1 x decompressing 8 pages
    128 KiB write, depth 1            null + 1.1 x compressing 32 pages
    4 KiB, depth 32                   0.9 / (1 / null + codec)     requests/s, one core's codec
    4 KiB write, depth 32             3 x memory-zstd
    128 KiB, depth 4                  0.8 x the codec on all cores

Latency is the p50, also of the codec (of 128 KiB pieces).  zcache runs as it is started by a user;
the others with as many nbdkit threads as it chooses for itself.  Whether server and client share a
core decides about more microseconds than anything that either does, and real-time threads are not
put together as others are; so depth 1 is measured as the scheduler has it and on one core, and
depth 32 as the scheduler has it and with a core each.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence

from bench import servers
from bench.bare import PAGE_BYTES, BareLoops, CodecTimes
from bench.load import KIB, Load
from bench.report import Goal, Section, figure
from bench.rounds import Results, interleave
from bench.setup import POOL, SIZE, Setup

READ_4K = Load("read", 4 * KIB)
READ_32K = Load("read", 32 * KIB)
WRITE_128K = Load("write", 128 * KIB, order="sequential")
DEEP_READ = Load("read", 4 * KIB, depth=32)
DEEP_WRITE = Load("write", 4 * KIB, depth=32)
WIDE_READ = Load("read", 128 * KIB, depth=4)
WIDE_WRITE = Load("write", 128 * KIB, depth=4)
WIDE_READ_2 = Load("read", 128 * KIB, depth=4, connections=2)
WIDE_WRITE_2 = Load("write", 128 * KIB, depth=4, connections=2)
ROWS = (
    READ_4K,
    READ_32K,
    WRITE_128K,
    DEEP_READ,
    DEEP_WRITE,
    WIDE_READ,
    WIDE_WRITE,
    WIDE_READ_2,
    WIDE_WRITE_2,
)
SINGLE = (READ_4K, READ_32K, WRITE_128K)
DEEP = (DEEP_READ, DEEP_WRITE)
ONE_CORE, TWO_CORES = ", one core", ", a core each"
NAMES = ("null", "memory", "memory-zstd", "zcache")
CODEC_MIB = 16
Codecs = dict[Load, list[CodecTimes]]
"""The bare codec beside each load, in the order of the rounds."""


def measure(setup: Setup) -> Section:
    loops = BareLoops(setup.pages[: min(CODEC_MIB << 20, len(setup.pages))])
    codec: Codecs = {load: [] for load in ROWS}
    codec_pinned: Codecs = {load: [] for load in (*SINGLE, *DEEP)}
    recipes = (
        servers.null(SIZE, servers.THREADS),
        servers.memory(SIZE, servers.THREADS),
        servers.memory_zstd(SIZE, servers.THREADS),
        servers.zcache(SIZE, POOL),
    )
    with setup.serving(recipes) as running:
        results = interleave(
            running, ROWS, setup.plan, lambda load: codec[load].append(loops.measure())
        )
        first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
        with servers.on_cores(running, {first}):
            together = interleave(
                running,
                SINGLE,
                setup.plan,
                lambda load: codec_pinned[load].append(loops.measure()),
            )
        with servers.on_cores(running, {first}, {last}):
            apart = interleave(
                running, DEEP, setup.plan, lambda load: codec_pinned[load].append(loops.measure())
            )
    head = ["", *NAMES, "zcache: CPU", "null: CPU"]
    section = Section("nbd", "Over NBD, Unix socket: p50 us, or requests/s", head)
    section.rows = [_row(load, results) for load in ROWS]
    section.rows += [_row(load, together, ONE_CORE) for load in SINGLE]
    section.rows += [_row(load, apart, TWO_CORES) for load in DEEP]
    section.goals = latency_goals(results, codec)
    section.goals += latency_goals(together, codec_pinned, ONE_CORE)
    section.goals += deep_goals(results, codec)
    section.goals += deep_goals(apart, codec_pinned, TWO_CORES)
    section.goals += wide_goals(results, codec, loops.cores)
    section.notes = [
        _codec_note(codec, loops.cores),
        "CPU: the server's, us per request; one core: server and client share it; "
        "a core each: each is kept on its own",
        *(_ceiling_note(load, results, codec, loops.cores) for load in (WIDE_READ_2, WIDE_WRITE_2)),
    ]
    section.raw = {
        "loads": results.as_json(),
        "one core": together.as_json(),
        "a core each": apart.as_json(),
        "codec": {str(load): [vars(times) for times in rounds] for load, rounds in codec.items()},
    }
    return section


def _row(load: Load, results: Results, where: str = "") -> list[str]:
    cells = [f"{load}{where}"]
    for name in NAMES:
        middle = results.median(load, name)
        cells.append(
            f"{figure(middle.p50_us)} us"
            if load.depth == 1
            else f"{figure(middle.requests_per_s)}/s"
        )
    return [*cells, *(figure(results.cpu_us(load, name)) for name in ("zcache", "null"))]


def _codec_note(codec: Codecs, cores: int) -> str:
    def middle(get: Callable[[CodecTimes], float]) -> float:
        return statistics.median(get(times) for rounds in codec.values() for times in rounds)

    both = (
        middle(lambda t: t.compress_together_per_s),
        middle(lambda t: t.decompress_together_per_s),
    )
    return (
        f"bare lz4, us/page: compress {figure(middle(lambda t: t.compress_us))}, "
        f"decompress {figure(middle(lambda t: t.decompress_us))}; on {cores} cores at once, "
        f"pages/s: {both[0]:.0f} and {both[1]:.0f}"
    )


def _ceiling_note(load: Load, results: Results, codec: Codecs, cores: int) -> str:
    """What is left for the codec when socket, nbdkit and client run on the same cores."""
    outcomes = results.of(load, "null")
    client_us = 1e6 * sum(o.client_cpu_s for o in outcomes) / sum(o.requests for o in outcomes)
    socket_us = client_us + results.cpu_us(load, "null")
    pages = load.block_bytes // PAGE_BYTES
    together = statistics.median(_together(load, times) for times in codec[load])
    codec_us = 1e6 * pages * cores / together
    return (
        f"128 KiB {load.op}, several at once: socket and client take {figure(socket_us)} us of CPU "
        f"per request with null, the codec {figure(codec_us)}: at most "
        f"{codec_us / (codec_us + socket_us):.2f} of the codec alone"
    )


def _together(load: Load, times: CodecTimes) -> float:
    """Pages/s of the codec on all cores, in the direction of this load."""
    if load.op == "read":
        return times.decompress_together_per_s
    return times.compress_together_per_s


def _ratio(ours: Sequence[float], bound: Sequence[float]) -> float:
    """Median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(ours, bound, strict=True))


def _plus_codec(base: Sequence[float], codec_us: Sequence[float]) -> list[float]:
    return [b + 1.1 * c for b, c in zip(base, codec_us, strict=True)]


def latency_goals(results: Results, codec: Codecs, where: str = "") -> list[Goal]:
    """Of one request at a time."""

    def p50(load: Load, name: str) -> list[float]:
        return results.each(load, name, "p50_us")

    read_us = [8 * times.decompress_p50_us for times in codec[READ_32K]]
    write_us = [32 * times.compress_p50_us for times in codec[WRITE_128K]]
    rows = (
        (READ_4K, p50(READ_4K, "memory"), 1.15, "latency, of memory's"),
        (
            READ_32K,
            _plus_codec(p50(READ_32K, "memory"), read_us),
            1.0,
            "latency, of memory + 1.1 codec",
        ),
        (
            WRITE_128K,
            _plus_codec(p50(WRITE_128K, "null"), write_us),
            1.0,
            "latency, of null + 1.1 codec",
        ),
    )
    return [
        Goal(
            f"{load.block_bytes // KIB} KiB {load.op}, depth 1{where}",
            _ratio(p50(load, "zcache"), base),
            most,
            True,
            text,
        )
        for load, base, most, text in rows
    ]


def deep_goals(results: Results, codec: Codecs, where: str = "") -> list[Goal]:
    """Of 4 KiB requests, many at once."""

    def rate(load: Load, name: str) -> list[float]:
        return results.each(load, name, "requests_per_s")

    found = []
    for load, codec_us in (
        (DEEP_READ, [times.decompress_us for times in codec[DEEP_READ]]),
        (DEEP_WRITE, [times.compress_us for times in codec[DEEP_WRITE]]),
    ):
        pairs = zip(rate(load, "null"), codec_us, strict=True)
        bound = [1 / (1 / null + us / 1e6) for null, us in pairs]
        measured = _ratio(rate(load, "zcache"), bound)
        text = "requests/s, of 1/(1/null + codec)"
        found.append(Goal(f"4 KiB {load.op}, depth 32{where}", measured, 0.9, False, text))
    measured = _ratio(rate(DEEP_WRITE, "zcache"), rate(DEEP_WRITE, "memory-zstd"))
    text = "requests/s, of memory-zstd's"
    found.append(Goal(f"4 KiB write, depth 32{where}", measured, 3.0, False, text))
    return found


def wide_goals(results: Results, codec: Codecs, cores: int) -> list[Goal]:
    """Of 128 KiB requests, several at once."""
    found = []
    for load in (WIDE_READ, WIDE_WRITE, WIDE_READ_2, WIDE_WRITE_2):
        together = [_together(load, times) for times in codec[load]]
        pages = load.block_bytes // PAGE_BYTES
        rates = results.each(load, "zcache", "requests_per_s")
        measured = _ratio([pages * rate for rate in rates], together)
        lines = f", {load.connections} connections" if load.connections > 1 else ""
        name = f"128 KiB {load.op}, depth 4{lines}"
        found.append(Goal(name, measured, 0.8, False, f"pages/s, of the codec on {cores} cores"))
    return found
