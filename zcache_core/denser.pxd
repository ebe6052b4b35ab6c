"""C face of recompression."""

from libc.stdint cimport uint32_t

from zcache_core.core cimport Core

cdef void dense_init(Core *core) noexcept nogil
cdef int dense_start(Core *core) noexcept nogil
cdef void dense_choose(Core *core, int level, uint32_t age_s) noexcept nogil
cdef bint dense_all(Core *core, int level) noexcept nogil
cdef void dense_stop(Core *core) noexcept nogil
cdef bint dense_begin(Core *core) noexcept nogil
