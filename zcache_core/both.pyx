"""Two tiers as one: pages go to peers first, else to the disk; each is read where its address says.

    put   peers, if they take it, have room, and answer faster than the disk -> else the disk
          what peers refused of a batch goes to the disk in the same call
    get   by the address: lower_state(where)

Which one answers faster is measured: the smoothed time of a read from each.  Every
TRY_EVERY-th batch goes to the slower one, so that it is noticed when that has changed.

What is being cleaned on the disk stays on the disk.  With backup=disk a page goes to both
(backup.pyx).

Bound: one array of a batch.  One of the two may be missing (NULL).
"""

from libc.errno cimport EAGAIN, EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from zcache_core.backup cimport (
    backup_adopt, backup_drop, backup_get, backup_get_many, backup_holds, backup_put, backup_tick,
    give_up_disk_copy,
)
from zcache_core.bothstate cimport PIECE_BYTES, TRY_EVERY, can_take, observe_get, peers_are_faster
from zcache_core.cold cimport HOLDS_NOT, ColdPage, ColdTier
from zcache_core.layout cimport ST_PEER, is_backed, length_of, lower_state
from zcache_core.pthread cimport now_us

cdef ColdTier *of_where(Both *b, uint64_t where) noexcept nogil:
    return b.peers if lower_state(where) == ST_PEER else b.disk


cdef ColdTier *chosen(Both *b, uint64_t bytes) noexcept nogil:
    """Where a batch goes first."""
    cdef bint peers_first = peers_are_faster(b)
    if b.disk == NULL:
        return b.peers
    if b.peers == NULL or b.resorting:
        return b.disk
    b.puts += 1
    if b.puts % TRY_EVERY == 0:
        peers_first = not peers_first
    if peers_first:
        return b.peers if can_take(b.peers, bytes) else b.disk
    return b.disk if can_take(b.disk, bytes) else b.peers


cdef uint32_t both_put(ColdTier *tier, ColdPage *pages, uint32_t n) noexcept nogil:
    cdef Both *b = <Both *>tier
    cdef ColdTier *first
    cdef ColdTier *other
    cdef uint64_t bytes = 0
    cdef uint32_t i, good
    cdef uint32_t m = 0
    for i in range(n):
        bytes += length_of(pages[i].length_codec)
    if b.backs_up and not b.resorting:
        return backup_put(b, pages, n)
    first = chosen(b, bytes)
    good = first.put(first, pages, n)
    other = b.peers if first == b.disk else b.disk
    if good == n or b.resorting or other == NULL or not other.takes(other):
        return good
    for i in range(n):
        if pages[i].error and pages[i].error != EAGAIN:
            b.again[m] = pages[i]
            b.whose[m] = i
            m += 1
    if m:
        good += other.put(other, b.again, m)
    for i in range(m):
        pages[b.whose[i]] = b.again[i]
    return good


cdef int both_get(ColdTier *tier, ColdPage *page, uint8_t *io) noexcept nogil:
    cdef Both *b = <Both *>tier
    cdef ColdTier *below = of_where(b, page.where)
    cdef int64_t start = now_us()
    cdef int error
    if below == NULL:
        return EIO
    if is_backed(page.where):
        return backup_get(b, page, io)
    error = below.get(below, page, io)
    observe_get(b, 0 if below == b.peers else 1, now_us() - start, error)
    return error


