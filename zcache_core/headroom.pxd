"""C face of the headroom: how much memory can be taken without reclaim."""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    ZONE_TEXT_BYTES = 16384

ctypedef struct Headroom:
    int fd                      # /proc/zoneinfo, kept open; -1: nothing is known
    uint64_t plenty_bytes       # with so much free no zone has to be looked at
    int64_t looked_us           # when that was computed
    char text[ZONE_TEXT_BYTES]  # one read of the file; nothing is allocated while it is used

cdef void headroom_open(Headroom *h, const char *zoneinfo) noexcept nogil
cdef void headroom_close(Headroom *h) noexcept nogil
cdef bint headroom_is_plenty(Headroom *h, uint64_t bytes) noexcept nogil
cdef uint64_t headroom_bytes(Headroom *h, uint64_t enough_bytes) noexcept nogil
