"""Frames of 64 chunks with two or three buds each: what zbud and z3fold do, written once.

    budframe: where buds stand in a frame --> this: lists of frames --> zbud, z3fold

Unbuddied lists: a frame that has a place left stands on the list of its largest gap in which
a bud may be placed; a new bud goes to the frame whose gap it fills best (one look at a 64-bit
map), else it opens a frame.  Buddied list, number 0: frames where no bud may be placed.  A raw
page has a frame to itself and stands on none.

Frames where little is left are emptied by moving their buds to others (`thin` in
allocator.pxd).  A bud never moves within its frame: a move must not overwrite the only copy.

Guarantees: constant time for every call; never more than 63 chunks for a bud (a larger one
leaves room for nobody and is cheaper raw).  State is five bytes per frame in the arena's table,
and the list heads here.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from zcache_core.accounting cimport count_object, enter_class, leave_class
from zcache_core.allocator cimport Allocator, Held, frame_open
from zcache_core.arena cimport FRAME_TAKEN, NO_FRAME, Arena, Frame, arena_give, arena_take
from zcache_core.budframe cimport (
    FIRST, LARGEST_CHUNKS, MIDDLE,
    broken_frame, bud_at, buds_of, chunks_for, gap_of, number_of, place_in, take_chunks,
)
from zcache_core.counter_ids cimport C_BUDDIED_COUNT, C_RAW_PAGES, C_UNBUDDIED_COUNT
from zcache_core.layout cimport CHUNK_BYTES, NCHUNKS, PAGE_BYTES, PAGE_SHIFT
from zcache_core.native cimport zc_ctz64
from zcache_core.pthread cimport lock_take, pthread_mutex_t, pthread_mutex_unlock

ctypedef struct Buds:
    Allocator face              # first: an Allocator * is a Buds *
    uint32_t head[NCHUNKS]      # by gap, 0 to 63
    uint32_t places             # buds a frame may hold: 2 or 3
    uint32_t lone               # frames with one bud
    uint32_t aside              # the frame that is being emptied, or NO_FRAME
    uint64_t filled             # bit n: list n is not empty


# ---- lists and accounting: lock held -------------------------------------------------

cdef inline void leave(Buds *z, const Frame *f) noexcept nogil:
    """Before any change of a frame's buds or marks."""
    if buds_of(f):
        leave_class(z.face.cells, 1, f.ephemeral_only)


cdef inline void enter(Buds *z, Frame *f) noexcept nogil:
    """After it."""
    if buds_of(f):
        f.ephemeral_only = f.marks == buds_of(f)
        enter_class(z.face.cells, 1, f.ephemeral_only)


cdef inline void count_frame(Buds *z, const Frame *f, int change) noexcept nogil:
    cdef bint alone = number_of(buds_of(f)) == 1
    z.face.cells[C_UNBUDDIED_COUNT if alone else C_BUDDIED_COUNT] += change
    z.lone += change * alone


cdef void link_frame(Buds *z, uint32_t frame) noexcept nogil:
    """The frame has changed: onto its list.  Not for raw pages."""
    cdef Frame *frames = z.face.arena.frames
    cdef Frame *f = &frames[frame]
    cdef uint32_t gap = gap_of(f, z.places)
    count_frame(z, f, 1)
    if frame == z.aside:
        return
    f.prev = NO_FRAME
    f.next = z.head[gap]
    if f.next != NO_FRAME:
        frames[f.next].prev = frame
    z.head[gap] = frame
    z.filled |= <uint64_t>1 << gap


cdef void unlink_frame(Buds *z, uint32_t frame) noexcept nogil:
    """The frame is about to change."""
    cdef Frame *frames = z.face.arena.frames
    cdef Frame *f = &frames[frame]
    cdef uint32_t gap = gap_of(f, z.places)
    count_frame(z, f, -1)
    if frame == z.aside:
        return
    if f.prev != NO_FRAME:
        frames[f.prev].next = f.next
    else:
        z.head[gap] = f.next
        if f.next == NO_FRAME:
            z.filled &= ~(<uint64_t>1 << gap)
    if f.next != NO_FRAME:
        frames[f.next].prev = f.prev


cdef inline void keep_aside(Buds *z, uint32_t frame, uint32_t aside) noexcept nogil:
    """The frame that is aside, on no list, is `aside` from now on."""
    unlink_frame(z, frame)
    z.aside = aside
    link_frame(z, frame)


# ---- the face ------------------------------------------------------------------------

cdef bint place_raw(Buds *z, uint64_t *where) noexcept nogil:
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


cdef bint place_bud(Buds *z, uint32_t chunks, bint packed, uint64_t *where) noexcept nogil:
    """Room for one bud; `packed`: in a frame that holds another already."""
    cdef uint64_t fitting = z.filled >> chunks << chunks
    cdef uint32_t frame
    cdef Frame *f
    if fitting:
        frame = z.head[zc_ctz64(fitting)]
        unlink_frame(z, frame)
    else:
        frame = NO_FRAME if packed else arena_take(z.face.arena)
        if frame == NO_FRAME:
            return False
        frame_open(&z.face, frame)
    f = &z.face.arena.frames[frame]
    leave(z, f)
    where[0] = (<uint64_t>frame << PAGE_SHIFT) + place_in(f, chunks) * CHUNK_BYTES
    f.referenced = 1
    enter(z, f)
    link_frame(z, frame)
    return True


