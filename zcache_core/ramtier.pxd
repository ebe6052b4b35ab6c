"""C face of the RAM tier: what the device, the takeover, and later the cold tiers, call."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.core cimport Core
from zcache_core.layout cimport ST_DISK, ST_PEER, ST_RAM, ST_RAM_EPHEMERAL, Entry
from zcache_core.slots cimport Slot

cdef int store_put(Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version) noexcept nogil
cdef int store_replace(
    Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version, const Entry *expected
) noexcept nogil
cdef int store_get(
    Core *core, Slot *slot, uint64_t page, uint8_t *data, Entry *seen, bint may_block
) noexcept nogil
cdef void store_expect(Core *core, uint64_t page) noexcept nogil
cdef void store_invalidate(Core *core, Slot *slot, uint64_t page, uint64_t version) noexcept nogil
cdef void store_wait_ready(Core *core) noexcept nogil
cdef uint32_t store_victims(Core *core, uint32_t *frames, uint32_t most, bint ephemeral) noexcept nogil
cdef void count_same_filled(Core *core, Slot *slot) noexcept nogil
cdef bint place_is_possible(Core *core, uint64_t location) noexcept nogil
cdef bint load_blob(Core *core, Slot *slot, uint64_t page, Entry e, uint8_t *data, bint apart) noexcept nogil


cdef inline void note_new(Core *core, uint64_t page) noexcept nogil:
    """The page's content is new, or it has come to RAM anew: it is young, and untried."""
    if core.marks != NULL and core.marks[page]:
        core.marks[page] = 0


cdef inline bint is_below(uint32_t state) noexcept nogil:
    return state == ST_DISK or state == ST_PEER


cdef inline bint in_ram(uint32_t state) noexcept nogil:
    return state == ST_RAM or state == ST_RAM_EPHEMERAL


cdef inline bint room_at_once(Core *core, uint32_t bytes, uint64_t *where) noexcept nogil:
    """Room for an object if there is any now."""
    return core.allocator.alloc(core.allocator, bytes, where)
