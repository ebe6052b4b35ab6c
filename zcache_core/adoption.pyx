"""Adopting the frames of a predecessor: which are free, and page tables for those in use.

The frames lie there as the predecessor left them: taken ones, its reserve, and what it was
writing when it died.  They have memory, but this process has no page tables for them.

    before requests may write    the index has said which frames are taken, the frame map says which
                                 of the others have memory: those are free.  One page of every
                                 2 MiB with any of either is touched, so that their tables are there
    behind, 1 MiB at a time      mapped, 16 pages a fault; nothing is punched until that is done

So a request may meet a page that is not mapped yet.  That costs it a minor fault (half a
microsecond), which neither waits nor needs memory: the page is there, locked, and so is the table
that it is put into.  Mapping all of it beforehand, under the lock, made the first write wait for
0.35 to 1 s for each GiB.

It was the kernel that was asked which frames have memory (mincore), behind, in the order of
their numbers.  A nearly full pool refused writes then, while its free frames were further on than
1.5 s; and the kernel takes a page of its own for each such answer, and more for page tables: in
a machine without memory the thread waited for reclaim, and reclaim for a swap write that only the
frames it was looking for could take.

Frames that are free keep their memory: on a machine without any, what is given up is not to be
had again.  Bound: about 5 ns a frame before requests may write.  What it is not: trust.  A damaged
map makes a free frame an uncommitted one, or one whose memory comes with its first write.
"""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.arena cimport (
    BATCH, FRAME_UNCOMMITTED, HELD_UNMAPPED, NO_FRAME, Arena, frame_address, frame_gets_memory,
    frame_has_memory, publish, push_free,
)
from zcache_core.counter_ids cimport C_COMMIT_FAILURES, C_UNSORTED_FRAMES
from zcache_core.layout cimport HEADER_BYTES, PAGE_BYTES, PAGE_SHIFT
from zcache_core.native cimport zc_store32
from zcache_core.pthread cimport (
    lock_take, pthread_cond_broadcast, pthread_cond_signal, pthread_mutex_unlock, sched_yield,
)

cdef extern from *:
    """
    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22       /* Linux 5.14 */
    #endif
    static void zc_look_at(volatile unsigned char *p) { (void)*p; }
    """
    void zc_look_at(uint8_t *p) nogil

cdef extern from "<sys/mman.h>" nogil:
    enum: MADV_POPULATE_READ
    int madvise(void *addr, size_t length, int advice)

cdef enum:
    TURN_FRAMES = 65536         # sorted with the lock held: 0.2 ms
    TABLE_SHIFT = 21            # address space of one page table: 512 pages (less elsewhere than x86-64: more faults)


cdef bint map_present(uint8_t *start, uint64_t length_bytes) noexcept nogil:
    """Put pages that are there into this process's page tables; False if they cannot be."""
    cdef uint64_t at = 0
    if madvise(start, length_bytes, MADV_POPULATE_READ) == 0:
        return True
    if errno != EINVAL:
        return False
    while at < length_bytes:        # before Linux 5.14
        zc_look_at(start + at)
        at += PAGE_BYTES
    return True


cdef bint map_frames(Arena *arena, uint32_t first, uint32_t n) noexcept nogil:
    """Frames [first, first + n), which have memory, and their headers."""
    cdef uint64_t head = <uint64_t>first * HEADER_BYTES // PAGE_BYTES * PAGE_BYTES
    cdef uint64_t tail = (<uint64_t>(first + n) * HEADER_BYTES + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    cdef bint good = map_present(<uint8_t *>arena.headers + head, tail - head)
    return map_present(frame_address(arena, first), <uint64_t>n << PAGE_SHIFT) and good


cdef void sort_frames(Arena *arena, uint32_t first, uint32_t n) noexcept nogil:
    """What is not taken of [first, first + n), on the free list or on the uncommitted one.  Lock held."""
    cdef uint32_t frame, i
    for i in range(n):
        frame = first + n - 1 - i       # so that the lists begin with the lowest numbers
        if arena.frames[frame].state != FRAME_UNCOMMITTED:
            frame_gets_memory(arena, frame)     # the index says so, whatever the map does
        elif frame_has_memory(arena, frame):
            push_free(arena, frame)
        else:
            arena.frames[frame].next = arena.bare_head
            arena.bare_head = frame
            continue
        arena.committed += 1


cdef void map_tables(Arena *arena) noexcept nogil:
    """Page tables for all frames that have memory: a table has the other 511 pages of its 2 MiB too."""
    cdef uint64_t table = 0         # the last one that is there
    cdef uint64_t address
    cdef uint32_t frame
    for frame in range(arena.total):
        address = <uint64_t>frame_address(arena, frame)
        if address >> TABLE_SHIFT != table and frame_has_memory(arena, frame):
            table = address >> TABLE_SHIFT
            map_frames(arena, frame, 1)


cdef void arena_adopt(Arena *arena) noexcept nogil:
    """A rebuild has marked the taken frames: find the free ones.  Then `arena_adopt_rest`."""
    cdef uint32_t end = arena.total
    cdef uint32_t n
    lock_take(&arena.lock)
    arena.bare_from = arena.total
    arena.bare_head = NO_FRAME
    arena.committed = 0
    while end:
        n = min(<uint32_t>TURN_FRAMES, end)
        end -= n
        sort_frames(arena, end, n)
        if end:
            pthread_mutex_unlock(&arena.lock)
            sched_yield()
            lock_take(&arena.lock)
    arena.cells[C_UNSORTED_FRAMES] = arena.total
    publish(arena)
    pthread_mutex_unlock(&arena.lock)
    map_tables(arena)
    lock_take(&arena.lock)
    zc_store32(&arena.held, HELD_UNMAPPED)
    pthread_cond_signal(&arena.work)
    pthread_cond_broadcast(&arena.room)
    pthread_mutex_unlock(&arena.lock)


cdef void map_range(Arena *arena, uint32_t first, uint32_t n) noexcept nogil:
    """Map those of [first, first + n) that have memory."""
    cdef uint32_t at = first
    cdef uint32_t run
    while at < first + n:
        run = 0
        while at + run < first + n and frame_has_memory(arena, at + run):
            run += 1
        if run and not map_frames(arena, at, run):
            arena.cells[C_COMMIT_FAILURES] += 1
        at += run + 1
    lock_take(&arena.lock)
    arena.cells[C_UNSORTED_FRAMES] -= n
    pthread_mutex_unlock(&arena.lock)


cdef void arena_adopt_rest(Arena *arena) noexcept nogil:
    """Map the frames that have memory.  Requests are served meanwhile."""
    cdef uint32_t first = 0
    while first < arena.total:
        map_range(arena, first, min(<uint32_t>BATCH, arena.total - first))
        first += BATCH
    lock_take(&arena.lock)
    zc_store32(&arena.held, 0)
    pthread_cond_signal(&arena.work)
    pthread_mutex_unlock(&arena.lock)
