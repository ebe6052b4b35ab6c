"""TLS without a socket, for a lane: OpenSSL between two buffers.

    socket --recv--> came --tls_open--> bytes       the reader's side
    bytes --tls_seal--> wire --send--> socket       the sender's side

One reader and one sender at a time, of different threads; OpenSSL's object is one for both, so each takes
the lock while it makes one record to bytes or bytes to one record, and nobody waits for a socket
with it.  What belongs to TLS itself is said only in the handshake and with bytes of ours: a peer that
wants an answer of TLS while it is read (there is none of ours that does) loses its connection.

The rules (`TlsRules`): TLS 1.3, certificates on both sides, signed by the one authority; who is who
is asked of the name in it (`name_in`).  No tickets, no resumption: each connection shows its certificate.

Bound: TLS_IN_BYTES and TLS_WIRE_BYTES, and what OpenSSL has for a connection (40 KiB), all of it from the
handshake on; for a record it asks malloc for four blocks of 48 bytes, which it gives back at once, and for
nothing else (tests/t1_tls.py counts).
Source: RFC 8446.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from zcache_core.pthread cimport lock_init, lock_take, now_us, pthread_mutex_unlock

cdef extern from "<openssl/bio.h>" nogil:
    ctypedef struct BIO:
        pass
    ctypedef struct BIO_METHOD:
        pass
    enum: BIO_TYPE_SOURCE_SINK, BIO_CTRL_FLUSH
    int BIO_get_new_index()
    BIO_METHOD *BIO_meth_new(int kind, const char *name)
    int BIO_meth_set_read(BIO_METHOD *, int (*)(BIO *, char *, int) noexcept nogil)
    int BIO_meth_set_write(BIO_METHOD *, int (*)(BIO *, const char *, int) noexcept nogil)
    int BIO_meth_set_ctrl(BIO_METHOD *, long (*)(BIO *, int, long, void *) noexcept nogil)
    BIO *BIO_new(const BIO_METHOD *)
    BIO *BIO_new_mem_buf(const void *bytes, int n)
    void BIO_set_data(BIO *, void *)
    void *BIO_get_data(BIO *)
    void BIO_set_init(BIO *, int)
    void BIO_set_retry_read(BIO *)
    void BIO_clear_retry_flags(BIO *)
    int BIO_free(BIO *)
cdef extern from "<openssl/x509.h>" nogil:
    enum: NID_commonName, X509_V_OK
    ctypedef struct X509:
        pass
    ctypedef struct X509_NAME:
        pass
    ctypedef struct X509_NAME_ENTRY:
        pass
    ctypedef struct X509_STORE:
        pass
    ctypedef struct ASN1_STRING:
        pass
    int X509_STORE_add_cert(X509_STORE *, X509 *)
    X509_NAME *X509_get_subject_name(const X509 *)
    int X509_NAME_get_index_by_NID(const X509_NAME *, int nid, int after)
    X509_NAME_ENTRY *X509_NAME_get_entry(const X509_NAME *, int at)
    ASN1_STRING *X509_NAME_ENTRY_get_data(const X509_NAME_ENTRY *)
    int ASN1_STRING_to_UTF8(unsigned char **out, const ASN1_STRING *)
    const char *X509_verify_cert_error_string(long)
    void X509_free(X509 *)
cdef extern from "<openssl/pem.h>" nogil:
    X509 *PEM_read_bio_X509(BIO *, X509 **, void *callback, void *about)
cdef extern from "<openssl/err.h>" nogil:
    void ERR_clear_error()
    unsigned long ERR_peek_error()
    const char *ERR_reason_error_string(unsigned long)
cdef extern from "<openssl/crypto.h>" nogil:
    void OPENSSL_free(void *)
cdef extern from "<openssl/ssl.h>" nogil:
    ctypedef struct SSL_METHOD:
        pass
    enum:
        TLS1_3_VERSION, SSL_FILETYPE_PEM, SSL_VERIFY_PEER, SSL_VERIFY_FAIL_IF_NO_PEER_CERT, SSL_SESS_CACHE_OFF
        SSL_ERROR_WANT_READ, SSL_ERROR_ZERO_RETURN
    const SSL_METHOD *TLS_server_method()
    const SSL_METHOD *TLS_client_method()
    SSL_CTX *SSL_CTX_new(const SSL_METHOD *)
    void SSL_CTX_free(SSL_CTX *)
    int SSL_CTX_set_min_proto_version(SSL_CTX *, int)
    void SSL_CTX_set_verify(SSL_CTX *, int mode, void *callback)
    void SSL_CTX_set_security_level(SSL_CTX *, int)
    long SSL_CTX_set_session_cache_mode(SSL_CTX *, long)
    int SSL_CTX_set_num_tickets(SSL_CTX *, size_t)
    void SSL_CTX_set_default_passwd_cb(SSL_CTX *, int (*)(char *, int, int, void *) noexcept nogil)
    int SSL_CTX_use_certificate_chain_file(SSL_CTX *, const char *)
    int SSL_CTX_use_PrivateKey_file(SSL_CTX *, const char *, int kind)
    int SSL_CTX_check_private_key(const SSL_CTX *)
    X509_STORE *SSL_CTX_get_cert_store(const SSL_CTX *)
    SSL *SSL_new(SSL_CTX *)
    void SSL_free(SSL *)
    void SSL_set_bio(SSL *, BIO *, BIO *)
    void SSL_set_accept_state(SSL *)
    void SSL_set_connect_state(SSL *)
    int SSL_do_handshake(SSL *)
    int SSL_read(SSL *, void *to, int n)
    int SSL_write(SSL *, const void *of, int n)
    int SSL_get_error(const SSL *, int result)
    long SSL_get_verify_result(const SSL *)
    X509 *SSL_get1_peer_certificate(const SSL *)

cdef enum:
    SECURITY_LEVEL = 2          # 112 bits: as Debian's own setting, and Python's, whatever openssl.cnf says
    BUFFERS_BYTES = TLS_IN_BYTES + TLS_WIRE_BYTES


# ---- what OpenSSL reads from and writes to -----------------------------------------------

cdef int came_read(BIO *bio, char *to, int n) noexcept nogil:
    """Of what came."""
    cdef Tls *tls = <Tls *>BIO_get_data(bio)
    cdef uint64_t have = tls.came_end - tls.came_begin
    BIO_clear_retry_flags(bio)
    if n <= 0 or have == 0:
        BIO_set_retry_read(bio)
        return -1
    have = min(have, <uint64_t>n)
    memcpy(to, tls.came + tls.came_begin, have)
    tls.came_begin += have
    return <int>have


cdef int wire_write(BIO *bio, const char *of, int n) noexcept nogil:
    """Behind what is to be sent; all of it or, where nothing is to be said, nothing."""
    cdef Tls *tls = <Tls *>BIO_get_data(bio)
    BIO_clear_retry_flags(bio)
    if not tls.talks or n <= 0 or TLS_WIRE_BYTES - tls.wire_end < <uint64_t>n:
        return -1
    memcpy(tls.wire + tls.wire_end, of, n)
    tls.wire_end += <uint64_t>n
    return n


cdef long control(BIO *bio, int what, long number, void *about) noexcept nogil:
    return what == BIO_CTRL_FLUSH


cdef BIO_METHOD *buffers = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, b"lane")
if buffers == NULL or not (
    BIO_meth_set_read(buffers, came_read) and BIO_meth_set_write(buffers, wire_write)
    and BIO_meth_set_ctrl(buffers, control)
):
    raise MemoryError("libcrypto has no memory")


# ---- a connection's ------------------------------------------------------------------------

cdef bint tls_make(Tls *tls, SSL_CTX *ctx, bint server, bint touched) noexcept nogil:
    """For a new connection; `touched`: its buffers are had beforehand.  False without memory."""
    cdef BIO *bio
    memset(tls, 0, sizeof(Tls))
    lock_init(&tls.lock)
    tls.came = <uint8_t *>mmap(NULL, BUFFERS_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if <void *>tls.came == MAP_FAILED:
        tls.came = NULL
        return False
    if touched:
        memset(tls.came, 0, BUFFERS_BYTES)
    tls.wire = tls.came + TLS_IN_BYTES
    bio = BIO_new(buffers)
    tls.ssl = SSL_new(ctx)
    if bio == NULL or tls.ssl == NULL:
        BIO_free(bio)
        tls_discard(tls)
        return False
    BIO_set_data(bio, tls)
    BIO_set_init(bio, 1)
    SSL_set_bio(tls.ssl, bio, bio)
    if server:
        SSL_set_accept_state(tls.ssl)
    else:
        SSL_set_connect_state(tls.ssl)
    return True


cdef void tls_discard(Tls *tls) noexcept nogil:
    """Harmless when done before, or plain."""
    SSL_free(tls.ssl)           # and with it the BIO
    tls.ssl = NULL
    if tls.came != NULL:
        munmap(tls.came, BUFFERS_BYTES)
    tls.came = tls.wire = NULL
    tls.wire_begin = tls.wire_end = 0


cdef int verdict(Tls *tls, int result) noexcept nogil:
    """Lock held: what a call that gave no bytes means."""
    cdef int kind = SSL_get_error(tls.ssl, result)
    cdef long verified
    if kind == SSL_ERROR_WANT_READ:
        return TLS_WANTS
    tls.reason = NULL
    if kind != SSL_ERROR_ZERO_RETURN:
        verified = SSL_get_verify_result(tls.ssl)
        if verified != X509_V_OK:
            tls.reason = X509_verify_cert_error_string(verified)
        else:
            tls.reason = ERR_reason_error_string(ERR_peek_error())
        if tls.reason == NULL:
            tls.reason = b"it says what TLS does not allow"
    return TLS_BAD


cdef int tls_shake(Tls *tls) noexcept nogil:
    """Go on with the handshake; what is on the wire then is to be sent, also when it has failed."""
    cdef int result
    lock_take(&tls.lock)
    tls.talks = True
    ERR_clear_error()
    result = SSL_do_handshake(tls.ssl)
    result = TLS_DONE if result == 1 else verdict(tls, result)
    tls.talks = False
    pthread_mutex_unlock(&tls.lock)
    return result


cdef int64_t tls_open(Tls *tls, uint8_t *to, uint64_t room) noexcept nogil:
    """Of what came, as many bytes as there are whole records for; TLS_WANTS, TLS_BAD."""
    cdef uint64_t got = 0
    cdef int result
    cdef bint fed
    while got < room and tls.came_begin < tls.came_end or got == 0:
        fed = tls.came_begin < tls.came_end
        lock_take(&tls.lock)
        ERR_clear_error()
        result = SSL_read(tls.ssl, to + got, <int>min(room - got, <uint64_t>TLS_RECORD))
        if result <= 0:
            result = verdict(tls, result)
            pthread_mutex_unlock(&tls.lock)
            # (a record without bytes of ours counts as half of one: ours send none)
            tls.half = tls.half or fed
            # (what came before the end is looked at first; the end is found again)
            return <int64_t>got if got else result
        pthread_mutex_unlock(&tls.lock)
        tls.half = False
        got += <uint64_t>result
    return <int64_t>got


cdef int64_t tls_seal(Tls *tls, const uint8_t *bytes, uint64_t n) noexcept nogil:
    """Put the first of these bytes on the wire as one record; how many; 0: it is full; TLS_BAD."""
    cdef uint64_t room
    cdef int result
    if tls.wire_begin == tls.wire_end:
        tls.wire_begin = tls.wire_end = 0
    room = TLS_WIRE_BYTES - tls.wire_end
    if room <= TLS_MORE:
        return 0
    n = min(n, min(room - TLS_MORE, <uint64_t>TLS_RECORD))
    lock_take(&tls.lock)
    tls.talks = True
    ERR_clear_error()
    result = SSL_write(tls.ssl, bytes, <int>n)
    if result <= 0:
        verdict(tls, result)
        result = TLS_BAD
    tls.talks = False
    pthread_mutex_unlock(&tls.lock)
    return result


# ---- as Python has it ------------------------------------------------------------------------

cdef int no_password(char *to, int n, int writing, void *about) noexcept nogil:
    """A key that needs one is of no use: nobody is there to ask."""
    return -1


cdef bint trust(SSL_CTX *ctx, bytes authority):
    cdef BIO *bio = BIO_new_mem_buf(<const char *>authority, <int>len(authority))
    cdef X509 *certificate = PEM_read_bio_X509(bio, NULL, NULL, NULL)
    cdef bint good = certificate != NULL and X509_STORE_add_cert(SSL_CTX_get_cert_store(ctx), certificate) == 1
    X509_free(certificate)
    BIO_free(bio)
    return good


cdef class TlsRules:
    """Who is let in: whoever shows a certificate that this authority has signed.

    node: path of a file with our key and certificate; authority: its certificate, in PEM.
    Raises ValueError with the reason when they are no such thing.
    """

    def __cinit__(self, bytes node not None, bytes authority not None, bint server):
        self.server = server
        ERR_clear_error()
        self.ctx = SSL_CTX_new(TLS_server_method() if server else TLS_client_method())
        if self.ctx == NULL:
            raise MemoryError("libssl has no memory")
        SSL_CTX_set_verify(self.ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL)
        SSL_CTX_set_security_level(self.ctx, SECURITY_LEVEL)
        SSL_CTX_set_session_cache_mode(self.ctx, SSL_SESS_CACHE_OFF)
        SSL_CTX_set_default_passwd_cb(self.ctx, no_password)
        if not (
            SSL_CTX_set_num_tickets(self.ctx, 0)
            and SSL_CTX_set_min_proto_version(self.ctx, TLS1_3_VERSION)
            and SSL_CTX_use_certificate_chain_file(self.ctx, node) == 1
            and SSL_CTX_use_PrivateKey_file(self.ctx, node, SSL_FILETYPE_PEM) == 1
            and SSL_CTX_check_private_key(self.ctx) == 1
            and trust(self.ctx, authority)
        ):
            raise ValueError(why())

    def __dealloc__(self):
        SSL_CTX_free(self.ctx)


cdef str why():
    cdef const char *reason = ERR_reason_error_string(ERR_peek_error())
    return reason.decode() if reason != NULL else "libssl does not take it"


cdef str name_in(Tls *tls):
    """The first common name in the peer's certificate; "" without one."""
    cdef unsigned char *text = NULL
    cdef int at, length = -1
    lock_take(&tls.lock)
    cdef X509 *certificate = SSL_get1_peer_certificate(tls.ssl)
    pthread_mutex_unlock(&tls.lock)
    if certificate == NULL:
        return ""
    at = X509_NAME_get_index_by_NID(X509_get_subject_name(certificate), NID_commonName, -1)
    if at >= 0:
        length = ASN1_STRING_to_UTF8(
            &text, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(X509_get_subject_name(certificate), at))
        )
    name = (<char *>text)[:length].decode("utf-8", "replace") if length > 0 else ""
    if text != NULL:
        OPENSSL_free(text)
    X509_free(certificate)
    return name


