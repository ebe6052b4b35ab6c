"""A sample of the anonymous pages of live processes: what would go to swap.

    /proc/PID/smaps     which mappings hold anonymous pages, and how many
    /proc/PID/pagemap   which of their pages are present: one u64 each, file or shared (bit 61),
                        swapped (bit 62), present (bit 63)
    /proc/PID/mem       the bytes of those that are chosen, one by one

Every present page has the same chance, whichever process it is of.  Processes are not stopped:
a page may be half of two moments, which hardly changes how it compresses, and nobody waits.

Nothing but sizes leaves here: a page's bytes are handed to the caller's function and forgotten.
Our own memory is locked, as far as that is allowed, and makes no core dump, so that they cannot
get to a disk through swap or a crash.  Of root's capabilities only the three that this needs
are kept.

Bounds: `pages` pages in all, and `ENTRIES_MOST` pagemap entries looked at (a process that only
reserves terabytes is looked at as far as that goes).

Sources: Documentation/admin-guide/mm/pagemap.rst; proc(5); capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PAGE_BYTES = 4096
FILE_OR_SHARED = 1 << 61
SWAPPED = 1 << 62
PRESENT = 1 << 63
ENTRIES_AT_ONCE = 1 << 16  # 512 KiB of pagemap, for 256 MiB of addresses
ENTRIES_MOST = 1 << 25  # 256 MiB of pagemap, about a second; 128 GiB of addresses
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38
MCL_ALL_ON_FAULT = 7  # MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT
CAP_DAC_READ_SEARCH, CAP_IPC_LOCK, CAP_SYS_PTRACE = 2, 14, 19
CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class Held(NamedTuple):
    """Anonymous pages of one process: addresses of those in RAM, and how many are swapped."""

    pid: int
    name: str
    present: Sequence[int]
    swapped: int


class Unreadable(NamedTuple):
    pid: int
    why: str


def drop_privileges() -> None:
    """Keep what reading other processes needs, and nothing else; keep pages off every disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    has = keep_capabilities(1 << CAP_DAC_READ_SEARCH | 1 << CAP_IPC_LOCK | 1 << CAP_SYS_PTRACE)
    if has >> CAP_IPC_LOCK & 1:  # without it there is a limit, and later allocations would fail
        _libc.mlockall(MCL_ALL_ON_FAULT)


def keep_capabilities(kept: int) -> int:
    """Of those that this process has, only these (a mask), for good; which they are."""
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    has = ctypes.create_string_buffer(24)
    if _libc.capget(header, has):
        return 0
    words = struct.unpack("=6I", has.raw)  # effective, permitted, inheritable; twice 32 bits
    low = words[1] & kept
    _libc.capset(header, struct.pack("=6I", low, low, 0, 0, 0, 0))
    return int(low)


def processes() -> list[int]:
    """All but kernel threads and this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        try:
            if pid != os.getpid() and (path / "cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue  # gone
    return sorted(found)


def anonymous_mappings(pid: int) -> Iterator[tuple[int, int]]:
    """Address ranges that hold anonymous pages.  Raises OSError."""
    start = end = 0
    with open(f"/proc/{pid}/smaps", encoding="ascii", errors="replace") as file:
        for line in file:
            first = line.split(maxsplit=1)[0]
            if not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
            elif first in ("Anonymous:", "Swap:") and int(line.split()[1]):
                yield start, end
                start = end  # once, whatever follows


def look(pid: int, entries_most: int) -> tuple[Held, int]:
    """What a process holds, and how many pagemap entries it took to see.  Raises OSError."""
    name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    present = array("Q")  # 8 bytes each: a list of 32 GiB's would take 300 MB of locked memory
    swapped = looked = 0
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start, end in anonymous_mappings(pid):
            for first in range(start, end, ENTRIES_AT_ONCE * PAGE_BYTES):
                count = min(ENTRIES_AT_ONCE, (end - first) // PAGE_BYTES)
                if looked + count > entries_most:
                    break
                looked += count
                data = os.pread(pagemap.fileno(), count * 8, first // PAGE_BYTES * 8)
                for at, (entry,) in enumerate(struct.iter_unpack("=Q", data)):
                    if entry & SWAPPED:
                        swapped += 1
                    elif entry & PRESENT and not entry & FILE_OR_SHARED:
                        present.append(first + at * PAGE_BYTES)
    return Held(pid, name, present, swapped), looked


def survey(
    pids: Sequence[int], progress: Callable[[int], None]
) -> tuple[list[Held], list[Unreadable]]:
    """Every process in turn; `progress` is told how many are done."""
    held, unreadable, left = [], [], ENTRIES_MOST
    for done, pid in enumerate(pids):
        progress(done)
        try:
            found, looked = look(pid, left)
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | ProcessLookupError)
            why = "there is no such process" if gone else error.strerror or str(error)
            unreadable.append(Unreadable(pid, why))
            continue
        left -= looked
        held.append(found)
    return held, unreadable


def sample(
    held: Sequence[Held], pages: int, seed: int, take: Callable[[bytes], None]
) -> Iterator[int]:
    """Give up to `pages` pages, chosen at random, to `take`; yields how many so far.

    What has gone meanwhile is left out.
    """
    total = sum(len(one.present) for one in held)
    chosen = sorted(random.Random(seed).sample(range(total), min(pages, total)))
    done = first = at = 0
    for one in held:
        try:
            memory = os.open(f"/proc/{one.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            memory = -1
        while at < len(chosen) and chosen[at] < first + len(one.present):
            if (page := _page(memory, one.present[chosen[at] - first])) is not None:
                take(page)
                done += 1
            at += 1
            yield done
        first += len(one.present)
        if memory >= 0:
            os.close(memory)


def _page(memory: int, address: int) -> bytes | None:
    try:
        page = os.pread(memory, PAGE_BYTES, address)
    except OSError:
        return None
    return page if len(page) == PAGE_BYTES else None
