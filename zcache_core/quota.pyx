"""The limit of bytes written to the disk in a day (writeback_limit), for who minds a disk's wear.

    limit  |=====================|      everything that is written counts: pages, headers,
    today  |#############|              padding, cleaning.  At UTC's midnight it begins anew

A write that would go beyond the limit is not begun, so the limit is never exceeded.  The
count is in the memory file: a restart does not begin anew, and without a limit it goes
on, so that one that is set later counts the day's writes before it.

A clock that is set back to another day begins a day too; nothing else is better known.

What it is not: a rate.  All of a day's bytes may be written in its first minute.
"""

from libc.stdint cimport uint64_t
from posix.time cimport timespec

from zcache_core.counter_ids cimport C_WRITEBACK_DAY_BYTES, C_WRITEBACK_LIMIT_REACHED
from zcache_core.layout cimport Superblock
from zcache_core.native cimport zc_load64

cdef extern from "<time.h>" nogil:
    enum: CLOCK_REALTIME
    int clock_gettime(int, timespec *)

cdef enum:
    SECONDS_A_DAY = 86400


cdef void quota_init(Quota *q, Superblock *super, const uint64_t *limit_bytes, uint64_t *cells) noexcept nogil:
    q.super = super
    q.limit_bytes = limit_bytes
    q.cells = cells


cdef void begin_day(Quota *q) noexcept nogil:
    cdef timespec t
    cdef uint64_t day
    clock_gettime(CLOCK_REALTIME, &t)
    day = <uint64_t>t.tv_sec // SECONDS_A_DAY
    if day != q.super.write_day:
        q.super.write_day_bytes = 0
        q.super.write_day = day


cdef bint quota_is_used_up(const Quota *q, uint64_t bytes) noexcept nogil:
    """Whether so many bytes would go beyond the limit as it is at this moment.  Any thread."""
    cdef uint64_t limit = zc_load64(<uint64_t *>q.limit_bytes) if q.limit_bytes != NULL else 0
    return limit != 0 and zc_load64(&q.super.write_day_bytes) + bytes > limit


cdef bint quota_allows(Quota *q, uint64_t bytes) noexcept nogil:
    """Whether so much may be written now; says in the counters how it is.

    Called by the writing thread only.
    """
    cdef bint allowed
    begin_day(q)
    allowed = not quota_is_used_up(q, bytes)
    q.cells[C_WRITEBACK_DAY_BYTES] = q.super.write_day_bytes
    q.cells[C_WRITEBACK_LIMIT_REACHED] = not allowed
    return allowed


cdef void quota_count(Quota *q, uint64_t bytes) noexcept nogil:
    """So much was written, or may have been: a write that failed counts too."""
    begin_day(q)
    q.super.write_day_bytes += bytes
    q.cells[C_WRITEBACK_DAY_BYTES] = q.super.write_day_bytes
