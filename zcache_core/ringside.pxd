"""C face of the node's end of the ring."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.ring cimport Note, Ring


cdef class RingSide:
    cdef Ring *ring
    cdef int lock_fd
    cdef readonly int wake_fd
    cdef uint64_t attached

    cdef object _take_over(self)
    cdef object _put_part(self, uint32_t first, uint32_t n)
    cdef Note *_note(self)
    cdef object _send(self)
