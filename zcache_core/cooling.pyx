"""Moves between RAM and the tiers below: each one flip, from exactly the entry it knows.

    RAM  --copied down-->  EPHEMERAL  --room needed-->  DISK
     ^                        |  ^                        |
     +----- overwritten ------+  +------ read twice ------+

The version never changes in a move, because the content does not.  An overwrite or
trim in between makes the flip fail, and then nothing has happened: what was copied
is dropped again.  There is no moment at which a page is nowhere.

The lower address of an ephemeral page stands in its blob's header.  Whoever reads
or writes it holds the allocator's lock and has looked at the entry under it: the
room of an object is only given to another under that lock.  It has check bits: a damaged one
is not used, and the page counts as one that is in RAM only.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zcache_core.allocator cimport object_blob, object_bytes, object_fill, object_header
from zcache_core.cold cimport HOLDS, HOLDS_NOT, ColdPage
from zcache_core.core cimport Core, note_arrival
from zcache_core.counter_ids cimport C_DAMAGED_LOWER_ADDRESSES
from zcache_core.index cimport entry_flip, entry_load
from zcache_core.layout cimport (
    BACKED_BITS, PAGE_BYTES, PAGE_SHIFT, ST_LOST, ST_PEER, ST_RAM, ST_RAM_EPHEMERAL, BlobHeader, Entry,
    backed_where, codec_of, disk_part, donor_at, entry_is_sound, header_fill, header_is_sound, header_lower, header_matches, header_page, header_set_lower,
    is_backed, length_of, lower_state, place_word, state_of, version_of, version_word, where_of,
)
from zcache_core.native cimport zc_acquire_fence, zc_load32, zc_release_fence
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock
from zcache_core.ramtier cimport is_below, note_new, room_at_once
from zcache_core.slots cimport Slot


cdef inline Entry same_page(Entry e, uint32_t state, uint64_t location) noexcept nogil:
    """The entry of the same content in another state and place."""
    cdef Entry new
    new.location = location
    new.version = version_word(version_of(e.version), state, location)
    return new


cdef inline bint is_now(Core *core, uint64_t page, Entry e) noexcept nogil:
    cdef Entry now = entry_load(&core.index, page)
    return now.location == e.location and now.version == e.version


cdef uint32_t page_at(Core *core, uint64_t where, uint32_t bytes) noexcept nogil:
    """Number of the page that the object at `where` is, by its header: a hint, the entry decides."""
    return header_page(object_header(&core.arena, where, PAGE_BYTES if bytes >= PAGE_BYTES else 1))


cdef bint copy_for_below(
    Core *core, uint64_t where, uint32_t bytes, ColdPage *page, Entry *entry, uint8_t *blob
) noexcept nogil:
    """Copy the persistent object at `where` (of `bytes`, as the allocator has it) into `blob`.

    Whole, and checked.  The caller is inside a slot, so the frame is not punched meanwhile.  False when
    there is none (any more), it is ephemeral already, or it is damaged: damaged bytes
    must not go down under a fresh checksum.
    """
    cdef uint32_t length
    cdef uint64_t number
    cdef Entry e
    cdef BlobHeader header
    cdef const uint8_t *there
    number = page_at(core, where, bytes)
    if number >= core.index.pages:
        return False
    e = entry_load(&core.index, number)
    if state_of(e.version) != ST_RAM or where_of(e.location) != where or not entry_is_sound(e.location, e.version):
        return False
    length = length_of(e.location)
    header = object_header(&core.arena, where, length)[0]
    there = object_blob(&core.arena, where, length, blob)
    if there == NULL:
        return False
    if there != blob:
        memcpy(blob, there, length)
    zc_acquire_fence()
    if not is_now(core, number, e):
        return False
    if not header_matches(&header, version_of(e.version), core.device, <uint32_t>number, e.location, blob):
        return False
    page.page = <uint32_t>number
    page.version = version_of(e.version)
    page.length_codec = e.location & 0xFFFF
    page.blob = blob
    entry[0] = e
    return True


cdef bint make_ephemeral(Core *core, uint64_t page, Entry entry, uint64_t lower) noexcept nogil:
    """The page has a copy at `lower`: its RAM copy may be dropped from now on."""
    cdef uint64_t where = where_of(entry.location)
    cdef uint32_t length = length_of(entry.location)
    cdef bint done = False
    lock_take(&core.allocator.lock)
    if is_now(core, page, entry):
        header_set_lower(object_header(&core.arena, where, length), lower)
        zc_release_fence()
        done = entry_flip(&core.index, page, entry, same_page(entry, ST_RAM_EPHEMERAL, entry.location))
        if done:
            core.allocator.ephemeral(core.allocator, where, object_bytes(length), 1)
    pthread_mutex_unlock(&core.allocator.lock)
    return done


cdef bint drop_ram_copy(Core *core, uint64_t page, Entry entry) noexcept nogil:
    """An ephemeral page leaves RAM: its entry points below from now on.

    Not while the copy there may be gone (`holds`).  If its lower address is damaged the RAM copy is
    the only one again, to be copied down anew.
    """
    cdef uint64_t where = where_of(entry.location)
    cdef uint32_t length = length_of(entry.location)
    cdef BlobHeader *header = object_header(&core.arena, where, length)
    cdef uint64_t lower
    cdef Entry below
    cdef bint done = False
    lock_take(&core.allocator.lock)
    if state_of(entry.version) == ST_RAM_EPHEMERAL and is_now(core, page, entry):
        if header_is_sound(header):
            lower = header_lower(header)
            if core.lower.holds(core.lower.tiers, lower) == HOLDS:
                below = same_page(entry, lower_state(lower), place_word(lower, length, codec_of(entry.location)))
                done = entry_flip(&core.index, page, entry, below)
        elif entry_flip(&core.index, page, entry, same_page(entry, ST_RAM, entry.location)):
            core.allocator.ephemeral(core.allocator, where, object_bytes(length), -1)
            core.allocator.cells[C_DAMAGED_LOWER_ADDRESSES] += 1
    pthread_mutex_unlock(&core.allocator.lock)
    if done:
        core.allocator.release(core.allocator, where, object_bytes(length))
    return done


cdef bint leave_damaged_copy(Core *core, uint64_t page, Entry entry, uint64_t lower) noexcept nogil:
    """The RAM copy is damaged, and the one at `lower` was just read and is right: use that."""
    cdef uint32_t length = length_of(entry.location)
    cdef bint done = False
    if not zc_load32(&core.ready):
        return False            # the allocator may not know yet of the room to be freed: another time
    lock_take(&core.allocator.lock)
    # (it may have been moved since it was read: then whoever reads next tries again)
    if is_now(core, page, entry) and header_lower(object_header(&core.arena, where_of(entry.location), length)) == lower:
        done = entry_flip(
            &core.index, page, entry,
            same_page(entry, lower_state(lower), place_word(lower, length, codec_of(entry.location))),
        )
    pthread_mutex_unlock(&core.allocator.lock)
    if done:
        core.allocator.release(core.allocator, where_of(entry.location), object_bytes(length))
    return done


cdef bint leave_for_lost(Core *core, uint64_t page, Entry entry) noexcept nogil:
    """No tier has this page any more: reads answer EIO until it is written again."""
    return entry_flip(&core.index, page, entry, same_page(entry, ST_LOST, 0))


cdef bint keep_in_ram(Core *core, uint64_t page, Entry entry, uint64_t *lower) noexcept nogil:
    """An ephemeral page is persistent again; its copy at `lower` is nobody's then."""
    cdef BlobHeader *header = object_header(&core.arena, where_of(entry.location), length_of(entry.location))
    cdef bint done = False
    lock_take(&core.allocator.lock)
    if state_of(entry.version) == ST_RAM_EPHEMERAL and is_now(core, page, entry) and header_is_sound(header):
        done = entry_flip(&core.index, page, entry, same_page(entry, ST_RAM, entry.location))
        if done:
            lower[0] = header_lower(header)
            core.allocator.ephemeral(
                core.allocator, where_of(entry.location), object_bytes(length_of(entry.location)), -1
            )
    pthread_mutex_unlock(&core.allocator.lock)
    return done


