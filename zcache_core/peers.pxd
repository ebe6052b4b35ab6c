"""C face of the peer tier."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdPage
from zcache_core.layout cimport Superblock
from zcache_core.peernotes cimport Peers

cdef int peers_get_within(Peers *p, ColdPage *page, int64_t most_us) noexcept nogil
cdef uint64_t peers_memory_bytes() noexcept nogil
cdef bint peers_make(Peers *p, Superblock *super, uint32_t device, uint64_t *cells) noexcept nogil
cdef void peers_discard(Peers *p) noexcept nogil
