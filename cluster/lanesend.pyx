"""What a lane sends: whole frames, one sender at a time, plain or in TLS records.

    thread --lane_send--> [kept before] pieces [kept meanwhile] --> socket      waits for it
    others --lane_send_or_keep, _pieces--> socket, or kept (`out`) --flush_kept--> socket       never waits

Who sends makes records of what it sends (its is the wire of `tls`); what is kept is not one yet.  So they
are sent in the order in which they are made.

Bound: what others leave to be sent, and TLS_WIRE_BYTES of records; the session's high-water mark bounds
that (`laneport`).
Lock: the lane's, never held while the thread sends, nor by others but for a send that does not wait.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

from cluster.tls cimport TLS_RECORD, tls_seal
from zcache_core.native cimport zc_load32, zc_store64
from zcache_core.pthread cimport lock_take, now_us, pthread_mutex_unlock

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_DONTWAIT, MSG_NOSIGNAL
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t send(int fd, const void *of, size_t n, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    enum: SHUT_RDWR
    int shutdown(int fd, int how)
cdef extern from "<poll.h>" nogil:
    enum: POLLOUT
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef enum:
    KEPT_MORE = 1 << 16         # room at a time
    PIECES_MOST = 4


cdef bint send_bytes(Lane *lane, Piece *pieces, uint32_t n) noexcept nogil:
    """By the one that sends, waiting for the peer; False when the connection is over."""
    cdef iovec parts[PIECES_MOST]
    cdef msghdr message
    cdef pollfd ready
    cdef ssize_t sent
    cdef uint32_t i
    cdef bint good = True
    while n:
        for i in range(n):
            parts[i].iov_base, parts[i].iov_len = <void *>pieces[i].at, pieces[i].bytes
        memset(&message, 0, sizeof(message))
        message.msg_iov, message.msg_iovlen = parts, n
        sent = sendmsg(lane.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent < 0 and errno == EAGAIN:
            if lane.stuck_us == 0:
                zc_store64(<uint64_t *>&lane.stuck_us, <uint64_t>now_us())
            ready.fd, ready.events = lane.fd, POLLOUT
            poll(&ready, 1, -1)
        elif sent < 0 and errno != EINTR:
            good = False
            break
        while sent > 0 and n:
            i = sent < <ssize_t>pieces[0].bytes
            pieces[0].at += sent if i else <ssize_t>pieces[0].bytes
            sent -= <ssize_t>pieces[0].bytes
            if i:
                pieces[0].bytes = <uint64_t>-sent
            else:
                pieces += 1
                n -= 1
        while n and pieces[0].bytes == 0:
            pieces += 1
            n -= 1
        if zc_load32(&lane.closing):
            good = n == 0
            break
    zc_store64(<uint64_t *>&lane.stuck_us, 0)
    return good


cdef bint send_wire(Lane *lane) noexcept nogil:
    """All records that wait."""
    cdef Piece records
    records.at = lane.tls.wire + lane.tls.wire_begin
    records.bytes = lane.tls.wire_end - lane.tls.wire_begin
    lane.tls.wire_begin = lane.tls.wire_end = 0
    return records.bytes == 0 or send_bytes(lane, &records, 1)


cdef uint32_t gather(Piece *pieces, uint32_t n, uint8_t *room, Piece *first) noexcept nogil:
    """`first`: the bytes of one record, from the pieces; how many pieces those are part of."""
    cdef uint64_t bytes = 0
    cdef uint64_t taken
    cdef uint32_t i
    if n == 1 or pieces[0].bytes >= TLS_RECORD:
        first[0] = pieces[0]
        return 1
    for i in range(n):
        taken = min(pieces[i].bytes, <uint64_t>TLS_RECORD - bytes)
        memcpy(room + bytes, pieces[i].at, taken)
        bytes += taken
    first.at, first.bytes = room, bytes
    return n


cdef bint send_sealed(Lane *lane, Piece *pieces, uint32_t n) noexcept nogil:
    """As send_bytes, in records; a small head and what follows are one."""
    cdef uint8_t room[TLS_RECORD]
    cdef Piece first
    cdef uint32_t of
    cdef uint64_t taken
    cdef int64_t done
    while n:
        of = gather(pieces, n, room, &first)
        done = tls_seal(&lane.tls, first.at, first.bytes) if first.bytes else 0
        if done < 0:
            return False
        if done == 0 and first.bytes and not send_wire(lane):
            return False
        while n and <uint64_t>done >= pieces[0].bytes:
            done -= <int64_t>pieces[0].bytes
            pieces += 1
            n -= 1
        if n:
            pieces[0].at += done
            pieces[0].bytes -= <uint64_t>done
    return send_wire(lane)


cdef bint send_all(Lane *lane, Piece *pieces, uint32_t n) noexcept nogil:
    """By the one that sends, waiting for the peer; False when the connection is over."""
    return send_bytes(lane, pieces, n) if lane.tls.ssl == NULL else send_sealed(lane, pieces, n)


cdef int64_t send_now(Lane *lane, const uint8_t *bytes, uint64_t n) noexcept nogil:
    """Lock held, nobody else sends: how many of these bytes are done with, without waiting; -1: it is over."""
    cdef uint64_t done = 0
    cdef int64_t more
    cdef ssize_t sent
    if lane.tls.ssl == NULL:
        sent = send(lane.fd, bytes, n, MSG_DONTWAIT | MSG_NOSIGNAL)
        return sent if sent >= 0 else 0 if errno == EAGAIN or errno == EINTR else -1
    while True:
        more = 1
        while done < n and more > 0:
            more = tls_seal(&lane.tls, bytes + done, n - done)
            done += <uint64_t>max(0, more)
        if more < 0:
            return -1
        sent = 0
        if lane.tls.wire_begin < lane.tls.wire_end:
            sent = send(
                lane.fd, lane.tls.wire + lane.tls.wire_begin, lane.tls.wire_end - lane.tls.wire_begin,
                MSG_DONTWAIT | MSG_NOSIGNAL,
            )
            if sent < 0:
                return <int64_t>done if errno == EAGAIN or errno == EINTR else -1
            lane.tls.wire_begin += <uint64_t>sent
        if lane.tls.wire_begin < lane.tls.wire_end or done == n:
            return <int64_t>done


cdef uint64_t unsent(const Lane *lane) noexcept nogil:
    """Lock held."""
    return lane.out_bytes + (lane.tls.wire_end - lane.tls.wire_begin)


cdef bint send_kept(Lane *lane) noexcept nogil:
    """What was kept, lock held before and after; dropped meanwhile."""
    cdef Piece piece
    cdef uint8_t *kept
    cdef bint good = True
    while good and unsent(lane):
        kept, piece.at, piece.bytes = lane.out, lane.out, lane.out_bytes
        lane.out, lane.out_bytes, lane.out_room = NULL, 0, 0
        pthread_mutex_unlock(&lane.lock)
        good = send_all(lane, &piece, 1)
        free(kept)
        lock_take(&lane.lock)
    return good


cdef bint lane_send(Lane *lane, Piece *pieces, uint32_t n) noexcept nogil:
    """By the thread: what was kept, these pieces (changed), and what is kept meanwhile."""
    cdef bint good
    lock_take(&lane.lock)
    lane.sending = True
    good = send_kept(lane)
    if good and n:
        pthread_mutex_unlock(&lane.lock)
        good = send_all(lane, pieces, n)
        lock_take(&lane.lock)
        good = good and send_kept(lane)
    lane.sending = False
    pthread_mutex_unlock(&lane.lock)
    return good


cdef bint keep(Lane *lane, const uint8_t *bytes, uint64_t n) noexcept nogil:
    """Lock held.  False without memory."""
    cdef uint64_t wanted = lane.out_bytes + n
    cdef uint8_t *bigger
    if wanted > lane.out_room:
        bigger = <uint8_t *>realloc(lane.out, wanted + KEPT_MORE)
        if bigger == NULL:
            return False
        lane.out, lane.out_room = bigger, wanted + KEPT_MORE
    memcpy(lane.out + lane.out_bytes, bytes, n)
    lane.out_bytes = wanted
    return True


cdef bint lane_send_or_keep(Lane *lane, const uint8_t *bytes, uint64_t n) noexcept nogil:
    """By anybody but the thread: never waits.  False: the connection is of no use."""
    cdef Piece piece
    piece.at, piece.bytes = bytes, n
    return lane_send_pieces(lane, &piece, 1)


cdef bint lane_send_pieces(Lane *lane, const Piece *pieces, uint32_t n) noexcept nogil:
    """The same of some pieces, with nothing of others between them."""
    cdef int64_t sent
    cdef uint32_t i
    cdef bint good = True
    lock_take(&lane.lock)
    for i in range(n):
        sent = 0
        if not lane.sending and not lane.handed and unsent(lane) == 0:
            sent = send_now(lane, pieces[i].at, pieces[i].bytes)
            good = sent >= 0
        if good and <uint64_t>sent < pieces[i].bytes:
            good = keep(lane, pieces[i].at + sent, pieces[i].bytes - <uint64_t>sent)
        if not good:
            shutdown(lane.fd, SHUT_RDWR)        # half of it may be gone: nothing may come after that
            break
    if good and not lane.sending and not lane.handed and unsent(lane):
        eventfd_write(lane.wake_fd, 1)          # somebody has to flush it
    pthread_mutex_unlock(&lane.lock)
    return good


cdef bint flush_kept(Lane *lane) noexcept nogil:
    """As much of what is kept as the socket takes now; whether all is gone.

    When the connection is over all is dropped: some of it is in records, and would be in two.
    """
    cdef int64_t sent
    cdef bint empty
    lock_take(&lane.lock)
    if not lane.sending and not lane.handed and unsent(lane):
        sent = send_now(lane, lane.out, lane.out_bytes)
        if sent > 0:
            lane.out_bytes -= <uint64_t>sent
            memmove(lane.out, lane.out + sent, lane.out_bytes)
        elif sent < 0:
            lane.out_bytes = lane.tls.wire_begin = lane.tls.wire_end = 0
            shutdown(lane.fd, SHUT_RDWR)        # the thread tells of the end
        if unsent(lane) and lane.stuck_us == 0:
            zc_store64(<uint64_t *>&lane.stuck_us, <uint64_t>now_us())
        elif unsent(lane) == 0:
            zc_store64(<uint64_t *>&lane.stuck_us, 0)
    empty = unsent(lane) == 0
    pthread_mutex_unlock(&lane.lock)
    return empty
