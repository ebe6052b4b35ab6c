"""Encryption of pages that leave this machine's RAM, for the disk and for peers.

    blob (n bytes)  --seal-->  | counter 8 | tag 16 | ciphertext n |
                    <--open--  or refused, whatever was changed and wherever

Authenticated encryption by libcrypto: AES-256-GCM, or ChaCha20-Poly1305 where the CPU
has no instructions for AES.  What is sealed is bound to what it is: epoch of the
memory file, page, version, length, codec, device and purpose are associated data
(`Associated`), so a blob of another page, an older one, or one meant for the disk is
refused from a peer.

No nonce is ever used twice with a key: it is a counter, handed out from ranges that are
taken off a number in the memory file before the first of them is used, whole; what a
dead server had left of one is never used.  The purpose is part of the nonce.

    nonce (96 bits)   counter 64 | purpose 8 | 0 (24)

The key lies in the memory file, which is locked and never dumped; the schedules that
libcrypto makes of it lie in these contexts, wiped when they are discarded.

Bound: CRYPT_CONTEXTS at once, all made at start, about 100 KiB; sealing and opening allocate
nothing.  Who finds all taken yields until one is free: nobody holds one for more than
a page's time (1 to 2 us).

Sources: NIST SP 800-38D (GCM), RFC 8439 (ChaCha20-Poly1305), evp(7).
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from zcache_core.layout cimport KEY_BYTES, PAGE_BYTES
from zcache_core.memfile cimport MemoryFile
from zcache_core.native cimport zc_add64, zc_cas32, zc_load32, zc_store32
from zcache_core.pthread cimport lock_init, lock_take, now_us, pthread_mutex_unlock, sched_yield

from zcache_core.errors import MemoryFileError

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    enum: EVP_CTRL_AEAD_GET_TAG, EVP_CTRL_AEAD_SET_TAG
    EVP_CIPHER *EVP_CIPHER_fetch(void *library, const char *name, const char *properties)
    void EVP_CIPHER_free(EVP_CIPHER *)
    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *)
    int EVP_CIPHER_CTX_ctrl(EVP_CIPHER_CTX *, int type, int arg, void *data)
    int EVP_CipherInit_ex(EVP_CIPHER_CTX *, const EVP_CIPHER *, void *engine, const uint8_t *key, const uint8_t *nonce, int seal)
    int EVP_CipherUpdate(EVP_CIPHER_CTX *, uint8_t *out, int *written, const uint8_t *data, int length)
    int EVP_CipherFinal_ex(EVP_CIPHER_CTX *, uint8_t *out, int *written)

cdef extern from *:
    """
    #if defined(__aarch64__)
    #include <sys/auxv.h>
    static int zc_cpu_has_aes(void) { return (getauxval(AT_HWCAP) >> 3) & 1; }    /* HWCAP_AES */
    #elif defined(__x86_64__)
    static int zc_cpu_has_aes(void) { return __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul"); }
    #else
    static int zc_cpu_has_aes(void) { return 0; }
    #endif
    static __thread unsigned zc_last_context;   /* where this thread looks first */
    """
    int zc_cpu_has_aes() nogil
    unsigned int zc_last_context

cdef enum:
    RANGE_STEP = 1 << 20        # nonces reserved at a time: one store each million pages


cdef const char *cipher_name(uint32_t cipher) noexcept nogil:
    if cipher == CIPHER_AES_256_GCM:
        return b"AES-256-GCM"
    return b"ChaCha20-Poly1305"


cdef uint32_t best_cipher() noexcept nogil:
    """AES where the CPU has it: 4 KiB in 1.1 us, against 1.4 us by ChaCha20-Poly1305 (AVX-512) or more."""
    return CIPHER_AES_256_GCM if zc_cpu_has_aes() else CIPHER_CHACHA20_POLY1305


# ---- one operation on one context ------------------------------------------------------------

cdef EVP_CIPHER_CTX *context_new(uint32_t cipher, const uint8_t *key, bint seal) noexcept nogil:
    """A context with its key in place; NULL when libcrypto refuses."""
    cdef EVP_CIPHER *kind = EVP_CIPHER_fetch(NULL, cipher_name(cipher), NULL)
    cdef EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new()
    if kind == NULL or c == NULL or EVP_CipherInit_ex(c, kind, NULL, key, NULL, seal) != 1:
        EVP_CIPHER_CTX_free(c)
        c = NULL
    EVP_CIPHER_free(kind)       # the context keeps a count of its own
    return c


cdef bint seal_with(
    EVP_CIPHER_CTX *c, const uint8_t *nonce, const uint8_t *about, int about_bytes,
    const uint8_t *plain, int length_bytes, uint8_t *out, uint8_t *tag,
) noexcept nogil:
    cdef int n = 0
    return (
        EVP_CipherInit_ex(c, NULL, NULL, NULL, nonce, 1) == 1
        and EVP_CipherUpdate(c, NULL, &n, about, about_bytes) == 1
        and EVP_CipherUpdate(c, out, &n, plain, length_bytes) == 1 and n == length_bytes
        and EVP_CipherFinal_ex(c, out + length_bytes, &n) == 1
        and EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_GET_TAG, TAG_BYTES, tag) == 1
    )


cdef bint open_with(
    EVP_CIPHER_CTX *c, const uint8_t *nonce, const uint8_t *about, int about_bytes,
    const uint8_t *data, int length_bytes, uint8_t *out, const uint8_t *tag,
) noexcept nogil:
    """False when anything is not as it was sealed; `out` is wiped then."""
    cdef int n = 0
    if (
        EVP_CipherInit_ex(c, NULL, NULL, NULL, nonce, 0) == 1
        and EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_SET_TAG, TAG_BYTES, <void *>tag) == 1
        and EVP_CipherUpdate(c, NULL, &n, about, about_bytes) == 1
        and EVP_CipherUpdate(c, out, &n, data, length_bytes) == 1 and n == length_bytes
        and EVP_CipherFinal_ex(c, out + length_bytes, &n) == 1
    ):
        return True
    memset(out, 0, length_bytes)
    return False


# ---- nonces, contexts ----------------------------------------------------------------------------

cdef uint64_t nonce_take(Nonces *nonces) noexcept nogil:
    """A counter that nobody had or will have with this key."""
    cdef uint64_t mine
    lock_take(&nonces.lock)
    if nonces.next == nonces.end:
        nonces.next = zc_add64(nonces.reserved, RANGE_STEP)
        nonces.end = nonces.next + RANGE_STEP
    mine = nonces.next
    nonces.next += 1
    pthread_mutex_unlock(&nonces.lock)
    return mine


cdef inline void nonce_bytes(uint64_t counter, uint8_t purpose, uint8_t *nonce) noexcept nogil:
    memset(nonce, 0, NONCE_BYTES)
    memcpy(nonce, &counter, 8)
    nonce[8] = purpose


cdef Context *context_take(Crypt *crypt) noexcept nogil:
    """A free context, the one this thread had last if possible."""
    global zc_last_context
    cdef uint32_t first = zc_last_context
    cdef uint32_t i, at
    while True:
        for i in range(CRYPT_CONTEXTS):
            at = (first + i) % CRYPT_CONTEXTS
            if zc_load32(&crypt.context[at].busy) == 0 and zc_cas32(&crypt.context[at].busy, 0, 1):
                zc_last_context = at
                return &crypt.context[at]
        sched_yield()


cdef int crypt_make(Crypt *crypt, const uint8_t *key, uint64_t *reserved, uint32_t cipher) noexcept nogil:
    """Contexts for this key of KEY_BYTES; -1 when libcrypto gives none.  `cipher` 0: the CPU's best.

    Opening knows every cipher; only what is sealed anew is of `cipher`.
    """
    cdef uint32_t i, kind
    memset(crypt, 0, sizeof(Crypt))
    crypt.cipher = cipher or best_cipher()
    crypt.nonces.reserved = reserved
    lock_init(&crypt.nonces.lock)
    for i in range(CRYPT_CONTEXTS):
        crypt.context[i].seal = context_new(crypt.cipher, key, True)
        if crypt.context[i].seal == NULL:
            return -1
        for kind in range(1, CIPHERS):
            crypt.context[i].open[kind] = context_new(kind, key, False)
            if crypt.context[i].open[kind] == NULL:
                return -1
    return 0


cdef void crypt_discard(Crypt *crypt) noexcept nogil:
    """Wipe and free the contexts; harmless when done before."""
    cdef uint32_t i, kind
    for i in range(CRYPT_CONTEXTS):
        EVP_CIPHER_CTX_free(crypt.context[i].seal)
        for kind in range(1, CIPHERS):
            EVP_CIPHER_CTX_free(crypt.context[i].open[kind])
    memset(crypt, 0, sizeof(Crypt))


# ---- what tiers call --------------------------------------------------------------------------------

cdef bint crypt_seal(
    Crypt *crypt, const Associated *about, const uint8_t *plain, uint32_t length_bytes, uint8_t *sealed
) noexcept nogil:
    """Seal a blob into `sealed` (SEAL_BYTES more than it); False when libcrypto fails."""
    cdef uint8_t nonce[NONCE_BYTES]
    cdef uint64_t counter = nonce_take(&crypt.nonces)
    cdef Context *context = context_take(crypt)
    cdef bint good
    nonce_bytes(counter, about.purpose, nonce)
    memcpy(sealed, &counter, 8)
    good = seal_with(
        context.seal, nonce, <const uint8_t *>about, sizeof(Associated), plain, length_bytes,
        sealed + SEAL_BYTES, sealed + 8,
    )
    zc_store32(&context.busy, 0)
    return good


cdef bint crypt_open(
    Crypt *crypt, uint32_t cipher, const Associated *about, const uint8_t *sealed, uint32_t length_bytes, uint8_t *plain
) noexcept nogil:
    """The blob of length_bytes behind its seal; `plain` may be where the ciphertext is.

    False when it is not exactly what was sealed, or under another key: then `plain` is zeros.
    """
    cdef uint8_t nonce[NONCE_BYTES]
    cdef uint64_t counter
    cdef Context *context
    cdef bint good
    if cipher == CIPHER_NONE or cipher >= CIPHERS:
        return False
    memcpy(&counter, sealed, 8)
    nonce_bytes(counter, about.purpose, nonce)
    context = context_take(crypt)
    good = open_with(
        context.open[cipher], nonce, <const uint8_t *>about, sizeof(Associated), sealed + SEAL_BYTES,
        length_bytes, plain, sealed + 8,
    )
    zc_store32(&context.busy, 0)
    return good


# ---- Python's view ----------------------------------------------------------------------------------

CIPHER_NAMES = {CIPHER_AES_256_GCM: "AES-256-GCM", CIPHER_CHACHA20_POLY1305: "ChaCha20-Poly1305"}


cdef class Sealer:
    """Sealing and opening with a memory file's key: the disk's, or the one for peers.

    `cipher` 1 or 2 as in CIPHER_NAMES, 0: what is best on this CPU.  Raises MemoryFileError.
    """

    def __cinit__(self, MemoryFile memory not None, uint32_t cipher=0, bint for_peers=False):
        if cipher >= CIPHERS:
            raise ValueError(f"there is no cipher {cipher}; use one of {CIPHER_NAMES}")
        if memory.base == NULL or not memory.writable:
            raise MemoryFileError("encryption needs a memory file that is open for writing")
        cdef const uint8_t *key = memory.keys.disk_key
        if for_peers:
            key = memory.keys.peer_key
        self.memory = memory
        if crypt_make(&self.crypt, key, &memory.super.nonces_reserved, cipher):
            raise MemoryFileError("libcrypto refuses to encrypt with AES-256-GCM and ChaCha20-Poly1305; install another")

    def __dealloc__(self):
        crypt_discard(&self.crypt)

    @property
    def cipher(self):
        """Number of the cipher that seals."""
        return self.crypt.cipher

    def seal(self, bytes plain not None, Py_ssize_t copies=1, **about):
        """The sealed blob of 1 to 4096 bytes; `about`: epoch, version, page, length_codec, device, purpose.

        `copies` seals it so often, and the last one counts: for measurements.
        """
        cdef Associated bound = associated(about)
        cdef uint8_t out[PAGE_BYTES + SEAL_BYTES]
        cdef const uint8_t *data = plain
        cdef uint32_t length = len(plain)
        cdef Py_ssize_t i
        cdef bint good = True
        if not 0 < length <= PAGE_BYTES:
            raise ValueError("a blob has 1 to 4096 bytes")
        with nogil:
            for i in range(copies):
                good = crypt_seal(&self.crypt, &bound, data, length, out) and good
        if not good:
            raise MemoryFileError("libcrypto failed to encrypt; see its version")
        return (<char *>out)[: length + SEAL_BYTES]

    def open(self, bytes sealed not None, uint32_t cipher=0, Py_ssize_t copies=1, **about):
        """The blob again; None when anything is not as it was sealed."""
        cdef Associated bound = associated(about)
        cdef uint8_t out[PAGE_BYTES]
        cdef const uint8_t *data = sealed
        cdef uint32_t length = max(0, len(sealed) - <Py_ssize_t>SEAL_BYTES)
        cdef Py_ssize_t i
        cdef bint good = True
        if not 0 < length <= PAGE_BYTES:
            return None
        with nogil:
            for i in range(copies):
                good = crypt_open(&self.crypt, cipher or self.crypt.cipher, &bound, data, length, out) and good
        return (<char *>out)[:length] if good else None


cdef Associated associated(dict about) except *:
    cdef Associated bound
    memset(&bound, 0, sizeof(bound))
    bound.epoch, bound.version = about.pop("epoch", 0), about.pop("version", 0)
    bound.page, bound.device = about.pop("page", 0), about.pop("device", 0)
    bound.length_codec, bound.purpose = about.pop("length_codec", 0), about.pop("purpose", FOR_DISK)
    if about:
        raise TypeError(f"a blob is not bound to {', '.join(about)}")
    return bound


def aead(uint32_t cipher, bytes key not None, bytes nonce not None, bytes about not None, bytes data not None, bytes tag=None):
    """The bare cipher, for published vectors: (ciphertext, tag), or, with a tag, the plain text or None."""
    cdef EVP_CIPHER_CTX *c
    cdef uint8_t made[TAG_BYTES]
    out = bytearray(len(data) + 1)
    cdef uint8_t *at = out
    if len(key) != KEY_BYTES or len(nonce) != NONCE_BYTES or tag is not None and len(tag) != TAG_BYTES:
        raise ValueError("a key has 32 bytes, a nonce 12, a tag 16")
    c = context_new(cipher, key, tag is None)
    if c == NULL:
        raise ValueError(f"libcrypto has no cipher {cipher}")
    try:
        if tag is None:
            if not seal_with(c, nonce, about, len(about), data, len(data), at, made):
                raise ValueError("libcrypto failed to encrypt")
            return bytes(out[: len(data)]), (<char *>made)[:TAG_BYTES]
        good = open_with(c, nonce, about, len(about), data, len(data), at, tag)
        return bytes(out[: len(data)]) if good else None
    finally:
        EVP_CIPHER_CTX_free(c)


def time_seal(Sealer sealer not None, bytes plain not None, Py_ssize_t rounds):
    """(seconds to seal, seconds to open) the blob `rounds` times, without Python."""
    cdef int64_t start = now_us()
    sealed = sealer.seal(plain, rounds)
    cdef int64_t middle = now_us()
    if sealer.open(sealed, 0, rounds) != plain:
        raise MemoryFileError("what was sealed does not open")
    return (middle - start) / 1e6, (now_us() - middle) / 1e6
