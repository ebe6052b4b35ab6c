"""zbud: at most two buds in a frame, one from each end.

    chunk  0 1 2 ...                                              ... 62 63
           +-----------------+-----------------------+------------------+
           | first bud       |   free, one run       |         last bud |
           +-----------------+-----------------------+------------------+

A frame is 64 chunks of 64 bytes.  A frame with one bud stands on the unbuddied
list of its number of free chunks; a new bud goes to the frame that it fills best
(one look at a 64-bit map of the lists that are not empty), else it opens a frame.
A frame with two buds stands on the buddied list.  A raw page has a frame to
itself and stands on none.

Guarantees: constant time for every call; at most two pages in a frame, so that
freeing a frame never moves more than two pages; never more than 63 chunks for a
bud (a larger one leaves room for nobody and is cheaper raw).  What it cannot do:
hold more than two pages in a frame, however small they are.

State is two bytes per frame in the arena's table, and the list heads here.
Source: the idea is that of mm/zbud.c in Linux 3.11.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport (
    FRAME_TAKEN, NO_FRAME, Arena, Frame, arena_give, arena_take,
)
from zcache_core.committer cimport arena_adopt
from zcache_core.counter_ids cimport (
    C_BUDDIED_COUNT, C_EPH_PAGEFRAMES, C_EPH_PAGEFRAMES_MAX, C_EPH_ZBYTES, C_EPH_ZPAGES,
    C_EPH_ZPAGES_MAX, C_PERS_PAGEFRAMES, C_PERS_PAGEFRAMES_MAX, C_PERS_ZBYTES, C_PERS_ZBYTES_MAX,
    C_PERS_ZPAGES, C_PERS_ZPAGES_MAX, C_RAW_PAGES, C_UNBUDDIED_COUNT,
)
from zcache_core.layout cimport CHUNK_BYTES, HEADER_BYTES, NCHUNKS, PAGE_BYTES, PAGE_SHIFT
from zcache_core.native cimport zc_ctz64
from zcache_core.pthread cimport lock_init, lock_take, pthread_mutex_unlock

cdef enum:
    LARGEST_CHUNKS = NCHUNKS - 1
    FIRST = 1                   # bits of Frame.allocator_word: this bud is ephemeral
    LAST = 2
    BUDDIED = 0                 # list number; others are the free chunks of an unbuddied frame

ctypedef struct Zbud:
    Allocator face              # first: an Allocator * is a Zbud *
    uint32_t head[NCHUNKS]      # by free chunks, 1 to 63; BUDDIED
    uint64_t filled             # bit n: list n (1 to 63) is not empty


# ---- lists: lock held -------------------------------------------------------------

cdef inline uint32_t list_of(const Frame *f) noexcept nogil:
    if f.first_chunks and f.last_chunks:
        return BUDDIED
    return NCHUNKS - f.first_chunks - f.last_chunks


cdef void link_frame(Zbud *z, uint32_t frame) noexcept nogil:
    cdef Frame *frames = z.face.arena.frames
    cdef uint32_t which = list_of(&frames[frame])
    cdef uint32_t head = z.head[which]
    frames[frame].prev = NO_FRAME
    frames[frame].next = head
    if head != NO_FRAME:
        frames[head].prev = frame
    z.head[which] = frame
    if which == BUDDIED:
        z.face.cells[C_BUDDIED_COUNT] += 1
    else:
        z.filled |= <uint64_t>1 << which
        z.face.cells[C_UNBUDDIED_COUNT] += 1


cdef void unlink_frame(Zbud *z, uint32_t frame) noexcept nogil:
    cdef Frame *frames = z.face.arena.frames
    cdef Frame *f = &frames[frame]
    cdef uint32_t which = list_of(f)
    if f.prev != NO_FRAME:
        frames[f.prev].next = f.next
    else:
        z.head[which] = f.next
        if f.next == NO_FRAME and which != BUDDIED:
            z.filled &= ~(<uint64_t>1 << which)
    if f.next != NO_FRAME:
        frames[f.next].prev = f.prev
    if which == BUDDIED:
        z.face.cells[C_BUDDIED_COUNT] -= 1
    else:
        z.face.cells[C_UNBUDDIED_COUNT] -= 1


# ---- accounting: lock held ------------------------------------------------------------
# A frame counts as ephemeral when all of its objects are, else as persistent; so it
# leaves its class before a change and enters one after.

cdef inline uint32_t both_bits(const Frame *f) noexcept nogil:
    return (FIRST if f.first_chunks else 0) | (LAST if f.last_chunks else 0)


cdef inline void leave_class(Zbud *z, const Frame *f) noexcept nogil:
    if both_bits(f) == 0:
        return
    z.face.cells[C_EPH_PAGEFRAMES if f.allocator_word == both_bits(f) else C_PERS_PAGEFRAMES] -= 1


cdef inline void enter_class(Zbud *z, Frame *f) noexcept nogil:
    cdef uint32_t which, peak
    f.ephemeral_only = f.allocator_word == both_bits(f)
    which = C_EPH_PAGEFRAMES if f.ephemeral_only else C_PERS_PAGEFRAMES
    peak = C_EPH_PAGEFRAMES_MAX if f.ephemeral_only else C_PERS_PAGEFRAMES_MAX
    if both_bits(f) == 0:
        return
    z.face.cells[which] += 1
    z.face.cells[peak] = max(z.face.cells[peak], z.face.cells[which])


cdef inline void count_object(Zbud *z, uint32_t bytes, bint ephemeral, int change) noexcept nogil:
    cdef uint64_t *cells = z.face.cells
    cdef uint64_t length = bytes - HEADER_BYTES if bytes < PAGE_BYTES else PAGE_BYTES
    if ephemeral:
        cells[C_EPH_ZPAGES] += <uint64_t>change
        cells[C_EPH_ZBYTES] += <uint64_t>change * length
        cells[C_EPH_ZPAGES_MAX] = max(cells[C_EPH_ZPAGES_MAX], cells[C_EPH_ZPAGES])
    else:
        cells[C_PERS_ZPAGES] += <uint64_t>change
        cells[C_PERS_ZBYTES] += <uint64_t>change * length
        cells[C_PERS_ZPAGES_MAX] = max(cells[C_PERS_ZPAGES_MAX], cells[C_PERS_ZPAGES])
        cells[C_PERS_ZBYTES_MAX] = max(cells[C_PERS_ZBYTES_MAX], cells[C_PERS_ZBYTES])


cdef inline uint32_t bit_of(uint64_t where) noexcept nogil:
    return LAST if where & (PAGE_BYTES - 1) else FIRST


cdef inline uint32_t chunks_for(uint32_t bytes) noexcept nogil:
    return (bytes + CHUNK_BYTES - 1) // CHUNK_BYTES


# ---- the face ---------------------------------------------------------------------

cdef bint place_raw(Zbud *z, uint64_t *where) noexcept nogil:
    cdef uint32_t frame = arena_take(z.face.arena)
    if frame == NO_FRAME:
        return False
    z.face.arena.frames[frame].first_chunks = NCHUNKS
    z.face.arena.frames[frame].last_chunks = 0
    z.face.arena.frames[frame].allocator_word = 0
    z.face.arena.frames[frame].referenced = 0       # a frame for one page: it leaves early
    z.face.cells[C_RAW_PAGES] += 1
    enter_class(z, &z.face.arena.frames[frame])
    where[0] = <uint64_t>frame << PAGE_SHIFT
    return True


cdef bint place_bud(Zbud *z, uint32_t chunks, uint64_t *where) noexcept nogil:
    cdef uint64_t fitting = z.filled >> chunks << chunks
    cdef uint32_t frame
    cdef Frame *f
    if fitting:
        frame = z.head[zc_ctz64(fitting)]
        unlink_frame(z, frame)
        f = &z.face.arena.frames[frame]
    else:
        frame = arena_take(z.face.arena)
        if frame == NO_FRAME:
            return False
        f = &z.face.arena.frames[frame]
        f.first_chunks = f.last_chunks = 0
        f.allocator_word = 0
    leave_class(z, f)
    if f.first_chunks == 0:
        f.first_chunks = chunks
        where[0] = <uint64_t>frame << PAGE_SHIFT
    else:
        f.last_chunks = chunks
        where[0] = (<uint64_t>frame << PAGE_SHIFT) + (NCHUNKS - chunks) * CHUNK_BYTES
    f.referenced = 1
    enter_class(z, f)
    link_frame(z, frame)
    return True


cdef bint zbud_alloc(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef bint placed
    lock_take(&self.lock)
    if bytes == PAGE_BYTES:
        placed = place_raw(z, where)
    else:
        placed = place_bud(z, chunks_for(bytes), where)
    if placed:
        count_object(z, bytes, False, 1)
    pthread_mutex_unlock(&self.lock)
    return placed


cdef void zbud_release(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef uint32_t frame = <uint32_t>(where >> PAGE_SHIFT)
    cdef Frame *f = &self.arena.frames[frame]
    lock_take(&self.lock)
    leave_class(z, f)
    count_object(z, bytes, f.allocator_word & bit_of(where), -1)
    f.allocator_word &= ~bit_of(where)
    if bytes == PAGE_BYTES:
        self.cells[C_RAW_PAGES] -= 1
        f.first_chunks = 0
    else:
        unlink_frame(z, frame)
        if where & (PAGE_BYTES - 1):
            f.last_chunks = 0
        else:
            f.first_chunks = 0
    if f.first_chunks or f.last_chunks:
        enter_class(z, f)
        link_frame(z, frame)
    else:
        arena_give(self.arena, frame)
    pthread_mutex_unlock(&self.lock)


cdef void zbud_ephemeral(Allocator *self, uint64_t where, uint32_t bytes, int change) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef Frame *f = &self.arena.frames[where >> PAGE_SHIFT]
    leave_class(z, f)
    count_object(z, bytes, change < 0, -1)
    count_object(z, bytes, change > 0, 1)
    f.allocator_word ^= bit_of(where)
    enter_class(z, f)


cdef bint zbud_adopt(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    """Single-threaded, before anything is allocated: marks, and leaves the lists to `adopted`."""
    cdef Zbud *z = <Zbud *>self
    cdef uint64_t frame = where >> PAGE_SHIFT
    cdef uint32_t offset = where & (PAGE_BYTES - 1)
    cdef uint32_t chunks = chunks_for(bytes)
    cdef Frame *f
    if frame >= self.arena.total:
        return False
    f = &self.arena.frames[frame]
    if bytes == PAGE_BYTES:
        if offset or f.first_chunks or f.last_chunks:
            return False
        f.first_chunks = NCHUNKS
        self.cells[C_RAW_PAGES] += 1
    elif chunks > LARGEST_CHUNKS:
        return False
    elif offset == 0:
        if f.first_chunks or chunks + f.last_chunks > NCHUNKS:
            return False
        leave_class(z, f)
        f.first_chunks = chunks
    else:
        if f.last_chunks or chunks + f.first_chunks > NCHUNKS:
            return False
        if offset != (NCHUNKS - chunks) * CHUNK_BYTES:
            return False
        leave_class(z, f)
        f.last_chunks = chunks
    f.state = FRAME_TAKEN
    enter_class(z, f)
    count_object(z, bytes, False, 1)
    return True


cdef void zbud_adopted(Allocator *self) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef uint32_t frame
    cdef Frame *f
    arena_adopt(self.arena)
    lock_take(&self.lock)
    for frame in range(self.arena.total):
        f = &self.arena.frames[frame]
        if f.state == FRAME_TAKEN and f.first_chunks < NCHUNKS:
            link_frame(z, frame)
    pthread_mutex_unlock(&self.lock)


cdef uint32_t zbud_objects(
    Allocator *self, uint32_t frame, uint64_t *where, uint32_t *bytes, uint32_t most
) noexcept nogil:
    """Sizes are rounded up to chunks; the exact length is in each header."""
    cdef uint32_t n = 0
    cdef Frame *f = &self.arena.frames[frame]
    lock_take(&self.lock)
    if f.state == FRAME_TAKEN:
        if f.first_chunks and n < most:
            where[n] = <uint64_t>frame << PAGE_SHIFT
            bytes[n] = f.first_chunks * CHUNK_BYTES
            n += 1
        if f.last_chunks and n < most:
            where[n] = (<uint64_t>frame << PAGE_SHIFT) + (NCHUNKS - f.last_chunks) * CHUNK_BYTES
            bytes[n] = f.last_chunks * CHUNK_BYTES
            n += 1
    pthread_mutex_unlock(&self.lock)
    return n


cdef uint32_t zbud_check(Allocator *self) noexcept nogil:
    """Broken invariants: lists against frames, counters against both."""
    cdef Zbud *z = <Zbud *>self
    cdef Frame *frames = self.arena.frames
    cdef uint64_t in_lists = 0
    cdef uint64_t in_frames = 0
    cdef uint64_t pages = 0
    cdef uint64_t raw = 0
    cdef uint64_t ephemeral = 0
    cdef uint64_t ephemeral_frames = 0
    cdef uint32_t broken = 0
    cdef uint32_t which, frame
    lock_take(&self.lock)
    for which in range(NCHUNKS):
        frame = z.head[which]
        if which != BUDDIED and (frame != NO_FRAME) != ((z.filled >> which) & 1):
            broken += 1
        while frame != NO_FRAME:
            in_lists += 1
            if list_of(&frames[frame]) != which or frames[frame].state != FRAME_TAKEN:
                broken += 1
            if frames[frame].next != NO_FRAME and frames[frames[frame].next].prev != frame:
                broken += 1
            frame = frames[frame].next
    for frame in range(self.arena.total):
        if frames[frame].state == FRAME_TAKEN:
            if frames[frame].first_chunks == NCHUNKS:
                raw += 1
            else:
                in_frames += 1
            if frames[frame].first_chunks + frames[frame].last_chunks > NCHUNKS:
                broken += 1
            if not (frames[frame].first_chunks or frames[frame].last_chunks):
                broken += 1
            if frames[frame].allocator_word & ~both_bits(&frames[frame]):
                broken += 1
            ephemeral += (frames[frame].allocator_word & FIRST) + (frames[frame].allocator_word >> 1)
            ephemeral_frames += frames[frame].allocator_word == both_bits(&frames[frame])
            pages += (frames[frame].first_chunks > 0) + (frames[frame].last_chunks > 0)
    broken += in_lists != in_frames
    broken += raw != self.cells[C_RAW_PAGES]
    broken += raw + in_frames != self.cells[C_PERS_PAGEFRAMES] + self.cells[C_EPH_PAGEFRAMES]
    broken += ephemeral_frames != self.cells[C_EPH_PAGEFRAMES]
    broken += pages != self.cells[C_PERS_ZPAGES] + self.cells[C_EPH_ZPAGES]
    broken += ephemeral != self.cells[C_EPH_ZPAGES]
    broken += in_frames != self.cells[C_BUDDIED_COUNT] + self.cells[C_UNBUDDIED_COUNT]
    pthread_mutex_unlock(&self.lock)
    return broken


cdef void zbud_discard(Allocator *self) noexcept nogil:
    free(self)


cdef Allocator *zbud_make(Arena *arena, uint64_t *cells) noexcept nogil:
    """A zbud allocator on `arena`; NULL when there is no memory."""
    cdef Zbud *z = <Zbud *>calloc(1, sizeof(Zbud))
    cdef uint32_t i
    if z == NULL:
        return NULL
    z.face.name = b"zbud"
    z.face.arena = arena
    z.face.cells = cells
    z.face.largest_bytes = LARGEST_CHUNKS * CHUNK_BYTES
    lock_init(&z.face.lock)
    z.face.alloc = zbud_alloc
    z.face.release = zbud_release
    z.face.adopt = zbud_adopt
    z.face.adopted = zbud_adopted
    z.face.objects = zbud_objects
    z.face.ephemeral = zbud_ephemeral
    z.face.check = zbud_check
    z.face.discard = zbud_discard
    for i in range(NCHUNKS):
        z.head[i] = NO_FRAME
    return &z.face
