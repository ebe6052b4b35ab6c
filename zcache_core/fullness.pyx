"""How full the pool is, by the kinds of its frames; when the cooling thread has to work.

                 high %          all of the pool
    +---------------+-----------------+
    | persistent    |  ephemeral      |  free, kept at 1/32 by dropping ephemeral frames
    +---------------+-----------------+
    above high: the coldest persistent frames are copied down in batches until low

"All of the pool" is the arena's target: its limit, or less while memory is short.  A
frame is persistent when the only copy of any of its pages is in it.  All numbers are
of this moment and may be old the next: they steer, and nothing is proven by them.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from zcache_core.below cimport FRAMES_AT_ONCE, Tiers
from zcache_core.counter_ids cimport C_EPH_PAGEFRAMES
from zcache_core.native cimport zc_load64
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock

cdef enum:
    FREE_SHARE = 32             # of the pool is kept free of ephemeral frames
    FREE_MOST = 8192


cdef uint32_t frames_taken(Tiers *t) noexcept nogil:
    """Frames in use by the allocator."""
    cdef uint32_t taken
    lock_take(&t.core.arena.lock)
    taken = t.core.arena.committed - t.core.arena.free_count - t.core.arena.moving
    pthread_mutex_unlock(&t.core.arena.lock)
    return taken


cdef uint64_t frames_ephemeral(Tiers *t) noexcept nogil:
    return zc_load64(&t.core.slots.shared[C_EPH_PAGEFRAMES])


cdef uint64_t frames_persistent(Tiers *t) noexcept nogil:
    cdef int64_t n = <int64_t>frames_taken(t) - <int64_t>frames_ephemeral(t)
    return <uint64_t>n if n > 0 else 0


cdef uint32_t frames_left(Tiers *t) noexcept nogil:
    cdef uint32_t taken = frames_taken(t)
    return t.core.arena.target - taken if t.core.arena.target > taken else 0


cdef uint32_t free_target(Tiers *t) noexcept nogil:
    return min(<uint32_t>FREE_MOST, t.core.arena.target // FREE_SHARE + 4)


cdef bint has_ram_to_spare(Tiers *t) noexcept nogil:
    """Whether persistent frames may be more without being many."""
    return not t.orders.draining and (
        (frames_persistent(t) + FRAMES_AT_ONCE) * 100 < <uint64_t>t.core.arena.target * t.orders.low_percent
    )


cdef bint must_cool(Tiers *t) noexcept nogil:
    """Above high until low; or nothing left to drop while room is short."""
    cdef uint64_t now = frames_persistent(t) * 100
    if t.orders.draining:
        return frames_persistent(t) > 0
    if now > <uint64_t>t.core.arena.target * t.orders.high_percent:
        t.cooling = True
    elif now <= <uint64_t>t.core.arena.target * t.orders.low_percent:
        t.cooling = False
    return t.cooling or t.waiting > 0 and frames_ephemeral(t) == 0
