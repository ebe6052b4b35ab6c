"""The state of two tiers as one, as a C struct: what its parts share.

    both.pyx      the ColdTier over them: a page at peers or on the disk
    backup.pyx    backup=disk: a page at one peer and on the disk
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.cold cimport COLD_BATCH, ColdPage, ColdTier
from zcache_core.layout cimport PAGE_BYTES
from zcache_core.native cimport zc_load64, zc_store64
from zcache_core.peernotes cimport Peers
from zcache_core.slots cimport IO_ROOM

cdef enum:
    PIECE_BYTES = 1 << 20       # peers with less room than that do not make up for a disk that fails
    SMOOTH = 16                 # a new value counts so little: a burst does not turn it round
    KNOWN_AFTER = 16            # reads, before the time of one is believed
    TRY_EVERY = 64
    SWEEP_PAGES = 256
    SWEEP_ROOM = SWEEP_PAGES * PAGE_BYTES + IO_ROOM
    FAILED_US = 250000          # a read that failed counts as one that took so long at least

ctypedef struct Both:
    ColdTier face               # first: a ColdTier * is a Both *
    ColdTier *peers
    ColdTier *disk
    uint64_t get_us[2]          # smoothed, times SMOOTH: of peers, of the disk
    uint64_t gets[2]
    uint64_t puts
    bint resorting              # what is put now comes from the disk
    ColdPage again[COLD_BATCH]  # what one refused, for the other
    uint32_t whose[COLD_BATCH]
    # pages in both (backup.pyx)
    Peers *peer_tier            # the same as `peers`
    bint backs_up               # backup=disk: what leaves RAM from now on goes to both
    uint64_t *disk_cells        # the disk's counters
    uint8_t *room               # SWEEP_ROOM: what else is done with it, is not done in a tick
    uint64_t reads
    uint64_t disk_begun         # reads of the disk for these pages, and how many of them are over
    uint64_t disk_ended
    uint64_t disk_moved_us      # when one of them was over, or the first of them began
    uint64_t sweep_at           # the page where the search for missing copies goes on


cdef inline bint can_take(ColdTier *tier, uint64_t bytes) noexcept nogil:
    return tier != NULL and tier.takes(tier) and tier.has_room(tier, bytes)


cdef inline void observe_get(Both *b, uint32_t which, int64_t took_us, int error) noexcept nogil:
    """May lose an observation to another thread: it steers, and nothing is proven by it."""
    cdef uint64_t smoothed = zc_load64(&b.get_us[which])
    if error:
        took_us = max(took_us, <int64_t>FAILED_US)
    zc_store64(&b.get_us[which], smoothed - smoothed // SMOOTH + <uint64_t>took_us)
    zc_store64(&b.gets[which], zc_load64(&b.gets[which]) + 1)


cdef inline bint peers_are_faster(Both *b) noexcept nogil:
    """As far as is known: a disk that was never read from is the slower one."""
    if b.gets[0] < KNOWN_AFTER or b.gets[1] < KNOWN_AFTER:
        return True
    return zc_load64(&b.get_us[0]) <= zc_load64(&b.get_us[1])
