"""The disk tier: compressed pages back to back in large sequential segments.

    byte 0         1 MiB                       2 MiB
    +--------------+---------------------------+----------------- - -
    | header block | object object ... |pad|.. | segment 2
    +--------------+---------------------------+----------------- - -
    object = header + blob, plain or encrypted, aligned to 8 (diskobject.pyx)

Pages go down as they are, without decompression, gathered into writes of up to a
whole segment (O_DIRECT where the file allows it), each padded to a block.  A `where` is
the byte offset of the object, and in its low bits how it is encrypted.

A segment's live bytes are counted exactly: added when an object is gathered,
taken off when the index lets go of it.  A full segment with nothing alive is free,
and punched unless its room was promised (preallocated).  One with little left is
read whole and its living objects are written anew (`resort`), while two segments
always stay free for that.

Failure: a write that fails marks its pages failed (they stay where they were), the
segment's tail unused, and the tier degraded; it is tried again after 0.1 s, then
twice as long each time, up to 10 s.  Reads go on meanwhile.  At the day's limit of
written bytes (quota.pyx) nothing is written, cleaning included; that is no failure.

Bounds: 8 bytes of memory for each MiB of disk, one buffer of 1 MiB.
Lock: `lock` (a leaf) guards the open segment and every change of a segment's state.
"""

from libc.errno cimport EDQUOT, EILSEQ, EINTR, EIO, ENOSPC, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.types cimport off_t

from zcache_core.cold cimport ColdPage, ColdTier
from zcache_core.counter_ids cimport (
    C_DISK_DEGRADED, C_DISK_ERRNO, C_DISK_LIVE_BYTES, C_DISK_PAGES, C_DISK_READ_ERRORS,
    C_DISK_SEGMENTS, C_DISK_SEGMENTS_USED, C_DISK_WRITE_ERRORS, C_DISK_WRITTEN_BYTES,
)
from zcache_core.crypt cimport CIPHER_NONE, CIPHERS, Crypt
from zcache_core.diskobject cimport (
    OBJECT_ALIGN, cipher_of, object_found, object_read, object_room, object_write, offset_of,
)
from zcache_core.layout cimport ST_DISK, Superblock, length_of
from zcache_core.native cimport zc_add32, zc_add64, zc_load32
from zcache_core.pthread cimport lock_init, lock_take, now_us, pthread_mutex_unlock
from zcache_core.quota cimport quota_allows, quota_count, quota_init, quota_is_used_up
from zcache_core.slots cimport IO_ROOM

cdef extern from "<fcntl.h>" nogil:
    enum: FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE
    int fallocate(int fd, int mode, off_t offset, off_t length)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t length, off_t offset)
    ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE

cdef enum:
    LEAST_WRITE_BYTES = 128 << 10   # with less left of a day's limit nothing is begun
    SPARE_SEGMENTS = 2          # never filled by put: resorting needs somewhere to write
    # Segments with more life than this are not worth reading: at 80 % full and uniform
    # random overwrites the emptiest segment has about 60 % (Rosenblum, LFS, 1991).
    # No less than 98: a promised disk (1.05 times the device) full of raw pages (4120 bytes
    # each) is 96 % alive, and must find something to clean nevertheless.
    RESORT_MOST_PERCENT = 98
    FIRST_RETRY_US = 100000
    LAST_RETRY_US = 10000000


