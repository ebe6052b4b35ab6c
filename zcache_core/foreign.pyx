"""Pages that this machine holds for others: found by owner, device, page and version.

    record of a request -> hash -> place (32 bytes, in the memory file) -> room in a frame
       whose | page | version            entry | checksum | whose          seal 24 | ciphertext

The arena and the allocator are the store's own; only the index is another one, because
owners may have any page of any device: a place is an index entry with the page's identity
beside it.  The seal (nonce counter and tag) stands where a blob's header stands: in front of the
blob, or in the table of frame headers when the page fills its frame.  Sealed bytes are kept
as they came; they can be checked here (a checksum, so that damaged RAM is found) but
neither read nor changed.

What survives a kill at any instant: every page whose put was answered.  A place counts from
the moment its version word is written, after everything else; a drop clears that word first.
All else (hash, free places, lists) is made again from the places.

An owner's epoch that is over makes its places unreachable at once, for the epoch is part of
the identity; a sweep gives their room back, a few thousand at a time.

Bound: the arena's frames, two places each; 24 bytes a frame of private tables.  Nobody waits
here but a put for frames to be committed, so long as its caller says.
Lock: `lock`, for a batch at a time; the allocator's and the arena's come after it.
A successor finds the pages again in foreignfound.pyx.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from zcache_core.allocator cimport blob_start, object_header
from zcache_core.arena cimport FRAME_TAKEN, Frame, arena_wait
from zcache_core.counter_ids cimport (
    C_FOREIGN_DAMAGED_PAGES, C_FOREIGN_DROPS, C_FOREIGN_ENDED_PAGES, C_FOREIGN_GETS, C_FOREIGN_PERS_BYTES,
    C_FOREIGN_PERS_PAGES, C_FOREIGN_PERS_PAGES_MAX, C_FOREIGN_PUTS, C_FOREIGN_REFUSED_PUTS, C_FOREIGN_UNSUCC_GETS,
)
from zcache_core.layout cimport (
    PAGE_BYTES, PAGE_SHIFT, ST_RAM, entry_is_sound, length_of, version_of, version_word, where_of,
)
from zcache_core.native cimport zc_release_fence, zc_store64
from zcache_core.pthread cimport lock_init, lock_take, now_us, pthread_mutex_unlock

cdef uint64_t GOLDEN = 0x9E3779B97F4A7C15


# ---- identity ------------------------------------------------------------------------

cdef inline uint64_t whose_word(uint64_t epoch, uint32_t row, uint32_t device) noexcept nogil:
    return (epoch << EPOCH_SHIFT) | (device << ROW_BITS) | row


cdef inline uint32_t bucket(Foreign *f, uint64_t whose, uint32_t page, uint64_t version) noexcept nogil:
    cdef uint64_t h = (whose ^ (<uint64_t>page << 20)) * GOLDEN
    h = (h ^ (h >> 29) ^ version) * <uint64_t>0xBF58476D1CE4E5B9
    return <uint32_t>(h >> 32) & f.mask


cdef inline uint32_t length_in(const Record *r) noexcept nogil:
    return (r.length_codec >> 4) + 1


# ---- the table: lock held -----------------------------------------------------------------

cdef uint32_t find(Foreign *f, uint64_t whose, uint32_t page, uint64_t version) noexcept nogil:
    cdef uint32_t at = f.heads[bucket(f, whose, page, version)]
    while at != NO_PLACE:
        if (
            f.places[at].whose == whose and f.places[at].page_checksum >> 32 == page
            and version_of(f.places[at].entry.version) == version
        ):
            return at
        at = f.next[at]
    return NO_PLACE


cdef void link_place(Foreign *f, uint32_t at) noexcept nogil:
    """Into its chain and into the accounts."""
    cdef Place *p = &f.places[at]
    cdef uint32_t b = bucket(f, p.whose, <uint32_t>(p.page_checksum >> 32), version_of(p.entry.version))
    cdef uint32_t room = room_for(f, length_of(p.entry.location))
    cdef Held *held = &f.held[row_of(p.whose)]
    f.next[at] = f.heads[b]
    f.heads[b] = at
    f.at_bud[bud_at(where_of(p.entry.location))] = at
    held.pages += 1
    held.bytes += room
    f.cells[C_FOREIGN_PERS_PAGES] += 1
    f.cells[C_FOREIGN_PERS_BYTES] += room
    f.cells[C_FOREIGN_PERS_PAGES_MAX] = max(f.cells[C_FOREIGN_PERS_PAGES_MAX], f.cells[C_FOREIGN_PERS_PAGES])


cdef bint remove_place(Foreign *f, uint32_t at) noexcept nogil:
    """The page is gone: out of its chain, its room given back.

    False when its words in the memory file are damaged: then it stays as it is, found by
    nobody or answered as damaged, until the next start, which frees it.
    """
    cdef Place *p = &f.places[at]
    cdef uint64_t location = p.entry.location
    cdef uint32_t room = room_for(f, length_of(location))
    cdef uint32_t *link = &f.heads[bucket(f, p.whose, <uint32_t>(p.page_checksum >> 32), version_of(p.entry.version))]
    while link[0] != at and link[0] != NO_PLACE:
        link = &f.next[link[0]]
    if link[0] == NO_PLACE or not entry_is_sound(location, p.entry.version):
        return False
    link[0] = f.next[at]
    if not is_current(f, p.whose):
        f.stale -= f.stale > 0
    elif f.held[row_of(p.whose)].pages:
        f.held[row_of(p.whose)].pages -= 1
        f.held[row_of(p.whose)].bytes -= room
    f.cells[C_FOREIGN_PERS_PAGES] -= 1
    f.cells[C_FOREIGN_PERS_BYTES] -= room
    f.at_bud[bud_at(where_of(location))] = NO_PLACE
    zc_store64(&p.entry.version, 0)     # first: from now on a successor does not know it
    p.entry.location = 0
    zc_release_fence()
    f.next[at] = f.free_head
    f.free_head = at
    f.allocator.release(f.allocator, where_of(location), room)
    return True


cdef uint32_t take_place(Foreign *f) noexcept nogil:
    cdef uint32_t at = f.free_head
    if at != NO_PLACE:
        f.free_head = f.next[at]
    elif f.used < f.total:
        at = f.used
        f.used += 1
    return at


# ---- put, get, drop -------------------------------------------------------------------------

cdef bint find_room(Foreign *f, uint32_t room, int64_t deadline_us, uint64_t *where) noexcept nogil:
    """Room in the arena; waits, with the lock dropped, while frames are being committed."""
    cdef bint again = True
    while again:
        if f.allocator.alloc(f.allocator, room, where):
            return True
        pthread_mutex_unlock(&f.lock)
        again = now_us() < deadline_us and arena_wait(&f.arena, 1, deadline_us, False)
        lock_take(&f.lock)
    return False


cdef uint32_t put_one(
    Foreign *f, uint32_t row, uint64_t epoch, const Record *r, const uint8_t *sealed, int64_t deadline_us
) noexcept nogil:
    cdef uint64_t where
    cdef uint32_t length = length_in(r)
    cdef uint32_t room = room_for(f, length)
    cdef uint64_t whose = whose_word(epoch, row, r.device)
    cdef uint32_t frame_or_length = PAGE_BYTES if room == PAGE_BYTES else length
    cdef uint32_t at, old
    cdef Place *p
    if f.held[row].bytes + room > f.held[row].quota_bytes or not find_room(f, room, deadline_us, &where):
        return PAGE_FULL
    at = take_place(f)
    if at == NO_PLACE or not is_current(f, whose):      # the lock was dropped: its epoch may be over
        if at != NO_PLACE:
            f.next[at] = f.free_head
            f.free_head = at
        f.allocator.release(f.allocator, where, room)
        return PAGE_FULL
    old = find(f, whose, r.page, r.version)
    p = &f.places[at]
    memcpy(object_header(&f.arena, where, frame_or_length), sealed, SEAL_BYTES)
    memcpy(blob_start(&f.arena, where, frame_or_length), sealed + SEAL_BYTES, length)
    p.whose = whose
    p.page_checksum = <uint64_t>r.page << 32
    p.entry.location = (where << 16) | r.length_codec
    zc_release_fence()
    # in two steps because the checksum needs the version; only the second word makes it count
    p.page_checksum |= new_sum(f, p, r.version, where, frame_or_length)
    zc_release_fence()
    zc_store64(&p.entry.version, version_word(r.version, ST_RAM, p.entry.location))
    link_place(f, at)
    if old != NO_PLACE:                 # sent again: its answer was lost
        remove_place(f, old)
    return PAGE_OK


cdef inline uint32_t new_sum(Foreign *f, const Place *p, uint64_t version, uint64_t where, uint32_t frame_or_length) noexcept nogil:
    cdef Place copy = p[0]
    copy.entry.version = version << 12
    return sum_of(
        &copy, <const uint64_t *>object_header(&f.arena, where, frame_or_length),
        blob_start(&f.arena, where, frame_or_length),
    )


cdef uint32_t foreign_put(
    Foreign *f, uint32_t row, uint64_t epoch, const Record *records, uint32_t n, const uint8_t *payload, uint8_t *codes,
    int64_t wait_us
) noexcept nogil:
    """Keep a batch, its sealed bytes one behind the other; a PageCode each; how many are kept.

    All are PAGE_OVER when this is not the row's epoch (any more).
    """
    cdef int64_t deadline_us = now_us() + wait_us
    cdef uint32_t i
    cdef uint32_t good = 0
    lock_take(&f.lock)
    if f.owners[row].epoch != epoch:
        memset(codes, PAGE_OVER, n)
        n = 0
    for i in range(n):
        codes[i] = <uint8_t>put_one(f, row, epoch, &records[i], payload, deadline_us)
        good += codes[i] == PAGE_OK
        payload += SEAL_BYTES + length_in(&records[i])
    f.cells[C_FOREIGN_PUTS] += good
    f.cells[C_FOREIGN_REFUSED_PUTS] += n - good
    pthread_mutex_unlock(&f.lock)
    return good


cdef uint32_t get_one(Foreign *f, uint32_t row, const Record *r, uint8_t *sealed) noexcept nogil:
    cdef uint32_t at = find(f, whose_word(f.owners[row].epoch, row, r.device), r.page, r.version)
    cdef uint32_t length = length_in(r)
    cdef uint32_t frame_or_length = PAGE_BYTES if room_for(f, length) == PAGE_BYTES else length
    cdef const Place *p
    cdef const uint8_t *seal
    cdef const uint8_t *blob
    cdef uint64_t where
    if at == NO_PLACE:
        return PAGE_ABSENT
    p = &f.places[at]
    if not entry_is_sound(p.entry.location, p.entry.version):
        return PAGE_DAMAGED
    if (p.entry.location & 0xFFFF) != r.length_codec:
        return PAGE_ABSENT
    where = where_of(p.entry.location)
    seal = <const uint8_t *>object_header(&f.arena, where, frame_or_length)
    blob = blob_start(&f.arena, where, frame_or_length)
    memcpy(sealed, seal, SEAL_BYTES)
    memcpy(sealed + SEAL_BYTES, blob, length)
    if <uint32_t>p.page_checksum != sum_of(p, <const uint64_t *>sealed, sealed + SEAL_BYTES):
        remove_place(f, at)
        return PAGE_DAMAGED
    f.arena.frames[where >> PAGE_SHIFT].referenced = 1
    return PAGE_OK


cdef uint64_t foreign_get(
    Foreign *f, uint32_t row, uint64_t epoch, const Record *records, uint32_t n, uint8_t *payload, uint8_t *codes
) noexcept nogil:
    """Copy what is PAGE_OK of a batch, one behind the other; how many bytes.  `payload` has room for all.

    All are PAGE_OVER when this is not the row's epoch (any more).
    """
    cdef uint32_t i
    cdef uint64_t bytes = 0
    lock_take(&f.lock)
    if f.owners[row].epoch != epoch:
        memset(codes, PAGE_OVER, n)
        n = 0
    for i in range(n):
        codes[i] = <uint8_t>get_one(f, row, &records[i], payload + bytes)
        if codes[i] == PAGE_OK:
            bytes += SEAL_BYTES + length_in(&records[i])
            f.cells[C_FOREIGN_GETS] += 1
        else:
            f.cells[C_FOREIGN_UNSUCC_GETS] += 1
            f.cells[C_FOREIGN_DAMAGED_PAGES] += codes[i] == PAGE_DAMAGED
    pthread_mutex_unlock(&f.lock)
    return bytes


cdef uint32_t foreign_drop(Foreign *f, uint32_t row, const Record *records, uint32_t n) noexcept nogil:
    """Forget these pages; how many were there."""
    cdef uint32_t i, at
    cdef uint32_t gone = 0
    lock_take(&f.lock)
    for i in range(n):
        at = find(f, whose_word(f.owners[row].epoch, row, records[i].device), records[i].page, records[i].version)
        if at != NO_PLACE:
            gone += remove_place(f, at)
    f.cells[C_FOREIGN_DROPS] += gone
    pthread_mutex_unlock(&f.lock)
    return gone


cdef uint64_t foreign_room(Foreign *f, uint32_t row) noexcept nogil:
    """Bytes that the owner of this row could put now, as frames and its quota allow: an estimate."""
    cdef Held *held = &f.held[row]
    cdef uint64_t quota = held.quota_bytes - held.bytes if held.quota_bytes > held.bytes else 0
    cdef uint64_t used, target
    lock_take(&f.arena.lock)
    used = f.arena.committed - f.arena.free_count - f.arena.moving
    target = f.arena.target
    pthread_mutex_unlock(&f.arena.lock)
    return min(quota, (target - used) * <uint64_t>PAGE_BYTES if target > used else 0)


# ---- looking through them ----------------------------------------------------------------------

cdef inline void tell(const Place *p, Record *r) noexcept nogil:
    r.version = version_of(p.entry.version)
    r.page = <uint32_t>(p.page_checksum >> 32)
    r.length_codec = <uint16_t>(p.entry.location & 0xFFFF)
    r.device = (p.whose >> ROW_BITS) & 0xFF
    r.zero = 0


cdef uint32_t foreign_list(
    Foreign *f, uint32_t row, uint64_t *cursor, Record *records, uint32_t most
) noexcept nogil:
    """What a row holds from the place `cursor` on; that moves on, to `total` at the end.

    What stays from the first call to the last is told once; looks at 64 Ki places a call.
    """
    cdef uint32_t n = 0
    cdef uint64_t at = cursor[0]
    cdef uint64_t end
    lock_take(&f.lock)
    end = min(<uint64_t>f.used, at + 65536)
    while at < end and n < most:
        if f.places[at].entry.version and row_of(f.places[at].whose) == row and is_current(f, f.places[at].whose):
            tell(&f.places[at], &records[n])
            n += 1
        at += 1
    cursor[0] = at if at < f.used else f.total
    pthread_mutex_unlock(&f.lock)
    return n


cdef uint32_t foreign_coldest(Foreign *f, Record *records, uint8_t *rows, uint32_t most) noexcept nogil:
    """Up to `most` pages of cold frames, whole frames at a time, by second chance."""
    cdef uint32_t n = 0
    cdef uint32_t at, bud
    cdef uint64_t steps
    cdef Frame *frame
    lock_take(&f.lock)
    for steps in range(2 * <uint64_t>f.arena.total):
        if n + 2 > most:
            break
        at = f.clock_hand
        f.clock_hand = (f.clock_hand + 1) % f.arena.total
        frame = &f.arena.frames[at]
        if frame.state < FRAME_TAKEN:
            continue
        if frame.referenced:
            frame.referenced = 0
            continue
        for bud in range(2):
            if f.at_bud[2 * at + bud] != NO_PLACE and is_current(f, f.places[f.at_bud[2 * at + bud]].whose):
                tell(&f.places[f.at_bud[2 * at + bud]], &records[n])
                rows[n] = row_of(f.places[f.at_bud[2 * at + bud]].whose)
                n += 1
        frame.referenced = 1        # told: others first, before it is told again
    pthread_mutex_unlock(&f.lock)
    return n


cdef void foreign_set_epoch(Foreign *f, uint32_t row, uint64_t epoch) noexcept nogil:
    """Another epoch of this row (0: none): what it held is over, and swept by and by."""
    lock_take(&f.lock)
    f.stale += f.held[row].pages
    f.cells[C_FOREIGN_ENDED_PAGES] += f.held[row].pages
    f.held[row].pages = f.held[row].bytes = 0
    zc_store64(&f.owners[row].epoch, epoch)
    pthread_mutex_unlock(&f.lock)


cdef uint32_t foreign_sweep(Foreign *f, uint32_t most) noexcept nogil:
    """Look at up to `most` places, none twice, for what is over, and free it; how many are left.

    Those that are damaged stay, and are counted: call it so often as is of use, not until 0.
    """
    cdef uint32_t i, left
    lock_take(&f.lock)
    for i in range(min(most, f.used)):
        if f.stale == 0:
            break
        if f.sweep_hand >= f.used:
            f.sweep_hand = 0
        if f.places[f.sweep_hand].entry.version and not is_current(f, f.places[f.sweep_hand].whose):
            remove_place(f, f.sweep_hand)
        f.sweep_hand += 1
    left = <uint32_t>f.stale
    pthread_mutex_unlock(&f.lock)
    return left


# ---- private tables --------------------------------------------------------------------------------

cdef uint32_t *table(uint64_t cells) noexcept nogil:
    """So many words, all NO_PLACE; NULL without memory."""
    cdef uint32_t *at = <uint32_t *>mmap(NULL, cells * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if <void *>at == MAP_FAILED:
        return NULL
    memset(at, 0xFF, cells * 4)
    return at


cdef int foreign_make(Foreign *f) noexcept nogil:
    """The private tables, all empty; -1 without memory.  Everything else is set already."""
    f.mask = 1
    while f.mask < f.total:
        f.mask <<= 1
    f.heads, f.next, f.at_bud = table(f.mask), table(f.total), table(2 * <uint64_t>f.arena.total)
    f.mask -= 1
    f.free_head = NO_PLACE
    lock_init(&f.lock)
    return 0 if f.heads != NULL and f.next != NULL and f.at_bud != NULL else -1


cdef void foreign_free(Foreign *f) noexcept nogil:
    if f.heads != NULL:
        munmap(f.heads, (<uint64_t>f.mask + 1) * 4)
    if f.next != NULL:
        munmap(f.next, <uint64_t>f.total * 4)
    if f.at_bud != NULL:
        munmap(f.at_bud, 2 * <uint64_t>f.arena.total * 4)
    f.heads = f.next = f.at_bud = NULL
