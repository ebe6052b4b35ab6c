"""C face of the codecs."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.slots cimport Slot, Slots

ctypedef struct CodecChoice:
    uint32_t codec              # a layout.Codec; CODEC_RAW: never compress
    int level                   # zstd only

cdef int codec_prepare(Slots *slots, CodecChoice choice) noexcept nogil
cdef void codec_discard(Slots *slots) noexcept nogil
cdef bint codec_expect_zstd(Slots *slots) noexcept nogil
cdef bint codec_make(Slot *slot, CodecChoice choice) noexcept nogil
cdef void codec_unmake(Slot *slot) noexcept nogil
cdef bint codec_load_dictionary(Slot *slot, const uint8_t *bytes, uint32_t length_bytes, int level) noexcept nogil
cdef bint codec_expect_copy(Slots *slots) noexcept nogil
cdef void codec_forget_copy(Slots *slots) noexcept nogil
cdef bint codec_expect_dictionary(Slots *slots, uint32_t number) noexcept nogil
cdef bint codec_dictionary_make(Slots *slots, uint32_t number, const uint8_t *bytes, uint32_t length_bytes) noexcept nogil
cdef uint64_t codec_context_bytes(const Slot *slot) noexcept nogil
cdef uint64_t codec_memory_bytes(Slots *slots) noexcept nogil
cdef uint32_t codec_compress(
    Slot *slot, CodecChoice choice, const uint8_t *page, uint8_t *blob, uint32_t room_bytes
) noexcept nogil
cdef bint codec_decompress(
    Slot *slot, uint32_t codec, const uint8_t *blob, uint32_t length_bytes, uint8_t *page
) noexcept nogil