cdef inline bint place(Allocator *self, uint32_t bytes, bint packed, uint64_t *where) noexcept nogil:
    cdef Buds *z = <Buds *>self
    cdef bint placed
    lock_take(self.guard)
    if bytes == PAGE_BYTES:
        placed = place_raw(z, where)
    else:
        placed = place_bud(z, chunks_for(bytes), packed, where)
    if placed:
        count_object(self.cells, bytes, False, 1)
    pthread_mutex_unlock(self.guard)
    return placed


cdef bint buds_alloc(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    return place(self, bytes, False, where)


cdef bint buds_alloc_packed(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    return place(self, bytes, True, where)


cdef uint32_t buds_room(Allocator *self, uint32_t bytes) noexcept nogil:
    return PAGE_BYTES if bytes > self.largest_bytes else chunks_for(bytes) * CHUNK_BYTES


cdef void buds_release(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    cdef Buds *z = <Buds *>self
    cdef uint32_t frame = <uint32_t>(where >> PAGE_SHIFT)
    cdef Frame *f = &self.arena.frames[frame]
    cdef uint32_t bud
    lock_take(self.guard)
    bud = bud_at(f, where)
    leave(z, f)
    count_object(self.cells, bytes, f.marks & bud, -1)
    if bytes == PAGE_BYTES:
        self.cells[C_RAW_PAGES] -= 1
        f.first_chunks = 0
    else:
        unlink_frame(z, frame)
        if bud == FIRST:
            f.first_chunks = 0
        elif bud == MIDDLE:
            f.middle_chunks = 0
        else:
            f.last_chunks = 0
    f.marks &= ~bud
    if buds_of(f):
        enter(z, f)
        link_frame(z, frame)
    else:
        if frame == z.aside:
            z.aside = NO_FRAME
        arena_give(self.arena, frame)
    pthread_mutex_unlock(self.guard)


cdef void buds_ephemeral(Allocator *self, uint64_t where, uint32_t bytes, int change) noexcept nogil:
    cdef Buds *z = <Buds *>self
    cdef Frame *f = &self.arena.frames[where >> PAGE_SHIFT]
    leave(z, f)
    count_object(self.cells, bytes, change < 0, -1)
    count_object(self.cells, bytes, change > 0, 1)
    f.marks ^= bud_at(f, where)
    enter(z, f)


# ---- after a restart: single-threaded, before anything is allocated --------------------

cdef bint buds_adopt(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    """Marks, and leaves the lists to `adopted`."""
    cdef Buds *z = <Buds *>self
    cdef uint64_t frame = where >> PAGE_SHIFT
    cdef uint32_t offset = where & (PAGE_BYTES - 1)
    cdef uint32_t chunks = chunks_for(bytes)
    cdef bint good
    cdef Frame *f
    if frame >= self.arena.total:
        return False
    f = &self.arena.frames[frame]
    if f.state >= FRAME_TAKEN and f.state != self.state:
        return False
    leave(z, f)
    if bytes == PAGE_BYTES:
        good = offset == 0 and buds_of(f) == 0
        if good:
            f.first_chunks = NCHUNKS
            self.cells[C_RAW_PAGES] += 1
    else:
        good = chunks <= LARGEST_CHUNKS and offset % CHUNK_BYTES == 0 and (
            take_chunks(f, z.places, offset // CHUNK_BYTES, chunks)
        )
    enter(z, f)
    if not good:
        return False
    f.state = self.state
    count_object(self.cells, bytes, False, 1)
    return True


cdef void buds_adopted(Allocator *self) noexcept nogil:
    cdef Buds *z = <Buds *>self
    cdef uint32_t frame
    lock_take(self.guard)
    for frame in range(self.arena.total):
        if self.arena.frames[frame].state == self.state and self.arena.frames[frame].first_chunks < NCHUNKS:
            link_frame(z, frame)
    pthread_mutex_unlock(self.guard)


# ---- emptying frames ------------------------------------------------------------------

cdef uint32_t buds_spare(Allocator *self) noexcept nogil:
    """A guess: every second frame with one bud."""
    return (<Buds *>self).lone // 2


cdef uint32_t buds_thin(Allocator *self) noexcept nogil:
    """The frame with most room, if its buds have room in others."""
    cdef Buds *z = <Buds *>self
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
        keep_aside(z, frame, frame)
        if z.filled >> max(max(f.first_chunks, f.middle_chunks), f.last_chunks) == 0:
            keep_aside(z, frame, NO_FRAME)
        frame = z.aside
    pthread_mutex_unlock(self.guard)
    return frame


cdef bint buds_aside(Allocator *self, uint32_t frame) noexcept nogil:
    cdef Buds *z = <Buds *>self
    cdef Frame *f = &self.arena.frames[frame]
    cdef bint taken
    lock_take(self.guard)
    taken = z.aside == NO_FRAME and f.state == self.state and f.first_chunks < NCHUNKS
    if taken:
        keep_aside(z, frame, frame)
    pthread_mutex_unlock(self.guard)
    return taken


cdef bint buds_put_back(Allocator *self) noexcept nogil:
    cdef Buds *z = <Buds *>self
    cdef uint32_t frame
    lock_take(self.guard)
    frame = z.aside
    if frame != NO_FRAME:
        keep_aside(z, frame, NO_FRAME)
    pthread_mutex_unlock(self.guard)
    return frame == NO_FRAME


# ---- looking ------------------------------------------------------------------------------

cdef uint32_t buds_objects(
    Allocator *self, uint32_t frame, uint64_t *where, uint32_t *bytes, uint32_t most
) noexcept nogil:
    """Sizes are rounded up to chunks; the exact length is in each header."""
    cdef uint32_t start[3]
    cdef uint32_t chunks[3]
    cdef uint32_t n = 0
    cdef uint32_t i
    cdef Frame *f = &self.arena.frames[frame]
    lock_take(self.guard)
    if f.state == self.state:
        start[0], chunks[0] = 0, f.first_chunks
        start[1], chunks[1] = f.middle_start, f.middle_chunks
        start[2], chunks[2] = NCHUNKS - f.last_chunks, f.last_chunks
        for i in range(3):
            if chunks[i] and n < most:
                where[n] = (<uint64_t>frame << PAGE_SHIFT) + start[i] * CHUNK_BYTES
                bytes[n] = chunks[i] * CHUNK_BYTES
                n += 1
    pthread_mutex_unlock(self.guard)
    return n


cdef uint32_t broken_lists(Buds *z, uint64_t *in_lists) noexcept nogil:
    cdef Frame *frames = z.face.arena.frames
    cdef uint32_t broken = 0
    cdef uint32_t gap, frame
    for gap in range(NCHUNKS):
        frame = z.head[gap]
        broken += (frame != NO_FRAME) != ((z.filled >> gap) & 1)
        while frame != NO_FRAME:
            in_lists[0] += 1
            broken += gap_of(&frames[frame], z.places) != gap or frames[frame].state != z.face.state
            broken += frames[frame].next != NO_FRAME and frames[frames[frame].next].prev != frame
            frame = frames[frame].next
    return broken


cdef uint32_t buds_check(Allocator *self, Held *held) noexcept nogil:
    """Broken invariants: frames in themselves, and lists against frames."""
    cdef Buds *z = <Buds *>self
    cdef uint64_t in_lists = 0
    cdef uint64_t on_lists = 0
    cdef uint32_t broken, frame
    cdef const Frame *f
    lock_take(self.guard)
    broken = broken_lists(z, &in_lists)
    for frame in range(self.arena.total):
        f = &self.arena.frames[frame]
        if f.state != self.state:
            continue
        broken += broken_frame(f)
        held.raw_pages += f.first_chunks == NCHUNKS
        on_lists += f.first_chunks < NCHUNKS and frame != z.aside
        held.frames += 1
        held.buddied += number_of(buds_of(f)) > 1
        held.unbuddied += number_of(buds_of(f)) == 1 and f.first_chunks < NCHUNKS
        held.ephemeral_frames += f.marks == buds_of(f)
        held.pages += number_of(buds_of(f))
        held.ephemeral_pages += number_of(f.marks)
    broken += in_lists != on_lists
    pthread_mutex_unlock(self.guard)
    return broken


cdef void buds_discard(Allocator *self) noexcept nogil:
    free(self)


cdef Allocator *buds_make(
    Arena *arena, uint64_t *cells, pthread_mutex_t *guard, const char *name, uint8_t state, uint32_t places
) noexcept nogil:
    """An allocator of `places` buds a frame, whose frames have this state; NULL when there is no memory."""
    cdef Buds *z = <Buds *>calloc(1, sizeof(Buds))
    cdef uint32_t i
    if z == NULL:
        return NULL
    z.face.name = name
    z.face.arena = arena
    z.face.cells = cells
    z.face.largest_bytes = LARGEST_CHUNKS * CHUNK_BYTES
    z.face.frames_at_once = 1
    z.face.objects_at_once = places
    z.places = places
    z.aside = NO_FRAME
    z.face.guard = guard
    z.face.state = state
    z.face.alloc = buds_alloc
    z.face.release = buds_release
    z.face.room = buds_room
    z.face.adopt = buds_adopt
    z.face.adopted = buds_adopted
    z.face.objects = buds_objects
    z.face.spare = buds_spare
    z.face.thin = buds_thin
    z.face.aside = buds_aside
    z.face.alloc_packed = buds_alloc_packed
    z.face.put_back = buds_put_back
    z.face.ephemeral = buds_ephemeral
    z.face.check = buds_check
    z.face.discard = buds_discard
    for i in range(NCHUNKS):
        z.head[i] = NO_FRAME
    return &z.face
