"""C face of reading neighbours on the disk at once."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdPage, ColdTier

cdef void disk_get_many(ColdTier *tier, ColdPage *pages, uint32_t n, uint8_t *room, uint64_t room_bytes) noexcept nogil
