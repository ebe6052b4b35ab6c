"""A connection between two nodes with a compiled thread of its own, and Python for what is rare.

    socket -(TLS)-> thread --whole frames of ours--> handler --> answer -(TLS)-> socket
                      |
                      '--anything else, as it came--> [handed over] --> session (Python) --> answer

The thread reads, and asks its handler about the bytes in front: a frame that the handler knows is
dealt with at once, without the GIL.  All others are Python's: the bytes are handed over, the thread
waits until the session has had them, and everything that comes is the session's until
that stands between two frames again.  So there is one order of requests, whoever answers them, and one place
for rules and errors (cluster/session, wire).

How it is sent: `lanesend`.  With TLS (`tls`) the thread shakes hands first, and then hands over nothing:
that is how Python hears that the peer is let in.

Bound: a connection has one thread, ROOM_BYTES for what came (touched as far as frames are long),
and what Python left to be sent; the session's high-water mark bounds that (`laneport`).  The
thread waits for the socket and for Python; both end with `stop`, and whoever watches (Channel)
stops what is overdue: `heard_us`, `partial_us`, `stuck_us` say since when.
Lock: `lock`, then that of `tls`; never held while anything is sent by the thread, nor by Python but for
a send that does not wait.
"""

from libc.errno cimport EINTR, ENOMEM, EPROTO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memmove, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from cluster.frames cimport FRAME_MOST
from cluster.lanesend cimport flush_kept, lane_send, lane_send_or_keep, send_now, send_wire, unsent
from cluster.tls cimport (
    TLS_BAD, TLS_DONE, TLS_IN_BYTES, TlsRules, name_in, tls_discard, tls_make, tls_open, tls_shake,
)
from zcache_core.native cimport zc_load32, zc_load64, zc_store32, zc_store64
from zcache_core.pthread cimport (
    cond_init, lock_init, lock_take, now_us, pthread_cond_broadcast, pthread_cond_wait, pthread_join,
    pthread_mutex_unlock, thread_start_as,
)

import os

cdef extern from "<sys/socket.h>" nogil:
    enum: SHUT_RDWR
    ssize_t recv(int fd, void *to, size_t n, int flags)
    int shutdown(int fd, int how)
cdef extern from "<sys/eventfd.h>" nogil:
    enum: EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int initial, int flags)
    int eventfd_write(int fd, uint64_t value)

cdef enum:
    READ_BYTES = 1 << 16        # room there must be for the next read; a socket gives what it has
    ROOM_BYTES = FRAME_MOST + 4 * READ_BYTES
    KEPT_BYTES = 128 << 10      # of it: more than a read-ahead's answer


# ---- the thread -----------------------------------------------------------------------

cdef bint hand_over(Lane *lane) noexcept nogil:
    """Python's turn, until it says `turn_back`; then what it wrote is sent.  False: it is over."""
    while True:
        lock_take(&lane.lock)
        lane.handed = True
        eventfd_write(lane.wake_fd, 1)
        while lane.handed and not zc_load32(&lane.closing):
            pthread_cond_wait(&lane.turned, &lane.lock)
        pthread_mutex_unlock(&lane.lock)
        if zc_load32(&lane.closing) or not lane_send(lane, NULL, 0):
            return False
        if not lane.again:
            return True


cdef bint receive(Lane *lane, uint8_t *to, uint64_t room, uint64_t *end) noexcept nogil:
    """Wait for bytes behind `end`; False at the end of the stream, of which `why` is told."""
    cdef ssize_t came
    while True:
        came = recv(lane.fd, to + end[0], room - end[0], 0)
        if came > 0:
            end[0] += <uint64_t>came
            return True
        if came == 0 or errno != EINTR or zc_load32(&lane.closing):
            lane.why = errno if came < 0 else 0
            return False


cdef bint receive_records(Lane *lane) noexcept nogil:
    """As receive, of what TLS reads; all that came before is read by it."""
    lane.tls.came_begin = lane.tls.came_end = 0
    return receive(lane, lane.tls.came, TLS_IN_BYTES, &lane.tls.came_end)


cdef bint shake(Lane *lane) noexcept nogil:
    """Hands; False: the peer is not let in, or does not let us in, or is gone."""
    cdef int state
    while True:
        state = tls_shake(&lane.tls)
        if not send_wire(lane):
            lane.why = EPROTO
            return False
        if state == TLS_DONE:
            return True
        if state == TLS_BAD:
            lane.why = EPROTO
            return False
        if not receive_records(lane):
            return False


