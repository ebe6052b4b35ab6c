"""zbud: at most two buds in a frame, one from each end (buds.pyx has the work).

    chunk  0 1 2 ...                                              ... 62 63
           +-----------------+-----------------------+------------------+
           | first bud       |   free, one run       |         last bud |
           +-----------------+-----------------------+------------------+

Guarantees: at most two pages in a frame, so that freeing a frame never moves more than two.
What it cannot do: hold more than two pages in a frame, however small they are.
Source: the idea is that of mm/zbud.c in Linux 3.11.
"""

from libc.stdint cimport uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport FRAME_ZBUD, Arena
from zcache_core.buds cimport buds_make
from zcache_core.pthread cimport pthread_mutex_t


cdef Allocator *zbud_make(Arena *arena, uint64_t *cells, pthread_mutex_t *guard) noexcept nogil:
    """A zbud allocator on `arena`; NULL when there is no memory."""
    return buds_make(arena, cells, guard, b"zbud", FRAME_ZBUD, 2)
