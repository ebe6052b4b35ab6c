"""C face of the share: how much of the machine work in the background takes."""

from libc.stdint cimport int64_t, uint64_t

from zcache_core.core cimport Core

ctypedef struct Share:          # of one thread; zeros are right at its start
    int64_t began_us            # of the piece of work under way
    int64_t began_cpu_us
    int64_t debt_us             # worked since the last rest
    int64_t alone_us            # since then with nobody served, and how much CPU it had of that
    int64_t alone_cpu_us
    uint64_t seen               # requests that had ended at the last look
    int64_t served_until_us     # requests are being served
    int64_t crowded_until_us    # no CPU is spare

cdef uint64_t requests_done(Core *core) noexcept nogil
cdef bint room_is_wanted(Core *core) noexcept nogil
cdef void share_begin(Share *s) noexcept nogil
cdef enum:
    REST = 19                   # per work: at most 5 % of one CPU

cdef void share_also(Share *s, int64_t us) noexcept nogil
cdef int64_t share_rest_us(Core *core, Share *s, int64_t rest, int64_t most_us) noexcept nogil
