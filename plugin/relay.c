/* relay: TLS between the kernel's NBD client, which has none, and a server.
 *
 *      kernel ── socket pair ── relay ── TLS over TCP ── server
 *                                 │
 *                                 └── line (descriptor 3) ── the attach helper (relays.py)
 *
 * The helper asks for STARTTLS on the TCP connection, hands it over with one end of a socket pair,
 * goes on with the NBD handshake at the other end, and gives that end to the kernel.  So this
 * knows nothing of NBD: it moves bytes until either side ends.
 *
 *      helper -> relay    "C" certificates and key, 0, the CA's, 0     once, at the start
 *                         "J" server's name, 0; two descriptors        a job; the last one ends
 *      relay -> helper    "+"         the TLS handshake is done
 *                         "!" REASON  it failed
 *                         "-" REASON  the job has ended
 *
 *      REASON   v NUMBER TEXT   the server's certificate was not accepted (X509_V_ERR_*)
 *               a NUMBER        the server's alert      e   it hung up       s NUMBER   errno
 *               k               the kernel hung up      t   no answer        x TEXT     anything else
 *
 * It stands on the way of every page of a machine that swaps, so it must not need a page that is
 * out.  A process of its own that is as small as can be: all of it is locked (about 1.5 MB and
 * libcrypto's 6), its heap keeps what it has had, PR_SET_IO_FLUSHER, never chosen by the OOM killer,
 * real-time.  After the start it opens no file, and forks never: a fork shares its memory, and
 * the next write to each page would need another page.
 *
 * Bound: one job; CHUNK_BYTES on the way in each direction; HANDSHAKE_MS for a handshake.  It goes
 * on without a helper for as long as its job does, then it ends.
 * What it is not: a decision about who is dialled, when, and what is done with its end.
 *
 * Source: RFC 8446 (TLS 1.3 only), ssl(7).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

enum {
    LINE = 3,
    CHUNK_BYTES = 64 << 10,     /* four records; a write of 128 KiB goes through in two turns */
    MESSAGE_BYTES = 64 << 10,
    REASON_BYTES = 200,
    HEAP_BYTES = 1 << 20,       /* kept ready; a handshake was measured to need less than 0.4 MiB */
    STACK_BYTES = 128 << 10,    /* touched at the start; measured: 30 KiB are used */
    HANDSHAKE_MS = 5000,        /* as dialer.HANDSHAKE_S */
    TURNS = 64,                 /* then the line is looked at, however much there is to move */
    ALERT_REASON = 1000,        /* SSL_AD_REASON_OFFSET: reasons above are alerts of the other side */
};

struct flow {
    size_t at, length;          /* what is left to be sent begins at data + at */
    unsigned char data[CHUNK_BYTES];
};

static SSL_CTX *ctx;
static SSL *ssl;                /* NULL: no job */
static int tcp = -1, kernel = -1, line = LINE;
static struct flow up, down;    /* to the server, to the kernel */
static char message[MESSAGE_BYTES];
static bool usable;             /* the certificates */

/* ---- telling ---------------------------------------------------------------------- */

static void tell(char kind, const char *text)
{
    char out[REASON_BYTES + 1];
    int length = snprintf(out, sizeof out, "%c%s", kind, text);
    if (length >= (int)sizeof out)
        length = sizeof out - 1;
    /* A helper that does not read, or is gone, keeps nobody waiting. */
    (void)!send(line, out, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* What went wrong with the job's last call, which answered `result`. */
static void reason(char out[REASON_BYTES], int result)
{
    int saved = errno, error = SSL_get_error(ssl, result);
    long verified = SSL_get_verify_result(ssl);
    unsigned long first = ERR_peek_error();
    int why = ERR_GET_REASON(first);
    const char *text = ERR_reason_error_string(first);

    if (verified != X509_V_OK)
        snprintf(out, REASON_BYTES, "v%ld %s", verified, X509_verify_cert_error_string(verified));
    else if (error == SSL_ERROR_SSL && why > ALERT_REASON && why < ALERT_REASON + 256)
        snprintf(out, REASON_BYTES, "a%d", why - ALERT_REASON);
    else if (error == SSL_ERROR_ZERO_RETURN || (error == SSL_ERROR_SSL && why == SSL_R_UNEXPECTED_EOF_WHILE_READING))
        snprintf(out, REASON_BYTES, "e");
    else if (error == SSL_ERROR_SYSCALL)
        snprintf(out, REASON_BYTES, saved ? "s%d" : "e", saved);
    else
        snprintf(out, REASON_BYTES, "x%s", text ? text : "it is no TLS");
    ERR_clear_error();
}

/* ---- a job ------------------------------------------------------------------------ */

static void end_job(void)
{
    SSL_free(ssl);
    ssl = NULL;
    if (tcp >= 0)
        close(tcp);
    if (kernel >= 0)
        close(kernel);
    tcp = kernel = -1;
    up.length = down.length = 0;
}

static long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000L + now.tv_nsec / 1000000;
}

static bool wait_for(int fd, short events, long until_ms)
{
    struct pollfd one = {fd, events, 0};
    for (;;) {
        long left_ms = until_ms - now_ms();
        if (left_ms <= 0)
            return false;
        int ready = poll(&one, 1, (int)left_ms);
        if (ready > 0)
            return true;
        if (ready < 0 && errno != EINTR)
            return false;
    }
}

/* The certificate has to have this name, or this address. */
static bool expect(const char *name)
{
    if (X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), name))
        return true;
    ERR_clear_error();          /* it is no address */
    SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return SSL_set1_host(ssl, name) && SSL_set_tlsext_host_name(ssl, name);
}

