"""The face that every cold tier has: batches of pages put, got and dropped.

    RAM tier -> tiers (what leaves, what comes back) -> ColdTier: disk, peers, a faulty one

A tier keeps compressed pages as they are.  Each travels with its page number and
version, and what comes back is proven by them: a tier that answers with other
bytes, an older version or another page has failed for that page, and never
passes it on.  It owns its addresses (`where`, 48 bits; the highest says whether it is of peers
or of a disk: lower_state) and its accounting of what is live; which copy counts is the index's to say.

Contract
    put      store a batch; sets `where` and `error` of each page; how many are good.
             Blocks as long as the tier needs.  One caller at a time.  A good page is
             counted live; who does not use it must drop it.  EAGAIN: it would have made a
             small write, and should come again with others.  No failure; not all of a batch.
    get      fetch one page into `blob` (4096 bytes of room) through `io` (IO_ROOM bytes,
             aligned); 0, EIO (unreadable), EILSEQ (wrong or damaged).  Many at a time.
    get_many several pages that lie close together, each with its blob and error as by get;
             `room` for reading them at once, at least IO_ROOM.  NULL: the tier has none.
    drop     this page's copy (page, version, where, length_codec) is not needed any more.
             Never blocks, never fails.
    adopt    after a restart: the index knows this copy.  False: impossible address.
    adopted  all are known.
    holds    whether this copy may be counted on, as far as is known now: what is in RAM too is
             only dropped there when it may (HOLDS).  HOLDS_MAYBE: that will be known soon; till
             then nothing is dropped for it, nor is it given up.  No I/O, no lock.  Any thread.
    part_lost  this copy's part on the disk was cut off: from now on it is at the peer alone.  False:
             not now, or the page has changed.  NULL: the tier has no copies of two parts.
    takes    whether a put is worth trying now: not while a failure is waited out, and not at
             the limit of bytes written a day.  Called by who puts.
    has_room whether a batch of that many bytes would find room now.
    resort   the objects of containers with little life (segments of the disk) read
             into `room`: pages with where and blob; how many, 0 when nothing is worth it.
             The caller puts those that are still alive anew, and then calls resorted.
    tick     background work, called now and then: give back what is free, try again
             after a failure.
    reason   0, or why nothing is taken now: the errno of the failure that degrades the tier,
             EDQUOT at the limit of bytes written a day.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    COLD_BATCH = 2048           # most pages in one put

cdef enum:                      # what `holds` says
    HOLDS_NOT = 0
    HOLDS = 1
    HOLDS_MAYBE = 2

cdef extern from *:
    """
    #define COLD_CAPSULE "zcache_core.ColdTier"     /* of tiers that Python hands about */
    """
    const char *COLD_CAPSULE

ctypedef struct ColdPage:
    uint64_t version
    uint64_t where
    uint32_t page
    uint32_t length_codec       # the low 16 bits of a location word
    uint8_t *blob
    int error

ctypedef struct ColdTier:
    const char *name
    uint32_t (*put)(ColdTier *, ColdPage *, uint32_t n) noexcept nogil
    int (*get)(ColdTier *, ColdPage *, uint8_t *io) noexcept nogil
    void (*get_many)(ColdTier *, ColdPage *, uint32_t n, uint8_t *room, uint64_t room_bytes) noexcept nogil
    void (*drop)(ColdTier *, const ColdPage *) noexcept nogil
    bint (*adopt)(ColdTier *, uint64_t where, uint32_t length_bytes) noexcept nogil
    void (*adopted)(ColdTier *) noexcept nogil
    int (*holds)(ColdTier *, uint64_t where) noexcept nogil
    bint (*part_lost)(ColdTier *, const ColdPage *) noexcept nogil
    bint (*takes)(ColdTier *) noexcept nogil
    bint (*has_room)(ColdTier *, uint64_t bytes) noexcept nogil
    uint32_t (*resort)(ColdTier *, ColdPage *, uint32_t most, uint8_t *room, uint64_t room_bytes) noexcept nogil
    void (*resorted)(ColdTier *) noexcept nogil
    void (*tick)(ColdTier *) noexcept nogil
    int (*reason)(ColdTier *) noexcept nogil


cdef inline ColdPage cold_page(uint64_t page, uint64_t version, uint64_t where, uint64_t location) noexcept nogil:
    """The page's copy at `where`, as drop takes it; `location` is any word with its length and codec."""
    cdef ColdPage p
    p.version = version
    p.where = where
    p.page = <uint32_t>page
    p.length_codec = location & 0xFFFF
    p.blob = NULL
    p.error = 0
    return p
