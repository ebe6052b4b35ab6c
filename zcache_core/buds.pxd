"""C face of the allocators that put buds in frames."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport Arena
from zcache_core.pthread cimport pthread_mutex_t

cdef Allocator *buds_make(
    Arena *arena, uint64_t *cells, pthread_mutex_t *guard, const char *name, uint8_t state, uint32_t places
) noexcept nogil
