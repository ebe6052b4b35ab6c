"""python -m bench.density: pages per byte of RAM, of every allocator and of the kernel's zram.

    python -m bench.density [--mib N] [--rounds N] [--no-docs]

The figure is logical bytes stored / bytes of RAM that storing them really costs: `ram_bytes`, all
frames, index, headers, tables and slots on our side, mem_used_total and its table on zram's.  The
pool is just as large as what it holds, because a reserve of frames that is committed ahead is not
a question of density; both sides are given the very same pages, in one run.

    zbud bound   the fewest frames for these pages with two buds in each: the largest with the
                 smallest that still fits
    churn        fill, free 60 % of the pages at random, compact; against a fresh fill with what
                 is left, in a pool of the same size
    beside       what recompression and compaction cost others, and their readers (density_time.py)
    cold         every page recompressed (`recompress=`), moved together, and the rest given back
    time         put and get of 1 MiB after 1 MiB in requests of one page, in turns with zbud

A corpus of 512 MiB by default, of four kinds of programs, kept beside the bench's own.  The table,
the plot and the figures in docs/ are written anew.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from bench import corpus, pages, zram
from bench.density_time import beside_compaction, beside_recompression, reads
from bench.report import Goal, Section, print_goals, print_section
from bench.servers import ROOT
from bench.setup import machine
from bench.store_alone import PART_BYTES, Part, device
from zcache_core import counters
from zcache_core.codec import Codec
from zcache_core.device import Device
from zcache_core.several import ALLOCATORS
from zcache_core.store import Store

matplotlib.use("svg")
from matplotlib import pyplot

MIB = 1 << 20
PAGE_BYTES = 4096
HEADER_BYTES = 24
CORPUS_MIB = 512
REQUEST_BYTES = 128 << 10
FREED_SHARE = 0.6
PARTS = 32
SETTLE_LIMIT_S = 30.0
SPARE_FRAMES = 64  # in a pool that is taken to the last frame nothing can be recompressed
RECOMPRESSED = ("zstd:3", "zstd:9", "zstd:15", "zstd:19")
JUDGED = "zstd:15"  # what recompress=zstd means
PAGE_FILE = ROOT / "docs" / "density.md"
JSON_FILE = ROOT / "docs" / "density.json"
PLOT_FILE = ROOT / "docs" / "img" / "density.svg"
Row = Callable[[str, int, int], None]


def corpus_folder() -> Path:
    return corpus.default_folder().with_name("corpus-density")


def write(target: Device, data: memoryview, wanted: set[int] | None = None) -> None:
    """All pages, or those whose numbers are wanted, at their own places."""
    if wanted is None:
        for at in range(0, len(data), REQUEST_BYTES):
            target.pwrite(None, data[at : at + REQUEST_BYTES], at, 0)
        return
    for page in sorted(wanted):
        at = page * PAGE_BYTES
        target.pwrite(None, data[at : at + PAGE_BYTES], at, 0)


def settled(store: Store) -> dict[str, int]:
    """The counters once the arena gives nothing back any more."""
    deadline_s = time.monotonic() + SETTLE_LIMIT_S
    seen = -1
    while time.monotonic() < deadline_s:
        found = counters.read(store.memory)
        if found["committed_frames"] == seen:
            return found
        seen = found["committed_frames"]
        time.sleep(0.5)
    raise TimeoutError("the arena does not settle")


def frames_in_use(found: dict[str, int]) -> int:
    return found["pers_pageframes"] + found["eph_pageframes"]


def cost(data: memoryview, allocator: str) -> dict[str, int]:
    """The counters of a store whose pool is full of just these pages."""
    with device(len(data), len(data), allocator=allocator, tidy=False) as (target, store):
        write(target, data)
        needed = frames_in_use(counters.read(store.memory))
    with device(len(data), needed * PAGE_BYTES, allocator=allocator, tidy=False) as (target, store):
        write(target, data)
        found = counters.read(store.memory)
        assert found["failed_stores"] == 0
        assert found["logical_bytes"] == len(data)
        return found


def cost_of_cold(data: memoryview, allocator: str, codec: str) -> dict[str, int]:
    """As cost, when all these pages have gone cold: recompressed, moved together, the rest back."""
    with device(len(data), len(data), allocator=allocator, tidy=False) as (target, store):
        write(target, data)
        needed = frames_in_use(counters.read(store.memory)) + SPARE_FRAMES
    with device(len(data), needed * PAGE_BYTES, allocator=allocator, tidy=False) as (target, store):
        write(target, data)
        store.recompress(codec)
        store.compact()
        found = counters.read(store.memory)
        store.set_pool((frames_in_use(found) + found["dictionary_frames"]) * PAGE_BYTES)
        found = settled(store)
        assert found["failed_stores"] == 0
        assert found["logical_bytes"] == len(data)
        return found


def churned(data: memoryview, allocator: str) -> dict[str, float]:
    """RAM after freeing most pages at random and compacting / of a fresh fill with the rest."""
    count = len(data) // PAGE_BYTES
    gone = set(random.Random(1).sample(range(count), int(FREED_SHARE * count)))
    left = set(range(count)) - gone
    with device(len(data), len(data), allocator=allocator, tidy=False) as (target, store):
        write(target, data)
        for page in gone:
            target.trim(None, PAGE_BYTES, page * PAGE_BYTES, 0)
        before = settled(store)
        start_s = time.perf_counter()
        store.compact()
        spent_s = time.perf_counter() - start_s
        after = settled(store)
    with device(len(data), len(data), allocator=allocator, tidy=False) as (target, store):
        write(target, data, left)
        store.compact()
        fresh = settled(store)
    return {
        "before": fresh["ram_bytes"] / before["ram_bytes"],
        "after": fresh["ram_bytes"] / after["ram_bytes"],
        "frames": frames_in_use(fresh) / frames_in_use(after),
        "moved_pages": after["moved_pages"],
        "us_per_moved_page": 1e6 * spent_s / max(1, after["moved_pages"]),
    }


def two_buds_bound(data: memoryview) -> int:
    """Fewest frames for these pages with at most two objects in each."""
    codec = Codec("lz4")
    sizes = []
    raw = 0
    for at in range(0, len(data), PAGE_BYTES):
        page = bytes(data[at : at + PAGE_BYTES])
        if page == page[:8] * (PAGE_BYTES // 8):
            continue
        blob = codec.compress(page)
        if blob is None or len(blob) + HEADER_BYTES > PAGE_BYTES:
            raw += 1
        else:
            sizes.append(len(blob) + HEADER_BYTES)
    sizes.sort()
    small, large, pairs = 0, len(sizes) - 1, 0
    while small < large:
        if sizes[small] + sizes[large] <= PAGE_BYTES:
            small += 1
            pairs += 1
        large -= 1
    return raw + len(sizes) - pairs


def times(data: memoryview, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds for each MiB of the first PARTS, by what is done and allocator, in turns."""
    found: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in ALLOCATORS} for what in ("put", "overwrite", "get")
    }
    with ExitStack() as stack:
        parts: dict[str, list[Part]] = {}
        for name in ALLOCATORS:
            target, _ = stack.enter_context(device(64 * MIB, 64 * MIB, allocator=name, tidy=False))
            spots = range(0, min(PARTS * PART_BYTES, len(data)), PART_BYTES)
            parts[name] = [Part(target, data[at : at + PART_BYTES], at, PAGE_BYTES) for at in spots]
            for part in parts[name]:  # warm: frames committed, buffers touched
                part.put()
                part.get()
        for turn in range(rounds):
            for row in zip(*parts.values(), strict=True):
                for part in row:
                    part.forget()
                names = list(zip(ALLOCATORS, row, strict=True))
                names = names[turn % len(names) :] + names[: turn % len(names)]
                for name, part in names:
                    found["put"][name].append(part.put())
                for name, part in names:
                    found["overwrite"][name].append(part.put())
                for name, part in names:
                    found["get"][name].append(part.get())
    return found


