"""The command `zcache estimate`: what live processes' memory would compress to, before one starts.

    zcache estimate --all | --pid PID ...  [--json] [--pool SIZE] [--pages N]

    a sample of anonymous pages -> same-filled? -> each codec: length, time -> forgotten
    the lengths -> each allocator, on an arena of its own -> pages in a frame

zbud and z3fold are tried as they are, of zsmalloc its size classes tell; the times are those of
this machine, now.  `RAM a page` is what it then costs: its share of a frame and the frame's
header, and 16 bytes of index.

Recommended is the codec that holds most, if it holds WORTH times what the faster one does and a
page out and in takes no longer than a page of an SSD; then the first allocator within SAME of the
densest.  Reads only; nothing but sizes is kept (sampling.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, Self

from plugin import amounts, config, sampling, show
from zcache_core import PAGES_PER_FRAME, counters
from zcache_core.codec import Codec
from zcache_core.errors import ConfigError
from zcache_core.memfile import MemoryFile
from zcache_core.probe import Probe
from zcache_core.sizeclass import size_classes

PAGE_BYTES = 4096
HEADER_BYTES = 24
INDEX_BYTES = 16
PAGES_MAX = 1 << 18
PAGES_LEAST = 64  # fewer say nothing
CODECS = ("lz4", "zstd:1", "zstd:3")
SEED = 1
AT_ONCE = 256  # pages compressed in one measured go: 1 MiB, not longer in memory than that
WORTH = 1.15
SSD_US = 80.0
SAME = 1.05


class Row(NamedTuple):
    """One allocator with one codec: what it would hold, and cost."""

    allocator: str
    codec: str
    pages_per_frame: float  # of those that are not same-filled
    ram_bytes_per_page: float  # of all
    capacity_bytes: int  # of swapped memory in a pool of the asked size
    out_us: float  # to compress a page
    in_us: float  # to decompress it


class Sizes:
    """Lengths of the sampled pages under each codec, and the times they took."""

    def __init__(self) -> None:
        self.codecs = {name: Codec(name) for name in CODECS}
        self.lengths: dict[str, list[int]] = {name: [] for name in CODECS}
        self.out_s = dict.fromkeys(CODECS, 0.0)
        self.in_s = dict.fromkeys(CODECS, 0.0)
        self.pages = self.same_filled = 0
        self._waiting = bytearray()

    def take(self, page: bytes) -> None:
        self.pages += 1
        if page == page[:8] * (PAGE_BYTES // 8):
            self.same_filled += 1
            return
        for name, codec in self.codecs.items():
            blob = codec.compress(page)
            self.lengths[name].append(PAGE_BYTES if blob is None else len(blob))
        self._waiting += page
        if len(self._waiting) == AT_ONCE * PAGE_BYTES:
            self.measure()

    def measure(self) -> None:
        """The times of the pages that wait for it; they are forgotten after."""
        for name, codec in self.codecs.items():
            self.out_s[name] += codec.time_compress(self._waiting)
            self.in_s[name] += codec.time_decompress(self._waiting)
        self._waiting = bytearray()


def frames_for(allocator: str, lengths: Sequence[int]) -> float:
    """Frames that objects of these blobs need, if there are many such."""
    if not lengths:  # every page was same-filled
        return 0
    if allocator == "zsmalloc":  # of many pages, hardly a zspage is half empty
        classes = sorted((room, frames / objects) for room, frames, objects in size_classes())
        rooms = [room for room, _ in classes] + [PAGE_BYTES]
        each = [share for _, share in classes] + [1.0]
        return sum(each[bisect_left(rooms, min(n + HEADER_BYTES, PAGE_BYTES))] for n in lengths)
    memory = MemoryFile.create(None, PAGE_BYTES * len(lengths), PAGE_BYTES * (len(lengths) + 1024))
    try:
        probe = Probe(memory, allocator)
        probe.start()
        for length in lengths:
            size = length + HEADER_BYTES
            if probe.alloc(size if size <= probe.largest_bytes else PAGE_BYTES) is None:
                raise ConfigError("there is not enough memory to try this many; use fewer --pages")
        return counters.read(memory)["pers_pageframes"]
    finally:
        del probe
        memory.close()


def rows(sizes: Sizes, pool_bytes: int) -> list[Row]:
    """Every allocator with every codec."""
    found = []
    measured = max(1, sizes.pages - sizes.same_filled)
    for codec in CODECS:
        for allocator in PAGES_PER_FRAME:
            frames = frames_for(allocator, sizes.lengths[codec])
            each = frames * (PAGE_BYTES + HEADER_BYTES) / sizes.pages
            found.append(Row(
                allocator, codec,
                pages_per_frame=round(measured / frames, 3) if frames else 0.0,
                ram_bytes_per_page=round(each + INDEX_BYTES, 1),
                capacity_bytes=int(pool_bytes / (each + INDEX_BYTES)) * PAGE_BYTES,
                out_us=round(1e6 * sizes.out_s[codec] / measured, 2),
                in_us=round(1e6 * sizes.in_s[codec] / measured, 2),
            ))  # fmt: skip
    return found


def recommended(found: Sequence[Row]) -> Row:
    """One of them; see the head of this file."""
    best = {c: min(r.ram_bytes_per_page for r in found if r.codec == c) for c in CODECS}
    codec = CODECS[0]
    for other in CODECS[1:]:
        cost = next(row for row in found if row.codec == other)
        if best[codec] >= WORTH * best[other] and cost.out_us + cost.in_us <= SSD_US:
            codec = other
    for row in found:
        if row.codec == codec and row.ram_bytes_per_page <= SAME * best[codec]:
            return row
    raise AssertionError("the densest is within its own bound")


def run(args: argparse.Namespace) -> int:
    """Exit code 0.  Raises ConfigError."""
    readers = {key.name: key.read for key in config.KEYS}
    pool_bytes: int = readers["pool"](args.pool, amounts.total_ram_bytes())
    if not PAGES_LEAST <= args.pages <= PAGES_MAX:
        raise ConfigError(f"--pages {args.pages} is not possible; use {PAGES_LEAST} to {PAGES_MAX}")
    sizes = Sizes()
    sampling.drop_privileges()
    pids = args.pid or sampling.processes()
    with Progress() as say:
        held, unreadable = sampling.survey(
            pids, lambda done: say(f"looking at process {done + 1} of {len(pids)}")
        )
        for done in sampling.sample(held, args.pages, SEED, sizes.take):
            if done % AT_ONCE == 0:
                say(f"{done} of at most {args.pages} pages are measured")
        sizes.measure()
        if sizes.pages < PAGES_LEAST:
            why = f": {unreadable[0].why} (process {unreadable[0].pid})" if unreadable else ""
            raise ConfigError(
                f"only {sizes.pages} pages could be read, which says nothing{why}; name larger "
                f"processes, or run it as root"
            )
        say("trying the allocators")
        found = rows(sizes, pool_bytes)
    report(args.json, sizes, held, unreadable, found, pool_bytes)
    return 0


class Progress:
    """One line on the terminal, written over and over, gone at the end; nothing into a pipe."""

    def __init__(self) -> None:
        self._wanted = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._wanted:
            print(f"\r\x1b[Kzcache: {text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def report(
    as_json: bool, sizes: Sizes, held: Sequence[sampling.Held],
    unreadable: Sequence[sampling.Unreadable], found: Sequence[Row], pool_bytes: int,
) -> None:  # fmt: skip
    """What was found, for a person or a script."""
    best = recommended(found)
    present = sum(len(one.present) for one in held)
    swapped = sum(one.swapped for one in held)
    if as_json:
        print(json.dumps({
            "processes": len(held), "unreadable": len(unreadable),
            "anonymous_bytes": present * PAGE_BYTES, "swapped_bytes": swapped * PAGE_BYTES,
            "sampled_pages": sizes.pages, "same_filled_pages": sizes.same_filled,
            "pool_bytes": pool_bytes, "rows": [row._asdict() for row in found],
            "recommended": {"allocator": best.allocator, "codec": best.codec},
        }, indent=2))  # fmt: skip
        return
    more = f", {len(unreadable)} could not be read" if unreadable else ""
    show.print_lines([
        show.Line("processes", f"{len(held)}{more}"),
        show.Line("anonymous", f"{show.size(present * PAGE_BYTES)} in RAM, "
                               f"{show.size(swapped * PAGE_BYTES)} in swap already"),
        show.Line("sampled", f"{show.count(sizes.pages)} pages, "
                             f"{show.percent(sizes.same_filled, sizes.pages)} of them same-filled"),
    ])  # fmt: skip
    print()
    print(f"{'allocator':<10}{'codec':<8}{'pages a frame':>14}{'RAM a page':>12}"
          f"{'held by ' + show.size(pool_bytes):>22}{'out, us':>9}{'in, us':>8}")  # fmt: skip
    for row in found:
        mark = "  <- recommended" if row == best else ""
        print(f"{row.allocator:<10}{row.codec:<8}{row.pages_per_frame:>14.2f}"
              f"{row.ram_bytes_per_page:>10.0f} B{show.size(row.capacity_bytes):>22}"
              f"{row.out_us:>9.1f}{row.in_us:>8.1f}{mark}")  # fmt: skip
    print()
    size, pool = amounts.human(whole(best.capacity_bytes)), amounts.human(pool_bytes)
    print(f"zcache serve size={size} pool={pool} allocator={best.allocator} codec={best.codec}")
    if best.ram_bytes_per_page > PAGE_BYTES * 0.8:
        print(
            "This memory hardly compresses: give the server a disk (disk=PATH), or use swap on one."
        )


def whole(size_bytes: int) -> int:
    """A round size below it."""
    unit = 1 << 20 if size_bytes < 1 << 30 else 1 << 28
    return max(unit, size_bytes // unit * unit)
