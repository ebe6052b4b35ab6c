"""Up: a page whose copy is below is read, checked, answered; and who earns a RAM copy.

A page that is read from below is only given a RAM copy when it is read a second
time within the next 2 * pool reads from below (ghosts remember): a scan of the
whole device cannot push the hot pages out.  Its copy on a disk stays, so the RAM copy is
ephemeral from the first moment; of copies at peers alone it is the only one, they are dropped.

Bound: one read of one object below, in the request's own slot, with no lock held; ghosts
cost 8 to 16 bytes a frame of the pool.
"""

from libc.errno cimport EILSEQ, EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.ahead cimport ahead_note, ahead_take
from zcache_core.allocator cimport object_header
from zcache_core.below cimport Tiers
from zcache_core.codec cimport codec_decompress
from zcache_core.cold cimport ColdPage, cold_page
from zcache_core.cooling cimport leave_damaged_copy, leave_for_lost, promote
from zcache_core.counter_ids cimport (
    C_COLD_LOADS, C_DISK_CORRUPT_PAGES, C_DISK_READ_ERRORS, C_LOST_PAGES, C_PROMOTED_PAGES,
    H_GET_DISK, H_GET_PEER,
)
from zcache_core.index cimport entry_load
from zcache_core.layout cimport (
    ST_PEER, Entry, codec_of, header_lower, length_of, lower_state, state_of, version_of, where_of,
)
from zcache_core.native cimport zc_add64, zc_load32, zc_store32
from zcache_core.pthread cimport lock_take, now_us, pthread_mutex_unlock
from zcache_core.ramtier cimport place_is_possible
from zcache_core.slots cimport Slot, count, observe, slot_park, slot_unpark

cdef extern from "<errno.h>":
    enum: ENODATA

cdef enum:
    GHOSTS_LEAST = 4096
    GHOST_WAYS = 16             # of 4 bytes: one cache line
    STAMPS = 1 << 14            # a window is so many units of time at most: a quarter of what 16 bits hold

cdef uint64_t GOLDEN = 0x9E3779B97F4A7C15


# ---- who earns a RAM copy -----------------------------------------------------------------
# A ghost is 16 bits of a page's hash and 16 of the time, counted in reads from below.  It
# lies in one of the sixteen cells that the hash names.  One that is too old to count makes
# room, else any of them: if it were the oldest, pages that share the cells and are read in
# turn would forget one another for ever.  A wrong hit, 1 in 2048 at most, is promoted early.

cdef uint64_t ghost_cells(uint64_t pool_frames) noexcept nogil:
    """A power of two, at least twice the pool: as many as pages may be read within the window."""
    cdef uint64_t n = GHOSTS_LEAST
    while n < 2 * pool_frames:
        n *= 2
    return n