cdef bint open_records(Lane *lane) noexcept nogil:
    """As read_more, with TLS."""
    cdef int64_t got
    while True:
        got = tls_open(&lane.tls, lane.room + lane.end, ROOM_BYTES - lane.end)
        if got > 0:
            lane.end += <uint64_t>got
            return True
        if got == TLS_BAD:
            lane.why = EPROTO if lane.tls.reason != NULL else 0
            return False
        if lane.tls.half and lane.partial_us == 0:      # (`deal` clears it)
            zc_store64(<uint64_t *>&lane.partial_us, <uint64_t>now_us())
        if not receive_records(lane):
            return False


cdef bint read_more(Lane *lane) noexcept nogil:
    """Wait for bytes; False at the end of the stream, of which `why` is told."""
    if lane.begin == lane.end:
        lane.begin = lane.end = 0
    elif ROOM_BYTES - lane.end < READ_BYTES:
        memmove(lane.room, lane.room + lane.begin, lane.end - lane.begin)
        lane.end -= lane.begin
        lane.begin = 0
    if lane.tls.ssl != NULL:
        return open_records(lane)
    return receive(lane, lane.room, ROOM_BYTES, &lane.end)


cdef bint deal(Lane *lane) noexcept nogil:
    """With the bytes in front, as far as they go; False: the connection is over."""
    cdef int64_t used
    while lane.begin < lane.end and not zc_load32(&lane.closing):
        used = LANE_ODD
        if not lane.passing:
            used = lane.handle(lane, lane.room + lane.begin, lane.end - lane.begin)
        if used == LANE_MORE:
            if lane.partial_us == 0:
                zc_store64(<uint64_t *>&lane.partial_us, <uint64_t>now_us())
            break
        if lane.partial_us:
            zc_store64(<uint64_t *>&lane.partial_us, 0)
        if used > 0:
            lane.begin += <uint64_t>used
            zc_store64(<uint64_t *>&lane.heard_us, <uint64_t>now_us())
        elif used == LANE_OVER or not hand_over(lane):
            return False
    return True


cdef int64_t all_odd(Lane *lane, const uint8_t *bytes, uint64_t have) noexcept nogil:
    """Nothing is ours."""
    return LANE_ODD


cdef bint let_in(Lane *lane) noexcept nogil:
    """With TLS: hands shaken, by who has sent alone until now, and Python has heard of it."""
    cdef bint good = shake(lane)
    lock_take(&lane.lock)
    lane.sending = False
    pthread_mutex_unlock(&lane.lock)
    return good and hand_over(lane)


cdef void *lane_run(void *argument) noexcept nogil:
    cdef Lane *lane = <Lane *>argument
    if lane.tls.ssl == NULL or let_in(lane):
        while deal(lane) and not zc_load32(&lane.closing) and read_more(lane):
            pass
    if lane.ended != NULL:
        lane.ended(lane)
    lock_take(&lane.lock)
    lane.over = True
    pthread_mutex_unlock(&lane.lock)
    eventfd_write(lane.wake_fd, 1)
    return NULL


# ---- as Python has it -------------------------------------------------------------------

