"""Writing to the disk: a batch of pages into segments, in few large writes.

    pages -> objects behind one another -> segment full -> neighbour free? same write, up to 1 MiB
                                                        -> else send it, and open another
    what is left for a part of a segment: held back, unless the batch is smaller than one

Nothing is known to be written before the batch ends: then all of its writes are done, and the
pages of one that failed are failed.  What a failed write leaves is never written to again before
it was free once more.

Failure: the tier is degraded, and tried again after 0.1 s, then twice as long each time, up to
10 s.  So it is when the file was removed or cut short, which is looked at before each batch; a
file that was cut short is made as long as it was, when it is tried again and what RAM had too is
there alone (eviction.pyx): till then its length tells every next server of the cut.

Bounds: two buffers of 1 MiB.  One thread; it holds the disk's lock for moments only.
"""

from libc.errno cimport EAGAIN, EDQUOT, EIO, ENODATA, ENOENT, ENOSPC
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from zcache_core.cold cimport ColdPage, ColdTier
from zcache_core.counter_ids cimport (
    C_DISK_CLEANED_BYTES, C_DISK_DEGRADED, C_DISK_ERRNO, C_DISK_LIVE_BYTES, C_DISK_PAGES, C_DISK_SEGMENTS_USED,
    C_DISK_WRITE_ERRORS, C_DISK_WRITES, C_DISK_WRITING_SINCE_US, C_DISK_WRITTEN_BYTES, H_WRITEBACK,
)
from zcache_core.diskio cimport (
    BLOCK_BYTES, WRITE_BYTES, WRITE_DONE, WRITE_IDLE, WRITES, Write, medium_bytes, medium_error, medium_mend, ring_idle,
    ring_send, ring_wait,
)
from zcache_core.diskobject cimport cipher_of, object_room, object_write
from zcache_core.diskstate cimport DISK_WHOLE, SPARE_SEGMENTS, Disk, Log
from zcache_core.layout cimport length_of
from zcache_core.native cimport zc_add32, zc_add64
from zcache_core.pthread cimport lock_take, now_us, pthread_mutex_unlock
from zcache_core.quota cimport quota_allows, quota_count
from zcache_core.segments cimport (
    SEGMENT_BYTES, segments_close, segments_died, segments_doubt, segments_give_back, segments_open,
)
from zcache_core.slots cimport observe_shared

cdef enum:
    FIRST_RETRY_US = 100000
    LAST_RETRY_US = 10000000

ctypedef struct Batch:          # one put under way
    ColdPage *pages
    uint32_t n
    Log *log
    Write *w                    # being filled, or NULL
    uint32_t filled             # of its buffer
    bint filled_one             # a whole segment: what does not fill another waits
    uint32_t opened_at          # page with which the open segment began in this put ...
    uint32_t opened_filled      # ... and where in the buffer; opened_at == n: it was open before
    int refused                 # why no more is taken


