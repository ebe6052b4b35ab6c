"""C face of the encryption of pages that leave this machine's RAM."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from zcache_core.pthread cimport pthread_mutex_t

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER_CTX:
        pass

cdef enum:
    TAG_BYTES = 16
    NONCE_BYTES = 12            # counter (8, little-endian), purpose (1), zeros
    SEAL_BYTES = 24             # what a sealed blob is longer: counter (8), tag (16)
    # Every request slot, every thread that moves pages, and some to spare.
    CRYPT_CONTEXTS = 40

cdef enum Cipher:
    CIPHER_NONE = 0
    CIPHER_AES_256_GCM = 1
    CIPHER_CHACHA20_POLY1305 = 2
    CIPHERS = 3

cdef enum Purpose:
    FOR_DISK = 1
    FOR_PEER = 2

ctypedef struct Associated:     # 24 bytes, little-endian: what a blob is bound to
    uint64_t epoch              # of the memory file
    uint64_t version
    uint32_t page
    uint16_t length_codec       # length - 1 (12 bits), codec (4), as in an entry
    uint8_t device
    uint8_t purpose

ctypedef struct Nonces:
    uint64_t *reserved          # in the memory file, atomic: every number below may have been used
    uint64_t next               # of the range that is this one's alone ...
    uint64_t end                # ... and its end
    pthread_mutex_t lock        # guards both

ctypedef struct Context:        # one cache line
    uint32_t busy               # taken by compare-and-swap
    uint32_t number
    EVP_CIPHER_CTX *seal
    EVP_CIPHER_CTX *open[CIPHERS]
    uint64_t padding[3]

ctypedef struct Crypt:
    uint32_t cipher             # of what is sealed from now on
    Nonces nonces
    Context context[CRYPT_CONTEXTS]

cdef int crypt_make(Crypt *crypt, const uint8_t *key, uint64_t *reserved, uint32_t cipher) noexcept nogil
cdef void crypt_discard(Crypt *crypt) noexcept nogil
cdef bint crypt_seal(
    Crypt *crypt, const Associated *about, const uint8_t *plain, uint32_t length_bytes, uint8_t *sealed
) noexcept nogil
cdef bint crypt_open(
    Crypt *crypt, uint32_t cipher, const Associated *about, const uint8_t *sealed, uint32_t length_bytes, uint8_t *plain
) noexcept nogil


cdef class Sealer:
    cdef Crypt crypt
    cdef object memory          # whose key and nonces these are, kept alive
