"""What is counted on at peers, what the node tells of it, and what it is told.

    note from the node  moved: the copies of a page are elsewhere -> its entry is told
                        gone: of a page on the disk too -> that is its one copy for now;
                              of one in RAM too -> it is in RAM alone, and must not be dropped there
                        donor: who a number is -> the donor table
    drop                copies not needed any more -> the ring, to the node

An entry is told as when a disk is cleaned (copy_moved): the page's version stays, an overwrite
in between wins, and the new copies are nobody's then.

Bounds: DROPS drops wait; one more is counted, and found by the node when it compares.
Lock: `lock` (a leaf) guards the end of the ring of drops.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zcache_core.cold cimport ColdPage, cold_page
from zcache_core.cooling cimport copy_moved, keep_in_ram, lower_now
from zcache_core.counter_ids cimport (
    C_BACKED_PAGES, C_PERS_PAGES_REMOTED, C_REMOTE_BYTES, C_REMOTE_MOVED_PAGES, C_RESCUED_PAGES,
)
from zcache_core.crypt cimport SEAL_BYTES
from zcache_core.index cimport entry_load
from zcache_core.layout cimport (
    COPIES_MOST, DONOR_ID_BYTES, DONORS, DonorRow, Entry, backed_where, disk_part, donor_at, is_backed, length_of,
    version_of,
)
from zcache_core.native cimport zc_acquire_fence, zc_add64, zc_load64, zc_store32, zc_store64
from zcache_core.peerwhere cimport where_is_possible, where_without
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock
from zcache_core.ring cimport DROPS, NOTE_DONOR, NOTE_GONE, NOTE_MOVED, NOTES, ROW_UNKNOWN, Drop, Note, RingHead

cdef enum:
    NOTES_AT_ONCE = NOTES       # all that are there: a tick says that they are heard


# ---- what is counted on ----------------------------------------------------------------------

cdef void count_copies(Peers *p, uint64_t where, uint32_t length_bytes, int sign) noexcept nogil:
    cdef uint32_t i, donor
    for i in range(COPIES_MOST):
        donor = donor_at(where, i)
        if donor and donor <= DONORS:
            zc_add64(&p.ring.head.copies[donor - 1], <uint64_t><int64_t>sign)
            zc_add64(&p.cells[C_REMOTE_BYTES], <uint64_t>(<int64_t>sign * <int64_t>(length_bytes + SEAL_BYTES)))


    if is_backed(where):
        count_backed(p, sign)
    elif donor_at(where, 1) == 0:
        count_alone(p, sign)


cdef void count_backed(Peers *p, int sign) noexcept nogil:
    zc_add64(&p.cells[C_BACKED_PAGES], <uint64_t><int64_t>sign)
    zc_add64(&p.ring.head.backed, <uint64_t><int64_t>sign)


cdef void count_alone(Peers *p, int sign) noexcept nogil:
    zc_add64(&p.ring.head.alone, <uint64_t><int64_t>sign)


cdef void count_page(Peers *p, uint64_t where, uint32_t length_bytes, int sign) noexcept nogil:
    zc_add64(&p.cells[C_PERS_PAGES_REMOTED], <uint64_t><int64_t>sign)
    count_copies(p, where, length_bytes, sign)


# ---- dropping -----------------------------------------------------------------------------------

cdef void tell_dropped(Peers *p, const ColdPage *page, uint64_t where) noexcept nogil:
    """Have the donors of `where` told; what finds no room in the ring is found out by comparing."""
    cdef RingHead *head = &p.ring.head
    cdef Drop *drop
    if where == 0:
        return
    lock_take(&p.lock)
    if head.drops_end - zc_load64(&head.drops_begin) < DROPS:
        drop = &p.ring.drop[head.drops_end % DROPS]
        drop.page = page.page
        drop.version = page.version
        drop.where = where
        drop.length_codec = page.length_codec & 0xFFFF
        zc_store64(&head.drops_end, head.drops_end + 1)
    else:
        head.drops_missed += 1
    pthread_mutex_unlock(&p.lock)


# ---- what the node tells -----------------------------------------------------------------------

cdef bint beside_disk(Peers *p, const Note *note, ColdPage *old) noexcept nogil:
    """A note of a page with a copy on the disk: put in what is its address now.  False: it is another."""
    cdef uint64_t now = lower_now(p.core, old)
    if not is_backed(now) or donor_at(now, 0) != donor_at(note.old, 0):
        return False
    old.where = now             # (cleaning may have moved the disk's part meanwhile)
    return True


cdef void hear_moved(Peers *p, const Note *note) noexcept nogil:
    """The copies of a page are elsewhere: its entry is told, or the new ones are nobody's."""
    cdef ColdPage old = cold_page(note.page, note.version, note.old, note.length_codec)
    cdef ColdPage on_disk
    cdef uint32_t length = length_of(note.length_codec)
    cdef uint64_t new = note.new
    if p.core == NULL or not where_is_possible(p.super, new) or note.page >= p.core.index.pages:
        return
    if is_backed(note.old) and beside_disk(p, note, &old) and donor_at(new, 1) == 0:
        new = backed_where(donor_at(new, 0), disk_part(old.where))
    count_copies(p, new, length, 1)
    if copy_moved(p.core, &old, new):
        count_copies(p, old.where, length, -1)
        tell_dropped(p, &old, where_without(old.where, new))
        if is_backed(old.where) and not is_backed(new):
            on_disk = cold_page(note.page, note.version, disk_part(old.where), note.length_codec)
            p.core.lower.drop(p.core.lower.tiers, &on_disk)
        zc_add64(&p.cells[C_REMOTE_MOVED_PAGES], 1)
    else:
        # Another note may have been first, and the same copy be counted on by now.
        count_copies(p, new, length, -1)
        tell_dropped(p, &old, where_without(where_without(new, note.old), lower_now(p.core, &old)))