cdef void pass_on(Tls *of, Tls *to) noexcept nogil:
    """What one has on its wire, as if it had come to the other; as much as there is room for."""
    cdef uint64_t n
    if to.came_begin == to.came_end:
        to.came_begin = to.came_end = 0
    n = min(of.wire_end - of.wire_begin, <uint64_t>TLS_IN_BYTES - to.came_end)
    memcpy(to.came + to.came_end, of.wire + of.wire_begin, n)
    to.came_end += n
    of.wire_begin += n


def time_records(TlsRules server not None, TlsRules client not None, bytes data not None, Py_ssize_t rounds):
    """Seconds that it takes to seal `data` and to open it again, `rounds` times, in one thread without sockets.

    From server to client, checked.  Raises ValueError when they do not come to terms.
    """
    cdef Tls ends[2]
    cdef const uint8_t *bytes = data
    cdef uint64_t n = len(data)
    cdef uint64_t done = 0
    cdef uint64_t opened = 0
    cdef int64_t step = 1
    cdef int64_t began_us = 0
    cdef Py_ssize_t i
    cdef const char *reason
    out = bytearray(n + 1)
    cdef uint8_t *to = out
    if not tls_make(&ends[0], server.ctx, True, False) or not tls_make(&ends[1], client.ctx, False, False):
        raise MemoryError("no memory for two ends")
    with nogil:
        for i in range(20):     # (turns of a handshake: three are enough)
            if tls_shake(&ends[i & 1]) == TLS_BAD:
                step = TLS_BAD
                break
            pass_on(&ends[i & 1], &ends[1 - (i & 1)])
        began_us = now_us()
        for i in range(rounds):
            done = opened = 0
            while step >= 0 and opened < n:
                step = tls_seal(&ends[0], bytes + done, n - done) if done < n else 0
                done += <uint64_t>max(0, step)
                pass_on(&ends[0], &ends[1])
                if step >= 0:
                    step = tls_open(&ends[1], to + opened, n - opened)
                    opened += <uint64_t>max(0, step)
    took_s = (now_us() - began_us) / 1e6
    reason = ends[0].reason if ends[0].reason != NULL else ends[1].reason
    tls_discard(&ends[0])
    tls_discard(&ends[1])
    if step < 0 or out[:n] != data:
        raise ValueError(reason.decode() if reason != NULL else "other bytes came out")
    return took_s
