"""python -m bench: everything that is measured, as a table, a JSON file and a plot.

    python -m bench [--only PART ...] [--rounds N] [--seconds S] [--quick]
                    [--lab-rounds N] [--json FILE] [--no-docs]

Parts:
    store     the store alone, against bare lz4 loops
    nbd       over NBD, against nbdkit's null, memory and memory with zstd
    threads   nbdkit thread counts
    polling   latency while the control RPC is polled
    disk      writeback, reads and company of the disk tier, against the disk itself
    disk-full cleaning: bytes written for each new one while 80 % of the disk is alive
    overflow  pages to other nodes' RAM, against nbdcopy to nbdkit memory over TCP; renewing
    remote    pages from another node's RAM, against a bare TCP exchange of the same sizes
    memory    resident size, index, density
    policy    who leaves RAM: reads from below on recorded swap traces, against LRU, SIEVE, ...
    lab       a real Linux with more to hold than it has, against kernel zram and others
    lab-threads   (only when asked for) the same guest, zcache with other thread counts

A full run also renews the figures and the plot of docs/performance.md; `policy`, which counts and
measures no time, and a part that only runs when asked for renew their own. Seeds are fixed, and
everything is bounded: about ten minutes with the defaults. Run it on a quiet machine; the load
before the start is in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import (
    corpus,
    disk,
    disk_full,
    footprint,
    nbd_goals,
    overcommit,
    overflow,
    pages,
    plot,
    policy,
    polling,
    quiet,
    remote,
    store_alone,
    thread_study,
)
from bench.report import Section, print_goals, print_section
from bench.rounds import Plan
from bench.servers import ROOT
from bench.setup import Setup, machine

PARTS: dict[str, Callable[[Setup], Section]] = {
    "store": store_alone.measure,
    "nbd": nbd_goals.measure,
    "threads": thread_study.measure,
    "polling": polling.measure,
    "disk": disk.measure,
    "disk-full": disk_full.measure,
    "remote": remote.measure,
    "overflow": overflow.measure,
    "memory": footprint.measure,
    "policy": policy.measure,
    "lab": overcommit.measure,
}
ONLY_WHEN_ASKED: dict[str, Callable[[Setup], Section]] = {
    "lab-threads": overcommit.measure_threads,
}
STAND_ALONE = {"policy", "remote", "overflow", *ONLY_WHEN_ASKED}
"""Parts whose figures need no others of the same run beside them."""
CORPUS_MIB = 64
QUICK_MIB = 4
LAB_SECONDS = 2.0
REGION_BYTES = 256 << 20
JSON_FILE = ROOT / "build" / "bench.json"
PAGE_FILE = ROOT / "docs" / "performance.md"
PLOT_FILE = ROOT / "docs" / "img" / "performance.svg"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 132)
    with quiet.preferred():
        about = machine()
        if quiet.busy():
            console.print(f"this machine is busy (load {about['load_before']}): figures spread")
        sections = run(options, console)
    print_goals(sections, console)
    document = {
        "machine": about,
        "corpus": corpus.manifest(),
        "options": {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "lab_rounds": options.lab_rounds,
            "quick": options.quick,
        },
        "sections": {section.name: section.as_json() for section in sections},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1, default=str) + "\n")
    console.print(f"\nall figures: {options.json}", highlight=False)
    if not (options.quick or options.no_docs):
        renew_docs(document, full=not options.only)
    return 0


def renew_docs(document: Mapping[str, Any], full: bool) -> None:
    """Only figures of one run stand together: a part of it renews what stands alone."""
    found = pages.tables(document)
    if full:
        plot.draw(document, PLOT_FILE)
    else:
        found = {name: text for name, text in found.items() if name in STAND_ALONE}
    pages.update(PAGE_FILE, found)


def run(options: argparse.Namespace, console: Console) -> list[Section]:
    """The parts that are asked for, each shown when it is done."""
    mib = QUICK_MIB if options.quick else CORPUS_MIB
    data = corpus.pages_file(mib)
    region_bytes = mib << 20 if options.quick else REGION_BYTES
    sections = []
    with tempfile.TemporaryDirectory(prefix="zcache-bench-") as folder:
        plan = Plan(data, region_bytes, options.seconds, options.rounds)
        lab = (1, 1.0) if options.quick else (options.lab_rounds, LAB_SECONDS)
        setup = Setup(plan, memoryview(corpus.pages(mib)), Path(folder), *lab)
        for name in options.only or PARTS:
            start_s = time.monotonic()
            section = (PARTS | ONLY_WHEN_ASKED)[name](setup)
            section.seconds = time.monotonic() - start_s
            print_section(section, console)
            sections.append(section)
    return sections


def _parser() -> argparse.ArgumentParser:
    summary, _, about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=summary,
        epilog=about.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *ONLY_WHEN_ASKED], metavar="PART")
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement (default 7)")
    parser.add_argument("--lab-rounds", type=int, default=5, help="guests each (default 5)")
    parser.add_argument("--seconds", type=float, default=0.25, help="of a load (default 0.25)")
    parser.add_argument("--quick", action="store_true", help="few pages: does it run at all")
    parser.add_argument("--json", type=Path, default=JSON_FILE, metavar="FILE")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/ as it is")
    return parser


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:  # every part ends the servers that it started
        print("bench: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