static void begin_job(const char *name, int server_fd, int kernel_fd)
{
    char why[REASON_BYTES] = "xlibssl refuses the name";
    end_job();
    tcp = server_fd;
    kernel = kernel_fd;
    if (!usable) {
        tell('!', "xthe certificates cannot be used");
        end_job();
        return;
    }
    fcntl(tcp, F_SETFL, O_NONBLOCK);
    fcntl(kernel, F_SETFL, O_NONBLOCK);
    ssl = SSL_new(ctx);
    bool good = ssl && SSL_set_fd(ssl, tcp) && expect(name);
    long until_ms = now_ms() + HANDSHAKE_MS;
    while (good) {
        errno = 0;
        int result = SSL_connect(ssl);
        if (result == 1) {
            tell('+', "");
            return;
        }
        int error = SSL_get_error(ssl, result);
        short events = error == SSL_ERROR_WANT_READ ? POLLIN : error == SSL_ERROR_WANT_WRITE ? POLLOUT : 0;
        if (!events) {
            reason(why, result);
            good = false;
        } else if (!wait_for(tcp, events, until_ms)) {
            snprintf(why, sizeof why, "t");
            good = false;
        }
    }
    tell('!', why);
    end_job();
}

/* One turn in each direction.  Returns -1 when the job has ended (and says why), else whether
 * anything was moved; *events is what libssl waits for then. */
static int turn(short *events)
{
    char why[REASON_BYTES] = "k";
    bool moved = false;
    *events = 0;
    if (!up.length) {
        ssize_t got = read(kernel, up.data, CHUNK_BYTES);
        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
            goto ended;
        if (got > 0) {
            up.at = 0;
            up.length = (size_t)got;
        }
    }
    if (up.length) {
        errno = 0;
        int sent = SSL_write(ssl, up.data + up.at, (int)up.length);
        if (sent > 0) {
            up.at += (size_t)sent;
            up.length -= (size_t)sent;
            moved = true;
        } else {
            int error = SSL_get_error(ssl, sent);
            if (error != SSL_ERROR_WANT_WRITE && error != SSL_ERROR_WANT_READ) {
                reason(why, sent);
                goto ended;
            }
            *events |= error == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN;
        }
    }
    if (!down.length) {
        errno = 0;
        int got = SSL_read(ssl, down.data, CHUNK_BYTES);
        if (got > 0) {
            down.at = 0;
            down.length = (size_t)got;
        } else {
            int error = SSL_get_error(ssl, got);
            if (error != SSL_ERROR_WANT_WRITE && error != SSL_ERROR_WANT_READ) {
                reason(why, got);
                goto ended;
            }
            *events |= error == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN;
        }
    }
    if (down.length) {
        ssize_t sent = write(kernel, down.data + down.at, down.length);
        if (sent > 0) {
            down.at += (size_t)sent;
            down.length -= (size_t)sent;
            moved = true;
        } else if (errno != EAGAIN && errno != EINTR)
            goto ended;
    }
    return moved;
ended:
    tell('-', why);
    end_job();
    return -1;
}

/* ---- what the helper says --------------------------------------------------------- */

