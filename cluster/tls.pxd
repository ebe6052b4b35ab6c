"""C face of TLS for a lane: bytes to records and back, no socket."""

from libc.stdint cimport int64_t, uint8_t, uint64_t

from zcache_core.pthread cimport pthread_mutex_t

cdef extern from "<openssl/ssl.h>" nogil:
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_CTX:
        pass

cdef enum:
    TLS_IN_BYTES = 1 << 16      # of records that came
    TLS_RECORD = 1 << 14        # most bytes in one (RFC 8446, 5.1)
    TLS_MORE = 256              # most that a record is longer
    TLS_WIRE_BYTES = 2 * (TLS_RECORD + TLS_MORE)    # of records to be sent

cdef enum:
    TLS_DONE = 1
    TLS_WANTS = 0               # bytes from the peer
    TLS_BAD = -1                # the connection is over; `reason` says why

ctypedef struct Tls:
    SSL *ssl                    # NULL: plain
    pthread_mutex_t lock        # guards ssl, and is held while bytes are made to others; a leaf
    bint talks                  # lock held: what is made now may be sent
    const char *reason          # static; NULL: it was closed in order
    uint8_t *came               # `came_begin` to `came_end`: the reader's alone
    uint64_t came_begin
    uint64_t came_end
    bint half                   # there was a record's beginning last, and not its end; the reader's alone
    uint8_t *wire               # `wire_begin` to `wire_end`: the sender's alone
    uint64_t wire_begin
    uint64_t wire_end

cdef bint tls_make(Tls *tls, SSL_CTX *ctx, bint server, bint touched) noexcept nogil
cdef void tls_discard(Tls *tls) noexcept nogil
cdef int tls_shake(Tls *tls) noexcept nogil
cdef int64_t tls_open(Tls *tls, uint8_t *to, uint64_t room) noexcept nogil
cdef int64_t tls_seal(Tls *tls, const uint8_t *bytes, uint64_t n) noexcept nogil
cdef str name_in(Tls *tls)


cdef class TlsRules:
    cdef SSL_CTX *ctx
    cdef bint server
