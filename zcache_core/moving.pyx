"""Moving an object to another place in RAM: copy, one flip of its entry, old room freed.

    object at A --copy--> room at B --flip: entry A -> B--> A freed
                                    \-- entry changed meanwhile: B freed, nothing happened

The version stays, because the content does.  Until the flip B is nobody's, after it A is:
killed in between, a server leaves room that no entry points to, which its successor gives
back.  A reader that still looks at A finds the entry changed and reads again; A's frame is
not punched before that reader has left (slots.pyx).

The header moves along.  Its lower location (of an ephemeral page) may change at any time
under the allocator's lock, so it is copied under that lock, with the flip.

A copy that does not match its header is not used: the object was changed while it was
copied, or it is damaged and shall be found so where it is.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from zcache_core.allocator cimport object_blob, object_bytes, object_fill, object_header
from zcache_core.core cimport Core, note_arrival
from zcache_core.counter_ids cimport C_MOVED_PAGES
from zcache_core.index cimport entry_flip, entry_load
from zcache_core.layout cimport (
    PAGE_BYTES, ST_RAM_EPHEMERAL, BlobHeader, Entry, codec_of, entry_is_sound, header_matches, header_page,
    length_of, place_word, state_of, version_of, version_word, where_of,
)
from zcache_core.native cimport zc_acquire_fence, zc_release_fence
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock
from zcache_core.ramtier cimport in_ram
from zcache_core.slots cimport Slot, count


cdef bint entry_of(Core *core, uint64_t where, uint32_t bytes, uint64_t *page, Entry *e) noexcept nogil:
    """The entry that points to the object at `where`; False when none does (any more)."""
    page[0] = header_page(object_header(&core.arena, where, PAGE_BYTES if bytes >= PAGE_BYTES else 1))
    if page[0] >= core.index.pages:
        return False
    e[0] = entry_load(&core.index, page[0])
    return in_ram(state_of(e.version)) and where_of(e.location) == where and entry_is_sound(e.location, e.version)


cdef bint point_to(Core *core, uint64_t page, Entry e, uint64_t to) noexcept nogil:
    """Flip the entry to the copy at `to`; False when it is another by now."""
    cdef uint32_t length = length_of(e.location)
    cdef Entry new, now
    cdef bint done = False
    new.location = place_word(to, length, codec_of(e.location))
    new.version = version_word(version_of(e.version), state_of(e.version), new.location)
    lock_take(&core.allocator.lock)
    now = entry_load(&core.index, page)
    if now.location == e.location and now.version == e.version:
        object_header(&core.arena, to, length)[0] = object_header(&core.arena, where_of(e.location), length)[0]
        note_arrival(core, page)
        zc_release_fence()
        done = entry_flip(&core.index, page, e, new)
        if done and state_of(e.version) == ST_RAM_EPHEMERAL:
            core.allocator.ephemeral(core.allocator, to, object_bytes(length), 1)
    pthread_mutex_unlock(&core.allocator.lock)
    return done


cdef bint move_object(Core *core, Slot *slot, uint64_t where, uint32_t bytes) noexcept nogil:
    """Move the object at `where` to room in frames in use; False when it stays.  Inside a slot."""
    cdef uint64_t page, to
    cdef uint32_t length
    cdef const void *blob
    cdef BlobHeader header
    cdef Entry e
    if bytes >= PAGE_BYTES or not entry_of(core, where, bytes, &page, &e):
        return False
    length = length_of(e.location)
    if length == PAGE_BYTES or not core.allocator.alloc_packed(core.allocator, object_bytes(length), &to):
        return False
    header = object_header(&core.arena, where, length)[0]
    blob = object_blob(&core.arena, where, length, slot.blob)
    if blob != NULL:
        memcpy(slot.page, blob, length)
        zc_acquire_fence()
        if header_matches(&header, version_of(e.version), core.device, <uint32_t>page, e.location, slot.page):
            object_fill(&core.arena, to, length, slot.page)
            if point_to(core, page, e, to):
                core.allocator.release(core.allocator, where, object_bytes(length))
                count(slot, C_MOVED_PAGES, 1)
                return True
    core.allocator.release(core.allocator, to, object_bytes(length))
    return False


cdef uint32_t empty_frame(Core *core, Slot *slot, uint32_t frame) noexcept nogil:
    """Move everything out of a frame that is taken aside; how many objects went.  Inside a slot."""
    cdef uint64_t where[OBJECTS_IN_A_FRAME]
    cdef uint32_t bytes[OBJECTS_IN_A_FRAME]
    cdef uint32_t n = core.allocator.objects(core.allocator, frame, where, bytes, OBJECTS_IN_A_FRAME)
    cdef uint32_t moved = 0
    cdef uint32_t i
    for i in range(n):
        moved += move_object(core, slot, where[i], bytes[i])
    return moved
