"""Pages held for others, found again by a successor; and looked through by tests.

    places, once through:  sound, of its owner's present epoch, room possible -> in the table
                           anything else -> free

As the takeover of a store's own pages (takeover.pyx), but before the first request: a place
has 32 bytes, so a GiB takes a few milliseconds.  Blobs are not looked at; a get checks them.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from zcache_core.adoption cimport arena_adopt_rest
from zcache_core.allocator cimport blob_start, object_header
from zcache_core.counter_ids cimport (
    C_FOREIGN_DAMAGED_PAGES, C_FOREIGN_PERS_BYTES, C_FOREIGN_PERS_PAGES, C_REBUILT_PAGES,
)
from zcache_core.foreign cimport (
    NO_PLACE, OWNERS, Foreign, Place, bud_at, find, is_current, link_place, room_for, sum_of,
)
from zcache_core.layout cimport (
    PAGE_BYTES, ST_EMPTY, ST_RAM, entry_is_sound, length_of, state_of, version_of, where_of,
)
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock
from zcache_core.several cimport allocator_broken


cdef bint adopt_place(Foreign *f, uint32_t at) noexcept nogil:
    """Whether this place of a predecessor counts; then it is in the table again."""
    cdef Place *p = &f.places[at]
    cdef uint64_t location = p.entry.location
    if state_of(p.entry.version) != ST_RAM or not entry_is_sound(location, p.entry.version):
        f.cells[C_FOREIGN_DAMAGED_PAGES] += 1
        return False
    if not is_current(f, p.whose):
        return False
    if find(f, p.whose, <uint32_t>(p.page_checksum >> 32), version_of(p.entry.version)) != NO_PLACE:
        return False                    # killed between the two of a page sent again
    if not f.allocator.adopt(f.allocator, where_of(location), room_for(f, length_of(location))):
        f.cells[C_FOREIGN_DAMAGED_PAGES] += 1
        return False
    link_place(f, at)
    f.cells[C_REBUILT_PAGES] += 1
    return True


cdef void foreign_take_over(Foreign *f) noexcept nogil:
    """Find all pages of a predecessor again; before the first request."""
    cdef uint32_t i, at
    f.used = 0
    for at in range(f.total):
        if f.places[at].entry.version != 0:
            f.used = at + 1
    for i in range(f.used):
        at = f.used - 1 - i
        if f.places[at].entry.version == 0 or not adopt_place(f, at):
            memset(&f.places[at], 0, sizeof(Place))
            f.next[at] = f.free_head
            f.free_head = at
    f.allocator.adopted(f.allocator)
    arena_adopt_rest(&f.arena)


cdef uint64_t foreign_check(Foreign *f) noexcept nogil:
    """Broken invariants (0), for tests: accounts, chains, buds, checksums, the allocator."""
    cdef uint64_t broken = 0
    cdef uint64_t found = 0
    cdef uint64_t free_places = 0
    cdef uint64_t owned = 0
    cdef uint64_t room = 0
    cdef uint32_t at, length, whole
    cdef uint64_t where
    cdef Place *p
    lock_take(&f.lock)
    for at in range(f.total):
        p = &f.places[at]
        if p.entry.version == 0:
            continue
        found += 1
        length, where = length_of(p.entry.location), where_of(p.entry.location)
        whole = PAGE_BYTES if room_for(f, length) == PAGE_BYTES else length
        room += room_for(f, length)
        broken += at >= f.used
        broken += not entry_is_sound(p.entry.location, p.entry.version)
        broken += find(f, p.whose, <uint32_t>(p.page_checksum >> 32), version_of(p.entry.version)) != at
        broken += f.at_bud[bud_at(where)] != at
        broken += <uint32_t>p.page_checksum != sum_of(
            p, <const uint64_t *>object_header(&f.arena, where, whole), blob_start(&f.arena, where, whole)
        )
    at = f.free_head
    while at != NO_PLACE:
        free_places += 1
        broken += f.places[at].entry.version != ST_EMPTY
        at = f.next[at]
    for at in range(OWNERS):
        owned += f.held[at].pages
    broken += owned + f.stale != found
    broken += free_places + found != f.used
    broken += f.cells[C_FOREIGN_PERS_PAGES] != found
    broken += f.cells[C_FOREIGN_PERS_BYTES] != room
    pthread_mutex_unlock(&f.lock)
    return broken + allocator_broken(f.allocator)