cdef bint promote(Core *core, Slot *slot, uint64_t page, Entry entry, const uint8_t *blob, bint *alone) noexcept nogil:
    """Give a page that was read from below (entry, blob) a RAM copy, if there is room now.

    From a disk it is ephemeral: the copy there stays, and so does a peer's beside it, or that would
    have to be made anew.  From peers alone it is the only one that counts from then on (`alone`),
    and the caller drops theirs: their RAM is worth more than ours saves.  So it is when the copy on
    the disk was cut off after it was read.
    """
    cdef uint32_t length = length_of(entry.location)
    cdef uint32_t codec = codec_of(entry.location)
    cdef uint64_t below = where_of(entry.location)
    cdef bint only_peers = state_of(entry.version) == ST_PEER and not is_backed(below)
    cdef uint32_t state
    cdef uint64_t where
    cdef BlobHeader *header
    cdef bint done
    alone[0] = only_peers or core.lower.holds(core.lower.tiers, below) == HOLDS_NOT
    state = ST_RAM if alone[0] else ST_RAM_EPHEMERAL
    if not zc_load32(&core.ready) or not room_at_once(core, object_bytes(length), &where):
        return False            # (a takeover must not see entries change that it still has to adopt)
    object_fill(&core.arena, where, length, blob)
    header = object_header(&core.arena, where, length)
    header_fill(header, version_of(entry.version), core.device, <uint32_t>page, length, codec, blob)
    if state == ST_RAM_EPHEMERAL:
        header_set_lower(header, where_of(entry.location))
    note_arrival(core, page)
    zc_release_fence()
    lock_take(&core.allocator.lock)
    done = entry_flip(&core.index, page, entry, same_page(entry, state, place_word(where, length, codec)))
    if done:
        if state == ST_RAM_EPHEMERAL:
            core.allocator.ephemeral(core.allocator, where, object_bytes(length), 1)
        core.arena.frames[where >> PAGE_SHIFT].referenced = 1
    pthread_mutex_unlock(&core.allocator.lock)
    if done:
        note_new(core, page)
    else:
        core.allocator.release(core.allocator, where, object_bytes(length))
    return done


