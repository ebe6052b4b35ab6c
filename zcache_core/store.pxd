"""C face of the store: the struct behind the class."""

from zcache_core.core cimport Core
from zcache_core.memfile cimport MemoryFile


cdef class Store:
    cdef Core core
    cdef readonly MemoryFile memory
    cdef readonly str codec_text
    cdef bytes zoneinfo
    cdef readonly str commit
    cdef bint tidy
    cdef bint open
    cdef bint started
    cdef bint begun             # the counters are ours
    cdef object _require_open(self)
