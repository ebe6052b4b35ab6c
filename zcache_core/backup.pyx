"""backup=disk: a page that leaves RAM has one copy at a peer and one on the disk.

    put   the disk -> what it took: one peer as well -> both acknowledged: an address of both
          what the disk does not take: as many peers as `replicas` says
          what no peer takes: stays on the disk alone, and is missing a copy
    get   whoever answers faster; the other one when that is late, wrong or gone
          a read that is inside of the disk waits for it, later ones notice and ask the peer
    tick  copies at peers that are missing, made from the disk

    47  46  45 ..... 39  38 .................................. 0
    1   1   donor's row  address on the disk

So one failure, of a donor or of the disk, never loses a page, and costs a donor half the RAM
that two copies at peers take.  One word names both copies, and is changed by one
compare-and-swap: a kill at any moment leaves no half of it.

A donor that is lost, lies or wants to be rid of a page: its node says so (NOTE_GONE), the page is
on the disk alone from then on, and the next ticks send it to another donor.  A disk whose writes
fail (not one that is full): the node is told (disk_fails) and gives pages beside it their second
copy elsewhere, as `replicas` says.  A copy on the disk that is found damaged, or that was cut off
with the end of its file, is given up, and the node makes another from the peer's.

Bounds: a read waits no longer for a peer than HEDGE_MOST_US before it reads the disk; a tick works
for SWEEP_US and one batch; the disk has 512 GiB at most (the address).
Called by the cooling thread, reads by any.
"""

from libc.errno cimport EAGAIN, EDQUOT, EILSEQ, EIO, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.bothstate cimport (
    KNOWN_AFTER, SMOOTH, SWEEP_PAGES, TRY_EVERY, can_take, observe_get, peers_are_faster,
)
from zcache_core.cold cimport HOLDS, ColdTier, cold_page
from zcache_core.cooling cimport copy_moved, lower_now
from zcache_core.core cimport Core
from zcache_core.counter_ids cimport (
    C_BACKED_PAGES, C_BACKUP_LOADS, C_BACKUP_MISSING_PAGES, C_BACKUP_RENEWED_PAGES, C_DISK_CORRUPT_PAGES, C_DISK_PAGES,
)
from zcache_core.index cimport entry_load
from zcache_core.layout cimport (
    BACKED_BITS, COPIES_MOST, PAGE_BYTES, ST_DISK, ST_RAM_EPHEMERAL, Entry, backed_where, disk_part, donor_at,
    entry_is_sound, is_backed, length_of, lower_state, state_of, version_of, where_of,
)
from zcache_core.native cimport zc_add64, zc_load32, zc_load64, zc_store32, zc_store64
from zcache_core.peernotes cimport count_alone, count_backed
from zcache_core.peers cimport peers_get_within
from zcache_core.pthread cimport now_us

cdef extern from "<errno.h>":
    enum: ENODATA

cdef enum:
    # As the node's own hedging (replicas.py): four usual reads, 3 to 250 ms
    HEDGE_LEAST_US = 3000
    HEDGE_MOST_US = 250000
    HEDGE_UNKNOWN_US = 50000
    FOR_EVER_US = 1 << 30           # the peer tier's own bound then
    # No read of the disk is over for so long, though there are some: as patient as with a peer
    STANDS_US = HEDGE_MOST_US
    # Of each 0.1 s; a read of a disk takes 0.1 ms and up, so some 12 MB/s at least
    SWEEP_US = 30000
    SWEEP_ENTRIES = 1 << 17         # looked at in a tick: 0.5 ms


# ---- putting -----------------------------------------------------------------------------------

cdef uint32_t on_disk(Both *b, ColdPage *pages, uint32_t n) noexcept nogil:
    """The batch to the disk, if it takes any; how many are there."""
    cdef uint64_t bytes = 0
    cdef uint32_t i
    for i in range(n):
        bytes += length_of(pages[i].length_codec)
        pages[i].error = EIO
    return b.disk.put(b.disk, pages, n) if can_take(b.disk, bytes) else 0


