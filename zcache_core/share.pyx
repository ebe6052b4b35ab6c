"""The share: how much of the machine work in the background takes while others want it.

    a piece of work -> requests served within the last 20 ms?           -> rest 19 times as long as it
                       this thread had less than 4/5 of a CPU lately?      took: 5 % of one CPU; tidying 38
                       neither?                                         -> go on

One rule for tidying and for recompression.  A request counts while it is inside as well as when it has
ended: a piece of 40 us begins and ends inside of one request of 128 KiB, and a rule that looked
for requests that ended meanwhile saw none, so that compaction took a whole CPU beside a load (0.75 of its
speed was left).  Whether a CPU is spare is seen from this thread's own time, when it works without rests.

What it is not: a limit on pieces.  Whoever works makes them short, and rests only when 0.2 ms of them
have come together, because a wakeup costs those beside it more than a piece does.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from zcache_core.native cimport zc_load32, zc_load64
from zcache_core.pthread cimport lock_take, now_us, pthread_mutex_unlock
from zcache_core.slots cimport REQUEST_SLOTS

cdef enum:
    LEAST_US = 200              # of work between two rests
    QUIET_US = 20000            # after the last request nobody is served
    # Of so much time without a rest this thread had less than 4/5 of a CPU: none is spare, for so long.
    WINDOW_US = 20000
    CROWDED_US = 10000000
    FULL_SHARE = 64             # of the pool: less than that is free


cdef uint64_t requests_done(Core *core) noexcept nogil:
    """Grows with every request that ends."""
    cdef uint64_t turns = 0
    cdef uint32_t i
    for i in range(REQUEST_SLOTS):
        turns += zc_load64(&core.slots.slot[i].turn)
    return turns


cdef bint somebody_inside(Core *core) noexcept nogil:
    cdef uint32_t i
    for i in range(REQUEST_SLOTS):
        if zc_load32(&core.slots.slot[i].busy):
            return True
    return False


cdef bint room_is_wanted(Core *core) noexcept nogil:
    """Whether a request waits for room in the pool, or one soon may: who makes room does not rest then."""
    cdef uint32_t i, used
    for i in range(REQUEST_SLOTS):
        if zc_load32(&core.slots.slot[i].busy) == 2 and core.slots.slot[i].room_since_us:
            return True
    lock_take(&core.arena.lock)
    used = core.arena.committed - core.arena.free_count - core.arena.moving
    pthread_mutex_unlock(&core.arena.lock)
    return used + core.arena.target // FULL_SHARE >= core.arena.target


cdef int64_t thread_us() noexcept nogil:
    """CPU time of this thread."""
    cdef timespec used
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used)
    return <int64_t>used.tv_sec * 1000000 + used.tv_nsec // 1000


cdef void share_begin(Share *s) noexcept nogil:
    """A piece of work begins."""
    s.began_us, s.began_cpu_us = now_us(), thread_us()


cdef void share_also(Share *s, int64_t us) noexcept nogil:
    """So long another thread worked on account of this one."""
    s.debt_us += us


cdef int64_t share_rest_us(Core *core, Share *s, int64_t rest, int64_t most_us) noexcept nogil:
    """It has ended: how long to rest now, `rest` times as long as it took, at most `most_us`; 0: go on.  Outside of a slot."""
    cdef int64_t now = now_us()
    cdef int64_t spent = now - s.began_us
    cdef uint64_t done = requests_done(core)
    if done != s.seen or somebody_inside(core):
        s.served_until_us = now + QUIET_US
    s.seen = done
    s.debt_us += spent
    s.alone_us += spent
    s.alone_cpu_us += thread_us() - s.began_cpu_us
    if s.alone_us > WINDOW_US:
        if s.alone_cpu_us * 5 < s.alone_us * 4:
            s.crowded_until_us = now + CROWDED_US
        s.alone_us = s.alone_cpu_us = 0
    if s.debt_us < LEAST_US:
        return 0
    spent, s.debt_us = s.debt_us, 0
    if now >= s.served_until_us and now >= s.crowded_until_us:
        return 0
    s.alone_us = s.alone_cpu_us = 0
    return min(spent * rest, most_us)
