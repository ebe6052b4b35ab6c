"""C face of dictionaries."""

from libc.stdint cimport uint8_t, uint32_t

from zcache_core.core cimport Core

cdef bint dictionaries_open(Core *core) noexcept nogil
cdef bint dictionaries_expect(Core *core) noexcept nogil
cdef uint32_t dictionary_read(Core *core, uint32_t number) noexcept nogil
cdef int dictionary_newest(Core *core) noexcept nogil
cdef int dictionary_publish(Core *core, const uint8_t *bytes, uint32_t length_bytes, int current) noexcept nogil
