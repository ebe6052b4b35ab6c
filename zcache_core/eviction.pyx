"""Down: cold pages copied below in batches, ephemeral frames dropped, the tier tidied up.

    cold persistent frames -> gathered, whole -> put below -> flipped to ephemeral
    cold ephemeral frames  -> their entries flipped to the copies below -> free.  No I/O
                              (a copy below that may be gone: in RAM alone again)
    the tier's emptiest containers -> read -> what still lives put anew -> entries told

Whole frames leave, so that a frame is really freed.  A page that was overwritten or
trimmed meanwhile is another by then: its flip fails, and the copy below is dropped.

Bounds: one batch (2 MiB, 2048 pages) on its way at a time, by one thread.
Lock: `dropping` is held while ephemeral frames are chosen and dropped, because
writers do that too when the tier stalls.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport uint32_t, uint64_t

from zcache_core.arena cimport FRAME_TAIL, FRAME_TAKEN, Frame
from zcache_core.below cimport FRAMES_AT_ONCE, GATHER_BYTES, RESORT_PAGES, Tiers
from zcache_core.cold cimport COLD_BATCH, HOLDS_NOT, ColdPage, cold_page
from zcache_core.cooling cimport (
    copy_for_below, copy_moved, drop_ram_copy, keep_in_ram, lower_now, make_ephemeral, page_at, still_needed,
)
from zcache_core.counter_ids cimport (
    C_EVICTED_EPH_PAGEFRAMES, C_FAILED_WRITEBACK_PAGES, C_KEPT_PAGES,
    C_OUTSTANDING_WRITEBACK_PAGES, C_OVERTAKEN_WRITEBACK_PAGES, C_RESCUED_PAGES, C_WRITTEN_BACK_PAGES,
)
from zcache_core.disk cimport disk_kept, disk_to_keep
from zcache_core.diskstate cimport DISK_WHOLE
from zcache_core.fullness cimport frames_ephemeral
from zcache_core.index cimport entry_load
from zcache_core.layout cimport (
    PAGE_BYTES, ST_DISK, ST_PEER, ST_RAM_EPHEMERAL, Entry, disk_part, entry_is_sound, is_backed, length_of, lower_state,
    state_of, version_of, where_of,
)
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock, sched_yield
from zcache_core.ramtier cimport store_victims
from zcache_core.slots cimport Slot, slot_release, slot_take_own, slots_quiesce

cdef enum:
    MOST_OBJECTS = 64           # in one frame, of any allocator
    KEEP_ENTRIES = 1 << 14      # of the index looked at in one slot's time, an eighth of what a sweep may (backup.pyx)


cdef inline void let_others(Tiers *t) noexcept nogil:
    """While the thread has the class of those that serve, and perhaps their CPU: they come in between."""
    if t.raised:
        sched_yield()


# ---- persistent pages go down -----------------------------------------------------------

cdef uint32_t new_victims(Tiers *t, uint32_t *frames, uint32_t known, uint32_t most) noexcept nogil:
    """Up to `most` cold frames behind the `known` ones, up to the first known; how many."""
    cdef uint32_t i, j
    cdef uint32_t found = store_victims(t.core, frames + known, most, False)
    for i in range(found):
        for j in range(known):
            if frames[j] == frames[known + i]:
                return i                # the hand has gone round
    return found


cdef uint32_t gather_batch(Tiers *t, uint64_t most_bytes) noexcept nogil:
    """Copy the pages of cold frames together; how many.  Inside a slot, so no frame is punched.

    Once round at most, and COLD_BATCH frames: those whose pages are damaged stay, and would be
    met for ever.
    """
    cdef uint32_t frames[COLD_BATCH]
    cdef uint64_t where[MOST_OBJECTS]
    cdef uint32_t bytes[MOST_OBJECTS]
    cdef uint32_t objects, i, j
    cdef uint32_t known = 0
    cdef uint32_t n = 0
    cdef uint64_t filled = 0
    # as many as surely find room: a zspage goes as a whole, or its frames are not freed
    cdef uint32_t objects_at_once = t.core.allocator.objects_at_once
    cdef uint64_t bytes_at_once = t.core.allocator.frames_at_once * <uint64_t>PAGE_BYTES
    cdef uint32_t most = min(FRAMES_AT_ONCE, min(COLD_BATCH // objects_at_once, <uint32_t>(most_bytes // bytes_at_once)))
    cdef uint32_t found = most
    cdef Slot *slot = slot_take_own(&t.core.slots)
    while (
        found == most and known + most <= COLD_BATCH and n + most * objects_at_once <= COLD_BATCH
        and filled + most * bytes_at_once <= most_bytes
    ):
        let_others(t)
        found = new_victims(t, frames, known, most)
        for i in range(known, known + found):
            objects = t.core.allocator.objects(t.core.allocator, frames[i], where, bytes, MOST_OBJECTS)
            for j in range(objects):
                if n < COLD_BATCH and filled + PAGE_BYTES <= most_bytes and copy_for_below(
                    t.core, where[j], bytes[j], &t.batch[n], &t.entries[n], t.gathered + filled
                ):
                    filled += length_of(t.entries[n].location)
                    n += 1
        known += found
    slot_release(slot)
    return n


cdef uint32_t cool_batch(Tiers *t, uint64_t most_bytes) noexcept nogil:
    """One batch of cold pages becomes ephemeral; how many did."""
    cdef uint32_t n = gather_batch(t, most_bytes)
    cdef uint32_t i
    cdef uint32_t done = 0
    if n == 0:
        return 0
    if t.core.lower.peers:
        # Who has just moved one of them up drops its copies at peers next, and a copy there has no
        # address of its own: that drop must be told before the same version is put again.
        slots_quiesce(&t.core.slots)
    t.cells[C_OUTSTANDING_WRITEBACK_PAGES] = n
    t.cold.put(t.cold, t.batch, n)
    for i in range(n):
        if i % FRAMES_AT_ONCE == 0:
            let_others(t)
        if t.batch[i].error == EAGAIN:
            pass                    # it comes again with others
        elif t.batch[i].error:
            t.cells[C_FAILED_WRITEBACK_PAGES] += 1
        elif make_ephemeral(t.core, t.batch[i].page, t.entries[i], t.batch[i].where):
            done += 1
        else:
            t.cells[C_OVERTAKEN_WRITEBACK_PAGES] += 1
            t.cold.drop(t.cold, &t.batch[i])
    t.cells[C_WRITTEN_BACK_PAGES] += done
    t.cells[C_OUTSTANDING_WRITEBACK_PAGES] = 0
    return done


# ---- ephemeral pages leave RAM ------------------------------------------------------------

cdef bint rescue(Tiers *t, uint32_t page, Entry e) noexcept nogil:
    """A page whose copy below may be gone is in RAM alone from now on, to be copied down anew."""
    cdef ColdPage copy = cold_page(page, version_of(e.version), 0, e.location)
    copy.where = lower_now(t.core, &copy)
    if copy.where == 0 or t.cold.holds(t.cold, copy.where) != HOLDS_NOT or not keep_in_ram(t.core, page, e, &copy.where):
        return False
    t.cold.drop(t.cold, &copy)
    t.cells[C_RESCUED_PAGES] += 1
    return True


cdef uint32_t drop_frames(Tiers *t, uint32_t most) noexcept nogil:
    """Up to `most` ephemeral frames lose their pages, coldest first; how many.  No I/O.

    Or they are no ephemeral ones any more, because the copies below may be gone.  The caller is
    inside a slot.
    """
    cdef uint32_t frames[FRAMES_AT_ONCE]
    cdef uint64_t where[MOST_OBJECTS]
    cdef uint32_t bytes[MOST_OBJECTS]
    cdef uint32_t objects, i, j, page, found
    cdef uint32_t dropped = 0
    cdef uint32_t kept = 0
    cdef bint one, other
    cdef Entry e
    lock_take(&t.dropping)
    found = store_victims(t.core, frames, min(most, <uint32_t>FRAMES_AT_ONCE), True) if frames_ephemeral(t) else 0
    for i in range(found):
        one = other = False
        objects = t.core.allocator.objects(t.core.allocator, frames[i], where, bytes, MOST_OBJECTS)
        for j in range(objects):
            page = page_at(t.core, where[j], bytes[j])
            if page >= t.core.index.pages:
                continue
            e = entry_load(&t.core.index, page)
            if state_of(e.version) == ST_RAM_EPHEMERAL and where_of(e.location) == where[j]:
                if drop_ram_copy(t.core, page, e):
                    one = True
                else:
                    other |= rescue(t, page, e)
        dropped += one
        kept += other and not one
    t.cells[C_EVICTED_EPH_PAGEFRAMES] += dropped
    pthread_mutex_unlock(&t.dropping)
    return dropped + kept


# ---- ephemeral pages give up their copy below ----------------------------------------------

cdef uint32_t keep_frame(Tiers *t, uint32_t frame) noexcept nogil:
    """The pages of a frame are persistent again; how many."""
    cdef uint64_t where[MOST_OBJECTS]
    cdef uint32_t bytes[MOST_OBJECTS]
    cdef uint32_t objects, j, page
    cdef uint32_t kept = 0
    cdef uint64_t lower
    cdef ColdPage copy
    cdef Entry e
    objects = t.core.allocator.objects(t.core.allocator, frame, where, bytes, MOST_OBJECTS)
    for j in range(objects):
        page = page_at(t.core, where[j], bytes[j])
        if page >= t.core.index.pages:
            continue
        e = entry_load(&t.core.index, page)
        if where_of(e.location) == where[j] and keep_in_ram(t.core, page, e, &lower):
            copy = cold_page(page, version_of(e.version), lower, e.location)
            t.cold.drop(t.cold, &copy)
            kept += 1
    return kept


cdef uint32_t keep_hot(Tiers *t, uint32_t most) noexcept nogil:
    """Up to `most` ephemeral frames, those read lately first, live in RAM alone; pages kept.

    For when room is short below and not in RAM.  One round of all frames at most.
    """
    cdef uint32_t steps
    cdef uint32_t frames = 0
    cdef uint32_t kept = 0
    cdef bint any_will_do = False
    cdef Frame *f
    cdef Slot *slot = slot_take_own(&t.core.slots)
    lock_take(&t.dropping)
    while True:
        for steps in range(t.core.arena.total):
            if frames == most:
                break
            f = &t.core.arena.frames[t.keep_hand]
            if FRAME_TAKEN <= f.state < FRAME_TAIL and f.ephemeral_only and (f.referenced or any_will_do):
                kept += keep_frame(t, t.keep_hand)
                frames += 1
            t.keep_hand += 1
            if t.keep_hand == t.core.arena.total:
                t.keep_hand = 0
        if kept or any_will_do:
            break
        any_will_do = True
    pthread_mutex_unlock(&t.dropping)
    slot_release(slot)
    t.cells[C_KEPT_PAGES] += kept
    return kept


# ---- a disk that was cut short -------------------------------------------------------------

cdef bint was_cut_off(Tiers *t, uint64_t where) noexcept nogil:
    """Whether a copy at `where` has its part on the disk, and that may be gone."""
    if is_backed(where):
        where = disk_part(where)
    elif lower_state(where) != ST_DISK:
        return False
    return t.disk.holds(t.disk, where) == HOLDS_NOT


cdef bint has_changed(Tiers *t, uint64_t page, Entry seen) noexcept nogil:
    cdef Entry now = entry_load(&t.core.index, page)
    return now.location != seen.location or now.version != seen.version


cdef void keep_if_cut_off(Tiers *t, uint64_t page) noexcept nogil:
    """What RAM has is in RAM alone from now on; what a peer has, there alone."""
    cdef ColdPage copy
    cdef Entry e
    while True:                 # (its RAM copy may be moved meanwhile, a peer's come up)
        e = entry_load(&t.core.index, page)
        if not entry_is_sound(e.location, e.version):
            return
        copy = cold_page(page, version_of(e.version), where_of(e.location), e.location)
        if state_of(e.version) == ST_PEER and is_backed(copy.where) and t.cold.part_lost != NULL:
            if not was_cut_off(t, copy.where) or t.cold.part_lost(t.cold, &copy) or not has_changed(t, page, e):
                return
            continue
        if state_of(e.version) != ST_RAM_EPHEMERAL:
            return
        copy.where = lower_now(t.core, &copy)
        if copy.where == 0:
            if not has_changed(t, page, e):
                return          # its header is damaged: drop_ram_copy keeps such a one in RAM
            continue
        if not was_cut_off(t, copy.where):
            return
        if keep_in_ram(t.core, page, e, &copy.where):
            t.cold.drop(t.cold, &copy)
            t.cells[C_RESCUED_PAGES] += 1
            return


cdef bint keep_cut_off(Tiers *t) noexcept nogil:
    """A piece of the walk that a cut file waits for; False: there is nothing more to do.

    What is in RAM, and was on the disk too, is in RAM alone from then on; what is at a peer and was
    on the disk too, at that peer.  The file is made long
    again only after that: as long as it is short, every next server knows.
    """
    cdef uint64_t bytes = disk_to_keep(t.disk) if t.disk != NULL else <uint64_t>DISK_WHOLE
    cdef uint64_t page, end
    cdef Slot *slot
    if bytes == DISK_WHOLE:
        return False
    if bytes != t.keep_bytes:
        t.keep_bytes, t.keep_at = bytes, 0
        slots_quiesce(&t.core.slots)    # who is just promoting a page has not seen the cut
    end = min(t.keep_at + KEEP_ENTRIES, t.core.index.pages)
    slot = slot_take_own(&t.core.slots)
    for page in range(t.keep_at, end):
        keep_if_cut_off(t, page)
    slot_release(slot)
    let_others(t)
    t.keep_at = end
    if end < t.core.index.pages:
        return True
    disk_kept(t.disk, bytes)
    t.keep_bytes = DISK_WHOLE
    return False


# ---- tidying the tier ---------------------------------------------------------------------

cdef bint resort(Tiers *t) noexcept nogil:
    """Write the living objects of some segments anew; whether any moved."""
    cdef uint32_t found = t.cold.resort(t.cold, t.resort_batch, RESORT_PAGES, t.gathered, GATHER_BYTES)
    cdef uint32_t n = 0
    cdef uint32_t done = 0
    cdef uint32_t i, first, piece
    cdef ColdPage *moved = t.batch      # nothing else is under way
    if found == 0:
        return False
    for i in range(found):
        if still_needed(t.core, &t.resort_batch[i]):
            t.resort_batch[n] = t.resort_batch[i]
            n += 1
    first = 0
    while first < n:
        piece = min(n - first, <uint32_t>COLD_BATCH)
        for i in range(piece):
            moved[i] = t.resort_batch[first + i]
        t.cold.put(t.cold, moved, piece)
        for i in range(piece):
            if moved[i].error:
                continue
            if copy_moved(t.core, &t.resort_batch[first + i], moved[i].where):
                t.cold.drop(t.cold, &t.resort_batch[first + i])
                done += 1
            else:
                t.cold.drop(t.cold, &moved[i])
        first += piece
    t.cold.resorted(t.cold)
    t.cold.tick(t.cold)
    return done > 0
