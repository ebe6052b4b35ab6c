"""A tier that fails on command: between the tiers and a real one, for tests.

    tiers -> FaultyTier -> disk
                 |  delays, refuses, loses, spoils; counts what it did

It is a ColdTier as any other and passes the same suite while no fault is set.  What
it does then is what a tier may do by its contract: it never gives out wrong bytes as
right ones.  A spoiled copy is answered with EILSEQ and rubbish in the buffer, a lost
one (put said it was there) with EILSEQ for ever.  Whoever stands above must use
neither.

Chances are per mille of pages, drawn from a seed.  Bound: LOST_MOST lost copies are
remembered, no more are lost.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.errno cimport EILSEQ
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport nanosleep, timespec

from zcache_core.cold cimport COLD_BATCH, COLD_CAPSULE, ColdPage, ColdTier
from zcache_core.layout cimport length_of
from zcache_core.native cimport zc_add64, zc_load32, zc_load64, zc_store32, zc_store64

cdef enum:
    LOST_MOST = 1024            # a power of two
    DELAY_STEP_US = 10000       # how soon a delay notices that it was made shorter

ctypedef struct Faulty:
    ColdTier face               # first: a ColdTier * is a Faulty *
    ColdTier *below
    uint64_t draws              # atomic: number of chances taken
    uint64_t seed
    # what to do: atomics
    uint32_t put_errno          # pages of a put fail with it ...
    uint32_t put_fail           # ... per mille
    uint32_t get_errno
    uint32_t get_fail
    uint32_t put_delay_us
    uint32_t get_delay_us
    uint32_t adopt_delay_us     # of each copy that a takeover finds
    uint32_t many_delay_us      # before what is fetched ahead, besides
    uint32_t spoil              # per mille of gets
    uint32_t lose               # per mille of pages put
    # what was done: atomics
    uint64_t failed_puts
    uint64_t failed_gets
    uint64_t spoiled_gets
    uint64_t lost_puts
    uint64_t lost_gets
    uint64_t delays
    uint64_t lost[LOST_MOST]    # versions; 0: free.  By version modulo
    uint32_t lost_page[LOST_MOST]


cdef bint happens(Faulty *f, uint32_t *per_mille) noexcept nogil:
    cdef uint32_t wanted = zc_load32(per_mille)
    cdef uint64_t z
    if wanted == 0:
        return False
    z = (zc_add64(&f.draws, 1) + f.seed) * <uint64_t>0x9E3779B97F4A7C15     # splitmix64
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return (z ^ (z >> 31)) % 1000 < wanted


cdef void delay(Faulty *f, uint32_t *us) noexcept nogil:
    """Sleep for so long, or until a shorter delay is set."""
    cdef timespec nap
    cdef uint32_t done_us = 0
    cdef uint32_t step_us
    if zc_load32(us):
        zc_add64(&f.delays, 1)
    while done_us < zc_load32(us):
        step_us = min(zc_load32(us) - done_us, <uint32_t>DELAY_STEP_US)
        nap.tv_sec = 0
        nap.tv_nsec = step_us * 1000
        nanosleep(&nap, NULL)
        done_us += step_us


cdef inline bint is_lost(Faulty *f, uint64_t version) noexcept nogil:
    return zc_load64(&f.lost[version % LOST_MOST]) == version


cdef uint32_t faulty_put(ColdTier *tier, ColdPage *pages, uint32_t n) noexcept nogil:
    cdef Faulty *f = <Faulty *>tier
    cdef ColdPage good[COLD_BATCH]
    cdef uint32_t whose[COLD_BATCH]
    cdef uint32_t i
    cdef uint32_t m = 0
    cdef uint32_t stored = 0
    cdef uint64_t *cell
    delay(f, &f.put_delay_us)
    for i in range(n):
        if happens(f, &f.put_fail):
            pages[i].error = <int>f.put_errno
            zc_add64(&f.failed_puts, 1)
        else:
            good[m] = pages[i]
            whose[m] = i
            m += 1
    if m:
        f.below.put(f.below, good, m)
    for i in range(m):
        pages[whose[i]] = good[i]
        if good[i].error:
            continue
        stored += 1
        cell = &f.lost[good[i].version % LOST_MOST]
        if cell[0] == 0 and happens(f, &f.lose):
            f.lost_page[good[i].version % LOST_MOST] = good[i].page
            zc_store64(cell, good[i].version)
            zc_add64(&f.lost_puts, 1)
    return stored


cdef int faulty_get(ColdTier *tier, ColdPage *page, uint8_t *io) noexcept nogil:
    cdef Faulty *f = <Faulty *>tier
    delay(f, &f.get_delay_us)
    return worsen(f, page, f.below.get(f.below, page, io))


cdef int worsen(Faulty *f, ColdPage *page, int error) noexcept nogil:
    """What the page is answered with after a chance for every fault."""
    if happens(f, &f.get_fail):
        zc_add64(&f.failed_gets, 1)
        memset(page.blob, 0xA5, length_of(page.length_codec))
        return <int>f.get_errno
    if error == 0 and is_lost(f, page.version):
        zc_add64(&f.lost_gets, 1)
        error = EILSEQ
    elif error == 0 and happens(f, &f.spoil):
        zc_add64(&f.spoiled_gets, 1)
        error = EILSEQ
    if error:
        memset(page.blob, 0xA5, length_of(page.length_codec))
    return error


cdef void faulty_get_many(ColdTier *tier, ColdPage *pages, uint32_t n, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    """One delay for all, and each page's own chances."""
    cdef Faulty *f = <Faulty *>tier
    cdef uint32_t i
    delay(f, &f.get_delay_us)
    delay(f, &f.many_delay_us)
    f.below.get_many(f.below, pages, n, room, room_bytes)
    for i in range(n):
        pages[i].error = worsen(f, &pages[i], pages[i].error)


