"""Up: a page whose copy is below is read, checked, answered; and who earns a RAM copy.

A page that is read from below is only given a RAM copy when it is read a second
time within the next 2 * pool reads from below (`ghosts` remembers): a scan of the
whole device cannot push the hot pages out.  Its copy below stays, so the RAM copy is
ephemeral from the first moment.

Bound: one read of one object below, in the request's own slot; no lock is taken.
"""

from libc.errno cimport EILSEQ, EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.below cimport GHOSTS, Tiers
from zcache_core.codec cimport codec_decompress
from zcache_core.cold cimport ColdPage
from zcache_core.cooling cimport promote
from zcache_core.counter_ids cimport (
    C_COLD_LOADS, C_DISK_CORRUPT_PAGES, C_DISK_READ_ERRORS, C_PROMOTED_PAGES,
)
from zcache_core.index cimport entry_load
from zcache_core.layout cimport Entry, codec_of, length_of, state_of, version_of, where_of
from zcache_core.native cimport zc_add64, zc_load64, zc_store64
from zcache_core.slots cimport Slot, count, slot_park, slot_unpark


cdef bint earns_ram(Tiers *t, uint64_t page) noexcept nogil:
    """Whether this page was read from below a short while ago; remembers that it is now."""
    cdef uint64_t now = zc_add64(&t.cold_loads, 1)
    cdef uint64_t *ghost = t.ghosts + (page * <uint64_t>0x9E3779B97F4A7C15 >> 48) % GHOSTS
    cdef uint64_t seen = zc_load64(ghost)
    zc_store64(ghost, (now << 32) | <uint32_t>(page + 1))
    if <uint32_t>seen != <uint32_t>(page + 1):
        return False
    return <uint32_t>(now - (seen >> 32)) < 2 * <uint64_t>t.core.arena.limit


cdef int tiers_fetch(void *tiers, void *slot_argument, uint64_t page, Entry e, uint8_t *data) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    cdef Slot *slot = <Slot *>slot_argument
    cdef ColdPage wanted
    cdef Entry now
    cdef int error
    if state_of(e.version) != t.cold.state:
        return EIO
    wanted.page = <uint32_t>page
    wanted.version = version_of(e.version)
    wanted.where = where_of(e.location)
    wanted.length_codec = e.location & 0xFFFF
    wanted.blob = slot.blob
    count(slot, C_COLD_LOADS, 1)
    slot_park(slot)             # a disk may stall: the committer must not wait for it
    error = t.cold.get(t.cold, &wanted, slot.io)
    slot_unpark(slot)
    if error == 0 and not codec_decompress(slot, codec_of(e.location), slot.blob, length_of(e.location), data):
        error = EILSEQ
    if error:
        # A copy that moved or died while it was read is no fault: the caller looks again.
        now = entry_load(&t.core.index, page)
        if now.location == e.location and now.version == e.version:
            count(slot, C_DISK_READ_ERRORS if error == EIO else C_DISK_CORRUPT_PAGES, 1)
        return EIO
    if earns_ram(t, page) and promote(t.core, slot, page, e, slot.blob):
        count(slot, C_PROMOTED_PAGES, 1)
    return 0
