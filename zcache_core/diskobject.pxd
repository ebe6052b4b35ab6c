"""C face of objects on the disk: their size, and what they look like."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdPage
from zcache_core.crypt cimport SEAL_BYTES, Crypt
from zcache_core.layout cimport HEADER_BYTES

cdef enum:
    OBJECT_ALIGN = 8            # so the low three bits of an offset are free for the cipher

ctypedef struct Whose:          # what every object of one disk is bound to
    uint64_t epoch              # of the memory file
    uint32_t device
    uint32_t cipher             # of objects written from now on; CIPHER_NONE: plain
    Crypt *crypt                # NULL: nothing can be sealed or opened

cdef bint object_write(const Whose *whose, uint8_t *at, const ColdPage *page) noexcept nogil
cdef int object_read(const Whose *whose, uint8_t *at, const ColdPage *page) noexcept nogil
cdef bint object_found(const Whose *whose, uint8_t *at, uint32_t room_bytes, uint64_t offset, ColdPage *page) noexcept nogil


cdef inline uint64_t offset_of(uint64_t where) noexcept nogil:
    """The byte offset on the disk in an address."""
    return where & ~<uint64_t>(OBJECT_ALIGN - 1)

cdef inline uint32_t cipher_of(uint64_t where) noexcept nogil:
    return where & (OBJECT_ALIGN - 1)

cdef inline uint32_t head_bytes(uint32_t cipher) noexcept nogil:
    """What stands before the blob's bytes."""
    return HEADER_BYTES + (SEAL_BYTES if cipher else 0)

cdef inline uint32_t object_room(uint32_t cipher, uint32_t length_bytes) noexcept nogil:
    """Bytes that an object takes on the disk."""
    return (head_bytes(cipher) + length_bytes + OBJECT_ALIGN - 1) // OBJECT_ALIGN * OBJECT_ALIGN
