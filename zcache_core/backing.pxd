"""C face of the backing: giving frames memory, without waiting for reclaim while serving."""

from libc.stdint cimport uint8_t, uint64_t

from zcache_core.headroom cimport Headroom

ctypedef struct Backing:
    Headroom headroom
    int policy, priority        # of the serving threads: who made this one
    bint short                  # this round: memory is short, and we run in their class

cdef int back_range(uint8_t *start, uint64_t length_bytes) noexcept nogil
cdef void backing_open(Backing *b, const char *zoneinfo) noexcept nogil
cdef void backing_close(Backing *b) noexcept nogil
cdef void backing_round(Backing *b, uint64_t round_bytes) noexcept nogil
cdef bint backing_may(Backing *b, uint64_t bytes) noexcept nogil
cdef void backing_round_ends(Backing *b) noexcept nogil
cdef void change_class(int policy, int priority) noexcept nogil
