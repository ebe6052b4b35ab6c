"""Pages that come back, without Python: from the server's ring to a donor and back into the ring.

    ring --asked--> courier's thread --get of up to GET_PAGES--> lane of the donor that is best
    ring <--answered, the asker woken-- lane's thread <--------- answer

The courier's thread sleeps on the ring's eventfd.  What it does is what overflow does when nothing is the
matter: a page is asked of the best donor that has it, by the routes that Python tells
(`route`: which donors answer well, and how patient to be), all pages that are asked for at once in one
message.  Everything else is Python's, whole: a page without a route, one whose first copy was wrong
or is not there, an answer that is late (Python asks the others then; whoever answers first
has answered), a connection that ends, an answer that is an error.  Such a page has
`fallen`; until it is answered nothing about it is decided here.

Bound: OPEN_MOST gets under way on a connection, each with a deadline of its route's; what
finds none free falls.  Nothing is allocated.
Lock: the courier's `lock`, then a lane's.
"""

from libc.errno cimport EPROTO
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close, read

from cluster.frames cimport (
    FRAME_MORE, HEAD_MOST, RECORD_BYTES, SEALED_LEAST, Answer, begins_answer, read_answer, write_get,
)
from cluster.putlane cimport PutLane, Puts, is_a_puts, put_answered
from cluster.lanesend cimport LANE_MORE, LANE_ODD, LANE_OVER, Lane, lane_send_or_keep
from zcache_core.layout cimport COPIES_MOST, DONORS, donor_at
from zcache_core.native cimport zc_acquire_fence, zc_cas32, zc_load32, zc_load64, zc_store32
from zcache_core.pthread cimport (
    lock_init, lock_take, now_us, pthread_join, pthread_mutex_t, pthread_mutex_unlock, pthread_t, thread_start_alike,
)
from zcache_core.ring cimport (
    RING_ASKED, RING_CELLS, RING_STATE, RING_TAKEN, GetCell, Ring, cell_answer, zc_kick,
)
from zcache_core.ringside cimport RingSide

from cluster.session import OTHERS_MSGID

cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
cdef extern from "<sys/eventfd.h>" nogil:
    enum: EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int initial, int flags)

cdef enum:
    OPEN_MOST = 8               # half of what a donor takes on one connection; the rest is Python's
    LOOK_MS = 100               # a kick that got lost costs no more
    FREE = 0
    WAITED = 1                  # for its answer
    LATE = 2                    # nobody waits, an answer may come
    TOLD = 3                    # the answer is the session's to read
    NO_SUCH = 0xFFFFFFFF

WHY_NO_ROUTE, WHY_LATE, WHY_FAILED, WHY_ABSENT = 0, 1, 2, 3
cdef enum:
    BY_NO_ROUTE = 0
    BY_LATE = 1
    BY_FAILED = 2
    BY_ABSENT = 3

ctypedef struct Open:           # a get under way
    uint32_t state
    uint32_t msgid
    uint32_t n
    int64_t until_us
    uint16_t cell[RING_CELLS]
    uint32_t turn[RING_CELLS]
    uint16_t length_codec[RING_CELLS]
    uint8_t copy[RING_CELLS]

ctypedef struct Fetch:          # an owner's connection to one donor
    Lane *lane
    Puts *puts
    Work *work
    bint dead                   # nothing is asked here any more
    uint32_t next_msgid
    Open open[OPEN_MOST]

ctypedef struct Route:
    Fetch *fetch                # NULL: not this way
    uint32_t latency_us
    uint32_t patience_us

ctypedef struct Fallen:
    uint16_t cell
    uint8_t why
    uint8_t row
    uint32_t turn

ctypedef struct Work:
    Ring *ring
    int wake_fd                 # the ring's
    int tell_fd                 # there is something for Python
    uint32_t closing            # atomic
    pthread_t thread
    pthread_mutex_t lock        # guards the rest, and all Fetch
    Route route[DONORS]
    Fallen fallen[4 * RING_CELLS]
    uint32_t fallen_n


# ---- all of these with the lock held ----------------------------------------------------

cdef void fall(Work *w, uint32_t cell, uint32_t turn, uint32_t why, uint32_t row) noexcept nogil:
    """This page is Python's from now on."""
    cdef Fallen *f
    if w.fallen_n < 4 * RING_CELLS:     # else it waits, and is asked for again by its own bound
        f = &w.fallen[w.fallen_n]
        f.cell, f.turn, f.why, f.row = <uint16_t>cell, turn, <uint8_t>why, <uint8_t>row
        w.fallen_n += 1