cdef void faulty_drop(ColdTier *tier, const ColdPage *page) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    below.drop(below, page)


cdef bint faulty_part_lost(ColdTier *tier, const ColdPage *page) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    return below.part_lost(below, page)


cdef bint faulty_adopt(ColdTier *tier, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    delay(<Faulty *>tier, &(<Faulty *>tier).adopt_delay_us)
    return below.adopt(below, where, length_bytes)


cdef void faulty_adopted(ColdTier *tier) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    below.adopted(below)


cdef int faulty_holds(ColdTier *tier, uint64_t where) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    return below.holds(below, where)


cdef bint faulty_takes(ColdTier *tier) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    return below.takes(below)


cdef bint faulty_has_room(ColdTier *tier, uint64_t bytes) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    return below.has_room(below, bytes)


cdef uint32_t faulty_resort(ColdTier *tier, ColdPage *pages, uint32_t most, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    """What is lost cannot be read for resorting either."""
    cdef Faulty *f = <Faulty *>tier
    cdef uint32_t found = f.below.resort(f.below, pages, most, room, room_bytes)
    cdef uint32_t n = 0
    cdef uint32_t i
    for i in range(found):
        if not is_lost(f, pages[i].version):
            pages[n] = pages[i]
            n += 1
    if found and n == 0:
        f.below.resorted(f.below)
    return n


cdef void faulty_resorted(ColdTier *tier) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    below.resorted(below)


cdef void faulty_tick(ColdTier *tier) noexcept nogil:
    cdef ColdTier *below = (<Faulty *>tier).below
    below.tick(below)


cdef int faulty_reason(ColdTier *tier) noexcept nogil:
    cdef Faulty *f = <Faulty *>tier
    if zc_load32(&f.put_fail) == 1000:
        return <int>f.put_errno
    return f.below.reason(f.below)


cdef class FaultyTier:
    """A faulty tier above that of `capsule`, with its own `capsule`; no fault at first.

    Made by Cooling.wrap or ColdProbe.wrap: `cooling.wrap(lambda below: FaultyTier(below, seed))`.
    """

    cdef Faulty faulty
    cdef readonly object capsule

    def __cinit__(self, below, uint64_t seed=0):
        cdef Faulty *f = &self.faulty
        memset(f, 0, sizeof(Faulty))
        f.seed = seed
        f.below = <ColdTier *>PyCapsule_GetPointer(below, COLD_CAPSULE)
        f.face.name = b"faulty"
        f.face.put = faulty_put
        f.face.get = faulty_get
        if f.below.get_many != NULL:
            f.face.get_many = faulty_get_many
        f.face.drop = faulty_drop
        f.face.adopt = faulty_adopt
        f.face.adopted = faulty_adopted
        f.face.holds = faulty_holds
        if f.below.part_lost != NULL:
            f.face.part_lost = faulty_part_lost
        f.face.takes = faulty_takes
        f.face.has_room = faulty_has_room
        f.face.resort = faulty_resort
        f.face.resorted = faulty_resorted
        f.face.tick = faulty_tick
        f.face.reason = faulty_reason
        self.capsule = PyCapsule_New(&f.face, COLD_CAPSULE, NULL)

    def set(
        self, *, uint32_t put_fail=0, uint32_t put_errno=5, uint32_t get_fail=0, uint32_t get_errno=5,
        uint32_t put_delay_us=0, uint32_t get_delay_us=0, uint32_t spoil=0, uint32_t lose=0,
        uint32_t many_delay_us=0, uint32_t adopt_delay_us=0,
    ):
        """From now on these faults and no others; chances per mille, delays before each call.

        A call that is being delayed goes on when its delay is made shorter.
        """
        cdef Faulty *f = &self.faulty
        zc_store32(&f.put_errno, put_errno)
        zc_store32(&f.get_errno, get_errno)
        zc_store32(&f.put_fail, put_fail)
        zc_store32(&f.get_fail, get_fail)
        zc_store32(&f.put_delay_us, put_delay_us)
        zc_store32(&f.get_delay_us, get_delay_us)
        zc_store32(&f.many_delay_us, many_delay_us)
        zc_store32(&f.adopt_delay_us, adopt_delay_us)
        zc_store32(&f.spoil, spoil)
        zc_store32(&f.lose, lose)

    def counts(self):
        """What was done so far, by name: pages, and calls delayed."""
        cdef Faulty *f = &self.faulty
        return {
            "failed_puts": f.failed_puts, "failed_gets": f.failed_gets, "spoiled_gets": f.spoiled_gets,
            "lost_puts": f.lost_puts, "lost_gets": f.lost_gets, "delays": f.delays,
        }

    def lost(self):
        """{version: page} of the copies that were lost."""
        cdef Faulty *f = &self.faulty
        return {f.lost[i]: f.lost_page[i] for i in range(LOST_MOST) if f.lost[i]}