cdef class LaneEnd:
    """One end of a connection, all Python's; subclasses set its handler.  `start`, then `stop`, once each.

    All from one thread, the event loop's.  `wake_fd` is readable when `take` or `over` has
    something to say.  The descriptor stays the caller's, and open until `stop` has returned.
    Raises OSError without memory or a descriptor.
    """

    def __cinit__(self, *args, **kwargs):
        cdef int no_descriptor
        memset(&self.lane, 0, sizeof(Lane))
        self.lane.fd = -1
        self.lane.handle = all_odd
        self.lane.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        no_descriptor = errno
        lock_init(&self.lane.lock)
        cond_init(&self.lane.turned)
        self.lane.room = <uint8_t *>mmap(
            NULL, ROOM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
        )
        if self.lane.wake_fd < 0:
            raise OSError(no_descriptor, "no descriptor for a connection; raise the limit of open files")
        if <void *>self.lane.room == MAP_FAILED:
            raise OSError(ENOMEM, "no memory for a connection")

    def __dealloc__(self):
        self.stop()

    cdef void give_back(self):
        """Memory and descriptor, at once: an object may be long in being collected."""
        if self.lane.room != NULL and <void *>self.lane.room != MAP_FAILED:
            munmap(self.lane.room, ROOM_BYTES)
        if self.lane.wake_fd >= 0:
            close(self.lane.wake_fd)
        free(self.lane.out)
        tls_discard(&self.lane.tls)
        self.lane.room = self.lane.out = NULL
        self.lane.out_bytes = 0
        self.lane.wake_fd = -1

    def start(self, int fd, TlsRules rules=None):
        """Begin to read this connected, blocking socket, and with `rules` to shake hands.

        Raises OSError without a thread.
        """
        assert not self.started and self.lane.room != NULL
        self.lane.fd = fd
        if rules is not None and not tls_make(&self.lane.tls, rules.ctx, rules.server, self.alike):
            raise OSError("no memory for TLS")
        self.lane.heard_us = now_us()
        self.lane.sending = rules is not None   # the thread, until hands are shaken
        if self.alike:
            memset(self.lane.room, 0, KEPT_BYTES)   # there may be no memory when it is needed
        if thread_start_as(&self.lane.thread, lane_run, &self.lane, b"zc-lane", not self.alike):
            raise OSError("no thread could be started; raise the limit of processes")
        self.started = True

    def stop(self):
        """End the connection; its thread is gone when this returns.

        What we wrote in our turn is sent if the socket takes it.
        """
        cdef Lane *lane = &self.lane
        if self.started:
            self.started = False
            with nogil:
                lock_take(&lane.lock)
                if unsent(lane) and not lane.sending:
                    send_now(lane, lane.out, lane.out_bytes)
                zc_store32(&lane.closing, 1)
                pthread_cond_broadcast(&lane.turned)
                pthread_mutex_unlock(&lane.lock)
                shutdown(lane.fd, SHUT_RDWR)
                pthread_join(lane.thread, NULL)
        self.give_back()

    def collect(self):
        """Take what a subclass's handler has left for us; at each wake."""

    @property
    def wake_fd(self):
        """The eventfd."""
        return self.lane.wake_fd

    @property
    def is_handed(self):
        """Whether it is our turn."""
        return bool(self.lane.handed)

    @property
    def over(self):
        """None, or why nothing comes any more: an errno, 0 when the peer has closed."""
        return self.lane.why if self.lane.over else None

    @property
    def reason(self):
        """What TLS has to say of the end; "" when that is not why."""
        if self.lane.why != EPROTO or self.lane.tls.reason == NULL:
            return ""
        return (<bytes>self.lane.tls.reason).decode()

    def peer_name(self):
        """In our turn, with TLS: the name in the peer's certificate, "" without one; plain: None."""
        assert self.lane.handed
        return name_in(&self.lane.tls) if self.lane.tls.ssl != NULL else None

    def take(self):
        """In our turn: the bytes that came, all of them."""
        cdef Lane *lane = &self.lane
        assert lane.handed
        taken = (<char *>lane.room + lane.begin)[: lane.end - lane.begin]
        lane.begin = lane.end = 0
        return taken

    def turn_back(self, bint passing, bint again=False):
        """Our turn is over; `passing`: what comes next is the session's as well.

        `again`: it is our turn once more as soon as what we wrote has been sent.
        """
        cdef Lane *lane = &self.lane
        lock_take(&lane.lock)
        lane.passing, lane.again = passing, again
        lane.handed = False
        pthread_cond_broadcast(&lane.turned)
        pthread_mutex_unlock(&lane.lock)

    def write(self, bytes data not None):
        """Send, or keep, without waiting; how much is kept, or None when it is of no use."""
        cdef bint good
        good = lane_send_or_keep(&self.lane, <const uint8_t *><const char *>data, len(data))
        return self.kept_bytes if good else None

    def flush(self):
        """Send what is kept, as far as the socket takes it; whether all is gone."""
        return bool(flush_kept(&self.lane))

    @property
    def kept_bytes(self):
        # (a moment old: the thread may be sending)
        return self.lane.out_bytes + max(0, <int64_t>(self.lane.tls.wire_end - self.lane.tls.wire_begin))

    def times(self):
        """Seconds on the monotonic clock: a frame of ours was heard, is half there since, is not read since; 0.0: not."""
        cdef Lane *lane = &self.lane
        return (
            <int64_t>zc_load64(<uint64_t *>&lane.heard_us) / 1e6, <int64_t>zc_load64(<uint64_t *>&lane.partial_us) / 1e6,
            <int64_t>zc_load64(<uint64_t *>&lane.stuck_us) / 1e6,
        )