cdef void fall_all(Work *w, Open *o, uint32_t why) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t taken
    for i in range(o.n):
        taken = (o.turn[i] << 4) + RING_TAKEN
        if zc_load32(&w.ring.cell[o.cell[i]].word) == taken:
            fall(w, o.cell[i], o.turn[i], why, row_of_copy(&w.ring.cell[o.cell[i]], o.copy[i]))
    zc_kick(w.tell_fd)


cdef inline uint32_t row_of_copy(const GetCell *cell, uint32_t copy) noexcept nogil:
    return donor_at(cell.where, copy) - 1


cdef Open *open_of(Fetch *f, uint32_t msgid) noexcept nogil:
    cdef uint32_t i
    for i in range(OPEN_MOST):
        if f.open[i].state != FREE and f.open[i].msgid == msgid:
            return &f.open[i]
    return NULL


cdef Open *open_free(Fetch *f) noexcept nogil:
    cdef uint32_t i
    for i in range(OPEN_MOST):
        if f.open[i].state == FREE:
            return &f.open[i]
    return NULL


cdef uint32_t best_copy(Work *w, const GetCell *cell, uint64_t where) noexcept nogil:
    """Which copy of those at `where` to ask for; NO_SUCH when Python has to think."""
    cdef uint32_t best = NO_SUCH
    cdef uint32_t copy, donor
    cdef uint32_t latency_us = 0
    cdef Route *route
    if cell.wrong:
        return NO_SUCH
    for copy in range(COPIES_MOST):
        donor = donor_at(where, copy)
        if donor == 0 or donor > DONORS:
            break
        route = &w.route[donor - 1]
        if route.fetch != NULL and not route.fetch.dead and (best == NO_SUCH or route.latency_us < latency_us):
            best, latency_us = copy, route.latency_us
    return best


cdef void send_get(Work *w, Fetch *f, Open *o, int64_t until_us) noexcept nogil:
    """One message for all pages of it."""
    cdef uint8_t bytes[HEAD_MOST + RING_CELLS * RECORD_BYTES]
    cdef uint32_t at, i
    cdef const GetCell *cell
    cdef uint64_t version
    o.state, o.until_us, o.msgid = WAITED, until_us, f.next_msgid
    f.next_msgid = f.next_msgid + 1 if not is_a_puts(f.next_msgid + 1) else <uint32_t>1 << 31
    at = write_get(bytes, o.msgid, o.n)
    for i in range(o.n):
        cell = &w.ring.cell[o.cell[i]]
        version = cell.version
        memcpy(bytes + at, &version, 8)
        memcpy(bytes + at + 8, &cell.page, 4)
        memcpy(bytes + at + 12, &o.length_codec[i], 2)
        bytes[at + 14] = bytes[at + 15] = 0     # pages are numbered through all devices
        at += RECORD_BYTES
    if not lane_send_or_keep(f.lane, bytes, at):
        f.dead = True
        fall_all(w, o, BY_FAILED)
        o.state = FREE


cdef void give_up(Work *w, int64_t now) noexcept nogil:
    """Gets whose answer is late: Python asks somebody else."""
    cdef uint32_t row, i
    cdef Fetch *f
    for row in range(DONORS):
        f = w.route[row].fetch
        if f == NULL:
            continue
        for i in range(OPEN_MOST):
            if f.open[i].state == WAITED and f.open[i].until_us <= now:
                f.open[i].state = LATE
                fall_all(w, &f.open[i], BY_LATE)


cdef int64_t next_deadline(Work *w, int64_t now) noexcept nogil:
    """In ms, LOOK_MS at most."""
    cdef int64_t first = now + LOOK_MS * 1000
    cdef uint32_t row, i
    cdef Fetch *f
    for row in range(DONORS):
        f = w.route[row].fetch
        if f != NULL:
            for i in range(OPEN_MOST):
                if f.open[i].state == WAITED and f.open[i].until_us < first:
                    first = f.open[i].until_us
    return max(0, first - now + 999) // 1000


