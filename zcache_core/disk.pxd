"""C face of the disk tier."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.cold cimport ColdTier
from zcache_core.crypt cimport Crypt
from zcache_core.layout cimport Superblock

cdef ColdTier *disk_make(
    int fd, uint64_t disk_bytes, Superblock *super, uint32_t device, bint preallocated, uint64_t *cells,
    Crypt *crypt, bint encrypt, const uint64_t *limit_bytes,
) noexcept nogil
cdef void disk_keep_first(ColdTier *tier) noexcept nogil
cdef uint64_t disk_to_keep(ColdTier *tier) noexcept nogil
cdef void disk_kept(ColdTier *tier, uint64_t bytes) noexcept nogil
cdef void disk_cut(ColdTier *tier, uint64_t bytes) noexcept nogil
cdef uint64_t disk_memory_bytes(ColdTier *tier) noexcept nogil
cdef void disk_discard(ColdTier *tier) noexcept nogil