cdef bint earns_ram(Tiers *t, uint64_t page) noexcept nogil:
    """Whether this page was read from below a short while ago; remembers that it is now."""
    cdef uint64_t window = 2 * <uint64_t>t.core.arena.target
    cdef uint64_t unit = window // STAMPS + 1
    cdef uint64_t reads = zc_add64(&t.cold_loads, 1)
    cdef uint32_t now = <uint32_t>(reads // unit) & 0xFFFF
    cdef uint64_t hash = (page + 1) * GOLDEN
    cdef uint32_t tag = <uint32_t>(hash & 0xFFFF) | 1
    cdef uint32_t *cell = t.ghosts + (hash >> 20) % t.ghost_cells // GHOST_WAYS * GHOST_WAYS
    cdef uint64_t mixed = reads * GOLDEN
    cdef uint32_t place
    cdef uint32_t oldest = 0
    cdef uint32_t i, seen, age
    mixed = (mixed ^ mixed >> 32) * GOLDEN      # (without it the places come almost in turn)
    place = <uint32_t>(mixed >> 60) % GHOST_WAYS
    for i in range(GHOST_WAYS):
        seen = zc_load32(cell + i)
        age = (now - seen) & 0xFFFF if seen else 0x10000
        if age * unit < window:
            if seen >> 16 == tag:
                zc_store32(cell + i, (tag << 16) | now)
                return True
        elif age > oldest:
            oldest = age
            place = i
    zc_store32(cell + place, (tag << 16) | now)
    return False


# ---- reading ------------------------------------------------------------------------------

cdef int read_below(Tiers *t, Slot *slot, uint64_t page, Entry e, uint64_t where, uint8_t *data) noexcept nogil:
    """The page of entry `e` from its copy at `where`: 0, EIO or EILSEQ.  The blob is in the slot."""
    cdef ColdPage wanted
    cdef int error
    wanted.page = <uint32_t>page
    wanted.version = version_of(e.version)
    wanted.where = where
    wanted.length_codec = e.location & 0xFFFF
    wanted.blob = slot.blob
    slot_park(slot)             # a disk may stall: the committer must not wait for it
    error = 0
    if not ahead_take(&t.ahead, slot, page, e):
        error = t.cold.get(t.cold, &wanted, slot.io)
    slot_unpark(slot)
    if error == 0 and not codec_decompress(slot, codec_of(e.location), slot.blob, length_of(e.location), data):
        error = EILSEQ
    return error


cdef bint tiers_mend(void *tiers, void *slot_argument, uint64_t page, Entry e, uint8_t *data) noexcept nogil:
    """The RAM copy of an ephemeral page is damaged: answer from below, and leave RAM.

    The address may be damaged as well: what is read there proves itself, or is not used.
    """
    cdef Tiers *t = <Tiers *>tiers
    cdef uint64_t lower
    cdef Entry now
    if not place_is_possible(t.core, e.location):
        return False
    lock_take(&t.core.allocator.lock)
    lower = header_lower(object_header(&t.core.arena, where_of(e.location), length_of(e.location)))
    pthread_mutex_unlock(&t.core.allocator.lock)
    now = entry_load(&t.core.index, page)
    if now.location != e.location or now.version != e.version:
        return False            # it is elsewhere by now: the caller looks again
    if read_below(t, <Slot *>slot_argument, page, e, lower, data):
        return False
    leave_damaged_copy(t.core, page, e, lower)
    return True


cdef void count_failure(Tiers *t, Slot *slot, uint64_t page, Entry e, int error) noexcept nogil:
    """A copy below could not be had.  Peers count for themselves; a page none of them has is lost."""
    cdef ColdPage copy
    if state_of(e.version) != ST_PEER:
        count(slot, C_DISK_READ_ERRORS if error == EIO else C_DISK_CORRUPT_PAGES, 1)
    elif error == ENODATA and zc_load32(&t.core.ready) and leave_for_lost(t.core, page, e):
        # (not before a takeover has counted the copy that is dropped here: the next read does it)
        count(slot, C_LOST_PAGES, 1)
        copy = cold_page(page, version_of(e.version), where_of(e.location), e.location)
        t.cold.drop(t.cold, &copy)


cdef int tiers_fetch(void *tiers, void *slot_argument, uint64_t page, Entry e, uint8_t *data) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    cdef Slot *slot = <Slot *>slot_argument
    cdef Entry now
    cdef ColdPage copy
    cdef bint alone
    cdef int error
    cdef int64_t began_us = now_us()
    if state_of(e.version) != lower_state(where_of(e.location)):
        return EIO
    count(slot, C_COLD_LOADS, 1)
    error = read_below(t, slot, page, e, where_of(e.location), data)
    observe(slot, H_GET_PEER if state_of(e.version) == ST_PEER else H_GET_DISK, <uint64_t>(now_us() - began_us))
    if error:
        # A copy that moved or died while it was read is no fault: the caller looks again.
        now = entry_load(&t.core.index, page)
        if now.location == e.location and now.version == e.version:
            count_failure(t, slot, page, e, error)
        return EIO
    ahead_note(&t.ahead, page)
    if earns_ram(t, page) and promote(t.core, slot, page, e, slot.blob, &alone):
        count(slot, C_PROMOTED_PAGES, 1)
        if alone:
            copy = cold_page(page, version_of(e.version), where_of(e.location), e.location)
            t.cold.drop(t.cold, &copy)
    return 0
