"""Taking a memory file over: the index tells the allocator what is taken.

    index, once through:  RAM -> allocator.adopt     same-filled -> counted
                          impossible, but below too -> there
                          damaged or impossible -> LOST (EIO for that page alone)
    versions              start above the highest found, should the reserved range be damaged
    then                  ready; frames are mapped and free ones found behind (committer.pyx)

Readers are served meanwhile, from the first moment; writers and trims wait until
`ready` (about 10 ns a page of the device).  So until then this is of the serving threads'
class (as an ordinary thread it was starved by what waited for it), and lets them run often.  Nothing else of the predecessor is
needed: no list, no lock, no count.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from zcache_core.adoption cimport arena_adopt_rest
from zcache_core.allocator cimport object_bytes, object_header
from zcache_core.backing cimport change_class
from zcache_core.codec cimport codec_expect_zstd
from zcache_core.core cimport Core
from zcache_core.counter_ids cimport C_LOST_PAGES, C_PRIVATE_TABLE_BYTES, C_REBUILD_US, C_REBUILT_PAGES
from zcache_core.index cimport entry_flip, entry_load, versions_start_at, versions_take
from zcache_core.layout cimport (
    CODEC_ZSTD, ST_LOST, ST_PEER, ST_RAM, ST_RAM_EPHEMERAL, ST_SAME, BlobHeader, Entry, codec_of, entry_is_sound,
    header_is_sound, header_lower, header_page, header_version, is_backed, length_of, lower_state, place_word, state_of,
    version_of, version_word, where_of,
)
from zcache_core.native cimport zc_store32
from zcache_core.pthread cimport SCHED_OTHER, lock_take, now_us, pthread_mutex_unlock, sched_yield
from zcache_core.ramtier cimport count_same_filled, in_ram, is_below, place_is_possible
from zcache_core.slots cimport Slot, count, slot_park, slot_release, slot_take_own

cdef enum:
    TURN_PAGES = 16384          # 160 us


cdef void mark_lost(Core *core, Slot *slot, uint64_t page, Entry old) noexcept nogil:
    cdef Entry new
    new.location = 0
    new.version = version_word(versions_take(&core.index, 1), ST_LOST, 0)
    if entry_flip(&core.index, page, old, new):
        count(slot, C_LOST_PAGES, 1)


cdef bint lower_is_sure(Core *core, uint64_t page, Entry e) noexcept nogil:
    """Whether the header of this ephemeral page tells where its copy below is; not if there is no tier."""
    cdef BlobHeader *header = object_header(&core.arena, where_of(e.location), length_of(e.location))
    return core.lower.tiers != NULL and (
        header_is_sound(header) and header_page(header) == page and header_version(header) == version_of(e.version)
    )


cdef void adopt_ephemeral(Core *core, uint64_t page, Entry e) noexcept nogil:
    """Its copy below is known again, or it is the only copy from now on."""
    cdef Entry persistent
    cdef BlobHeader *header = object_header(&core.arena, where_of(e.location), length_of(e.location))
    if lower_is_sure(core, page, e):
        if core.lower.adopt(core.lower.tiers, header_lower(header), length_of(e.location)):
            lock_take(&core.allocator.lock)
            core.allocator.ephemeral(core.allocator, where_of(e.location), object_bytes(length_of(e.location)), 1)
            pthread_mutex_unlock(&core.allocator.lock)
            return
    persistent.location = e.location
    persistent.version = version_word(version_of(e.version), ST_RAM, e.location)
    entry_flip(&core.index, page, e, persistent)


cdef bint adopt_below(Core *core, uint64_t page, Entry e) noexcept nogil:
    """The RAM of an ephemeral page cannot be: it is below from now on.  False when it is not there."""
    cdef uint32_t length = length_of(e.location)
    cdef uint64_t lower
    cdef Entry below
    if state_of(e.version) != ST_RAM_EPHEMERAL or not place_is_possible(core, e.location):
        return False
    lower = header_lower(object_header(&core.arena, where_of(e.location), length))
    if not lower_is_sure(core, page, e) or not core.lower.adopt(core.lower.tiers, lower, length):
        return False
    below.location = place_word(lower, length, codec_of(e.location))
    below.version = version_word(version_of(e.version), lower_state(lower), below.location)
    entry_flip(&core.index, page, e, below)
    return True


cdef bint tier_is_there(Core *core, uint32_t state, uint64_t where) noexcept nogil:
    if state != ST_PEER:
        return core.lower.disk
    return core.lower.peers and (core.lower.disk or not is_backed(where))


cdef void *takeover(void *argument) noexcept nogil:
    """Tell the allocator what the index holds.  Readers are served meanwhile."""
    cdef Core *core = <Core *>argument
    cdef Slot *slot = slot_take_own(&core.slots)
    cdef int64_t start = now_us()
    cdef uint64_t page
    cdef uint32_t state
    cdef uint64_t above = 0
    cdef Entry e
    # It is no request, and no frame is punched before it ends: who fences older generations, to
    # serve the first read, must not wait for it (measured: 1 s for each GiB of the pool).
    slot_park(slot)
    for page in range(core.index.pages):
        if page % TURN_PAGES == 0:
            sched_yield()
        e = entry_load(&core.index, page)
        state = state_of(e.version)
        if version_of(e.version) >= above and entry_is_sound(e.location, e.version):
            above = version_of(e.version) + 1
        if not entry_is_sound(e.location, e.version):
            mark_lost(core, slot, page, e)
        elif (in_ram(state) or is_below(state)) and codec_of(e.location) >= CODEC_ZSTD and not core.slots.readers_backed:
            if codec_expect_zstd(&core.slots):
                core.dense.readers_counted = True
                count(slot, C_PRIVATE_TABLE_BYTES, core.slots.readers_backed_bytes)
        if not entry_is_sound(e.location, e.version):
            pass
        elif in_ram(state):
            if place_is_possible(core, e.location) and core.allocator.adopt(
                core.allocator, where_of(e.location), object_bytes(length_of(e.location))
            ):
                count(slot, C_REBUILT_PAGES, 1)
                if state == ST_RAM_EPHEMERAL:
                    adopt_ephemeral(core, page, e)
            elif adopt_below(core, page, e):
                count(slot, C_REBUILT_PAGES, 1)
            else:
                mark_lost(core, slot, page, e)
        elif is_below(state):
            if not tier_is_there(core, state, where_of(e.location)):
                pass                # its tier was not given this time: EIO, but not forgotten
            elif state == lower_state(where_of(e.location)) and core.lower.adopt(
                core.lower.tiers, where_of(e.location), length_of(e.location)
            ):
                count(slot, C_REBUILT_PAGES, 1)
            else:
                mark_lost(core, slot, page, e)
        elif state == ST_SAME:
            count_same_filled(core, slot)
            count(slot, C_REBUILT_PAGES, 1)
        elif state == ST_LOST:
            count(slot, C_LOST_PAGES, 1)
    versions_start_at(&core.index, above)
    core.allocator.adopted(core.allocator)
    if core.lower.tiers != NULL:
        core.lower.adopted(core.lower.tiers)
    count(slot, C_REBUILD_US, <uint64_t>(now_us() - start))
    slot_release(slot)
    zc_store32(&core.ready, 1)
    change_class(SCHED_OTHER, 0)
    arena_adopt_rest(&core.arena)
    return NULL