cdef void take_asked(Work *w, int64_t now) noexcept nogil:
    """Every page that is asked for: to a donor, or to Python."""
    cdef Open *going[DONORS]
    cdef Fetch *fetch
    cdef Open *o
    cdef GetCell *cell
    cdef uint32_t i, word, copy, row, n
    cdef uint64_t where
    memset(going, 0, sizeof(going))
    n = 0
    for i in range(RING_CELLS):
        cell = &w.ring.cell[i]
        word = zc_load32(&cell.word)
        if word & RING_STATE != RING_ASKED:
            continue
        zc_acquire_fence()
        # Read once: until the cell is taken it may be given up, and asked for another page.
        where = zc_load64(&cell.where)
        copy = best_copy(w, cell, where)
        row = donor_at(where, copy) - 1 if copy != NO_SUCH else 0
        o = NULL
        if copy != NO_SUCH:
            o = going[row]
            if o == NULL:
                o = open_free(w.route[row].fetch)
                if o != NULL:
                    # taken at once: another row may be the same connection's
                    o.state, o.n = WAITED, 0
                    o.until_us = now + w.route[row].patience_us
                    o.msgid = 0
                    going[row] = o
        if not zc_cas32(&cell.word, word, word - RING_ASKED + RING_TAKEN):
            continue
        if o == NULL:
            fall(w, i, word >> 4, BY_NO_ROUTE, 0)
            n += 1
            continue
        o.cell[o.n], o.turn[o.n], o.copy[o.n] = <uint16_t>i, word >> 4, <uint8_t>copy
        o.length_codec[o.n] = <uint16_t>cell.length_codec
        o.n += 1
    for row in range(DONORS):
        if going[row] != NULL:
            fetch = w.route[row].fetch
            if going[row].n:
                send_get(w, fetch, going[row], going[row].until_us)
            else:
                going[row].state = FREE
    if n:
        zc_kick(w.tell_fd)


# ---- the courier's thread -------------------------------------------------------------------

cdef void *work_run(void *argument) noexcept nogil:
    cdef Work *w = <Work *>argument
    cdef pollfd ready
    cdef uint64_t kicks
    cdef int64_t wait_ms = 0
    cdef ssize_t got
    while not zc_load32(&w.closing):
        ready.fd, ready.events = w.wake_fd, POLLIN
        poll(&ready, 1, <int>wait_ms)
        got = read(w.wake_fd, &kicks, 8)
        lock_take(&w.lock)
        give_up(w, now_us())
        take_asked(w, now_us())
        wait_ms = next_deadline(w, now_us())
        pthread_mutex_unlock(&w.lock)
        if zc_load32(&w.ring.head.put_word) & RING_STATE == RING_ASKED:
            zc_kick(w.tell_fd)
    return NULL


# ---- a lane's thread ---------------------------------------------------------------------------

cdef int64_t fetched(Lane *lane, const uint8_t *bytes, uint64_t have) noexcept nogil:
    """An answer to one of ours in front of these bytes."""
    cdef Fetch *f = <Fetch *>lane.about
    cdef Work *w = f.work
    cdef Answer answer
    cdef uint32_t msgid = 0
    cdef int64_t used = begins_answer(bytes, have, &msgid)
    cdef Open *o
    if used != 1:
        return LANE_MORE if used == FRAME_MORE else LANE_ODD
    if msgid < <uint32_t>1 << 31:
        return LANE_ODD
    if is_a_puts(msgid):
        return put_answered(f.puts, lane, bytes, have, msgid)
    used = read_answer(bytes, have, &answer)
    if used == FRAME_MORE:
        return LANE_MORE
    lock_take(&w.lock)
    o = open_of(f, msgid)
    if o == NULL or o.state == TOLD:
        used = LANE_ODD
    elif used < 0:
        if o.state == WAITED:
            fall_all(w, o, BY_FAILED)
        o.state = TOLD
        used = LANE_ODD
    elif not deliver(w, o, &answer):
        lane.why = EPROTO
        used = LANE_OVER
    else:
        o.state = FREE
    pthread_mutex_unlock(&w.lock)
    return used


cdef bint deliver(Work *w, Open *o, const Answer *answer) noexcept nogil:
    """Pages into their cells; False, and nothing done, when this is no answer to what was asked."""
    cdef uint64_t bytes = 0
    cdef const uint8_t *sealed = answer.payload
    cdef uint32_t i, n
    cdef bint fell = False
    if answer.n != o.n:
        return False
    for i in range(o.n):
        bytes += 0 if answer.codes[i] else (o.length_codec[i] >> 4) + SEALED_LEAST
    if bytes != answer.payload_bytes:
        return False
    for i in range(o.n):
        n = (o.length_codec[i] >> 4) + SEALED_LEAST
        if answer.codes[i] == 0:
            cell_answer(&w.ring.cell[o.cell[i]], o.turn[i], 0, sealed, n, o.copy[i])
            sealed += n
        elif o.state == WAITED:
            fall(w, o.cell[i], o.turn[i], BY_ABSENT, row_of_copy(&w.ring.cell[o.cell[i]], o.copy[i]))
            fell = True
    if fell:
        zc_kick(w.tell_fd)
    return True


cdef void fetch_ended(Lane *lane) noexcept nogil:
    """The connection is over: what was asked there is Python's.  Nothing is sent to it from now on."""
    cdef Fetch *f = <Fetch *>lane.about
    cdef uint32_t i
    lock_take(&f.work.lock)
    f.dead = True
    for i in range(OPEN_MOST):
        if f.open[i].state == WAITED:
            fall_all(f.work, &f.open[i], BY_FAILED)
        f.open[i].state = FREE
    pthread_mutex_unlock(&f.work.lock)


