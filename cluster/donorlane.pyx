"""A donor's end of a lane: gets and puts of an owner that has said hello, from the store to the socket.

    get -> is it the owner's epoch? -> copied out of the store, checked -> answer, one system call
    put -> does this donor take pages? -> copied in -> answer

Every other request, and each of these that is anything but what our own side sends, is the
session's (donor.py), and with it everything that needs thought: hello, drops, who may.  What is
answered here is answered with the same bytes as there.

Bound: per connection PAYLOAD_MOST for an answer, touched as far as answers are long.  A put waits
COMMIT_WAIT_US while frames are being committed, and nobody else waits with it.
What it is not: what reads and writes the socket (`lane`).
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from cluster.frames cimport (
    ASKED_GET, FRAME_MORE, HEAD_MOST, PAYLOAD_MOST, RECORDS_MOST, Asked, read_asked, write_answer,
)
from cluster.lane cimport LaneEnd
from cluster.lanesend cimport LANE_MORE, LANE_ODD, LANE_OVER, Lane, Piece, lane_send
from zcache_core.donation cimport Donation
from zcache_core.foreign cimport OWNERS, PAGE_OVER, Foreign, Record, foreign_get, foreign_put, foreign_room
from zcache_core.native cimport zc_load32, zc_load64, zc_store32

cdef enum:
    NO_ROW = 0xFFFFFFFF
    WELL = 0                    # peerwire.Health
    PAGE_LEAVING = 4            # peerwire.Code
    COMMIT_WAIT_US = 10000      # donor.COMMIT_WAIT_US

ctypedef struct Terms:
    Foreign *f
    uint32_t health             # atomic

ctypedef struct Serving:        # of one connection
    Lane *lane
    Terms *terms
    uint32_t row                # atomic; NO_ROW: it has not said hello
    uint64_t epoch
    int verdict
    uint8_t *payload
    uint8_t head[HEAD_MOST]
    uint8_t codes[RECORDS_MOST]


cdef int64_t serve(Lane *lane, const uint8_t *bytes, uint64_t have) noexcept nogil:
    """A get or a put in front of these bytes, answered; else LANE_ODD or LANE_MORE."""
    cdef Serving *s = <Serving *>lane.about
    cdef Asked asked
    cdef uint32_t row = zc_load32(&s.row)
    cdef Foreign *f = s.terms.f
    cdef int64_t used
    if row >= OWNERS or zc_load64(&f.owners[row].epoch) != s.epoch:
        return LANE_ODD
    used = read_asked(bytes, have, &asked)
    if used <= 0:
        return LANE_MORE if used == FRAME_MORE else LANE_ODD
    return used if reply(s, f, row, &asked) else s.verdict


cdef bint reply(Serving *s, Foreign *f, uint32_t row, const Asked *asked) noexcept nogil:
    """Do it and say so; False: not done, as `verdict` says."""
    cdef const Record *records = <const Record *>asked.records
    cdef uint32_t health = zc_load32(&s.terms.health)
    cdef uint64_t got = 0
    cdef uint64_t offer[3]
    cdef Piece pieces[2]
    if asked.what == ASKED_GET:
        got = foreign_get(f, row, s.epoch, records, asked.n, s.payload, s.codes)
    elif health != WELL:
        memset(s.codes, PAGE_LEAVING, asked.n)
    else:
        foreign_put(f, row, s.epoch, records, asked.n, asked.payload, s.codes, COMMIT_WAIT_US)
    if s.codes[0] == PAGE_OVER:     # since we looked
        s.verdict = LANE_ODD
        return False
    s.verdict = LANE_OVER
    offer[0] = foreign_room(f, row) if health == WELL else 0
    offer[1] = zc_load64(&f.held[row].bytes)
    offer[2] = health
    pieces[0].at = s.head
    pieces[0].bytes = write_answer(s.head, asked.msgid, offer, s.codes, asked.n, asked.what, got)
    pieces[1].at, pieces[1].bytes = s.payload, got
    return lane_send(s.lane, pieces, 2 if got else 1)


cdef class Lending:
    """What all connections of one donor share: its store, and how it is (`health`)."""

    cdef Donation donation
    cdef Terms terms

    def __cinit__(self, Donation donation not None):
        self.donation = donation
        self.terms.f = &donation.f
        self.terms.health = WELL

    @property
    def health(self):
        """As peerwire.Health has it; 0 until it is set."""
        return self.terms.health

    @health.setter
    def health(self, uint32_t health):
        zc_store32(&self.terms.health, health)


cdef class DonorLane(LaneEnd):
    """A connection of one owner; stopped before the donation is."""

    cdef Lending lending
    cdef Serving serving

    def __cinit__(self, Lending lending not None):
        self.lending = lending
        self.serving.lane, self.serving.terms = &self.lane, &lending.terms
        self.serving.row = NO_ROW
        self.serving.payload = <uint8_t *>mmap(
            NULL, PAYLOAD_MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
        )
        if <void *>self.serving.payload == MAP_FAILED:
            raise OSError(ENOMEM, "no memory for a connection")
        self.lane.about, self.lane.handle = &self.serving, serve

    def __dealloc__(self):
        self.stop()

    cdef void give_back(self):
        LaneEnd.give_back(self)
        if self.serving.payload != NULL and <void *>self.serving.payload != MAP_FAILED:
            munmap(self.serving.payload, PAYLOAD_MOST)
        self.serving.payload = NULL

    def welcome(self, uint32_t row, uint64_t epoch):
        """It has said hello: answer what it asks of this row, as long as the epoch is the row's.

        In our turn (the thread waits).
        """
        assert row < OWNERS and self.lane.handed
        self.serving.epoch = epoch
        zc_store32(&self.serving.row, row)
