"""C face of dictionaries."""

from libc.stdint cimport uint8_t, uint32_t

from zcache_core.core cimport Core

cdef enum:
    DICTIONARY_MOST = 112 << 10     # bytes; tests of 64, 112 and 256 KiB stand in docs/density.md

cdef void dictionaries_open(Core *core) noexcept nogil
cdef void dictionaries_free(Core *core) noexcept nogil
cdef uint32_t dictionary_read(Core *core, uint32_t number, uint8_t *bytes) noexcept nogil
cdef int dictionary_newest(Core *core) noexcept nogil
cdef int dictionary_publish(Core *core, const uint8_t *bytes, uint32_t length_bytes, int current) noexcept nogil