def measure(data: mmap.mmap, rounds: int, console: Console) -> list[Section]:
    view = memoryview(data)
    space = Section("density", "Pages per byte of RAM, LZ4", [
        "", "RAM, MiB", "stored / RAM", "of zram lz4", "of it frames, MiB",
    ])  # fmt: skip
    kernel = {}
    for algorithm in zram.algorithms():
        if algorithm in ("lzo-rle", "lz4"):
            kernel[algorithm] = zram.cost(data, algorithm)
    ours = {}
    for name in ALLOCATORS:
        ours[name] = cost(view, name)
        console.print(f"  {name}: {len(view) / ours[name]['ram_bytes']:.3f}")
    measure_ = kernel.get("lz4", {}).get("ram_bytes", 0)

    def row(name: str, ram_bytes: int, pool_bytes: int) -> None:
        of = f"{measure_ / ram_bytes:.3f}" if measure_ else "-"
        space.rows.append([
            name, f"{ram_bytes / MIB:.1f}", f"{len(view) / ram_bytes:.3f}", of,
            f"{pool_bytes / MIB:.1f}",
        ])  # fmt: skip

    for algorithm, found in kernel.items():
        row(f"zram {algorithm}", found["ram_bytes"], found["mem_used_total"])
    for name, found in ours.items():
        row(name, found["ram_bytes"], frames_in_use(found) * PAGE_BYTES)
    bound = two_buds_bound(view)
    space.goals.append(
        Goal("zbud", bound / frames_in_use(ours["zbud"]), 0.97, False, "of what two buds allow")
    )
    ratio = ours["zbud"]["ram_bytes"] / ours["z3fold"]["ram_bytes"]
    space.goals.append(Goal("z3fold", ratio, 1.18, False, "density, of zbud's"))
    if measure_:
        ratio = measure_ / ours["zsmalloc"]["ram_bytes"]
        space.goals.append(Goal("zsmalloc", ratio, 0.97, False, "density, of zram lz4's"))
    space.raw = {"zram": kernel, "zcache": ours, "two_buds_bound_frames": bound}
    cold = _cold(view, measure_, row)
    if measure_:
        ratio = measure_ / cold.raw["zsmalloc"][JUDGED]["ram_bytes"]
        space.goals.append(
            Goal("recompression", ratio, 1.75, False, "zsmalloc, all cold, density, of zram lz4's")
        )
    return [space, cold, _beside(view, rounds), _churn(view), _times(view, rounds)]


