"""Declarations of `native.h`: atomics, entry check, blob checksum, same-filled test."""

from libc.stdint cimport uint32_t, uint64_t


cdef extern from "native.h" nogil:
    int zc_cas16(void *p, uint64_t old_lo, uint64_t old_hi, uint64_t new_lo, uint64_t new_hi)
    uint64_t zc_load64(const uint64_t *p)
    void zc_store64(uint64_t *p, uint64_t v)
    uint64_t zc_add64(uint64_t *p, uint64_t v)
    uint32_t zc_load32(const uint32_t *p)
    void zc_store32(uint32_t *p, uint32_t v)
    uint32_t zc_add32(uint32_t *p, uint32_t v)
    int zc_cas64(uint64_t *p, uint64_t old, uint64_t new)
    int zc_cas32(uint32_t *p, uint32_t old, uint32_t new)
    void zc_acquire_fence()
    void zc_release_fence()
    void zc_full_fence()
    uint32_t zc_bits64(uint64_t v) nogil
    int zc_ctz64(uint64_t v)
    void zc_prefetch(const void *p)
    uint32_t zc_entry_check(uint64_t location, uint64_t version_word)
    uint64_t zc_hash(const void *data, size_t length_bytes)
    uint32_t zc_blob_checksum(const void *data, uint64_t length_bytes, uint64_t identity, uint64_t place)
    int zc_same_filled(const void *page, uint64_t *word)
    void zc_fill_words(void *page, uint64_t word)
