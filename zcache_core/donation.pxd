"""C face of the store of pages that this machine holds for others."""

from libc.stdint cimport uint32_t

from zcache_core.foreign cimport Foreign
from zcache_core.memfile cimport MemoryFile


cdef class Donation:
    cdef Foreign f
    cdef readonly MemoryFile memory
    cdef bint open
    cdef object _require_open(self)
    cdef object _require_row(self, uint32_t row)
    cdef object _name(self, uint32_t row)
    cdef object _count_owners(self)
    cdef object _sweep_all(self)