cdef void hear_gone_from_all(Peers *p, const Note *note, ColdPage *old) noexcept nogil:
    """No donor has it any more: a page that is in RAM too is in RAM alone from now on."""
    cdef Entry e = entry_load(&p.core.index, note.page)
    if version_of(e.version) != note.version or lower_now(p.core, old) != note.old:
        return                  # it is elsewhere by now
    if keep_in_ram(p.core, note.page, e, &old.where):
        p.core.lower.drop(p.core.lower.tiers, old)
        zc_add64(&p.cells[C_RESCUED_PAGES], 1)


cdef void hear_gone(Peers *p, const Note *note) noexcept nogil:
    """The donor's copy is not to be counted on: the page is on the disk alone, until it has another."""
    cdef ColdPage old = cold_page(note.page, note.version, note.old, note.length_codec)
    if p.core == NULL or note.page >= p.core.index.pages:
        return
    if not is_backed(note.old):
        hear_gone_from_all(p, note, &old)
        return
    if not beside_disk(p, note, &old):
        return
    if copy_moved(p.core, &old, disk_part(old.where)):
        count_page(p, old.where, length_of(note.length_codec), -1)
        tell_dropped(p, &old, old.where)


cdef void hear_donor(Peers *p, const Note *note) noexcept nogil:
    """Who a number is.  One that addresses count on stays who it is."""
    cdef DonorRow *row
    if note.page < DONORS and zc_load64(&p.ring.head.copies[note.page]) == 0:
        row = &p.super.donors[note.page]
        zc_store64(&row.seen_us, 0)
        zc_store32(&p.ring.head.row_state[note.page], ROW_UNKNOWN)
        row.epoch = note.new
        memcpy(row.id, note.id, DONOR_ID_BYTES)


cdef void hear_notes(Peers *p) noexcept nogil:
    """By the thread that puts, alone."""
    cdef RingHead *head = &p.ring.head
    cdef uint32_t i
    cdef Note note
    for i in range(NOTES_AT_ONCE):
        if head.notes_begin == zc_load64(&head.notes_end):
            break
        zc_acquire_fence()
        note = p.ring.note[head.notes_begin % NOTES]
        zc_store64(&head.notes_begin, head.notes_begin + 1)
        if note.kind == NOTE_MOVED:
            hear_moved(p, &note)
        elif note.kind == NOTE_GONE:
            hear_gone(p, &note)
        elif note.kind == NOTE_DONOR:
            hear_donor(p, &note)
