"""Taking a memory file over: the index tells the allocator what is taken.

    index, once through:  RAM -> allocator.adopt     same-filled -> counted
                          damaged or impossible -> LOST (EIO for that page alone)
    then                  everything not adopted goes back to the system

Readers are served meanwhile, from the first moment; writers and trims wait until
`ready` (about 10 ns a page of the device).  Nothing else of the predecessor is
needed: no list, no lock, no count.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from zcache_core.allocator cimport object_bytes
from zcache_core.core cimport Core
from zcache_core.counter_ids cimport C_LOST_PAGES, C_REBUILD_US, C_REBUILT_PAGES
from zcache_core.index cimport entry_flip, entry_load, versions_take
from zcache_core.layout cimport (
    ST_LOST, ST_SAME, Entry, entry_is_sound, length_of, state_of, version_word, where_of,
)
from zcache_core.native cimport zc_store32
from zcache_core.pthread cimport now_us
from zcache_core.ramtier cimport count_same_filled, in_ram, place_is_possible
from zcache_core.slots cimport Slot, count, slot_release, slot_take


cdef void mark_lost(Core *core, Slot *slot, uint64_t page, Entry old) noexcept nogil:
    cdef Entry new
    new.location = 0
    new.version = version_word(versions_take(&core.index, 1), ST_LOST, 0)
    if entry_flip(&core.index, page, old, new):
        count(slot, C_LOST_PAGES, 1)


cdef void *takeover(void *argument) noexcept nogil:
    """Tell the allocator what the index holds.  Readers are served meanwhile."""
    cdef Core *core = <Core *>argument
    cdef Slot *slot = slot_take(&core.slots)
    cdef int64_t start = now_us()
    cdef uint64_t page
    cdef uint32_t state
    cdef Entry e
    for page in range(core.index.pages):
        e = entry_load(&core.index, page)
        state = state_of(e.version)
        if not entry_is_sound(e.location, e.version):
            mark_lost(core, slot, page, e)
        elif in_ram(state):
            if place_is_possible(core, e.location) and core.allocator.adopt(
                core.allocator, where_of(e.location), object_bytes(length_of(e.location))
            ):
                count(slot, C_REBUILT_PAGES, 1)
            else:
                mark_lost(core, slot, page, e)
        elif state == ST_SAME:
            count_same_filled(core, slot)
            count(slot, C_REBUILT_PAGES, 1)
        elif state == ST_LOST:
            count(slot, C_LOST_PAGES, 1)
    core.allocator.adopted(core.allocator)
    count(slot, C_REBUILD_US, <uint64_t>(now_us() - start))
    slot_release(slot)
    zc_store32(&core.ready, 1)
    return NULL
