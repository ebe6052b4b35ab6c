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

from zcache_core.accounting cimport count_object, enter_class, leave_class
from zcache_core.allocator cimport Allocator, Held, frame_open
from zcache_core.arena cimport (
    FRAME_TAKEN, FRAME_ZBUD, NO_FRAME, Arena, Frame, arena_give, arena_take,
)
from zcache_core.counter_ids cimport C_BUDDIED_COUNT, C_RAW_PAGES, C_UNBUDDIED_COUNT
from zcache_core.layout cimport CHUNK_BYTES, NCHUNKS, PAGE_BYTES, PAGE_SHIFT
from zcache_core.native cimport zc_ctz64
from zcache_core.pthread cimport lock_take, pthread_mutex_t, pthread_mutex_unlock

cdef enum:
    LARGEST_CHUNKS = NCHUNKS - 1
    FIRST = 1                   # bits of Frame.marks: this bud is ephemeral
    LAST = 2
    BUDDIED = 0                 # list number; others are the free chunks of an unbuddied frame

ctypedef struct Zbud:
    Allocator face              # first: an Allocator * is a Zbud *
    uint32_t head[NCHUNKS]      # by free chunks, 1 to 63; BUDDIED
    uint32_t lone               # frames with one bud
    uint32_t aside              # the frame that is being emptied, or NO_FRAME
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
    if which != BUDDIED:
        z.face.cells[C_UNBUDDIED_COUNT] += 1
        z.lone += 1
    else:
        z.face.cells[C_BUDDIED_COUNT] += 1
    if frame == z.aside:
        return
    frames[frame].prev = NO_FRAME
    frames[frame].next = head
    if head != NO_FRAME:
        frames[head].prev = frame
    z.head[which] = frame
    if which != BUDDIED:
        z.filled |= <uint64_t>1 << which


cdef void unlink_frame(Zbud *z, uint32_t frame) noexcept nogil:
    cdef Frame *frames = z.face.arena.frames
    cdef Frame *f = &frames[frame]
    cdef uint32_t which = list_of(f)
    if which != BUDDIED:
        z.face.cells[C_UNBUDDIED_COUNT] -= 1
        z.lone -= 1
    else:
        z.face.cells[C_BUDDIED_COUNT] -= 1
    if frame == z.aside:
        return
    if f.prev != NO_FRAME:
        frames[f.prev].next = f.next
    else:
        z.head[which] = f.next
        if f.next == NO_FRAME and which != BUDDIED:
            z.filled &= ~(<uint64_t>1 << which)
    if f.next != NO_FRAME:
        frames[f.next].prev = f.prev


# ---- accounting: lock held ------------------------------------------------------------

cdef inline uint32_t both_bits(const Frame *f) noexcept nogil:
    return (FIRST if f.first_chunks else 0) | (LAST if f.last_chunks else 0)


cdef inline void leave(Zbud *z, const Frame *f) noexcept nogil:
    if both_bits(f):
        leave_class(z.face.cells, 1, f.ephemeral_only)


cdef inline void enter(Zbud *z, Frame *f) noexcept nogil:
    if both_bits(f):
        f.ephemeral_only = f.marks == both_bits(f)
        enter_class(z.face.cells, 1, f.ephemeral_only)


cdef inline uint32_t bit_of(uint64_t where) noexcept nogil:
    return LAST if where & (PAGE_BYTES - 1) else FIRST


cdef inline uint32_t chunks_for(uint32_t bytes) noexcept nogil:
    return (bytes + CHUNK_BYTES - 1) // CHUNK_BYTES


# ---- the face ---------------------------------------------------------------------

cdef bint place_raw(Zbud *z, uint64_t *where) noexcept nogil:
    cdef uint32_t frame = arena_take(z.face.arena)
    if frame == NO_FRAME:
        return False
    z.face.arena.frames[frame].state = z.face.state
    z.face.arena.frames[frame].first_chunks = NCHUNKS
    z.face.arena.frames[frame].referenced = 0       # a frame for one page: it leaves early
    z.face.cells[C_RAW_PAGES] += 1
    enter(z, &z.face.arena.frames[frame])
    where[0] = <uint64_t>frame << PAGE_SHIFT
    return True


cdef bint place_bud(Zbud *z, uint32_t chunks, bint packed, uint64_t *where) noexcept nogil:
    """Room for one bud; `packed`: in a frame that holds another already."""
    cdef uint64_t fitting = z.filled >> chunks << chunks
    cdef uint32_t frame
    cdef Frame *f
    if fitting:
        frame = z.head[zc_ctz64(fitting)]
        unlink_frame(z, frame)
        f = &z.face.arena.frames[frame]
    else:
        frame = NO_FRAME if packed else arena_take(z.face.arena)
        if frame == NO_FRAME:
            return False
        f = frame_open(&z.face, frame)
    leave(z, f)
    if f.first_chunks == 0:
        f.first_chunks = chunks
        where[0] = <uint64_t>frame << PAGE_SHIFT
    else:
        f.last_chunks = chunks
        where[0] = (<uint64_t>frame << PAGE_SHIFT) + (NCHUNKS - chunks) * CHUNK_BYTES
    f.referenced = 1
    enter(z, f)
    link_frame(z, frame)
    return True


