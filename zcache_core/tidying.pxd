"""C face of the tidying thread."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.core cimport Core

cdef int tidy_start(Core *core) noexcept nogil
cdef void tidy_stop(Core *core) noexcept nogil
cdef bint tidy_choose(Core *core, uint32_t number) noexcept nogil
cdef uint64_t tidy_all(Core *core) noexcept nogil
cdef void tidy_pause(Core *core, bint paused) noexcept nogil
