"""Making a process fit to serve swap: locked on fault, never in I/O for its own memory.

A swap server may be asked for memory's sake by the very machine that runs it, so it
must not need memory that can only be had by swapping out to it:

    mlockall(CURRENT | FUTURE | ONFAULT)   what is touched stays (nbdkit's tables are
                                           192 MiB of zeros, locking all would cost that)
    load_files                             and all of the program's and libraries' own pages,
                                           for who must go on when none can be read in
    own_memory                             a forked one's own copies, before they are needed
    PR_SET_IO_FLUSHER                      its own allocations start no I/O in reclaim;
                                           inherited by the threads made after it
    SCHED_FIFO                             serving threads run before those they unblock
    oom_score_adj -1000                    never the one to be killed
    one malloc arena                       no 64 MiB heap for each thread
    PR_SET_DUMPABLE 0                      only with encrypt=yes: what libcrypto makes of the
                                           key leaves by no core dump and no ptrace

Each is asked for; what is refused comes back as one sentence, and the server goes on.
Linux: mlock2(2), prctl(2), sched(7), proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import resource

from zcache_core.naps import Naps

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_IO_FLUSHER = 57
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23
M_ARENA_MAX, M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD = -8, -3, -2, -1
CAP_IPC_LOCK = 14
PAGE_BYTES = 4096
# In the highest bytes of pagemap's words, pages in memory; so many at once, a millisecond or two
# on the slowest machine at hand, as serving threads of the same real-time class can wait.
PRESENT = re.compile(rb"[\x80-\xff]{1,64}")
HEAP_BYTES_MAX = 32 << 20  # the most that glibc takes as a threshold for mmap
FIFO_PRIORITY = 1  # above every ordinary thread, below all that chose more

_libc = ctypes.CDLL(None, use_errno=True)


def _why() -> str:
    return os.strerror(ctypes.get_errno())


def lock_memory(on_fault: bool) -> str:
    """Lock what is and will be mapped: what is touched of it, or all.  A sentence if refused."""
    flags = MCL_CURRENT | MCL_FUTURE | (MCL_ONFAULT if on_fault else 0)
    # Without the capability everything mapped later counts against the limit, and a
    # thread's stack or the pool that does not fit fails; so the present alone, if it fits.
    if not _has_capability(CAP_IPC_LOCK) and _limited():
        flags &= ~MCL_FUTURE
    if _libc.mlockall(flags) == 0:
        if flags & MCL_FUTURE:
            return ""
        return "only what exists at start is locked: give CAP_IPC_LOCK or 'ulimit -l unlimited'"
    return f"memory is not locked ({_why()}): give CAP_IPC_LOCK or raise 'ulimit -l'"


def _has_capability(number: int) -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next((line.split()[1] for line in file if line.startswith("CapEff")), "0")
    return bool(int(effective, 16) >> number & 1)


def _limited() -> bool:
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY


def _io_flusher() -> str:
    if _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0:
        return ""
    return f"PR_SET_IO_FLUSHER is refused ({_why()}): give CAP_SYS_RESOURCE"


def _never_killed() -> str:
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-1000")
    except OSError as error:
        return f"oom_score_adj -1000 is refused ({error.strerror}): give CAP_SYS_RESOURCE"
    return ""


def real_time() -> str:
    """The calling thread in a real-time class, and what it starts.  A sentence if refused."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY))
    except OSError as error:
        return f"real-time priority is refused ({error.strerror}): give CAP_SYS_NICE"
    return ""


def in_turns() -> None:
    """The calling thread, if in a real-time class, takes turns (0.1 s) with its equals there."""
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_FIFO:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(FIFO_PRIORITY))