cdef bint zbud_alloc(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef bint placed
    lock_take(self.guard)
    if bytes == PAGE_BYTES:
        placed = place_raw(z, where)
    else:
        placed = place_bud(z, chunks_for(bytes), False, where)
    if placed:
        count_object(self.cells, bytes, False, 1)
    pthread_mutex_unlock(self.guard)
    return placed


cdef uint32_t zbud_room(Allocator *self, uint32_t bytes) noexcept nogil:
    return PAGE_BYTES if bytes > self.largest_bytes else chunks_for(bytes) * CHUNK_BYTES


cdef void zbud_release(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef uint32_t frame = <uint32_t>(where >> PAGE_SHIFT)
    cdef Frame *f = &self.arena.frames[frame]
    lock_take(self.guard)
    leave(z, f)
    count_object(self.cells, bytes, f.marks & bit_of(where), -1)
    f.marks &= ~bit_of(where)
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
        enter(z, f)
        link_frame(z, frame)
    else:
        if frame == z.aside:
            z.aside = NO_FRAME
        arena_give(self.arena, frame)
    pthread_mutex_unlock(self.guard)


cdef void zbud_ephemeral(Allocator *self, uint64_t where, uint32_t bytes, int change) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef Frame *f = &self.arena.frames[where >> PAGE_SHIFT]
    leave(z, f)
    count_object(self.cells, bytes, change < 0, -1)
    count_object(self.cells, bytes, change > 0, 1)
    f.marks ^= bit_of(where)
    enter(z, f)


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
    if f.state >= FRAME_TAKEN and f.state != self.state:
        return False
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
        leave(z, f)
        f.first_chunks = chunks
    else:
        if f.last_chunks or chunks + f.first_chunks > NCHUNKS:
            return False
        if offset != (NCHUNKS - chunks) * CHUNK_BYTES:
            return False
        leave(z, f)
        f.last_chunks = chunks
    f.state = self.state
    enter(z, f)
    count_object(self.cells, bytes, False, 1)
    return True


cdef void zbud_adopted(Allocator *self) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef uint32_t frame
    cdef Frame *f
    lock_take(self.guard)
    for frame in range(self.arena.total):
        f = &self.arena.frames[frame]
        if f.state == FRAME_ZBUD and f.first_chunks < NCHUNKS:
            link_frame(z, frame)
    pthread_mutex_unlock(self.guard)


# ---- emptying frames ------------------------------------------------------------------

cdef uint32_t zbud_spare(Allocator *self) noexcept nogil:
    """A guess: every second frame with one bud."""
    return (<Zbud *>self).lone // 2


cdef uint32_t zbud_thin(Allocator *self) noexcept nogil:
    """The frame with most room, if its buds have room in others."""
    cdef Zbud *z = <Zbud *>self
    cdef uint32_t frame = NO_FRAME
    cdef uint32_t which
    cdef Frame *f
    lock_take(self.guard)
    for which in range(NCHUNKS - 1, 0, -1):
        frame = z.head[which]
        if frame != NO_FRAME:
            break
    if frame != NO_FRAME:
        f = &self.arena.frames[frame]
        unlink_frame(z, frame)
        z.aside = frame
        if z.filled >> max(f.first_chunks, f.last_chunks) == 0:
            z.aside = NO_FRAME
        link_frame(z, frame)        # aside: on no list
        frame = z.aside
    pthread_mutex_unlock(self.guard)
    return frame


cdef bint zbud_aside(Allocator *self, uint32_t frame) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef Frame *f = &self.arena.frames[frame]
    cdef bint taken
    lock_take(self.guard)
    taken = z.aside == NO_FRAME and f.state == self.state and f.first_chunks < NCHUNKS
    if taken:
        unlink_frame(z, frame)
        z.aside = frame
        link_frame(z, frame)
    pthread_mutex_unlock(self.guard)
    return taken


cdef bint zbud_alloc_packed(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef bint placed
    lock_take(self.guard)
    placed = place_bud(<Zbud *>self, chunks_for(bytes), True, where)
    if placed:
        count_object(self.cells, bytes, False, 1)
    pthread_mutex_unlock(self.guard)
    return placed


cdef bint zbud_put_back(Allocator *self) noexcept nogil:
    cdef Zbud *z = <Zbud *>self
    cdef uint32_t frame
    lock_take(self.guard)
    frame = z.aside
    if frame != NO_FRAME:
        unlink_frame(z, frame)
        z.aside = NO_FRAME
        link_frame(z, frame)
    pthread_mutex_unlock(self.guard)
    return frame == NO_FRAME


cdef uint32_t zbud_objects(
    Allocator *self, uint32_t frame, uint64_t *where, uint32_t *bytes, uint32_t most
) noexcept nogil:
    """Sizes are rounded up to chunks; the exact length is in each header."""
    cdef uint32_t n = 0
    cdef Frame *f = &self.arena.frames[frame]
    lock_take(self.guard)
    if f.state == FRAME_ZBUD:
        if f.first_chunks and n < most:
            where[n] = <uint64_t>frame << PAGE_SHIFT
            bytes[n] = f.first_chunks * CHUNK_BYTES
            n += 1
        if f.last_chunks and n < most:
            where[n] = (<uint64_t>frame << PAGE_SHIFT) + (NCHUNKS - f.last_chunks) * CHUNK_BYTES
            bytes[n] = f.last_chunks * CHUNK_BYTES
            n += 1
    pthread_mutex_unlock(self.guard)
    return n


cdef uint32_t broken_lists(Zbud *z, uint64_t *in_lists) noexcept nogil:
    cdef Frame *frames = z.face.arena.frames
    cdef uint32_t broken = 0
    cdef uint32_t which, frame
    for which in range(NCHUNKS):
        frame = z.head[which]
        if which != BUDDIED and (frame != NO_FRAME) != ((z.filled >> which) & 1):
            broken += 1
        while frame != NO_FRAME:
            in_lists[0] += 1
            if list_of(&frames[frame]) != which or frames[frame].state != FRAME_ZBUD:
                broken += 1
            if frames[frame].next != NO_FRAME and frames[frames[frame].next].prev != frame:
                broken += 1
            frame = frames[frame].next
    return broken


cdef uint32_t zbud_check(Allocator *self, Held *held) noexcept nogil:
    """Broken invariants: lists against frames."""
    cdef Zbud *z = <Zbud *>self
    cdef uint64_t in_lists = 0
    cdef uint64_t shared = 0
    cdef uint32_t broken = 0
    cdef uint32_t frame
    cdef const Frame *f
    lock_take(self.guard)
    broken += broken_lists(z, &in_lists)
    for frame in range(self.arena.total):
        f = &self.arena.frames[frame]
        if f.state != FRAME_ZBUD:
            continue
        held.raw_pages += f.first_chunks == NCHUNKS
        shared += f.first_chunks < NCHUNKS
        broken += f.first_chunks + f.last_chunks > NCHUNKS
        broken += both_bits(f) == 0
        broken += (f.marks & ~both_bits(f)) != 0
        broken += f.ephemeral_only != (f.marks == both_bits(f))
        held.frames += 1
        held.buddied += list_of(f) == BUDDIED and f.first_chunks < NCHUNKS
        held.unbuddied += list_of(f) != BUDDIED and f.first_chunks < NCHUNKS
        held.ephemeral_frames += f.marks == both_bits(f)
        held.pages += (f.first_chunks > 0) + (f.last_chunks > 0)
        held.ephemeral_pages += (f.marks & FIRST) + (f.marks >> 1)
    broken += in_lists + (z.aside != NO_FRAME) != shared
    pthread_mutex_unlock(self.guard)
    return broken


cdef void zbud_discard(Allocator *self) noexcept nogil:
    free(self)


cdef Allocator *zbud_make(Arena *arena, uint64_t *cells, pthread_mutex_t *guard) noexcept nogil:
    """A zbud allocator on `arena`; NULL when there is no memory."""
    cdef Zbud *z = <Zbud *>calloc(1, sizeof(Zbud))
    cdef uint32_t i
    if z == NULL:
        return NULL
    z.face.name = b"zbud"
    z.face.arena = arena
    z.face.cells = cells
    z.face.largest_bytes = LARGEST_CHUNKS * CHUNK_BYTES
    z.face.frames_at_once = 1
    z.face.objects_at_once = 2
    z.aside = NO_FRAME
    z.face.guard = guard
    z.face.state = FRAME_ZBUD
    z.face.alloc = zbud_alloc
    z.face.release = zbud_release
    z.face.room = zbud_room
    z.face.adopt = zbud_adopt
    z.face.adopted = zbud_adopted
    z.face.objects = zbud_objects
    z.face.spare = zbud_spare
    z.face.thin = zbud_thin
    z.face.aside = zbud_aside
    z.face.alloc_packed = zbud_alloc_packed
    z.face.put_back = zbud_put_back
    z.face.ephemeral = zbud_ephemeral
    z.face.check = zbud_check
    z.face.discard = zbud_discard
    for i in range(NCHUNKS):
        z.head[i] = NO_FRAME
    return &z.face