def _cold(view: memoryview, of_bytes: int, row: Row) -> Section:
    """Recompression: what it wins, and what it costs."""
    section = Section("cold", "All pages cold, and recompressed", [
        "", "stored / RAM", "of zram lz4", "us a page tried", "pages won",
    ])  # fmt: skip
    section.raw = {"zsmalloc": {}, "zbud": {}}
    for name, codecs in (("zbud", (JUDGED,)), ("zsmalloc", RECOMPRESSED)):
        for codec in codecs:
            found = section.raw[name][codec] = cost_of_cold(view, name, codec)
            tried = found["recompressed_pages"] + found["recompress_poor"]
            ram_bytes = found["ram_bytes"]
            section.rows.append([
                f"{name}, {codec}", f"{len(view) / ram_bytes:.3f}",
                f"{of_bytes / ram_bytes:.3f}" if of_bytes else "-",
                f"{found['recompress_us'] / max(1, tried):.1f}",
                f"{100 * found['recompressed_pages'] / max(1, tried):.0f} %",
            ])  # fmt: skip
            if name == "zsmalloc" and codec == JUDGED:
                row(f"{name}, cold", ram_bytes, frames_in_use(found) * PAGE_BYTES)
    return section


def _beside(view: memoryview, rounds: int) -> Section:
    """What recompression and compaction cost the others, and who reads what they made."""
    section = Section("beside", "Beside recompression and compaction, and after", [
        "", "measured", "middle half",
    ])  # fmt: skip
    dense = beside_recompression(view, rounds)
    tidy, moved = beside_compaction(view, rounds)
    found = reads(view)
    section.raw = {"recompression": dense, "compaction": tidy, "moved": moved, "reads_us": found}
    for name, ratios in (("recompression", dense), ("compaction", tidy)):
        low, middle, high = statistics.quantiles(ratios, n=4)
        section.rows.append([f"speed beside {name}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
        section.goals.append(Goal(f"beside {name}", middle, 0.95, False, "speed of the others"))
    for name, times_us in found.items():
        text = f"p50 {times_us['p50']:.1f} us, p99 {times_us['p99']:.1f} us"
        section.rows.append([f"read of a page, {name}", text, ""])
    ratio = found["recompressed"]["p99"] / found["zstd"]["p99"]
    section.goals.append(Goal("recompressed read", ratio, 3, True, "p99, of a plain zstd page's"))
    return section


def _churn(view: memoryview) -> Section:
    section = Section("churn", "After 60 % of the pages were freed at random", [
        "", "RAM of a fresh fill / before", "/ after compaction", "frames / after",
        "us a moved page",
    ])  # fmt: skip
    section.raw = {name: churned(view, name) for name in ALLOCATORS}
    for name, found in section.raw.items():
        section.rows.append([
            name, f"{found['before']:.3f}", f"{found['after']:.3f}", f"{found['frames']:.3f}",
            f"{found['us_per_moved_page']:.2f}",
        ])  # fmt: skip
    section.goals.append(
        Goal("churn", section.raw["zsmalloc"]["after"], 0.95, False, "zsmalloc, of a fresh fill")
    )
    return section


def _times(view: memoryview, rounds: int) -> Section:
    section = Section("times", "Time of a page, us (requests of one page, one thread)", [
        "", *ALLOCATORS, *(f"{name} / zbud" for name in ALLOCATORS[1:]),
    ])  # fmt: skip
    per_part = PART_BYTES // PAGE_BYTES
    found = times(view, rounds)
    for what, sides in found.items():
        ratios = {
            name: statistics.median(b / a for a, b in zip(sides["zbud"], spent, strict=True))
            for name, spent in sides.items()
        }
        section.rows.append([
            what,
            *(f"{1e6 * statistics.median(spent) / per_part:.2f}" for spent in sides.values()),
            *(f"{ratios[name]:.2f}" for name in ALLOCATORS[1:]),
        ])  # fmt: skip
        for name in ALLOCATORS[1:]:
            if what != "overwrite":
                section.goals.append(Goal(f"{name} {what}", ratios[name], 1.15, True, "of zbud's"))
    section.notes.append(f"ratio: median over {len(found['put']['zbud'])} MiB, each in turns")
    return section


def draw(sections: Sequence[Section]) -> None:
    """Stored / RAM of every row, zram beside ours."""
    rows = sections[0].rows
    matplotlib.rcParams["svg.hashsalt"] = "zcache"
    figure, axis = pyplot.subplots(figsize=(7, 3))
    names = [row[0] for row in rows]
    values = [float(row[2]) for row in rows]
    colours = ["#8bb08b" if name.startswith("zram") else "#b5413b" for name in names]
    for bar in axis.bar(names, values, 0.6, color=colours):
        axis.annotate(
            f"{bar.get_height():.2f}",
            (bar.get_x() + bar.get_width() / 2, bar.get_height()),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axis.set_ylabel("bytes stored per byte of RAM")
    axis.set_title("the same pages, LZ4 (lzo-rle where it says so)", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    PLOT_FILE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT_FILE, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.density")
    parser.add_argument("--mib", type=int, default=CORPUS_MIB, help="of pages (default 512)")
    parser.add_argument("--rounds", type=int, default=7, help="of the times (default 7)")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/ as it is")
    options = parser.parse_args(argv)
    console = Console(width=None)
    folder = corpus_folder()
    about = machine()
    sections = measure(corpus.pages(options.mib, folder), options.rounds, console)
    for section in sections:
        print_section(section, console)
    print_goals(sections, console)
    document: dict[str, Any] = {
        "machine": about,
        "corpus": corpus.manifest(folder),
        "options": {"mib": options.mib, "rounds": options.rounds},
        "sections": {section.name: section.as_json() for section in sections},
    }
    if not options.no_docs:
        JSON_FILE.write_text(json.dumps(document, indent=1, default=str) + "\n")
        found = pages.tables(document | {"options": {"rounds": 0, "seconds": 0, "lab_rounds": 0}})
        found["machine"] = _about(document)
        pages.update(PAGE_FILE, found)
        draw(sections)
    return 0


def _about(document: dict[str, Any]) -> str:
    about = document["machine"]
    sources = document["corpus"]["sources"]
    kinds = ", ".join(f"{name} {count * PAGE_BYTES // MIB} MiB" for name, count in sources.items())
    return (
        f"{about['cores']} cores ({about['cpu']}), Linux {about['kernel']}; load before the start "
        f"{about['load_before']}; pages of {kinds}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
