"""C face of the limit of bytes written to the disk in a day."""

from libc.stdint cimport uint64_t

from zcache_core.layout cimport Superblock

ctypedef struct Quota:
    Superblock *super           # day and bytes stand there: a restart goes on counting
    const uint64_t *limit_bytes # of a day, 0: none.  Atomic: changed while the server runs
    uint64_t *cells

cdef void quota_init(Quota *q, Superblock *super, const uint64_t *limit_bytes, uint64_t *cells) noexcept nogil
cdef bint quota_allows(Quota *q, uint64_t bytes) noexcept nogil
cdef bint quota_is_used_up(const Quota *q, uint64_t bytes) noexcept nogil
cdef void quota_count(Quota *q, uint64_t bytes) noexcept nogil