cdef bint still_needed(Core *core, const ColdPage *page) noexcept nogil:
    """Whether the index still counts on this copy below, alone or beside another."""
    return moved_to(lower_now(core, page), page.where, page.where) != 0


cdef uint64_t moved_to(uint64_t lower, uint64_t old, uint64_t new) noexcept nogil:
    """The address `lower` when its copy at `old` is at `new`; 0 when it has none there."""
    if lower == old:
        return new
    if is_backed(lower) and disk_part(lower) == old and new >> BACKED_BITS == 0:
        return backed_where(donor_at(lower, 0), new)
    return 0


cdef uint64_t lower_now(Core *core, const ColdPage *page) noexcept nogil:
    """Where this version of the page is below now; 0: nowhere."""
    cdef Entry e
    cdef BlobHeader *header
    cdef uint64_t lower = 0
    if page.page >= core.index.pages:
        return 0
    e = entry_load(&core.index, page.page)
    if version_of(e.version) != page.version or not entry_is_sound(e.location, e.version):
        return 0
    if state_of(e.version) == ST_RAM_EPHEMERAL:
        lock_take(&core.allocator.lock)
        if is_now(core, page.page, e):
            header = object_header(&core.arena, where_of(e.location), length_of(e.location))
            lower = header_lower(header) if header_is_sound(header) else 0
        pthread_mutex_unlock(&core.allocator.lock)
        return lower
    return where_of(e.location) if is_below(state_of(e.version)) else 0


cdef bint copy_moved(Core *core, const ColdPage *old, uint64_t where) noexcept nogil:
    """The copy below has a new address: tell the entry, or the ephemeral page's header.

    `old` is the whole address, or the disk's part of one; then `where` is that part's new one.
    """
    cdef Entry e = entry_load(&core.index, old.page)
    cdef BlobHeader *header
    cdef uint64_t new
    cdef bint done = False
    if version_of(e.version) != old.version:
        return False
    if is_below(state_of(e.version)):
        new = moved_to(where_of(e.location), old.where, where)
        return new != 0 and entry_flip(
            &core.index, old.page, e,
            same_page(e, lower_state(new), place_word(new, length_of(e.location), codec_of(e.location))),
        )
    if state_of(e.version) != ST_RAM_EPHEMERAL:
        return False
    lock_take(&core.allocator.lock)
    if is_now(core, old.page, e):
        header = object_header(&core.arena, where_of(e.location), length_of(e.location))
        new = moved_to(header_lower(header), old.where, where) if header_is_sound(header) else 0
        if new:
            header_set_lower(header, new)
            done = True
    pthread_mutex_unlock(&core.allocator.lock)
    return done