cdef bint at_one(ColdPage *page) noexcept nogil:
    """Whether peers took one copy, as they were asked to."""
    return page.error == 0 and donor_at(page.where, 1) == 0


cdef void one_copy_each(Both *b, ColdPage *pages, uint32_t n) noexcept nogil:
    """Pages that lie on the disk: one copy at a peer; the address is of both then."""
    cdef ColdPage *one
    cdef uint32_t i
    cdef uint32_t m = 0
    for i in range(n):
        if pages[i].error == 0 and pages[i].where >> BACKED_BITS == 0:
            b.again[m] = pages[i]
            b.whose[m] = i
            m += 1
    b.peer_tier.copies = 1
    if m and b.peers.takes(b.peers):
        b.peers.put(b.peers, b.again, m)
        for i in range(m):
            one = &pages[b.whose[i]]
            if at_one(&b.again[i]):
                one.where = backed_where(donor_at(b.again[i].where, 0), one.where)
                count_alone(b.peer_tier, -1)
                count_backed(b.peer_tier, 1)
            elif b.again[i].error == 0:
                b.peers.drop(b.peers, &b.again[i])
    b.peer_tier.copies = 0


cdef uint32_t backup_put(Both *b, ColdPage *pages, uint32_t n) noexcept nogil:
    cdef uint32_t good = on_disk(b, pages, n)
    cdef uint32_t i
    cdef uint32_t m = 0
    if good:
        one_copy_each(b, pages, n)
    for i in range(n):
        if pages[i].error and pages[i].error != EAGAIN:
            b.again[m] = pages[i]
            b.whose[m] = i
            m += 1
    if m and b.peers.takes(b.peers):
        good += b.peers.put(b.peers, b.again, m)
        for i in range(m):
            pages[b.whose[i]] = b.again[i]
    return good


# ---- reading -----------------------------------------------------------------------------------

