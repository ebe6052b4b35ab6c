"""Reading ahead: pages that left together come back together, when they are read in order.

    reads of 7, 8, 9  ->  in order?  ->  the thread fetches 10 .. 17, ready for who asks
                                         and 18 .. 25 when 13 is read, and so on, longer

What is fetched ahead waits, compressed, in a small cache of its own, not in the pool: a
page that is never asked for must not displace one that is.  Of 16 pages, those that lie
close together below, because they left together, are fetched in one read.

Never at the cost of the page that is asked for: the thread is another, a full queue
drops what is new, and who wants a page that is just coming waits a moment for it and
then reads it himself.  Content cannot be stale: a page's version is its content's, and
blob and header are checked when used as any other.  Who came up meanwhile is read anew: it may
have been recompressed, and the dictionary of this blob be another one by now.

Bounds: 256 pages ready, 1.1 MiB; 16 stretches queued, of 32 pages at most.
Lock: `lock` (a leaf) guards all of it; held for one copy of a blob at most, never
across a read below.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport timespec

from zcache_core.core cimport arrivals_of
from zcache_core.counter_ids cimport (
    C_AHEAD_FAILED_PAGES, C_AHEAD_PAGES, C_AHEAD_USEFUL_PAGES, C_AHEAD_WASTED_PAGES,
)
from zcache_core.index cimport entry_load
from zcache_core.layout cimport (
    PAGE_BYTES, entry_is_sound, header_fill, header_matches, length_of, state_of, version_of, where_of,
)
from zcache_core.pthread cimport (
    at_us, cond_init, lock_init, lock_take, now_us, pthread_cond_broadcast, pthread_cond_signal,
    pthread_cond_timedwait, pthread_cond_wait, pthread_join, pthread_mutex_unlock, thread_start,
)
from zcache_core.ramtier cimport is_below
from zcache_core.slots cimport IO_ROOM, count

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE

cdef enum:
    IN_ORDER = 2                # so many pages after their neighbour before anything is fetched
    SKIP_MOST = 4               # pages in between may be in RAM: the stream goes on
    STRETCH_LEAST = 8           # pages; what one cluster of swap-in reads (vm.page-cluster=3)
    STRETCH_MOST = 32
    NEAR_BYTES = 64 * 1024      # pages that left together lie no farther from the first of them
    # Who wants a page that is just coming waits no longer: a read of a disk takes 0.1 ms and up
    WAIT_US = 500
    BLOBS = AHEAD_CELLS * PAGE_BYTES
    ROOM = 2 * NEAR_BYTES + IO_ROOM
    MEMORY = BLOBS + AHEAD_BATCH * PAGE_BYTES + ROOM


cdef bint ahead_make(Ahead *a, Core *core, ColdTier *cold, uint64_t *counters) noexcept nogil:
    """False: no memory."""
    memset(a, 0, sizeof(Ahead))
    a.core, a.cold, a.cells_counters = core, cold, counters
    a.memory = <uint8_t *>mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
    lock_init(&a.lock)
    cond_init(&a.work)
    cond_init(&a.done)
    return <void *>a.memory != MAP_FAILED


cdef void ahead_discard(Ahead *a) noexcept nogil:
    if a.memory != NULL and <void *>a.memory != MAP_FAILED:
        munmap(a.memory, MEMORY)
    a.memory = NULL


cdef inline uint8_t *blob_of(Ahead *a, const Cell *cell) noexcept nogil:
    return a.memory + (cell - &a.cell[0]) * PAGE_BYTES


cdef inline bint is_of(Ahead *a, const Cell *cell, uint64_t page, Entry e) noexcept nogil:
    """Whether the blob is, or will be, what the entry names.  Lock held."""
    return (
        cell.page == page and cell.version == version_of(e.version)
        and cell.arrivals == arrivals_of(a.core, page)
    )


# ---- what a read does ----------------------------------------------------------------------

cdef bint ahead_take(Ahead *a, Slot *slot, uint64_t page, Entry e) noexcept nogil:
    """The blob of the page of entry `e`, into the slot, if it is here or about to be."""
    cdef Cell *cell = &a.cell[page % AHEAD_CELLS]
    cdef BlobHeader header
    cdef timespec until
    cdef bint here
    if not a.running:
        return False
    lock_take(&a.lock)
    if cell.state == CELL_LOADING and is_of(a, cell, page, e):
        until = at_us(now_us() + WAIT_US)
        while cell.state == CELL_LOADING and cell.page == page:
            if pthread_cond_timedwait(&a.done, &a.lock, &until):
                break
    here = is_of(a, cell, page, e) and cell.state == CELL_READY
    if here:
        header = cell.header
        memcpy(slot.blob, blob_of(a, cell), length_of(e.location))
        cell.state = CELL_EMPTY
    pthread_mutex_unlock(&a.lock)
    if not here:
        return False
    if not header_matches(
        &header, version_of(e.version), a.core.device, <uint32_t>page, e.location, slot.blob
    ):
        return False
    count(slot, C_AHEAD_USEFUL_PAGES, 1)
    return True


cdef Stream *stream_of(Ahead *a, uint64_t page) noexcept nogil:
    """The stream that this page continues, or a new one in place of the oldest.  Lock held."""
    cdef Stream *oldest = &a.stream[0]
    cdef uint32_t i
    for i in range(AHEAD_STREAMS):
        if a.stream[i].next <= page and page < a.stream[i].next + SKIP_MOST and a.stream[i].turn:
            a.stream[i].run += 1
            return &a.stream[i]
        if a.stream[i].turn < oldest.turn:
            oldest = &a.stream[i]
    oldest.run = 0
    oldest.until = 0
    return oldest


cdef void ahead_note(Ahead *a, uint64_t page) noexcept nogil:
    """The page was read from below: have what follows fetched, if that looks right."""
    cdef Stream *s
    cdef uint64_t first, length
    if not a.running:
        return
    lock_take(&a.lock)
    s = stream_of(a, page)
    a.turns += 1
    s.turn = a.turns
    s.next = page + 1
    if s.run >= IN_ORDER and a.orders < AHEAD_ORDERS:
        length = min(<uint64_t>STRETCH_MOST, STRETCH_LEAST + <uint64_t>s.run // 2)
        first = max(s.until, s.next)
        if first < s.next + length // 2:
            s.until = min(first + length, a.core.index.pages)
            if first < s.until:
                a.order[a.orders].first, a.order[a.orders].end = <uint32_t>first, <uint32_t>s.until
                a.orders += 1
                pthread_cond_signal(&a.work)
    pthread_mutex_unlock(&a.lock)


# ---- the thread ------------------------------------------------------------------------------

cdef bint begin(Ahead *a, uint64_t page, Entry e, uint64_t arrivals) noexcept nogil:
    """Make the page's cell ready to be filled; False when the page is there already."""
    cdef Cell *cell = &a.cell[page % AHEAD_CELLS]
    cdef bint new
    lock_take(&a.lock)
    new = cell.state == CELL_EMPTY or not is_of(a, cell, page, e)
    if new:
        if cell.state == CELL_READY:
            a.cells_counters[C_AHEAD_WASTED_PAGES] += 1
        cell.state = CELL_LOADING
        cell.page = <uint32_t>page
        cell.version = version_of(e.version)
        cell.arrivals = arrivals
    pthread_mutex_unlock(&a.lock)
    return new


