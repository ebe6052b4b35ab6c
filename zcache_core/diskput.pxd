"""C face of writing to the disk."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.cold cimport ColdPage, ColdTier
from zcache_core.diskstate cimport Disk

cdef void come_alive(Disk *d, uint64_t where, uint32_t length_bytes) noexcept nogil
cdef void publish(Disk *d) noexcept nogil
cdef void disk_drop(ColdTier *tier, const ColdPage *page) noexcept nogil
cdef void note_cut(Disk *d, uint64_t bytes) noexcept nogil
cdef bint must_keep(const Disk *d) noexcept nogil
cdef bint disk_takes(ColdTier *tier) noexcept nogil
cdef uint32_t disk_put(ColdTier *tier, ColdPage *pages, uint32_t n) noexcept nogil
