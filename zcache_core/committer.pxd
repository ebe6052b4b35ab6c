"""C face of the committer: starting and ending an arena, and what costs it time."""

from libc.stdint cimport uint32_t

from zcache_core.arena cimport Arena

cdef void arena_free(Arena *arena) noexcept nogil
cdef int arena_start(Arena *arena) noexcept nogil
cdef void arena_stop(Arena *arena) noexcept nogil
cdef int arena_commit_now(Arena *arena, uint32_t frames) noexcept nogil