def _never_dumped() -> str:
    """The limit is for a core_pattern that ignores the flag; lowering it needs no permission."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0:
        return ""
    return f"PR_SET_DUMPABLE is refused ({_why()}): a core dump may hold the key"


def prepare(realtime: bool = True, on_fault: bool = True, secret: bool = False) -> list[str]:
    """Ask for all of it in the calling thread, before others are made.

    on_fault: lock what is touched, when it is; otherwise all that is mapped, now.
    secret: there is a key in this process's memory.
    Returns a sentence for each thing that was refused; empty when all is well.
    """
    _libc.mallopt(M_ARENA_MAX, 1)
    found = [lock_memory(on_fault), _io_flusher(), _never_killed()]
    if realtime:
        found.append(real_time())
    if secret:
        found.append(_never_dumped())
    return [sentence for sentence in found if sentence]


def load_files(copy: bool = True) -> int:
    """Have every page of the mapped files in memory; bytes of them.

    copy: those that are ours to write too are copied now, not when they are written.
    With `lock_memory` they stay.  Nothing that is only reserved (zeros, heap) is touched.
    Before Linux 5.14 nothing happens, and nothing for an ordinary user with secrets in memory
    (PR_SET_DUMPABLE is off), who may not look at his own pages.
    """
    total, naps = 0, Naps()
    if not os.access("/proc/self/pagemap", os.R_OK):
        return 0
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        rows = [line.split(maxsplit=5) for line in maps]
    for row in rows:
        # A program or library: private, of a file with a path.  (The memory file is shared.)
        if len(row) < 6 or not row[5].startswith("/") or row[1][0] != "r" or row[1][3] != "p":
            continue
        start, end = (int(number, 16) for number in row[0].split("-"))
        advice = MADV_POPULATE_WRITE if copy and row[1][1] == "w" else MADV_POPULATE_READ
        naps.breathe()
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
        total += end - start
    return total


def own_memory() -> int:
    """After a fork: a copy of our own of every page that would be copied when it is written.

    Returns bytes.  Pages that were never touched stay so (nbdkit's tables are 192 MiB of them).
    Before Linux 5.14 nothing happens.
    """
    total, naps = 0, Naps()
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        rows = [line.split(maxsplit=5) for line in maps]
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for row in rows:
            if row[1][1] != "w" or row[1][3] != "p":
                continue
            start, end = (int(number, 16) // PAGE_BYTES for number in row[0].split("-"))
            # Eight bytes a page; the highest bit: it is in memory.
            highest = os.pread(pagemap.fileno(), 8 * (end - start), 8 * start)[7::8]
            for run in re.finditer(PRESENT, highest):
                at, length = (start + run.start()) * PAGE_BYTES, len(run[0]) * PAGE_BYTES
                _libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(length), MADV_POPULATE_WRITE)
                total += length
                naps.breathe()
    return total


def hold_memory(size_bytes: int) -> mmap.mmap:
    """So much memory, touched: closing it makes room for who needs as much a moment later."""
    naps = Naps()
    held = mmap.mmap(-1, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES, mmap.MAP_PRIVATE)
    for at in range(0, len(held), PAGE_BYTES):
        held[at] = 1
        if at % (64 * PAGE_BYTES) == 0:
            naps.breathe()
    return held


def keep_heap(size_bytes: int) -> None:
    """Have so much free in malloc's heap, touched, and never give any of it back to the kernel.

    For threads too: one that had a heap of its own would fault it in.
    """
    _libc.mallopt(M_ARENA_MAX, 1)
    _libc.mallopt(M_TRIM_THRESHOLD, HEAP_BYTES_MAX)
    _libc.mallopt(M_MMAP_THRESHOLD, HEAP_BYTES_MAX)
    _libc.mallopt(M_TOP_PAD, size_bytes)
    _libc.malloc.restype = ctypes.c_void_p
    block = ctypes.c_void_p(_libc.malloc(ctypes.c_size_t(size_bytes)))
    if block:
        ctypes.memset(block, 0, size_bytes)
    _libc.free(block)


def io_flusher() -> str:
    """PR_SET_IO_FLUSHER alone, for the program that this process starts next.

    Returns a sentence when it was refused.
    """
    return _io_flusher()


def end_with_parent() -> None:
    """Be killed when the process that forked us ends; called in the child."""
    _libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)


def outlive_parent() -> None:
    """Not be ended with the process that started us; in the main thread.

    nbdkit -f asks for that (PR_SET_PDEATHSIG, SIGTERM): right for one in a terminal.
    """
    _libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