cdef void both_get_many(ColdTier *tier, ColdPage *pages, uint32_t n, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    """In one read if all are in the same tier."""
    cdef Both *b = <Both *>tier
    cdef ColdTier *below = NULL
    cdef uint32_t i
    cdef bint alike = n > 0
    if n and is_backed(pages[0].where):
        backup_get_many(b, pages, n, room, room_bytes)
        return
    for i in range(n):
        alike = alike and not is_backed(pages[i].where) and of_where(b, pages[i].where) == of_where(b, pages[0].where)
    if alike:
        below = of_where(b, pages[0].where)
    if below != NULL and below.get_many != NULL:
        below.get_many(below, pages, n, room, room_bytes)
        return
    for i in range(n):
        pages[i].error = both_get(tier, &pages[i], room)


cdef void both_drop(ColdTier *tier, const ColdPage *page) noexcept nogil:
    cdef ColdTier *below = of_where(<Both *>tier, page.where)
    if is_backed(page.where):
        backup_drop(<Both *>tier, page)
    elif below != NULL:
        below.drop(below, page)


cdef bint both_adopt(ColdTier *tier, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef ColdTier *below = of_where(<Both *>tier, where)
    if is_backed(where):
        return backup_adopt(<Both *>tier, where, length_bytes)
    return below != NULL and below.adopt(below, where, length_bytes)


cdef void both_adopted(ColdTier *tier) noexcept nogil:
    cdef Both *b = <Both *>tier
    if b.peers != NULL:
        b.peers.adopted(b.peers)
    if b.disk != NULL:
        b.disk.adopted(b.disk)


cdef int both_holds(ColdTier *tier, uint64_t where) noexcept nogil:
    cdef ColdTier *below = of_where(<Both *>tier, where)
    if is_backed(where):
        return backup_holds(<Both *>tier, where)
    return below.holds(below, where) if below != NULL else <int>HOLDS_NOT


cdef bint both_part_lost(ColdTier *tier, const ColdPage *page) noexcept nogil:
    return give_up_disk_copy(<Both *>tier, page)


cdef bint both_takes(ColdTier *tier) noexcept nogil:
    cdef Both *b = <Both *>tier
    return b.peers != NULL and b.peers.takes(b.peers) or b.disk != NULL and b.disk.takes(b.disk)


cdef bint both_has_room(ColdTier *tier, uint64_t bytes) noexcept nogil:
    """In either; of peers that take nothing now, none.  With backup=disk on the disk, which is cleaned then."""
    cdef Both *b = <Both *>tier
    if b.backs_up and b.disk.takes(b.disk):
        return b.disk.has_room(b.disk, bytes)
    return can_take(b.peers, bytes) or b.disk != NULL and b.disk.has_room(b.disk, bytes)


cdef uint32_t both_resort(ColdTier *tier, ColdPage *pages, uint32_t most, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    cdef Both *b = <Both *>tier
    cdef uint32_t n = 0
    if b.disk != NULL:
        n = b.disk.resort(b.disk, pages, most, room, room_bytes)
    b.resorting = n > 0
    return n


cdef void both_resorted(ColdTier *tier) noexcept nogil:
    cdef Both *b = <Both *>tier
    if b.disk != NULL:
        b.disk.resorted(b.disk)
    b.resorting = False


cdef void both_tick(ColdTier *tier) noexcept nogil:
    cdef Both *b = <Both *>tier
    if b.peers != NULL:
        b.peers.tick(b.peers)
    if b.disk != NULL:
        b.disk.tick(b.disk)
        backup_tick(b)


cdef int both_reason(ColdTier *tier) noexcept nogil:
    """Why nothing is taken: the disk's reason where there is one, for peers come and go."""
    cdef Both *b = <Both *>tier
    if b.disk == NULL:
        return b.peers.reason(b.peers)
    if can_take(b.peers, PIECE_BYTES):
        return 0
    return b.disk.reason(b.disk)


cdef void both_make(Both *b, ColdTier *peers, ColdTier *disk) noexcept nogil:
    """`peers` or `disk` may be NULL, not both."""
    memset(b, 0, sizeof(Both))
    b.peers, b.disk = peers, disk
    b.face.name = b"peers and disk"
    b.face.put = both_put
    b.face.get = both_get
    b.face.get_many = both_get_many
    b.face.drop = both_drop
    b.face.adopt = both_adopt
    b.face.adopted = both_adopted
    b.face.holds = both_holds
    b.face.part_lost = both_part_lost
    b.face.takes = both_takes
    b.face.has_room = both_has_room
    b.face.resort = both_resort
    b.face.resorted = both_resorted
    b.face.tick = both_tick
    b.face.reason = both_reason
