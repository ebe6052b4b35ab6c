"""C face of finding pages held for others again."""

from libc.stdint cimport uint64_t

from zcache_core.foreign cimport Foreign

cdef void foreign_take_over(Foreign *f) noexcept nogil
cdef uint64_t foreign_check(Foreign *f) noexcept nogil