cdef int64_t hedge_us(Both *b) noexcept nogil:
    """So long a peer may take before the disk is read."""
    if b.gets[0] < KNOWN_AFTER:
        return HEDGE_UNKNOWN_US
    return min(<int64_t>HEDGE_MOST_US, max(<int64_t>HEDGE_LEAST_US, <int64_t>(4 * zc_load64(&b.get_us[0]) // SMOOTH)))


cdef int from_peer(Both *b, ColdPage *page, int64_t most_us) noexcept nogil:
    cdef int64_t start = now_us()
    cdef int error = peers_get_within(b.peer_tier, page, most_us)
    observe_get(b, 0, now_us() - start, error)
    return error


cdef int from_disk(Both *b, ColdPage *page, uint8_t *io) noexcept nogil:
    cdef ColdPage there = page[0]
    cdef int64_t start = now_us()
    cdef int error
    there.where = disk_part(page.where)
    if zc_load64(&b.disk_begun) == zc_load64(&b.disk_ended):
        zc_store64(&b.disk_moved_us, <uint64_t>start)
    zc_add64(&b.disk_begun, 1)
    error = b.disk.get(b.disk, &there, io)
    zc_store64(&b.disk_moved_us, <uint64_t>now_us())
    zc_add64(&b.disk_ended, 1)
    observe_get(b, 1, now_us() - start, error)
    return error


cdef bint disk_stands(Both *b) noexcept nogil:
    """Whether reads are inside of the disk, and none has come out for long."""
    return (
        zc_load64(&b.disk_begun) != zc_load64(&b.disk_ended)
        and now_us() - <int64_t>zc_load64(&b.disk_moved_us) > STANDS_US
    )


cdef bint peers_live(Both *b) noexcept nogil:
    return zc_load64(&b.peer_tier.ring.head.live_peers) != 0


cdef bint give_up_disk_copy(Both *b, const ColdPage *page) noexcept nogil:
    """It is damaged or cut off: the peer's counts alone, until the node makes another.  False: not now."""
    cdef ColdPage there = page[0]
    cdef uint64_t alone = (<uint64_t>1 << 47) | donor_at(page.where, 0)
    # (a page that has changed meanwhile was dropped there: what is read then is no damage)
    # nor is anything given up before a takeover has counted it
    if b.peer_tier.core == NULL or not zc_load32(&b.peer_tier.core.ready):
        return False
    if not copy_moved(b.peer_tier.core, page, alone):
        return False
    count_backed(b.peer_tier, -1)
    count_alone(b.peer_tier, 1)
    there.where = disk_part(page.where)
    b.disk.drop(b.disk, &there)
    return True


cdef int backup_get(Both *b, ColdPage *page, uint8_t *io) noexcept nogil:
    """From whoever answers faster; ENODATA only when neither has it any more."""
    cdef bint peers_first = peers_are_faster(b)
    cdef bint stands
    cdef int disk_error
    cdef int error = EIO
    if b.disk == NULL:
        return peers_get_within(b.peer_tier, page, FOR_EVER_US)
    b.reads += 1
    if b.reads % TRY_EVERY == 0:
        peers_first = not peers_first
    stands = disk_stands(b)
    if (peers_first or stands) and peers_live(b):
        error = from_peer(b, page, FOR_EVER_US if stands else hedge_us(b))
        if error == 0:
            return 0
        zc_add64(&b.peer_tier.cells[C_BACKUP_LOADS], 1)
    disk_error = from_disk(b, page, io)
    if disk_error == 0:
        return 0
    if error == EIO:            # not asked, or not waited for
        error = from_peer(b, page, FOR_EVER_US)
    if error == 0 and disk_error == EILSEQ and give_up_disk_copy(b, page):
        zc_add64(&b.peer_tier.cells[C_DISK_CORRUPT_PAGES], 1)
    if error == ENODATA and disk_error != EILSEQ:
        return EIO
    return error


cdef void backup_get_many(Both *b, ColdPage *pages, uint32_t n, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    """All at once from whoever is faster, if all have both; what that one has not, alone."""
    cdef ColdTier *first = b.peers if peers_live(b) and (peers_are_faster(b) or disk_stands(b)) else b.disk
    cdef uint32_t i
    cdef bint alike = first != NULL and first.get_many != NULL
    for i in range(n):
        pages[i].error = EIO
        alike = alike and is_backed(pages[i].where)
    if alike and first == b.peers:
        first.get_many(first, pages, n, room, room_bytes)
    elif alike:
        for i in range(n):
            pages[i].where = disk_part(pages[i].where)
        first.get_many(first, pages, n, room, room_bytes)
        return                  # (what failed is read when it is asked for)
    for i in range(n):
        if pages[i].error:
            pages[i].error = b.face.get(&b.face, &pages[i], room)


# ---- the rest of the face, for addresses of both ---------------------------------------------------

cdef void backup_drop(Both *b, const ColdPage *page) noexcept nogil:
    cdef ColdPage there = page[0]
    there.where = disk_part(page.where)
    b.peers.drop(b.peers, page)
    if b.disk != NULL:
        b.disk.drop(b.disk, &there)


cdef bint backup_adopt(Both *b, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef ColdPage page
    if not b.peers.adopt(b.peers, where, length_bytes):
        return False
    if b.disk != NULL and b.disk.adopt(b.disk, disk_part(where), length_bytes):
        return True
    page = cold_page(0, 0, where, <uint64_t>(length_bytes - 1) << 4)
    b.peers.drop(b.peers, &page)        # (told to the donor as page 0 of version 0: it has none)
    return False


cdef int backup_holds(Both *b, uint64_t where) noexcept nogil:
    """One of the two is enough: while the other is missing, it is being made again."""
    if b.disk != NULL and b.disk.holds(b.disk, disk_part(where)) == HOLDS:
        return HOLDS
    return b.peers.holds(b.peers, where)


# ---- copies that are missing -------------------------------------------------------------------

cdef bint lies_on_disk_alone(Core *core, uint64_t page, ColdPage *copy) noexcept nogil:
    """Whether the page has a copy on the disk and none at a peer; what to read then."""
    cdef Entry e = entry_load(&core.index, page)
    cdef uint64_t where
    if state_of(e.version) != ST_DISK and state_of(e.version) != ST_RAM_EPHEMERAL:
        return False
    if not entry_is_sound(e.location, e.version):
        return False
    copy[0] = cold_page(page, version_of(e.version), 0, e.location)
    copy.where = where = lower_now(core, copy)
    return where != 0 and lower_state(where) == ST_DISK and where >> BACKED_BITS == 0


cdef uint32_t gather_missing(Both *b, ColdPage *found, int64_t until_us) noexcept nogil:
    """Pages without a copy at a peer, read from the disk; how many."""
    cdef Core *core = b.peer_tier.core
    cdef uint8_t *io = b.room + SWEEP_PAGES * PAGE_BYTES     # (aligned, as the room is)
    cdef uint32_t n = 0
    cdef uint32_t read = 0
    cdef uint32_t looked
    for looked in range(SWEEP_ENTRIES):
        if n == SWEEP_PAGES or looked >= core.index.pages or read and now_us() > until_us:
            break
        if b.sweep_at >= core.index.pages:
            b.sweep_at = 0
        if lies_on_disk_alone(core, b.sweep_at, &found[n]):
            found[n].blob = b.room + n * PAGE_BYTES
            read += 1
            if b.disk.get(b.disk, &found[n], io) == 0:
                found[n].error = 0
                n += 1
        b.sweep_at += 1
    return n


cdef void sweep(Both *b) noexcept nogil:
    """Some of the pages on the disk alone get their copy at a peer."""
    cdef ColdPage found[SWEEP_PAGES]
    cdef ColdPage *old
    cdef uint64_t new
    cdef uint32_t n = gather_missing(b, found, now_us() + SWEEP_US)
    cdef uint32_t i
    if n == 0:
        return
    for i in range(n):
        b.again[i] = found[i]
    b.peer_tier.copies = 1
    b.peers.put(b.peers, b.again, n)
    b.peer_tier.copies = 0
    for i in range(n):
        old = &found[i]
        if b.again[i].error:
            continue
        new = backed_where(donor_at(b.again[i].where, 0), old.where)
        if at_one(&b.again[i]) and copy_moved(b.peer_tier.core, old, new):
            count_alone(b.peer_tier, -1)
            count_backed(b.peer_tier, 1)
            zc_add64(&b.peer_tier.cells[C_BACKUP_RENEWED_PAGES], 1)
        else:
            b.peers.drop(b.peers, &b.again[i])


cdef bint peers_have_room(Both *b) noexcept nogil:
    cdef bint room
    b.peer_tier.copies = 1
    room = can_take(b.peers, SWEEP_PAGES * PAGE_BYTES)
    b.peer_tier.copies = 0
    return room


cdef void backup_tick(Both *b) noexcept nogil:
    cdef int64_t missing = <int64_t>zc_load64(&b.disk_cells[C_DISK_PAGES]) - <int64_t>zc_load64(&b.peer_tier.cells[C_BACKED_PAGES])
    cdef int reason = b.disk.reason(b.disk)
    cdef bint fails = reason != 0 and reason != ENOSPC and reason != EDQUOT
    b.peer_tier.cells[C_BACKUP_MISSING_PAGES] = <uint64_t>missing if missing > 0 else 0
    zc_store32(&b.peer_tier.ring.head.disk_fails, fails)
    if b.backs_up and missing > 0 and not fails and b.peer_tier.core != NULL and peers_have_room(b):
        sweep(b)


cdef void backup_make(Both *b, Peers *peers, uint64_t *disk_cells, bint backs_up) noexcept nogil:
    b.peer_tier, b.disk_cells, b.backs_up = peers, disk_cells, backs_up
    peers.backup = backs_up
