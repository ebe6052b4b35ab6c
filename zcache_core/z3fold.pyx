"""z3fold: at most three buds in a frame, one from each end and one in the middle.

    chunk  0 1 2 ...                                              ... 62 63
           +--------------+------------+--------------+------------------+
           | first bud    | middle bud | free         |         last bud |
           +--------------+------------+--------------+------------------+

A frame is 64 chunks of 64 bytes, as in zbud.  A bud goes first if the first place is
free, else last, else in the middle, right behind the first, so that what is free stays
in one run while a frame fills.  A frame that has a place left stands on the list of its
largest gap in which a bud may be placed; a new bud goes to the frame whose gap it fills
best (one look at a 64-bit map), else it opens a frame.  A raw page has a frame to itself.

    first freed   the gap from 0 to the next bud      last freed    up to the frame's end
    middle freed  the gap between first and last

Frames where little is left are emptied by moving their buds to others (`thin` in
allocator.pxd).  A bud never moves within its frame: a move must not overwrite the only copy.

Guarantees: constant time for every call; at most three pages in a frame.  Measured on
64 MiB of pages of four programs, LZ4: 1.27 times the density of zbud; two lists, by
number of buds, gave the same, and 32-byte chunks 1.28.
State is five bytes per frame in the arena's table, and the list heads here.
Source: the idea is that of mm/z3fold.c in Linux.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from zcache_core.accounting cimport count_object, enter_class, leave_class
from zcache_core.allocator cimport Allocator, Held, frame_open
from zcache_core.arena cimport (
    FRAME_TAKEN, FRAME_Z3FOLD, NO_FRAME, Arena, Frame, arena_give, arena_take,
)
from zcache_core.counter_ids cimport C_BUDDIED_COUNT, C_RAW_PAGES, C_UNBUDDIED_COUNT
from zcache_core.layout cimport CHUNK_BYTES, NCHUNKS, PAGE_BYTES, PAGE_SHIFT
from zcache_core.native cimport zc_ctz64
from zcache_core.pthread cimport lock_take, pthread_mutex_t, pthread_mutex_unlock

cdef enum:
    LARGEST_CHUNKS = NCHUNKS - 1
    FIRST = 1                   # bits of Frame.marks: this bud is ephemeral
    MIDDLE = 2
    LAST = 4

ctypedef struct Z3fold:
    Allocator face              # first: an Allocator * is a Z3fold *
    uint32_t head[NCHUNKS]      # by gap, 1 to 63; 0 is not used: such frames stand on no list
    uint32_t lone               # frames with one bud
    uint32_t aside              # the frame that is being emptied, or NO_FRAME
    uint64_t filled             # bit n: list n is not empty


# ---- one frame: lock held ----------------------------------------------------------

cdef inline uint32_t buds_of(const Frame *f) noexcept nogil:
    """Bits of the buds that are there."""
    return (FIRST if f.first_chunks else 0) | (MIDDLE if f.middle_chunks else 0) | (LAST if f.last_chunks else 0)


cdef inline uint32_t number_of(uint32_t buds) noexcept nogil:
    return (buds & 1) + (buds >> 1 & 1) + (buds >> 2)


cdef inline uint32_t before(const Frame *f) noexcept nogil:
    """Chunks free in front of the middle and last bud."""
    return f.middle_start if f.middle_chunks else NCHUNKS - f.last_chunks


cdef inline uint32_t behind(const Frame *f) noexcept nogil:
    """Chunks free behind the first and middle bud."""
    return NCHUNKS - (f.middle_start + f.middle_chunks if f.middle_chunks else f.first_chunks)


cdef inline uint32_t gap_of(const Frame *f) noexcept nogil:
    """Chunks of the largest bud that may be placed here."""
    cdef uint32_t gap = 0
    if f.first_chunks == 0:
        gap = before(f)
    if f.last_chunks == 0:
        gap = max(gap, behind(f))
    if f.first_chunks and f.last_chunks and f.middle_chunks == 0:
        gap = NCHUNKS - f.first_chunks - f.last_chunks
    return gap


cdef inline uint32_t place_in(Frame *f, uint32_t chunks) noexcept nogil:
    """Put a bud where it fits (its gap is large enough); the chunk at which it starts."""
    if f.first_chunks == 0 and before(f) >= chunks:
        f.first_chunks = chunks
        return 0
    if f.last_chunks == 0 and behind(f) >= chunks:
        f.last_chunks = chunks
        return NCHUNKS - chunks
    f.middle_chunks = chunks
    f.middle_start = f.first_chunks
    return f.middle_start


cdef inline uint32_t bud_at(const Frame *f, uint64_t where) noexcept nogil:
    cdef uint32_t chunk = (where & (PAGE_BYTES - 1)) // CHUNK_BYTES
    if chunk == 0:
        return FIRST
    return MIDDLE if f.middle_chunks and chunk == f.middle_start else LAST


cdef inline uint32_t chunks_for(uint32_t bytes) noexcept nogil:
    return (bytes + CHUNK_BYTES - 1) // CHUNK_BYTES


# ---- lists and accounting: lock held -------------------------------------------------

cdef inline void leave(Z3fold *z, const Frame *f) noexcept nogil:
    """Before any change of a frame's buds or marks."""
    if buds_of(f):
        leave_class(z.face.cells, 1, f.ephemeral_only)


