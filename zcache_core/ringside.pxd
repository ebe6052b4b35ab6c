"""C face of the node's end of the ring."""

from libc.stdint cimport uint64_t

from zcache_core.ring cimport Note, Ring


cdef class RingSide:
    cdef Ring *ring
    cdef int lock_fd
    cdef readonly int wake_fd
    cdef uint64_t attached

    cdef object _take_over(self)
    cdef Note *_note(self)
    cdef object _send(self)
