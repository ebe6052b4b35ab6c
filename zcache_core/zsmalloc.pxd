"""C face of zsmalloc."""

from libc.stdint cimport uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport Arena
from zcache_core.pthread cimport pthread_mutex_t

cdef Allocator *zsmalloc_make(Arena *arena, uint64_t *cells, pthread_mutex_t *guard) noexcept nogil
cdef bint zsmalloc_prepare(Allocator *self) noexcept nogil
cdef void zsmalloc_tell(Allocator *self) noexcept nogil
