"""C face of adopting a predecessor's frames."""

from zcache_core.arena cimport Arena

cdef void arena_adopt(Arena *arena) noexcept nogil
cdef void arena_adopt_rest(Arena *arena) noexcept nogil
