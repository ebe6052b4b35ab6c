"""The disk tier: compressed pages back to back in whole segments, written 1 MiB at a time.

    byte 0         256 KiB                     512 KiB
    +--------------+---------------------------+----------------- - -
    | header block | object object ... |pad|.. | segment 2
    +--------------+---------------------------+----------------- - -
    object = header + blob, plain or encrypted, aligned to 8 (diskobject.pyx)

Pages go down as they are, without decompression, into whole segments, in writes of up to
1 MiB (diskput.pyx; O_DIRECT where the file allows it).  A `where` is the byte offset of the
object, and in its low bits how it is encrypted.

A segment's live bytes are counted exactly: added when an object is gathered,
taken off when the index lets go of it.  A full segment with nothing alive is free,
and punched (discarded on a block device) unless its room was promised (preallocated).
Those with least to lose are read and their living objects written anew (`resort`), into a log of
their own: what was moved once has lived long, and is not mixed with what comes and goes.
SPARE_SEGMENTS always stay free for that.

A disk that fails is tried again and again, reads go on meanwhile.  At the day's limit of
written bytes (quota.pyx) nothing is written, cleaning included; that is no failure.

Bounds: 50 bytes of memory for each MiB of disk, two buffers of 1 MiB.
Lock: `lock` (a leaf) guards logs and every change of a segment's state.
"""

from libc.errno cimport EDQUOT, EILSEQ, EIO, ENODATA
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from zcache_core.cold cimport HOLDS, HOLDS_NOT, ColdPage, ColdTier
from zcache_core.counter_ids cimport C_DISK_READ_ERRORS, C_DISK_SEGMENTS, C_DISK_WRITING_SINCE_US
from zcache_core.crypt cimport CIPHER_NONE, CIPHERS, Crypt
from zcache_core.diskio cimport BLOCK_BYTES, WRITE_BYTES, WRITES, punch, read_all, ring_discard, ring_make
from zcache_core.diskobject cimport OBJECT_ALIGN, cipher_of, object_found, object_read, object_room, offset_of
from zcache_core.diskput cimport come_alive, disk_drop, disk_put, disk_takes, must_keep, note_cut, publish
from zcache_core.diskstate cimport DISK_WHOLE, SPARE_SEGMENTS, Disk
from zcache_core.layout cimport Superblock, length_of
from zcache_core.native cimport zc_add32, zc_add64, zc_load32
from zcache_core.pthread cimport lock_init, lock_take, pthread_mutex_unlock
from zcache_core.quota cimport quota_init, quota_is_used_up
from zcache_core.segments cimport (
    SEG_FREE, SEG_FULL, SEG_RESORT, SEG_TRIED, SEGMENT_BYTES, Segment, Segments, segment_is_full, segments_close,
    segments_discard, segments_give_back, segments_is_cut, segments_make, segments_take, segments_victim,
)
from zcache_core.slots cimport IO_ROOM

cdef enum:
    OBJECT_LEAST = 32           # no object is smaller


# ---- reading, and finding again -----------------------------------------------------------------