# ---- as Python has it -----------------------------------------------------------------------------

cdef class Courier:
    """One ring's.  `stop` before the ring is closed, and after all of its lanes are stopped."""

    cdef Work work
    cdef RingSide ring
    cdef dict lanes             # by row: what is routed lives
    cdef bint started

    def __cinit__(self, RingSide ring not None):
        memset(&self.work, 0, sizeof(Work))
        self.work.ring, self.work.wake_fd = ring.ring, ring.wake_fd
        self.work.tell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.work.tell_fd < 0:
            raise OSError("no descriptor; raise the limit of open files")
        lock_init(&self.work.lock)
        self.ring, self.lanes = ring, {}

    def start(self):
        """Begin to serve the ring.  Raises OSError without a thread."""
        # Of the node's class, as the owner's lanes: a server that swaps waits for what they fetch.
        if thread_start_alike(&self.work.thread, work_run, &self.work, b"zc-courier"):
            raise OSError("no thread could be started; raise the limit of processes")
        self.started = True

    def stop(self):
        """The ring is Python's alone again."""
        if self.started:
            self.started = False
            zc_store32(&self.work.closing, 1)
            zc_kick(self.work.wake_fd)
            with nogil:
                pthread_join(self.work.thread, NULL)

    def __dealloc__(self):
        self.stop()
        if self.work.tell_fd >= 0:
            close(self.work.tell_fd)

    @property
    def tell_fd(self):
        """Readable when there is something in the ring, or in `fallen`, for us."""
        return self.work.tell_fd

    def route(self, uint32_t row, OwnerLane lane, uint32_t latency_us=0, uint32_t patience_us=0):
        """Ask pages of this row over that lane, so long at most; None: do not."""
        cdef Route *route = &self.work.route[row]
        assert row < DONORS
        lock_take(&self.work.lock)
        if route.fetch != NULL and (lane is None or route.fetch != &lane.fetch):
            self._abandon(row)
        route.fetch = NULL if lane is None else &lane.fetch
        route.latency_us, route.patience_us = latency_us, patience_us
        pthread_mutex_unlock(&self.work.lock)
        if lane is None:
            self.lanes.pop(row, None)
        else:
            self.lanes[row] = lane

    cdef object _abandon(self, uint32_t row):
        """Lock held: deadlines are looked at by route, so what is under way there is late now."""
        cdef Fetch *f = self.work.route[row].fetch
        cdef uint32_t i
        for i in range(OPEN_MOST):
            if f.open[i].state == WAITED:
                f.open[i].state = LATE
                fall_all(&self.work, &f.open[i], BY_LATE)

    def fallen(self):
        """[(cell, turn, page, version, where, length_codec, wrong, why, row)]: pages for us, once each."""
        cdef uint32_t i
        cdef Fallen *f
        cdef GetCell *cell
        found = []
        lock_take(&self.work.lock)
        for i in range(self.work.fallen_n):
            f = &self.work.fallen[i]
            cell = &self.work.ring.cell[f.cell]
            if zc_load32(&cell.word) == (f.turn << 4) + RING_TAKEN:
                found.append((
                    f.cell, f.turn, cell.page, cell.version, cell.where, cell.length_codec, cell.wrong, f.why, f.row,
                ))
        self.work.fallen_n = 0
        pthread_mutex_unlock(&self.work.lock)
        return found


cdef class OwnerLane(PutLane):
    """An owner's connection to one donor, over which its courier asks, and puts go."""

    cdef Fetch fetch
    cdef Courier courier

    def __cinit__(self, Courier courier not None):
        self.courier = courier
        self.alike = True
        memset(&self.fetch, 0, sizeof(Fetch))
        self.fetch.lane, self.fetch.work, self.fetch.puts = &self.lane, &courier.work, &self.puts
        self.fetch.next_msgid = OTHERS_MSGID
        self.lane.about, self.lane.handle, self.lane.ended = &self.fetch, fetched, fetch_ended

    def settled(self, response):
        """Whether this answer, which the session has read, was to a put of ours, or one of the courier's gets.

        It may be a good one that came close behind something of the session's: such a get is asked again.
        """
        cdef uint32_t msgid = response.msgid
        cdef Open *o
        if is_a_puts(msgid):
            return self._put_is_read(response)
        lock_take(&self.courier.work.lock)
        o = open_of(&self.fetch, msgid)
        if o != NULL:
            if o.state == WAITED:
                fall_all(&self.courier.work, o, BY_FAILED)
            o.state = FREE
        pthread_mutex_unlock(&self.courier.work.lock)
        return o != NULL