cdef inline void come_alive(Disk *d, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef uint32_t room = object_room(cipher_of(where), length_bytes)
    zc_add32(&d.segment[where // SEGMENT_BYTES].live_bytes, room)
    zc_add64(&d.cells[C_DISK_PAGES], 1)
    zc_add64(&d.cells[C_DISK_LIVE_BYTES], room)


cdef inline uint32_t blocks_up(uint32_t n) noexcept nogil:
    return (n + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


# ---- input and output -----------------------------------------------------------------

cdef int write_all(int fd, const uint8_t *data, uint64_t length, uint64_t offset) noexcept nogil:
    """0 or an errno; a short write that does not go on is EIO."""
    cdef ssize_t n
    while length:
        n = pwrite(fd, data, length, <off_t>offset)
        if n < 0:
            if errno == EINTR:
                continue
            return errno
        if n == 0 or n % BLOCK_BYTES and <uint64_t>n != length:
            return EIO
        data += n
        offset += <uint64_t>n
        length -= <uint64_t>n
    return 0


cdef int read_all(int fd, uint8_t *data, uint64_t length, uint64_t offset) noexcept nogil:
    """0 or an errno; the end of the file inside the range is EIO."""
    cdef ssize_t n
    while length:
        n = pread(fd, data, length, <off_t>offset)
        if n < 0:
            if errno == EINTR:
                continue
            return errno
        if n == 0:
            return EIO
        data += n
        offset += <uint64_t>n
        length -= <uint64_t>n
    return 0


# ---- segments: lock held -----------------------------------------------------------------

cdef void publish(Disk *d) noexcept nogil:
    d.cells[C_DISK_SEGMENTS_USED] = d.segments - 1 - d.free_segments


cdef bint open_next(Disk *d, uint32_t keep_free) noexcept nogil:
    """Open an empty segment, leaving `keep_free` of them; False when there is none."""
    cdef uint32_t i, at
    if d.free_segments <= keep_free:
        return False
    for i in range(d.segments):
        at = (d.next_free + i) % d.segments
        if at and d.segment[at].state == SEG_FREE:
            d.segment[at].state = SEG_OPEN
            d.free_segments -= 1
            d.open_segment = at
            d.fill_bytes = 0
            d.next_free = at + 1
            return True
    return False


cdef void close_open(Disk *d) noexcept nogil:
    if d.open_segment:
        d.segment[d.open_segment].state = SEG_FULL
        d.open_segment = 0


cdef void note_failure(Disk *d, int error) noexcept nogil:
    if error:
        d.cells[C_DISK_WRITE_ERRORS] += 1
        d.retry_wait_us = min(<int64_t>LAST_RETRY_US, max(<int64_t>FIRST_RETRY_US, 2 * d.retry_wait_us))
        d.retry_at_us = now_us() + d.retry_wait_us
    else:
        d.retry_wait_us = 0
    d.failing = error
    d.cells[C_DISK_DEGRADED] = error != 0
    d.cells[C_DISK_ERRNO] = <uint64_t>error


# ---- put -------------------------------------------------------------------------------------

cdef void give_up(Disk *d, ColdPage *pages, uint32_t first, uint32_t end, int error, bint counted) noexcept nogil:
    cdef uint32_t i
    for i in range(first, end):
        if counted and pages[i].error == 0:
            disk_drop(&d.face, pages[i].where, length_of(pages[i].length_codec))
        pages[i].error = error


cdef bint flush(Disk *d, ColdPage *pages, uint32_t first, uint32_t end, uint32_t filled) noexcept nogil:
    """Write what is gathered (pages first .. end - 1) behind the open segment's content."""
    cdef uint32_t length = blocks_up(filled)
    cdef int error
    if filled == 0:
        return True
    if not quota_allows(&d.quota, length):
        give_up(d, pages, first, end, EDQUOT, True)
        return False
    memset(d.buffer + filled, 0, length - filled)
    quota_count(&d.quota, length)
    error = write_all(d.fd, d.buffer, length, <uint64_t>d.open_segment * SEGMENT_BYTES + d.fill_bytes)
    lock_take(&d.lock)
    note_failure(d, error)
    d.fill_bytes += length
    if error:
        close_open(d)           # what reached the medium is unknown: never written again
    else:
        d.cells[C_DISK_WRITTEN_BYTES] += length
    pthread_mutex_unlock(&d.lock)
    if error:
        give_up(d, pages, first, end, error, True)
    return error == 0


cdef bint turn_over(Disk *d) noexcept nogil:
    """Close the open segment and open another; False when the disk is full."""
    cdef bint good
    lock_take(&d.lock)
    close_open(d)
    good = open_next(d, 0 if d.resorting else SPARE_SEGMENTS)
    pthread_mutex_unlock(&d.lock)
    return good


cdef bint gather(Disk *d, ColdPage *page, uint32_t filled) noexcept nogil:
    """Copy one object to the buffer and count it live; False when it cannot be encrypted."""
    if not object_write(&d.whose, d.buffer + filled, page):
        return False
    page.where = (<uint64_t>d.open_segment * SEGMENT_BYTES + d.fill_bytes + filled) | d.whose.cipher
    page.error = 0
    come_alive(d, page.where, length_of(page.length_codec))
    return True


cdef inline bint must_wait(Disk *d) noexcept nogil:
    return d.failing and now_us() < d.retry_at_us


cdef uint32_t disk_put(ColdTier *tier, ColdPage *pages, uint32_t n) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint32_t i = 0
    cdef uint32_t first = 0
    cdef uint32_t filled = 0
    cdef uint32_t good = 0
    cdef uint32_t room
    if must_wait(d):
        give_up(d, pages, 0, n, d.failing, False)
        return 0
    while i < n:
        room = object_room(d.whose.cipher, length_of(pages[i].length_codec))
        if d.open_segment == 0 or blocks_up(d.fill_bytes + filled + room) > SEGMENT_BYTES:
            if not flush(d, pages, first, i, filled):
                give_up(d, pages, i, n, d.failing or EDQUOT, False)
                break
            first = i
            filled = 0
            if not turn_over(d):
                give_up(d, pages, i, n, ENOSPC, False)
                break
        if gather(d, &pages[i], filled):
            filled += room
        else:
            pages[i].error = EIO
        i += 1
    else:
        flush(d, pages, first, n, filled)
    for i in range(n):
        good += pages[i].error == 0
    lock_take(&d.lock)
    publish(d)
    pthread_mutex_unlock(&d.lock)
    return good


# ---- get and drop ------------------------------------------------------------------------------

cdef int disk_get(ColdTier *tier, ColdPage *page, uint8_t *io) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t offset = offset_of(page.where)
    cdef uint64_t start = offset // BLOCK_BYTES * BLOCK_BYTES
    cdef uint64_t end = offset + object_room(cipher_of(page.where), length_of(page.length_codec))
    end = (end + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    if end > <uint64_t>d.segments * SEGMENT_BYTES or end - start > IO_ROOM:
        return EILSEQ
    if read_all(d.fd, io, end - start, start):
        return EIO
    return object_read(&d.whose, io + (offset - start), page)


cdef void disk_drop(ColdTier *tier, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t number = where // SEGMENT_BYTES
    cdef uint32_t room = object_room(cipher_of(where), length_bytes)
    if number < d.segments:
        zc_add64(&d.cells[C_DISK_PAGES], <uint64_t>-1)
        zc_add64(&d.cells[C_DISK_LIVE_BYTES], <uint64_t>-<int64_t>room)
        zc_add32(&d.segment[number].live_bytes, <uint32_t>-<int>room)


cdef bint disk_adopt(ColdTier *tier, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t number = where // SEGMENT_BYTES
    cdef uint64_t last = (offset_of(where) + object_room(cipher_of(where), length_bytes) - 1) // SEGMENT_BYTES
    if number == 0 or number >= d.segments or last != number or cipher_of(where) >= CIPHERS:
        return False
    if d.segment[number].state == SEG_FREE:
        d.segment[number].state = SEG_FULL
        d.free_segments -= 1
    come_alive(d, where, length_bytes)
    return True


cdef void disk_adopted(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    lock_take(&d.lock)
    publish(d)
    pthread_mutex_unlock(&d.lock)


cdef bint disk_takes(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    return not must_wait(d) and quota_allows(&d.quota, LEAST_WRITE_BYTES)


cdef bint disk_has_room(ColdTier *tier, uint64_t bytes) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t room
    lock_take(&d.lock)
    room = 0 if d.free_segments <= SPARE_SEGMENTS else <uint64_t>(d.free_segments - SPARE_SEGMENTS) * SEGMENT_BYTES
    if d.open_segment:
        room += SEGMENT_BYTES - d.fill_bytes
    pthread_mutex_unlock(&d.lock)
    return room >= bytes


# ---- background ----------------------------------------------------------------------------------

cdef inline bint is_full(uint32_t state) noexcept nogil:
    return state == SEG_FULL or state == SEG_TRIED


cdef void free_empty(Disk *d) noexcept nogil:
    """Full segments with nothing alive are free again; punched first unless promised.

    A reader may still read there: what it gets does not match its entry any more.
    """
    cdef uint32_t i
    for i in range(1, d.segments):
        if not is_full(zc_load32(&d.segment[i].state)) or zc_load32(&d.segment[i].live_bytes):
            continue
        if not d.preallocated:
            fallocate(d.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <off_t>i * SEGMENT_BYTES, SEGMENT_BYTES)
        lock_take(&d.lock)
        d.segment[i].state = SEG_FREE
        d.free_segments += 1
        pthread_mutex_unlock(&d.lock)


cdef void disk_tick(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    free_empty(d)
    quota_allows(&d.quota, LEAST_WRITE_BYTES)
    lock_take(&d.lock)
    publish(d)
    pthread_mutex_unlock(&d.lock)


cdef uint32_t pick_resort(Disk *d) noexcept nogil:
    """The full segment with least alive, 0 when none is worth it.

    One that cleaning could not empty (damage, a failing disk) waits until all others had
    their turn, so that it never keeps them from theirs.
    """
    cdef uint32_t i, live
    cdef uint32_t best = 0
    cdef uint32_t least = SEGMENT_BYTES // 100 * RESORT_MOST_PERCENT
    for i in range(1, d.segments):
        if d.segment[i].state == SEG_FULL:
            live = zc_load32(&d.segment[i].live_bytes)
            if live < least:
                best = i
                least = live
    if best == 0:
        for i in range(1, d.segments):
            if d.segment[i].state == SEG_TRIED:
                d.segment[i].state = SEG_FULL
    return best


cdef uint32_t disk_resort(ColdTier *tier, ColdPage *pages, uint32_t most, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    """Objects of the emptiest segment, whatever the index says of them; blobs lie in `room`."""
    cdef Disk *d = <Disk *>tier
    cdef uint32_t number, n, at
    if room_bytes < SEGMENT_BYTES or not disk_takes(tier):
        return 0
    lock_take(&d.lock)
    number = pick_resort(d)
    if number:
        d.segment[number].state = SEG_RESORT
        d.resorting = number
    pthread_mutex_unlock(&d.lock)
    if number == 0:
        return 0
    if read_all(d.fd, room, SEGMENT_BYTES, <uint64_t>number * SEGMENT_BYTES):
        zc_add64(&d.cells[C_DISK_READ_ERRORS], 1)
        disk_resorted(tier)
        return 0
    n = at = 0
    while n < most and at < SEGMENT_BYTES:
        if object_found(&d.whose, room + at, SEGMENT_BYTES - at, <uint64_t>number * SEGMENT_BYTES + at, &pages[n]):
            at += object_room(cipher_of(pages[n].where), length_of(pages[n].length_codec))
            n += 1
        else:
            at += OBJECT_ALIGN      # padding, or damage: the next object is somewhere behind
    if n == 0:
        disk_resorted(tier)
    return n


cdef void disk_resorted(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    lock_take(&d.lock)
    if d.resorting:
        d.segment[d.resorting].state = SEG_TRIED if zc_load32(&d.segment[d.resorting].live_bytes) else SEG_FULL
        d.resorting = 0
    pthread_mutex_unlock(&d.lock)


cdef int disk_reason(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    return d.failing or (EDQUOT if quota_is_used_up(&d.quota) else 0)


cdef uint64_t disk_memory_bytes(ColdTier *tier) noexcept nogil:
    return SEGMENT_BYTES + (<Disk *>tier).segments * <uint64_t>sizeof(Segment)


cdef void disk_discard(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    if d.buffer != NULL and <void *>d.buffer != MAP_FAILED:
        munmap(d.buffer, SEGMENT_BYTES)
    free(d.segment)
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
    d.whose.epoch = super.epoch
    d.whose.device = device
    d.whose.crypt = crypt
    d.whose.cipher = crypt.cipher if encrypt and crypt != NULL else <uint32_t>CIPHER_NONE
    d.preallocated = preallocated
    d.cells = cells
    d.segments = <uint32_t>(disk_bytes // SEGMENT_BYTES)
    d.free_segments = d.segments - 1
    d.next_free = 1
    d.segment = <Segment *>calloc(d.segments, sizeof(Segment))
    d.buffer = <uint8_t *>mmap(
        NULL, SEGMENT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0
    )
    quota_init(&d.quota, super, limit_bytes, cells)
    lock_init(&d.lock)
    if d.segment == NULL or <void *>d.buffer == MAP_FAILED:
        disk_discard(&d.face)
        return NULL
    cells[C_DISK_SEGMENTS] = d.segments - 1
    d.face.name = b"disk"
    d.face.state = ST_DISK
    d.face.put = disk_put
    d.face.get = disk_get
    d.face.drop = disk_drop
    d.face.adopt = disk_adopt
    d.face.adopted = disk_adopted
    d.face.takes = disk_takes
    d.face.has_room = disk_has_room
    d.face.resort = disk_resort
    d.face.resorted = disk_resorted
    d.face.tick = disk_tick
    d.face.reason = disk_reason
    return &d.face
