"""Commands to a running server, from the node process: 16 bytes each, through a pipe.

The steward's thread reads the pipe when something is in it, without waiting and without
the GIL, and what holds now is in the counters; there is no other answer.  commands.py
has the bytes.  What cannot be done changes nothing and is counted (refused_commands).

Bound: 16 commands at a time.
"""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.arena cimport arena_set_goal
from zcache_core.counter_ids cimport C_DRAINING, C_HIGH_PERCENT, C_LOW_PERCENT, C_REFUSED_COMMANDS, C_WRITEBACK_LIMIT_BYTES
from zcache_core.denser cimport dense_choose
from zcache_core.native cimport zc_store64
from zcache_core.tidying cimport tidy_choose

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *data, size_t length)

cdef enum:
    AT_ONCE = 16
    WORDS = 2                   # of a command
    DRAIN = 1                   # as in commands.py
    WATERMARKS = 2
    POOL = 3
    WRITEBACK_LIMIT = 4
    ALLOCATOR = 5
    ALLOCATORS = 3              # as many as there are
    RECOMPRESS = 6
    LEVELS = 19                 # of zstd


cdef void orders_tell(Orders *o) noexcept nogil:
    """What holds now, for whoever reads the counters."""
    o.cells[C_HIGH_PERCENT] = o.high_percent
    o.cells[C_LOW_PERCENT] = o.low_percent
    o.cells[C_DRAINING] = o.draining
    o.cells[C_WRITEBACK_LIMIT_BYTES] = o.writeback_limit_bytes


cdef bint obey(Orders *o, uint64_t command, uint64_t value) noexcept nogil:
    """False when it cannot be done."""
    cdef uint32_t high = <uint32_t>(value >> 32)
    cdef uint32_t low = <uint32_t>value
    if command == POOL:
        return high == 0 and arena_set_goal(&o.core.arena, low, o.below)
    if command == ALLOCATOR:
        return value < ALLOCATORS and tidy_choose(o.core, low)
    if command == RECOMPRESS:
        if high > LEVELS or low == 0:
            return False
        dense_choose(o.core, <int>high, low)
        return True
    if not o.below:
        return False
    if command == DRAIN:
        o.draining = value != 0
    elif command == WATERMARKS and 0 < low and low <= high and high <= 100:
        o.high_percent, o.low_percent = high, low
    elif command == WRITEBACK_LIMIT:
        zc_store64(&o.writeback_limit_bytes, value)
    else:
        return False
    orders_tell(o)
    return True


cdef void orders_hear(Orders *o) noexcept nogil:
    """Obey what is in the pipe.  Its writers write whole commands, which are atomic there."""
    cdef uint64_t words[AT_ONCE * WORDS]
    cdef ssize_t got = 0
    cdef ssize_t i
    if o.fd >= 0:
        got = read(o.fd, words, sizeof(words))
    for i in range(got // <ssize_t>(WORDS * sizeof(uint64_t)) if got > 0 else 0):
        if not obey(o, words[WORDS * i], words[WORDS * i + 1]):
            o.cells[C_REFUSED_COMMANDS] += 1