cdef void finish(Ahead *a, ColdPage *got) noexcept nogil:
    """What was fetched is ready, or was not to be had."""
    cdef Cell *cell = &a.cell[got.page % AHEAD_CELLS]
    cdef uint32_t length = length_of(got.length_codec)
    cdef BlobHeader header
    if got.error == 0:
        header_fill(&header, got.version, a.core.device, got.page, length, got.length_codec & 0xF, got.blob)
    lock_take(&a.lock)
    if got.error:
        cell.state = CELL_EMPTY
        a.cells_counters[C_AHEAD_FAILED_PAGES] += 1
    else:
        cell.header = header
        memcpy(blob_of(a, cell), got.blob, length)
        cell.state = CELL_READY
        a.cells_counters[C_AHEAD_PAGES] += 1
    pthread_cond_broadcast(&a.done)
    pthread_mutex_unlock(&a.lock)


cdef uint32_t gather(Ahead *a, Stretch *left) noexcept nogil:
    """The next batch of a stretch, which gets shorter by it; how many pages."""
    cdef uint32_t n = 0
    cdef uint32_t page
    cdef uint64_t arrivals
    cdef Entry e
    while left.first < left.end and n < AHEAD_BATCH:
        page = left.first
        left.first += 1
        arrivals = arrivals_of(a.core, page)
        e = entry_load(&a.core.index, page)
        if not entry_is_sound(e.location, e.version) or not is_below(state_of(e.version)):
            continue            # in RAM, or empty
        if not begin(a, page, e, arrivals):
            continue            # here already
        a.batch[n].page = page
        a.batch[n].version = version_of(e.version)
        a.batch[n].where = where_of(e.location)
        a.batch[n].length_codec = e.location & 0xFFFF
        a.batch[n].blob = a.memory + BLOBS + n * PAGE_BYTES
        n += 1
    return n