cdef inline void enter(Z3fold *z, Frame *f) noexcept nogil:
    """After it."""
    if buds_of(f):
        f.ephemeral_only = f.marks == buds_of(f)
        enter_class(z.face.cells, 1, f.ephemeral_only)


cdef void link_frame(Z3fold *z, uint32_t frame) noexcept nogil:
    """The frame has changed: onto its list.  Not for raw pages."""
    cdef Frame *frames = z.face.arena.frames
    cdef Frame *f = &frames[frame]
    cdef uint32_t gap = gap_of(f)
    z.face.cells[C_UNBUDDIED_COUNT if number_of(buds_of(f)) == 1 else C_BUDDIED_COUNT] += 1
    z.lone += number_of(buds_of(f)) == 1
    f.prev = f.next = NO_FRAME
    if gap and frame != z.aside:
        f.next = z.head[gap]
        if f.next != NO_FRAME:
            frames[f.next].prev = frame
        z.head[gap] = frame
        z.filled |= <uint64_t>1 << gap


cdef void unlink_frame(Z3fold *z, uint32_t frame) noexcept nogil:
    """The frame is about to change."""
    cdef Frame *frames = z.face.arena.frames
    cdef Frame *f = &frames[frame]
    cdef uint32_t gap = gap_of(f)
    z.face.cells[C_UNBUDDIED_COUNT if number_of(buds_of(f)) == 1 else C_BUDDIED_COUNT] -= 1
    z.lone -= number_of(buds_of(f)) == 1
    if gap and frame != z.aside:
        if f.prev != NO_FRAME:
            frames[f.prev].next = f.next
        else:
            z.head[gap] = f.next
            if f.next == NO_FRAME:
                z.filled &= ~(<uint64_t>1 << gap)
        if f.next != NO_FRAME:
            frames[f.next].prev = f.prev


# ---- the face ------------------------------------------------------------------------

cdef bint place_raw(Z3fold *z, uint64_t *where) noexcept nogil:
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


cdef bint place_bud(Z3fold *z, uint32_t chunks, bint packed, uint64_t *where) noexcept nogil:
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


