"""C face of a memory file's geometry."""

from libc.stdint cimport uint8_t, uint64_t

cdef uint64_t map_bytes(uint64_t frames) noexcept nogil
cdef void map_ahead(uint8_t *base) noexcept nogil
