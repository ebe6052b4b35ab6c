"""Puts over an owner's connection, made and answered without the session.

    begin_put --head, records, payload as they are--> socket
    future <--collect, when woken-- a slot <--lane's thread-- answer

What is not an answer as donors of ours send it, or came close behind a frame of the session's, is the
session's to read, which gives it back (`settled`).  Deadlines, and what is to be done
about a put that failed, are Python's (peerlink, replicas).

Bound: PUTS_MOST under way, or given up and not answered yet; whoever finds none free asks through the
session.  What the socket does not take at once is kept by the lane, and counts there.
Lock: `lock`, a leaf.
"""

from libc.errno cimport EPROTO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from cluster.frames cimport (
    FRAME_MORE, HEAD_MOST, RECORD_BYTES, RECORDS_MOST, Answer, read_put_answer, write_put,
)
from cluster.lane cimport LaneEnd
from cluster.lanesend cimport LANE_MORE, LANE_ODD, LANE_OVER, Lane, Piece, lane_send_pieces
from zcache_core.pthread cimport lock_init, lock_take, pthread_mutex_unlock

from cluster.link import RpcError

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef enum:
    FREE = 0
    WAITED = 1                  # for its answer
    LATE = 2                    # nobody waits, an answer may come
    ANSWERED = 3


cdef Put *put_of(Puts *puts, uint32_t msgid) noexcept nogil:
    """Lock held: the one of that number, or NULL."""
    cdef uint32_t i
    for i in range(PUTS_MOST):
        if puts.put[i].state != FREE and puts.put[i].msgid == msgid:
            return &puts.put[i]
    return NULL


cdef Put *put_begun(Puts *puts, uint32_t n) noexcept nogil:
    """Lock held: a slot, with a number of its own; NULL: none is free."""
    cdef uint32_t i
    for i in range(PUTS_MOST):
        if puts.put[i].state == FREE:
            puts.put[i].state, puts.put[i].msgid, puts.put[i].n = WAITED, puts.next_msgid, n
            puts.next_msgid = puts.next_msgid + 1 if puts.next_msgid != <uint32_t>0xFFFFFFFF else <uint32_t>3 << 30
            return &puts.put[i]
    return NULL


cdef int64_t put_answered(Puts *puts, Lane *lane, const uint8_t *bytes, uint64_t have, uint32_t msgid) noexcept nogil:
    """By the lane's thread: an answer to one of ours in front of these bytes, as a handler says it."""
    cdef Answer answer
    cdef int64_t used = read_put_answer(bytes, have, &answer)
    cdef Put *put
    cdef bint news = False
    if used == FRAME_MORE:
        return LANE_MORE
    lock_take(&puts.lock)
    put = put_of(puts, msgid)
    if put == NULL or put.state == ANSWERED or used < 0:
        used = LANE_ODD
    elif answer.n != put.n:
        lane.why = EPROTO
        used = LANE_OVER
    elif put.state == LATE:
        put.state = FREE
    else:
        memcpy(put.offer, answer.offer, sizeof(put.offer))
        memcpy(put.codes, answer.codes, answer.n)
        put.state = ANSWERED
        news = True
    pthread_mutex_unlock(&puts.lock)
    if news:
        eventfd_write(lane.wake_fd, 1)
    return used


cdef class PutLane(LaneEnd):
    """An owner's connection to one donor, as far as puts go.  From one thread, the event loop's."""

    def __cinit__(self, *args, **kwargs):
        memset(&self.puts, 0, sizeof(Puts))
        lock_init(&self.puts.lock)
        self.puts.next_msgid = <uint32_t>3 << 30
        self.waiting = {}

    def begin_put(self, future, bytes records not None, bytes payload not None):
        """Send it; its number.  The future gets its result, as the session would, or an RpcError.

        None: there is no room, or the connection is over, and nothing has been sent.
        """
        cdef uint8_t head[HEAD_MOST + RECORDS_MOST * RECORD_BYTES]
        cdef uint32_t n = <uint32_t>(len(records) // RECORD_BYTES)
        cdef Piece pieces[2]
        cdef Put *put
        cdef uint32_t msgid
        if not self.started or not 0 < n <= RECORDS_MOST or len(records) % RECORD_BYTES:
            return None
        lock_take(&self.puts.lock)
        put = put_begun(&self.puts, n)
        msgid = put.msgid if put != NULL else 0
        pthread_mutex_unlock(&self.puts.lock)
        if put == NULL:
            return None
        self.waiting[msgid] = future
        pieces[0].at = head
        pieces[0].bytes = write_put(head, msgid, <const uint8_t *><const char *>records, n, len(payload))
        pieces[1].at, pieces[1].bytes = <const uint8_t *><const char *>payload, len(payload)
        lane_send_pieces(&self.lane, pieces, 2)     # (if that fails the thread tells of the end)
        return msgid

    def forget_put(self, uint32_t msgid):
        """Nobody waits for its answer any more."""
        cdef Put *put
        self.waiting.pop(msgid, None)
        lock_take(&self.puts.lock)
        put = put_of(&self.puts, msgid)
        if put != NULL:
            put.state = LATE if put.state == WAITED else FREE if put.state == ANSWERED else put.state
        pthread_mutex_unlock(&self.puts.lock)

    def collect(self):
        """Answers that have come, to those who wait for them."""
        cdef Put put
        cdef uint32_t i
        for i in range(PUTS_MOST):
            lock_take(&self.puts.lock)
            put = self.puts.put[i]
            if put.state == ANSWERED:
                self.puts.put[i].state = FREE
            pthread_mutex_unlock(&self.puts.lock)
            if put.state == ANSWERED:
                future = self.waiting.pop(put.msgid, None)
                if future is not None and not future.done():
                    offer = [put.offer[0], put.offer[1], put.offer[2]]
                    future.set_result([offer, (<const char *>put.codes)[: put.n]])

    cdef object _put_is_read(self, response):
        """Whether this answer, which the session has read, was to one of ours."""
        cdef Put *put
        cdef bint ours
        lock_take(&self.puts.lock)
        put = put_of(&self.puts, <uint32_t>response.msgid)
        ours = put != NULL and put.state != ANSWERED
        if ours:
            put.state = FREE
        pthread_mutex_unlock(&self.puts.lock)
        future = self.waiting.pop(response.msgid, None) if ours else None
        if future is not None and not future.done():
            if response.error is None:
                future.set_result(response.result)
            else:
                future.set_exception(RpcError.from_wire(response.error))
        return ours

    def end_puts(self, error):
        """The connection is over: who waits hears it."""
        while self.waiting:
            _, future = self.waiting.popitem()
            if not future.done():
                future.set_exception(error)