cdef bint z3fold_alloc(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef Z3fold *z = <Z3fold *>self
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


cdef uint32_t z3fold_room(Allocator *self, uint32_t bytes) noexcept nogil:
    return PAGE_BYTES if bytes > self.largest_bytes else chunks_for(bytes) * CHUNK_BYTES


cdef void z3fold_release(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    cdef Z3fold *z = <Z3fold *>self
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


cdef void z3fold_ephemeral(Allocator *self, uint64_t where, uint32_t bytes, int change) noexcept nogil:
    cdef Z3fold *z = <Z3fold *>self
    cdef Frame *f = &self.arena.frames[where >> PAGE_SHIFT]
    leave(z, f)
    count_object(self.cells, bytes, change < 0, -1)
    count_object(self.cells, bytes, change > 0, 1)
    f.marks ^= bud_at(f, where)
    enter(z, f)


# ---- after a restart: single-threaded, before anything is allocated --------------------

cdef bint take_chunks(Frame *f, uint32_t start, uint32_t chunks) noexcept nogil:
    """Mark a bud where it stands; False when it overlaps another or its place is taken."""
    cdef uint32_t end = start + chunks
    if end > NCHUNKS or f.first_chunks > start or f.last_chunks > NCHUNKS - end:
        return False
    if f.middle_chunks and start < f.middle_start + f.middle_chunks and f.middle_start < end:
        return False
    if start == 0:
        f.first_chunks = chunks
    elif end == NCHUNKS:        # no middle bud ends there: it was placed in front of a last one
        f.last_chunks = chunks
    elif f.middle_chunks:
        return False
    else:
        f.middle_chunks = chunks
        f.middle_start = start
    return True


cdef bint z3fold_adopt(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    """Marks, and leaves the lists to `adopted`."""
    cdef Z3fold *z = <Z3fold *>self
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
        good = chunks <= LARGEST_CHUNKS and offset % CHUNK_BYTES == 0 and take_chunks(f, offset // CHUNK_BYTES, chunks)
    enter(z, f)
    if not good:
        return False
    f.state = self.state
    count_object(self.cells, bytes, False, 1)
    return True


cdef void z3fold_adopted(Allocator *self) noexcept nogil:
    cdef Z3fold *z = <Z3fold *>self
    cdef uint32_t frame
    lock_take(self.guard)
    for frame in range(self.arena.total):
        if self.arena.frames[frame].state == FRAME_Z3FOLD and self.arena.frames[frame].first_chunks < NCHUNKS:
            link_frame(z, frame)
    pthread_mutex_unlock(self.guard)


# ---- emptying frames ------------------------------------------------------------------

cdef uint32_t z3fold_spare(Allocator *self) noexcept nogil:
    """A guess: every second frame with one bud."""
    return (<Z3fold *>self).lone // 2


cdef uint32_t z3fold_thin(Allocator *self) noexcept nogil:
    """The frame with most room, if its buds have room in others."""
    cdef Z3fold *z = <Z3fold *>self
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
        if z.filled >> max(max(f.first_chunks, f.middle_chunks), f.last_chunks) == 0:
            z.aside = NO_FRAME
        link_frame(z, frame)        # aside: on no list
        frame = z.aside
    pthread_mutex_unlock(self.guard)
    return frame


cdef bint z3fold_aside(Allocator *self, uint32_t frame) noexcept nogil:
    cdef Z3fold *z = <Z3fold *>self
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


cdef bint z3fold_alloc_packed(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef bint placed
    lock_take(self.guard)
    placed = place_bud(<Z3fold *>self, chunks_for(bytes), True, where)
    if placed:
        count_object(self.cells, bytes, False, 1)
    pthread_mutex_unlock(self.guard)
    return placed


cdef bint z3fold_put_back(Allocator *self) noexcept nogil:
    cdef Z3fold *z = <Z3fold *>self
    cdef uint32_t frame
    lock_take(self.guard)
    frame = z.aside
    if frame != NO_FRAME:
        unlink_frame(z, frame)
        z.aside = NO_FRAME
        link_frame(z, frame)
    pthread_mutex_unlock(self.guard)
    return frame == NO_FRAME


# ---- looking ------------------------------------------------------------------------------

cdef uint32_t z3fold_objects(
    Allocator *self, uint32_t frame, uint64_t *where, uint32_t *bytes, uint32_t most
) noexcept nogil:
    """Sizes are rounded up to chunks; the exact length is in each header."""
    cdef uint32_t start[3]
    cdef uint32_t chunks[3]
    cdef uint32_t n = 0
    cdef uint32_t i
    cdef Frame *f = &self.arena.frames[frame]
    lock_take(self.guard)
    if f.state == FRAME_Z3FOLD:
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


cdef uint32_t broken_frame(const Frame *f) noexcept nogil:
    """Broken invariants of a frame that holds buds or a raw page."""
    cdef uint32_t broken = 0
    broken += buds_of(f) == 0
    broken += (f.marks & ~buds_of(f)) != 0
    broken += f.ephemeral_only != (f.marks == buds_of(f))
    if f.middle_chunks:
        broken += f.middle_start < f.first_chunks
        broken += f.middle_start + f.middle_chunks + f.last_chunks > NCHUNKS
        broken += f.middle_start == 0
    else:
        broken += f.first_chunks + f.last_chunks > NCHUNKS
    return broken


cdef uint32_t broken_lists(Z3fold *z, uint64_t *in_lists) noexcept nogil:
    cdef Frame *frames = z.face.arena.frames
    cdef uint32_t broken = 0
    cdef uint32_t gap, frame
    for gap in range(1, NCHUNKS):
        frame = z.head[gap]
        broken += (frame != NO_FRAME) != ((z.filled >> gap) & 1)
        while frame != NO_FRAME:
            in_lists[0] += 1
            broken += gap_of(&frames[frame]) != gap or frames[frame].state != FRAME_Z3FOLD
            broken += frames[frame].next != NO_FRAME and frames[frames[frame].next].prev != frame
            frame = frames[frame].next
    return broken


cdef uint32_t z3fold_check(Allocator *self, Held *held) noexcept nogil:
    """Broken invariants: frames in themselves, and lists against frames."""
    cdef Z3fold *z = <Z3fold *>self
    cdef uint64_t in_lists = 0
    cdef uint64_t on_lists = 0
    cdef uint32_t broken, frame
    cdef const Frame *f
    lock_take(self.guard)
    broken = broken_lists(z, &in_lists)
    for frame in range(self.arena.total):
        f = &self.arena.frames[frame]
        if f.state != FRAME_Z3FOLD:
            continue
        broken += broken_frame(f)
        held.raw_pages += f.first_chunks == NCHUNKS
        on_lists += f.first_chunks < NCHUNKS and gap_of(f) > 0 and frame != z.aside
        held.frames += 1
        held.buddied += number_of(buds_of(f)) > 1
        held.unbuddied += number_of(buds_of(f)) == 1 and f.first_chunks < NCHUNKS
        held.ephemeral_frames += f.marks == buds_of(f)
        held.pages += number_of(buds_of(f))
        held.ephemeral_pages += number_of(f.marks)
    broken += in_lists != on_lists
    pthread_mutex_unlock(self.guard)
    return broken


cdef void z3fold_discard(Allocator *self) noexcept nogil:
    free(self)


cdef Allocator *z3fold_make(Arena *arena, uint64_t *cells, pthread_mutex_t *guard) noexcept nogil:
    """A z3fold allocator on `arena`; NULL when there is no memory."""
    cdef Z3fold *z = <Z3fold *>calloc(1, sizeof(Z3fold))
    cdef uint32_t i
    if z == NULL:
        return NULL
    z.face.name = b"z3fold"
    z.face.arena = arena
    z.face.cells = cells
    z.face.largest_bytes = LARGEST_CHUNKS * CHUNK_BYTES
    z.face.frames_at_once = 1
    z.face.objects_at_once = 3
    z.aside = NO_FRAME
    z.face.guard = guard
    z.face.state = FRAME_Z3FOLD
    z.face.alloc = z3fold_alloc
    z.face.release = z3fold_release
    z.face.room = z3fold_room
    z.face.adopt = z3fold_adopt
    z.face.adopted = z3fold_adopted
    z.face.objects = z3fold_objects
    z.face.spare = z3fold_spare
    z.face.thin = z3fold_thin
    z.face.aside = z3fold_aside
    z.face.alloc_packed = z3fold_alloc_packed
    z.face.put_back = z3fold_put_back
    z.face.ephemeral = z3fold_ephemeral
    z.face.check = z3fold_check
    z.face.discard = z3fold_discard
    for i in range(NCHUNKS):
        z.head[i] = NO_FRAME
    return &z.face
