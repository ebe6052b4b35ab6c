"""C face of the allocators of one arena, behind one."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport Arena

cdef Allocator *several_make(Arena *arena, uint64_t *cells, uint32_t number) noexcept nogil
cdef void several_tell(Allocator *self) noexcept nogil
cdef bint several_choose(Allocator *self, uint32_t number) noexcept nogil
cdef uint32_t allocator_broken(Allocator *allocator) noexcept nogil
