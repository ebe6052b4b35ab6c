"""Backing: giving frames memory; while serving only memory that needs no reclaim.

A thread that populates holds this process's mmap_lock, and on a machine that swaps onto
us its allocation may wait, inside the kernel, for a swap write.  A serving thread that
then needs the same lock (a page fault, malloc) waits for it, and nobody serves that
write.  In a guest of 256 MiB with random bytes one of five runs did not end, and one moved
9 thousand pages in 20 s, where runs with this look moved 130 to 180 thousand.  So while serving

    look at what is left -> populate 64 KiB -> look again

and nothing is asked for that the kernel does not have.  While memory is short this runs
in the serving threads' real-time class, where it is allowed: on one CPU nobody takes
the memory away between look and populate, and requests get their turn after each step.

Bound: one step on its way without a look.  What it is not: a guarantee on several CPUs, or
without real-time permission; there the margin above the kernel's min watermark has to do.
"""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint8_t, uint64_t

from zcache_core.headroom cimport headroom_bytes, headroom_close, headroom_is_plenty, headroom_open
from zcache_core.layout cimport PAGE_BYTES
from zcache_core.pthread cimport SCHED_OTHER, sched_getparam, sched_getscheduler, sched_param, sched_yield

cdef extern from *:
    """
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23      /* Linux 5.14 */
    #endif
    static void zc_touch(volatile unsigned char *p) { __atomic_fetch_or(p, 0, __ATOMIC_RELAXED); }
    """
    void zc_touch(uint8_t *p) nogil

cdef extern from "<sys/mman.h>" nogil:
    enum: MADV_POPULATE_WRITE
    int madvise(void *addr, size_t length, int advice)

cdef extern from "<sched.h>" nogil:
    int sched_setscheduler(int thread, int policy, const sched_param *param)


cdef int back_range(uint8_t *start, uint64_t length_bytes) noexcept nogil:
    """Back a range with memory, writable, in this process's page tables; 0 or an errno."""
    cdef uint64_t at = 0
    if madvise(start, length_bytes, MADV_POPULATE_WRITE) == 0:
        return 0
    if errno != EINVAL:
        return errno
    while at < length_bytes:
        zc_touch(start + at)
        at += PAGE_BYTES
    return 0


cdef void backing_open(Backing *b, const char *zoneinfo) noexcept nogil:
    """By the thread that starts the one that will populate; it has the serving threads' class."""
    cdef sched_param param
    b.policy = sched_getscheduler(0)
    b.priority = param.sched_priority if sched_getparam(0, &param) == 0 else 0
    headroom_open(&b.headroom, zoneinfo)


cdef void backing_close(Backing *b) noexcept nogil:
    headroom_close(&b.headroom)


cdef void change_class(int policy, int priority) noexcept nogil:
    """The calling thread's."""
    cdef sched_param param
    param.sched_priority = priority
    sched_setscheduler(0, policy, &param)       # refused: then as it is


cdef void backing_round(Backing *b, uint64_t round_bytes) noexcept nogil:
    """Some steps begin, of so many bytes together."""
    b.short = not headroom_is_plenty(&b.headroom, round_bytes)
    if b.short and b.policy != SCHED_OTHER:
        change_class(b.policy, b.priority)


cdef bint backing_may(Backing *b, uint64_t bytes) noexcept nogil:
    """Whether so much can be taken now without reclaim."""
    if b.short:
        sched_yield()           # a request that has come meanwhile
    return headroom_bytes(&b.headroom, bytes) >= bytes


cdef void backing_round_ends(Backing *b) noexcept nogil:
    if b.short and b.policy != SCHED_OTHER:
        change_class(SCHED_OTHER, 0)
    b.short = False
