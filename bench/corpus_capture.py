"""Reads the anonymous pages of a live process: what would go to swap.

    /proc/PID/maps      which ranges are private and readable
    /proc/PID/pagemap   one u64 per page: present (bit 63), file or shared (bit 61)
    /proc/PID/mem       the bytes

A page counts when it is present, anonymous (heap, stacks, private copies of file pages) and not all
zeros; untouched memory, mapped files, vdso and vvar do not.  The process is stopped while it is
read, so that a page is not half of two moments, and goes on afterwards.

Bound: at most `limit_pages`, taken as whole runs of RUN_PAGES neighbours (the kernel writes
neighbours together, and compressors that look beyond one page need them), spread over the process
by a seeded choice.  Needs the right to trace the process (our own children, or root).

Sources: Documentation/admin-guide/mm/pagemap.rst; proc(5).
"""

from __future__ import annotations

import os
import random
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass

PAGE_BYTES = 4096
RUN_PAGES = 32
"""128 KiB: what a swapping kernel writes at once, most of the time."""
PRESENT = 1 << 63
FILE_OR_SHARED = 1 << 61
ZEROS = bytes(PAGE_BYTES)
ENTRIES = 65536
"""Pagemap entries read at once: 512 KiB for 256 MiB of address space."""


@dataclass(frozen=True)
class Range:
    """start, end: addresses in bytes."""

    start: int
    end: int


def private_ranges(pid: int) -> list[Range]:
    """Readable private mappings of a process.  Raises OSError when it is gone."""
    ranges = []
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            addresses, permissions, *rest = line.split(maxsplit=5)
            name = rest[3].strip() if len(rest) > 3 else ""
            if permissions[0] == "r" and permissions[3] == "p" and not name.startswith("[v"):
                start, end = addresses.split("-")
                ranges.append(Range(int(start, 16), int(end, 16)))
    return ranges


def anonymous_runs(pid: int) -> Iterator[list[int]]:
    """Addresses of present anonymous pages, in runs of neighbours of at most RUN_PAGES."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for span in private_ranges(pid):
            run: list[int] = []
            for first in range(span.start, span.end, ENTRIES * PAGE_BYTES):
                count = min(ENTRIES, (span.end - first) // PAGE_BYTES)
                data = os.pread(pagemap.fileno(), count * 8, first // PAGE_BYTES * 8)
                for index, (entry,) in enumerate(struct.iter_unpack("<Q", data)):
                    wanted = entry & PRESENT and not entry & FILE_OR_SHARED
                    if wanted:
                        run.append(first + index * PAGE_BYTES)
                    if run and (not wanted or len(run) == RUN_PAGES):
                        yield run
                        run = []
            if run:
                yield run


def capture(pid: int, limit_pages: int, seed: int) -> list[bytes]:
    """Runs of pages of a live process, each a multiple of 4096 bytes; the whole is bounded.

    Raises OSError (PermissionError, ProcessLookupError) when the process cannot be read.
    """
    os.kill(pid, signal.SIGSTOP)
    try:
        runs = list(anonymous_runs(pid))
        random.Random(seed).shuffle(runs)
        taken: list[bytes] = []
        left = limit_pages
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for run in runs:
                if left <= 0:
                    break
                pages = _nonzero(memory.fileno(), run)[:left]
                if pages:
                    taken.append(b"".join(pages))
                    left -= len(pages)
        return taken
    finally:
        os.kill(pid, signal.SIGCONT)


def _nonzero(memory: int, run: list[int]) -> list[bytes]:
    """The pages of one run, in order; none where the kernel refuses to show them."""
    try:
        data = os.pread(memory, len(run) * PAGE_BYTES, run[0])
    except OSError:
        return []
    pages = (data[at : at + PAGE_BYTES] for at in range(0, len(data), PAGE_BYTES))
    return [page for page in pages if len(page) == PAGE_BYTES and page != ZEROS]
