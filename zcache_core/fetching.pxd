"""C face of reads from below."""

from libc.stdint cimport uint8_t, uint64_t

from zcache_core.layout cimport Entry

cdef int tiers_fetch(void *tiers, void *slot_argument, uint64_t page, Entry e, uint8_t *data) noexcept nogil