cdef uint32_t split_off(Ahead *a, uint32_t n, uint32_t *near) noexcept nogil:
    """Move the first of the batch and what lies near it to the group; how many are left."""
    cdef uint64_t first = a.batch[0].where
    cdef uint32_t left = 0
    cdef uint32_t i
    near[0] = 0
    for i in range(n):
        if a.batch[i].where <= first + NEAR_BYTES and first <= a.batch[i].where + NEAR_BYTES:
            a.group[near[0]] = a.batch[i]
            near[0] += 1
        else:
            a.batch[left] = a.batch[i]
            left += 1
    return left


cdef void fetch_stretch(Ahead *a, Stretch *stretch) noexcept nogil:
    cdef uint8_t *room = a.memory + BLOBS + AHEAD_BATCH * PAGE_BYTES
    cdef uint32_t left, near, i
    while stretch.first < stretch.end and not a.stopping:
        left = gather(a, stretch)
        while left:
            left = split_off(a, left, &near)
            if a.cold.get_many != NULL:
                a.cold.get_many(a.cold, a.group, near, room, ROOM)
            for i in range(near):
                if a.cold.get_many == NULL:
                    a.group[i].error = a.cold.get(a.cold, &a.group[i], room)
                finish(a, &a.group[i])


cdef void *ahead_thread(void *argument) noexcept nogil:
    cdef Ahead *a = <Ahead *>argument
    cdef Stretch stretch
    cdef uint32_t i
    lock_take(&a.lock)
    while not a.stopping:
        if a.orders == 0:
            pthread_cond_wait(&a.work, &a.lock)
            continue
        stretch = a.order[0]
        a.orders -= 1
        for i in range(a.orders):
            a.order[i] = a.order[i + 1]
        pthread_mutex_unlock(&a.lock)
        fetch_stretch(a, &stretch)
        lock_take(&a.lock)
    pthread_mutex_unlock(&a.lock)
    return NULL


cdef int ahead_start(Ahead *a) noexcept nogil:
    """0, or an errno."""
    cdef int error = thread_start(&a.thread, ahead_thread, a, b"zc-ahead")
    a.running = error == 0
    return error


cdef void ahead_stop(Ahead *a) noexcept nogil:
    if not a.running:
        return
    lock_take(&a.lock)
    a.running = False
    a.stopping = True
    pthread_cond_broadcast(&a.work)
    pthread_mutex_unlock(&a.lock)
    pthread_join(a.thread, NULL)
