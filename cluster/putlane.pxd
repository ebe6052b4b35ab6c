"""C face of puts that an owner's connection makes without the session."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from cluster.frames cimport RECORDS_MOST
from cluster.lane cimport LaneEnd
from cluster.lanesend cimport Lane
from zcache_core.pthread cimport pthread_mutex_t

cdef enum:
    PUTS_MOST = 8               # half of what a donor takes on one connection; the rest is the session's

ctypedef struct Put:            # one under way
    uint32_t state
    uint32_t msgid
    uint32_t n
    uint64_t offer[3]           # of its answer
    uint8_t codes[RECORDS_MOST]

ctypedef struct Puts:
    pthread_mutex_t lock        # guards the rest; a leaf
    uint32_t next_msgid
    Put put[PUTS_MOST]


cdef inline bint is_a_puts(uint32_t msgid) noexcept nogil:
    """Whether it is a number of ours: the upper half of those that are not the session's."""
    return msgid >> 30 == 3


cdef int64_t put_answered(Puts *puts, Lane *lane, const uint8_t *bytes, uint64_t have, uint32_t msgid) noexcept nogil


cdef class PutLane(LaneEnd):
    cdef Puts puts
    cdef dict waiting           # msgid -> future
    cdef object _put_is_read(self, response)
