"""C face of reads from below."""

from libc.stdint cimport uint8_t, uint64_t

from zcache_core.layout cimport Entry

cdef uint64_t ghost_cells(uint64_t pool_frames) noexcept nogil
cdef bint tiers_mend(void *tiers, void *slot_argument, uint64_t page, Entry e, uint8_t *data) noexcept nogil
cdef int tiers_fetch(void *tiers, void *slot_argument, uint64_t page, Entry e, uint8_t *data) noexcept nogil