cdef inline uint32_t blocks_up(uint32_t n) noexcept nogil:
    return (n + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


# ---- what is alive --------------------------------------------------------------------------

cdef void come_alive(Disk *d, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef uint32_t room = object_room(cipher_of(where), length_bytes)
    zc_add32(&d.segments.at[where // SEGMENT_BYTES].live_bytes, room)
    zc_add64(&d.cells[C_DISK_PAGES], 1)
    zc_add64(&d.cells[C_DISK_LIVE_BYTES], room)


cdef void disk_drop(ColdTier *tier, const ColdPage *page) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef uint64_t number = page.where // SEGMENT_BYTES
    cdef uint32_t room = object_room(cipher_of(page.where), length_of(page.length_codec))
    if number < d.segments.count:
        zc_add64(&d.cells[C_DISK_PAGES], <uint64_t>-1)
        zc_add64(&d.cells[C_DISK_LIVE_BYTES], <uint64_t>-<int64_t>room)
        segments_died(&d.segments, <uint32_t>number, room)


cdef void publish(Disk *d) noexcept nogil:
    lock_take(&d.lock)
    d.cells[C_DISK_SEGMENTS_USED] = d.segments.count - 1 - d.segments.free_count
    pthread_mutex_unlock(&d.lock)


# ---- well or not ----------------------------------------------------------------------------

cdef void note_failure(Disk *d, int error) noexcept nogil:
    """0: well."""
    if error:
        d.retry_wait_us = min(<int64_t>LAST_RETRY_US, max(<int64_t>FIRST_RETRY_US, 2 * d.retry_wait_us))
        d.retry_at_us = now_us() + d.retry_wait_us
    else:
        d.retry_wait_us = 0
    d.failing = error
    d.cells[C_DISK_DEGRADED] = error != 0
    d.cells[C_DISK_ERRNO] = <uint64_t>error


cdef bint must_wait(Disk *d) noexcept nogil:
    return d.failing and now_us() < d.retry_at_us


cdef void note_cut(Disk *d, uint64_t bytes) noexcept nogil:
    """The file has only so many bytes: no copy that is there now is counted on, also when it is long again.

    Not those before its end either: a write under way may have made it longer, over a hole.
    """
    cdef uint32_t i
    if bytes >= d.cut_bytes:
        return
    d.cut_bytes = bytes
    lock_take(&d.lock)
    segments_doubt(&d.segments)
    for i in range(2):          # what is written from now on goes elsewhere
        if d.log[i].segment:
            segments_close(&d.segments, d.log[i].segment)
            d.log[i].segment = 0
    pthread_mutex_unlock(&d.lock)


cdef bint must_keep(const Disk *d) noexcept nogil:
    """Whether the index may still count on copies that were cut off: the next server would do so, too."""
    return d.keep_first and d.cut_bytes < d.kept_bytes


cdef bint disk_takes(ColdTier *tier) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef int error
    if must_wait(d):
        return False
    d.cells[C_DISK_WRITING_SINCE_US] = <uint64_t>now_us()      # a disk that hangs may do so here
    error = medium_error(d.fd, d.bytes)
    d.cells[C_DISK_WRITING_SINCE_US] = 0
    if error == ENODATA:
        note_cut(d, medium_bytes(d.fd))
    if error == 0 and must_keep(d):
        error = ENODATA             # somebody else made it long
    if error == ENODATA and d.failing == ENODATA and not must_keep(d) and medium_mend(d.fd, d.bytes, d.preallocated) == 0:
        error = 0
    if error == 0:
        d.cut_bytes = d.kept_bytes = DISK_WHOLE
    if must_keep(d):
        d.retry_wait_us = 0         # its end is near, and no attempt of the disk's
    if error or d.failing == ENOENT or d.failing == ENODATA:
        note_failure(d, error)
    return error == 0 and quota_allows(&d.quota, WRITE_BYTES)


# ---- a batch --------------------------------------------------------------------------------

cdef void give_up(Disk *d, ColdPage *pages, uint32_t first, uint32_t end, int error, bint counted) noexcept nogil:
    cdef uint32_t i
    for i in range(first, end):
        if counted and pages[i].error == 0:
            disk_drop(&d.face, &pages[i])
        pages[i].error = error


cdef void look_at_done(Disk *d, Batch *b) noexcept nogil:
    """Take note of writes that are done; a failed one's pages are where they were."""
    cdef uint32_t i
    cdef Write *w
    for i in range(WRITES):
        w = &d.ring.write[i]
        if w.state != WRITE_DONE:
            continue
        w.state = WRITE_IDLE
        if b.refused == 0:          # one failure of a batch is one, however many of its writes fail
            note_failure(d, w.error)
        if w.error:
            d.cells[C_DISK_WRITE_ERRORS] += 1
            b.refused = w.error
            give_up(d, b.pages, w.first, w.end, w.error, True)
            lock_take(&d.lock)
            if b.log.segment:       # what reached the medium is unknown: never written again
                segments_close(&d.segments, b.log.segment)
                b.log.segment = 0
            pthread_mutex_unlock(&d.lock)
        else:
            d.cells[C_DISK_WRITES] += 1
            d.cells[C_DISK_WRITTEN_BYTES] += w.length_bytes
            if d.resorting_count:
                d.cells[C_DISK_CLEANED_BYTES] += w.length_bytes


cdef void send(Disk *d, Batch *b, uint32_t end) noexcept nogil:
    """Have what is gathered written: pages up to `end`."""
    cdef uint32_t length = blocks_up(b.filled)
    cdef Write *w = b.w
    b.w = NULL
    if b.filled == 0:
        return
    w.end = end
    if not quota_allows(&d.quota, length):
        give_up(d, b.pages, w.first, end, EDQUOT, True)
        b.refused = EDQUOT
        return
    memset(w.buffer + b.filled, 0, length - b.filled)
    w.length_bytes = length
    quota_count(&d.quota, length)
    ring_send(&d.ring, w)


cdef bint begin(Disk *d, Batch *b, uint32_t page) noexcept nogil:
    """A buffer for what comes behind the log's end; False when nothing can be written."""
    while b.refused == 0:
        look_at_done(d, b)
        b.w = ring_idle(&d.ring)
        if b.w != NULL or b.refused:
            break
        ring_wait(&d.ring)
    if b.refused:
        b.w = NULL
        return False
    if b.log.segment == 0 and not open_another(d, b, 0, page, 0):
        b.w = NULL
        b.refused = ENOSPC
        return False
    b.filled = 0
    b.w.first = page
    b.w.offset = <uint64_t>b.log.segment * SEGMENT_BYTES + b.log.fill_bytes
    return True


cdef bint open_another(Disk *d, Batch *b, uint32_t wanted, uint32_t page, uint32_t filled) noexcept nogil:
    """Open a segment for the log, `wanted` or (0) any; it begins with that page of the batch."""
    cdef uint32_t number
    lock_take(&d.lock)
    number = segments_open(&d.segments, wanted, 0 if d.resorting_count else SPARE_SEGMENTS)
    if number:
        b.log.segment = number
        b.log.fill_bytes = 0
        b.opened_at = page
        b.opened_filled = filled
    pthread_mutex_unlock(&d.lock)
    return number != 0


cdef void turn_over(Disk *d, Batch *b, uint32_t page) noexcept nogil:
    """The open segment is full: go on in its neighbour, in the same write, or send what there is."""
    cdef uint32_t number = b.log.segment
    cdef uint32_t rest = SEGMENT_BYTES - b.log.fill_bytes
    lock_take(&d.lock)
    segments_close(&d.segments, number)
    b.log.segment = 0
    pthread_mutex_unlock(&d.lock)
    b.filled_one = True
    if b.w == NULL:
        return
    if b.filled + rest + SEGMENT_BYTES <= WRITE_BYTES and open_another(d, b, number + 1, page, b.filled + rest):
        memset(b.w.buffer + b.filled, 0, rest)
        b.filled += rest
    else:
        send(d, b, page)


cdef uint32_t hold_back(Disk *d, Batch *b, uint32_t end) noexcept nogil:
    """Pages of a segment that is not full, while another was filled, wait; the new end."""
    cdef uint32_t i
    if not b.filled_one or b.opened_at == 0 or b.opened_at >= end or b.log.segment == 0:
        return end
    for i in range(b.opened_at, end):
        if b.pages[i].error == 0:
            disk_drop(&d.face, &b.pages[i])
        b.pages[i].error = EAGAIN
    lock_take(&d.lock)
    segments_give_back(&d.segments, b.log.segment)
    b.log.segment = 0
    pthread_mutex_unlock(&d.lock)
    b.filled = b.opened_filled
    d.held_back = True
    return b.opened_at


cdef uint32_t gather(Disk *d, Batch *b) noexcept nogil:
    """Copy objects into buffers, and send those; how many pages of the batch were taken."""
    cdef uint32_t i = 0
    cdef uint32_t room
    cdef ColdPage *page
    while i < b.n:
        page = &b.pages[i]
        room = object_room(d.whose.cipher, length_of(page.length_codec))
        if b.log.segment and b.log.fill_bytes + room > SEGMENT_BYTES:
            turn_over(d, b, i)
        if b.w == NULL and not begin(d, b, i):
            break
        if not object_write(&d.whose, b.w.buffer + b.filled, page):
            page.error = EIO
        else:
            page.where = (<uint64_t>b.log.segment * SEGMENT_BYTES + b.log.fill_bytes) | d.whose.cipher
            page.error = 0
            come_alive(d, page.where, length_of(page.length_codec))
            b.filled += room
            b.log.fill_bytes += room
        i += 1
    return i


cdef uint32_t disk_put(ColdTier *tier, ColdPage *pages, uint32_t n) noexcept nogil:
    cdef Disk *d = <Disk *>tier
    cdef Batch b
    cdef uint32_t i, end
    cdef uint32_t good = 0
    cdef int64_t began_us
    memset(&b, 0, sizeof(Batch))
    b.pages, b.n, b.opened_at = pages, n, n
    b.log = &d.log[1 if d.resorting_count else 0]
    if not disk_takes(tier):
        b.refused = d.failing or EDQUOT
    d.held_back = False
    began_us = now_us()
    d.cells[C_DISK_WRITING_SINCE_US] = <uint64_t>began_us
    for i in range(n):
        pages[i].error = EIO
    end = gather(d, &b) if b.refused == 0 else 0
    if b.w != NULL:
        end = hold_back(d, &b, end)
        b.log.fill_bytes = blocks_up(b.log.fill_bytes)
        send(d, &b, end)
    while writes_left(d):
        ring_wait(&d.ring)
        look_at_done(d, &b)
    d.cells[C_DISK_WRITING_SINCE_US] = 0
    observe_shared(d.cells, H_WRITEBACK, <uint64_t>(now_us() - began_us))
    for i in range(end, n):
        if pages[i].error == EIO and b.refused:
            pages[i].error = b.refused
    for i in range(n):
        good += pages[i].error == 0
    publish(d)
    return good


cdef bint writes_left(Disk *d) noexcept nogil:
    cdef uint32_t i
    for i in range(WRITES):
        if d.ring.write[i].state != WRITE_IDLE:
            return True
    return False