/* Certificates and key of ours (none: an empty text), and those of whom we trust. */
static bool take_certificates(const char *own, const char *trusted)
{
    BIO *text = BIO_new_mem_buf(trusted, -1);
    X509_STORE *store = SSL_CTX_get_cert_store(ctx);
    int authorities = 0;
    for (X509 *one; (one = PEM_read_bio_X509(text, NULL, NULL, NULL)); X509_free(one))
        authorities += X509_STORE_add_cert(store, one);
    BIO_free(text);
    ERR_clear_error();          /* the text's end is one */
    if (!authorities)
        return false;
    if (!*own)
        return true;
    text = BIO_new_mem_buf(own, -1);
    EVP_PKEY *key = PEM_read_bio_PrivateKey(text, NULL, NULL, (void *)"");
    (void)BIO_reset(text);
    X509 *certificate = PEM_read_bio_X509(text, NULL, NULL, NULL);
    bool good = key && certificate && SSL_CTX_use_certificate(ctx, certificate) && SSL_CTX_use_PrivateKey(ctx, key);
    for (X509 *one; good && (one = PEM_read_bio_X509(text, NULL, NULL, NULL)); X509_free(one))
        SSL_CTX_add1_chain_cert(ctx, one);
    X509_free(certificate);
    EVP_PKEY_free(key);
    BIO_free(text);
    ERR_clear_error();
    return good;
}

static void hear_certificates(ssize_t length)
{
    const char *own = message + 1;
    size_t own_length = strnlen(own, (size_t)length - 1);
    bool whole = own_length + 3 <= (size_t)length;
    /* Nothing is answered: who takes a relay over could not know whether an answer was read. */
    usable = whole && take_certificates(own, own + own_length + 1);
    OPENSSL_cleanse(message, sizeof message);
}

/* One message; false when the helper is gone. */
static bool hear(void)
{
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } control;
    struct iovec where = {message, sizeof message - 1};
    struct msghdr all = {.msg_iov = &where, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t length = recvmsg(line, &all, MSG_CMSG_CLOEXEC);
    if (length < 0)
        return errno == EINTR || errno == EAGAIN;
    if (length == 0)
        return false;
    message[length] = 0;
    int fds[2] = {-1, -1};
    struct cmsghdr *head = CMSG_FIRSTHDR(&all);
    if (head && head->cmsg_type == SCM_RIGHTS && head->cmsg_len <= CMSG_LEN(sizeof fds))
        memcpy(fds, CMSG_DATA(head), head->cmsg_len - CMSG_LEN(0));
    if (message[0] == 'C')
        hear_certificates(length);
    else if (message[0] == 'J' && fds[1] >= 0)
        begin_job(message + 1, fds[0], fds[1]);
    return true;
}

/* ---- the process ------------------------------------------------------------------ */

/* As process.prepare does it for the helper, which says what was refused. */
static void settle(void)
{
    struct rlimit none = {0, 0};
    struct sched_param first = {.sched_priority = 1};
    volatile char stack[STACK_BYTES];
    setrlimit(RLIMIT_CORE, &none);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    sched_setscheduler(0, SCHED_FIFO, &first);
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        (void)!write(fd, "-1000", 5);
        close(fd);
    }
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 32 << 20);
    mallopt(M_TOP_PAD, HEAP_BYTES);
    mlockall(MCL_CURRENT | MCL_FUTURE);
    for (size_t i = 0; i < sizeof stack; i += 4096)
        stack[i] = 0;
    char *heap = malloc(HEAP_BYTES);
    if (heap)
        explicit_bzero(heap, HEAP_BYTES);
    free(heap);
}

static bool make_context(void)
{
    /* Nothing is read from files: they may be out, and a relay may be started when all else is. */
    OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_LOAD_SSL_STRINGS, NULL);
    ctx = SSL_CTX_new(TLS_client_method());
    if (!ctx || !SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION))
        return false;
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(ctx, 1);     /* else two reads a record */
    SSL_CTX_set_default_read_buffer_len(ctx, CHUNK_BYTES);
    return true;
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    close_range(LINE + 1, ~0U, 0);      /* the helper's lock and the kernel's socket are not ours to keep */
    settle();
    if (!make_context())
        return 1;
    for (;;) {
        short events = 0;
        int moved = 0;
        if (ssl) {
            for (int i = 0; i < TURNS && (moved = turn(&events)) > 0; i++)
                ;
            if (moved < 0)
                continue;
        } else if (line < 0)
            return 0;
        struct pollfd fds[3] = {
            {line, POLLIN, 0},
            {kernel, (short)((up.length ? 0 : POLLIN) | (down.length ? POLLOUT : 0)), 0},
            {tcp, events, 0},
        };
        if (poll(fds, 3, moved > 0 ? 0 : -1) < 0)
            continue;
        /* Neither side can be asked while the other one has not taken what it got; but its end ends all. */
        if (ssl && ((up.length && fds[1].revents & (POLLHUP | POLLERR)) || (down.length && fds[2].revents & (POLLHUP | POLLERR)))) {
            tell('-', fds[1].revents & (POLLHUP | POLLERR) ? "k" : "e");
            end_job();
        }
        if (fds[0].revents && !hear()) {
            close(line);
            line = -1;
        }
    }
}