cdef int disk_get(ColdTier *tier, ColdPage *page, uint8_t *io) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t offset = offset_of(page.where)
    cdef uint64_t start = offset // BLOCK_BYTES * BLOCK_BYTES
    cdef uint64_t end = offset + object_room(cipher_of(page.where), length_of(page.length_codec))
    end = (end + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    if end > <uint64_t>d.segments.count * SEGMENT_BYTES or end - start > IO_ROOM:
        return EILSEQ
    if read_all(d.fd, io, end - start, start):
        return EIO
    return object_read(&d.whose, io + (offset - start), page)


cdef bint disk_adopt(ColdTier *tier, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t number = where // SEGMENT_BYTES
    cdef uint64_t last = (offset_of(where) + object_room(cipher_of(where), length_bytes) - 1) // SEGMENT_BYTES
    if number == 0 or number >= d.segments.count or last != number or cipher_of(where) >= CIPHERS:
        return False
    if d.segments.at[number].state == SEG_FREE:
        segments_take(&d.segments, <uint32_t>number)
        d.segments.at[number].state = SEG_FULL
    come_alive(d, where, length_bytes)
    return True


cdef int disk_holds(ColdTier *tier, uint64_t where) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t number = where // SEGMENT_BYTES
    return HOLDS if number < d.segments.count and not segments_is_cut(&d.segments, <uint32_t>number) else HOLDS_NOT


cdef void disk_cut(ColdTier *tier, uint64_t bytes) noexcept nogil:
    """Before anything is adopted: the file was found with only so many bytes."""
    note_cut(<Disk *>tier, bytes)


cdef void disk_keep_first(ColdTier *tier) noexcept nogil:
    """Somebody looks at disk_to_keep: till it is done a cut file stays short, and nothing is written."""
    (<Disk *>tier).keep_first = True


cdef uint64_t disk_to_keep(ColdTier *tier) noexcept nogil:
    """The length to which it was cut, and what is in RAM is to be kept there; DISK_WHOLE: nothing is.  By who puts."""
    cdef Disk *d = <Disk *>tier
    return d.cut_bytes if must_keep(d) else <uint64_t>DISK_WHOLE


cdef void disk_kept(ColdTier *tier, uint64_t bytes) noexcept nogil:
    """What is in RAM too is counted on there alone.  By who puts."""
    cdef Disk *d = <Disk *>tier
    d.kept_bytes = bytes
    if d.failing == ENODATA:
        d.retry_at_us = d.retry_wait_us = 0     # that was what it waited for


cdef void disk_adopted(ColdTier *tier) noexcept nogil:
    publish(<Disk *>tier)


# ---- room, and what makes some --------------------------------------------------------------------

cdef bint disk_has_room(ColdTier *tier, uint64_t bytes) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t room = 0
    lock_take(&d.lock)
    if d.segments.free_count > SPARE_SEGMENTS:
        room = <uint64_t>(d.segments.free_count - SPARE_SEGMENTS) * SEGMENT_BYTES
    if d.log[0].segment:
        room += SEGMENT_BYTES - d.log[0].fill_bytes
    pthread_mutex_unlock(&d.lock)
    return room >= bytes


cdef void free_empty(Disk *d) noexcept nogil:
    """Full segments with nothing alive are free again; punched first unless promised.

    A reader may still read there: what it gets does not match its entry any more.
    """
    cdef Segments *s = &d.segments
    cdef uint32_t i
    if zc_load32(&s.emptied) == 0:
        return
    zc_add32(&s.emptied, <uint32_t>-<int>zc_load32(&s.emptied))
    for i in range(1, s.count):
        if not segment_is_full(&s.at[i]) or zc_load32(&s.at[i].live_bytes):
            continue
        if not d.preallocated and not d.no_punching:
            d.no_punching = punch(d.fd, <uint64_t>i * SEGMENT_BYTES, SEGMENT_BYTES) != 0
        lock_take(&d.lock)
        segments_give_back(s, i)
        pthread_mutex_unlock(&d.lock)


cdef void disk_tick(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    free_empty(d)
    disk_takes(tier)            # says how it is
    publish(d)


cdef uint32_t objects_of(Disk *d, uint32_t number, ColdPage *pages, uint32_t most, uint8_t *room) noexcept nogil:
    """All objects of a segment that was read into `room`; how many."""
    cdef uint32_t n = 0
    cdef uint32_t at = 0
    while n < most and at < SEGMENT_BYTES:
        if object_found(&d.whose, room + at, SEGMENT_BYTES - at, <uint64_t>number * SEGMENT_BYTES + at, &pages[n]):
            at += object_room(cipher_of(pages[n].where), length_of(pages[n].length_codec))
            n += 1
        else:
            at += OBJECT_ALIGN      # padding, or damage: the next object is somewhere behind
    return n


cdef uint32_t disk_resort(ColdTier *tier, ColdPage *pages, uint32_t most, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    """Objects of segments that are worth it, whatever the index says of them; blobs lie in `room`.

    As many segments as have 1 MiB alive, so that whole ones can be written.
    """
    cdef Disk *d = <Disk *>tier
    cdef uint32_t number
    cdef uint32_t n = 0
    cdef uint64_t live = 0
    cdef uint32_t count
    if not disk_takes(tier):
        return 0
    while live < WRITE_BYTES and d.resorting_count < room_bytes // SEGMENT_BYTES and n + SEGMENT_BYTES // OBJECT_LEAST <= most:
        lock_take(&d.lock)
        number = segments_victim(&d.segments)
        if number:
            count = d.resorting_count
            d.segments.at[number].state = SEG_RESORT
            d.resorting[count] = number
            d.resorting_live[count] = zc_load32(&d.segments.at[number].live_bytes)
            live += d.resorting_live[count]
            d.resorting_count += 1
        pthread_mutex_unlock(&d.lock)
        if number == 0:
            break
        if read_all(d.fd, room + count * SEGMENT_BYTES, SEGMENT_BYTES, <uint64_t>number * SEGMENT_BYTES):
            zc_add64(&d.cells[C_DISK_READ_ERRORS], 1)
        else:
            n += objects_of(d, number, pages + n, most - n, room + count * SEGMENT_BYTES)
    if n == 0:
        disk_resorted(tier)
    return n


cdef void disk_resorted(ColdTier *tier) noexcept nogil:
    """They are full again; one from which nothing moved waits, unless it was only held back."""
    cdef Disk *d = <Disk *>tier
    cdef uint32_t i, live
    lock_take(&d.lock)
    for i in range(d.resorting_count):
        live = zc_load32(&d.segments.at[d.resorting[i]].live_bytes)
        segments_close(&d.segments, d.resorting[i])
        if live and live == d.resorting_live[i] and not d.held_back:
            d.segments.at[d.resorting[i]].state = SEG_TRIED
    d.resorting_count = 0
    d.held_back = False
    pthread_mutex_unlock(&d.lock)


# ---- made and discarded ------------------------------------------------------------------------------

cdef int disk_reason(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    return d.failing or (EDQUOT if quota_is_used_up(&d.quota, WRITE_BYTES) else 0)


cdef uint64_t disk_memory_bytes(ColdTier *tier) noexcept nogil:
    return WRITES * WRITE_BYTES + (<Disk *>tier).segments.count * <uint64_t>(sizeof(Segment) + 1)


cdef void disk_discard(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    ring_discard(&d.ring)
    segments_discard(&d.segments)
    free(d)


cdef ColdTier *disk_make(
    int fd, uint64_t disk_bytes, Superblock *super, uint32_t device, bint preallocated, uint64_t *cells,
    Crypt *crypt, bint encrypt, const uint64_t *limit_bytes,
) noexcept nogil:
    """A disk tier over an open file or block device of `disk_bytes`; NULL without memory.

    `crypt` (NULL: there is nothing encrypted) opens what is encrypted there; with `encrypt` it
    seals what is written.  `limit_bytes` (NULL: none) is where the day's limit stands.
    """
    cdef Disk *d = <Disk *>calloc(1, sizeof(Disk))
    if d == NULL:
        return NULL
    d.fd = fd
    d.bytes = disk_bytes
    d.cut_bytes = d.kept_bytes = DISK_WHOLE
    d.whose.epoch = super.epoch
    d.whose.device = device
    d.whose.crypt = crypt
    d.whose.cipher = crypt.cipher if encrypt and crypt != NULL else <uint32_t>CIPHER_NONE
    d.preallocated = preallocated
    d.cells = cells
    quota_init(&d.quota, super, limit_bytes, cells)
    lock_init(&d.lock)
    if ring_make(&d.ring, fd) or segments_make(&d.segments, disk_bytes):
        disk_discard(&d.face)
        return NULL
    cells[C_DISK_WRITING_SINCE_US] = 0
    cells[C_DISK_SEGMENTS] = d.segments.count - 1
    d.face.name = b"disk"
    d.face.put = disk_put
    d.face.get = disk_get
    d.face.drop = disk_drop
    d.face.adopt = disk_adopt
    d.face.adopted = disk_adopted
    d.face.holds = disk_holds
    d.face.takes = disk_takes
    d.face.has_room = disk_has_room
    d.face.resort = disk_resort
    d.face.resorted = disk_resorted
    d.face.tick = disk_tick
    d.face.reason = disk_reason
    return &d.face
