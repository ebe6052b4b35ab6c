"""C face of the tidying thread."""

from libc.stdint cimport uint64_t

from zcache_core.core cimport Core

cdef int tidy_start(Core *core) noexcept nogil
cdef void tidy_stop(Core *core) noexcept nogil
cdef uint64_t tidy_all(Core *core) noexcept nogil
