"""The allocators of one arena behind one face: new pages go to one, each frame knows its own.

    alloc                       -> the chosen one
    release, objects, ...       -> the one whose frame it is  (frame table: state)
    adopt, after a restart      -> the one that opened it     (frame header, in the memory file)

So another may be chosen at any time, in a running server or at its next start, and every
page is found where it was.  What the others hold moves to the chosen one, with the same
means as compaction: `thin` takes aside one frame of theirs after the other, and
`alloc_packed` gives room in the chosen one.

    frame table   0 ... the others' frames here are empty | hand ... not yet ... total
                  again from 0, until a round empties none; without room to move to, after
                  frames were emptied in the usual way

What the chosen one cannot hold, because it is too large to share a frame there, stays, and
so do raw pages: each costs one frame anywhere.  They share the arena, the counters and one
lock, the one in front.

What comes back from below may have been compressed for an allocator of larger objects than
the chosen one's: it goes to zbud, which takes all that any of them does.

Bound: one call through a pointer more than an allocator alone.  What it is not: a
choice by page.  All other pages of a moment go to the same allocator.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from zcache_core.accounting cimport wrong_counters
from zcache_core.adoption cimport arena_adopt
from zcache_core.allocator cimport Allocator, Held, frame_opener
from zcache_core.arena cimport FRAME_TAKEN, FRAME_ZSMALLOC, NO_FRAME, Arena
from zcache_core.counter_ids cimport C_ALLOCATOR, C_MIGRATING, C_PRIVATE_TABLE_BYTES
from zcache_core.layout cimport PAGE_BYTES, PAGE_SHIFT
from zcache_core.pthread cimport lock_init, lock_take, pthread_mutex_unlock
from zcache_core.z3fold cimport z3fold_make
from zcache_core.zbud cimport zbud_make
from zcache_core.zsmalloc cimport zsmalloc_make, zsmalloc_prepare, zsmalloc_tell

cdef enum:
    KINDS = 3
    ZSMALLOC = 2                # number of the one with a table of its own
    REST = 64                   # as many as the tidying thread empties in vain before it pauses
    LEFT_FREE = 64              # frames that moving pages leave to requests: two of 128 KiB

# In the order of FrameState: the state of a frame is FRAME_TAKEN and its allocator's place here.
ALLOCATORS = ("zbud", "z3fold", "zsmalloc")

ctypedef struct Several:
    Allocator face              # first: an Allocator * is a Several *
    Allocator *kind[KINDS]
    Allocator *chosen           # new pages go here
    bint prepared               # zsmalloc's table has memory
    # guarded by the turn of who empties frames
    Allocator *thinning         # whose frames are taken aside
    bint leaving                # the others' frames are being emptied
    bint out                    # `thinning` is one of them
    bint starved                # there was no room for one of them since the hand was at the first
    uint32_t rest               # so many frames are emptied within their allocator, before it is tried again
    uint32_t hand               # the frame at which that goes on
    uint32_t gone               # frames (zspages) emptied since the hand was at the first


cdef inline Allocator *owner(Allocator *self, uint64_t frame) noexcept nogil:
    """Whose a taken frame is.  Of a free one: any, and that one sees for itself."""
    cdef uint32_t state = self.arena.frames[frame].state
    if state < FRAME_TAKEN:
        return (<Several *>self).kind[0]
    return (<Several *>self).kind[min(state, <uint32_t>FRAME_ZSMALLOC) - FRAME_TAKEN]


cdef void measure(Allocator *self, Allocator *its) noexcept nogil:
    """There are frames of `its`, or will be."""
    self.frames_at_once = max(self.frames_at_once, its.frames_at_once)
    self.objects_at_once = max(self.objects_at_once, its.objects_at_once)


cdef void tell(Several *s) noexcept nogil:
    """What holds now, for whoever reads the counters."""
    s.face.cells[C_ALLOCATOR] = s.chosen.state - FRAME_TAKEN
    s.face.cells[C_MIGRATING] = s.leaving


cdef bint several_alloc(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef Allocator *its = (<Several *>self).chosen
    if its.largest_bytes < bytes < PAGE_BYTES:
        its = (<Several *>self).kind[0]
        if bytes > its.largest_bytes:
            return False
    return its.alloc(its, bytes, where)


cdef void several_release(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    cdef Allocator *its = owner(self, where >> PAGE_SHIFT)
    its.release(its, where, bytes)


cdef uint32_t several_room(Allocator *self, uint32_t bytes) noexcept nogil:
    """Where it would be placed now."""
    cdef Allocator *its = (<Several *>self).chosen
    if its.largest_bytes < bytes < PAGE_BYTES:
        its = (<Several *>self).kind[0]
    return its.room(its, bytes)


cdef bint several_adopt(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    cdef uint64_t frame = where >> PAGE_SHIFT
    cdef Allocator *its = (<Several *>self).chosen
    cdef uint32_t number
    if frame >= self.arena.total:
        return False
    if bytes < PAGE_BYTES:
        number = frame_opener(self.arena, <uint32_t>frame) - FRAME_TAKEN
        if number >= KINDS:
            return False
        its = (<Several *>self).kind[number]
        (<Several *>self).leaving |= its != (<Several *>self).chosen
    measure(self, its)
    return its.adopt(its, where, bytes)


cdef void several_adopted(Allocator *self) noexcept nogil:
    cdef uint32_t i
    arena_adopt(self.arena)
    for i in range(KINDS):
        (<Several *>self).kind[i].adopted((<Several *>self).kind[i])
    tell(<Several *>self)


cdef uint32_t several_objects(
    Allocator *self, uint32_t frame, uint64_t *where, uint32_t *bytes, uint32_t most
) noexcept nogil:
    cdef Allocator *its = owner(self, frame)
    return its.objects(its, frame, where, bytes, most)


cdef uint32_t several_spare(Allocator *self) noexcept nogil:
    cdef uint32_t frames = 0
    cdef uint32_t i
    for i in range(KINDS):
        frames += (<Several *>self).kind[i].spare((<Several *>self).kind[i])
    return frames


cdef uint32_t next_foreign(Several *s) noexcept nogil:
    """Take aside the next frame of those that are to leave; NO_FRAME when there is none, or no room."""
    cdef Arena *arena = s.face.arena
    cdef Allocator *its
    cdef uint32_t frame, state
    if s.rest:
        s.rest -= 1
        return NO_FRAME
    while s.leaving:
        while s.hand < arena.total:
            frame = s.hand
            s.hand += 1
            state = arena.frames[frame].state
            if FRAME_TAKEN <= state and state <= FRAME_ZSMALLOC and state != s.chosen.state:
                its = s.kind[state - FRAME_TAKEN]
                if its.aside(its, frame):
                    s.thinning = its
                    return frame
        if s.gone == 0 and s.starved:
            s.rest = REST
        s.leaving = s.gone > 0 or s.starved
        s.hand = s.gone = 0
        s.starved = False
        if s.rest:
            break
    tell(s)
    return NO_FRAME


cdef uint32_t several_thin(Allocator *self) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t frame = next_foreign(<Several *>self)
    cdef Allocator *its
    (<Several *>self).out = frame != NO_FRAME
    for i in range(KINDS):
        if frame != NO_FRAME:
            break
        its = (<Several *>self).kind[i]
        frame = its.thin(its)
        if frame != NO_FRAME:
            (<Several *>self).thinning = its
    return frame


cdef bint several_alloc_packed(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    """In another frame of the same allocator; or, from a frame that is to leave, in the chosen one."""
    cdef Several *s = <Several *>self
    cdef Allocator *to = s.thinning
    if not s.out:
        return to.alloc_packed(to, bytes, where)
    to = s.chosen
    if bytes > to.largest_bytes:
        return False
    if to.alloc_packed(to, bytes, where):
        return True
    if self.arena.free_count >= LEFT_FREE + to.frames_at_once and to.alloc(to, bytes, where):
        return True
    s.starved = True
    return False


cdef bint several_put_back(Allocator *self) noexcept nogil:
    cdef Several *s = <Several *>self
    cdef bint gone = s.thinning.put_back(s.thinning)
    s.gone += gone and s.out
    return gone


cdef void several_ephemeral(Allocator *self, uint64_t where, uint32_t bytes, int change) noexcept nogil:
    cdef Allocator *its = owner(self, where >> PAGE_SHIFT)
    its.ephemeral(its, where, bytes, change)


cdef uint32_t several_check(Allocator *self, Held *held) noexcept nogil:
    cdef uint32_t broken = 0
    cdef uint32_t i
    for i in range(KINDS):
        broken += (<Several *>self).kind[i].check((<Several *>self).kind[i], held)
    return broken


cdef void several_discard(Allocator *self) noexcept nogil:
    cdef uint32_t i
    for i in range(KINDS):
        if (<Several *>self).kind[i] != NULL:
            (<Several *>self).kind[i].discard((<Several *>self).kind[i])
    free(self)


cdef bint several_choose(Allocator *self, uint32_t number) noexcept nogil:
    """New pages go to ALLOCATORS[number] from now on, and those of the others shall follow.

    The caller has the turn of emptying frames.  False, and nothing has changed, when there is
    no memory for its table.
    """
    cdef Several *s = <Several *>self
    cdef bint first = number == ZSMALLOC and not s.prepared
    if first and not zsmalloc_prepare(s.kind[ZSMALLOC]):
        return False
    lock_take(&self.lock)
    if first:
        s.prepared = True
        self.cells[C_PRIVATE_TABLE_BYTES] += s.kind[ZSMALLOC].table_bytes
    s.chosen = s.kind[number]
    measure(self, s.chosen)
    self.name = s.chosen.name
    self.largest_bytes = s.chosen.largest_bytes
    s.leaving = True
    s.hand = s.gone = s.rest = 0
    s.starved = False
    tell(s)
    pthread_mutex_unlock(&self.lock)
    return True


cdef Allocator *several_make(Arena *arena, uint64_t *cells, uint32_t number) noexcept nogil:
    """All allocators on `arena`, ALLOCATORS[number] for new pages; NULL when there is no memory."""
    cdef Several *s = <Several *>calloc(1, sizeof(Several))
    cdef uint32_t i
    if s == NULL:
        return NULL
    lock_init(&s.face.lock)
    s.kind[0] = zbud_make(arena, cells, &s.face.lock)
    s.kind[1] = z3fold_make(arena, cells, &s.face.lock)
    s.kind[2] = zsmalloc_make(arena, cells, &s.face.lock)
    for i in range(KINDS):
        if s.kind[i] == NULL:
            several_discard(&s.face)
            return NULL
    s.chosen = s.kind[number]
    if number == ZSMALLOC:
        s.prepared = zsmalloc_prepare(s.chosen)
    s.face.name = s.chosen.name
    s.face.arena = arena
    s.face.cells = cells
    s.face.largest_bytes = s.chosen.largest_bytes
    s.face.frames_at_once = s.chosen.frames_at_once
    s.face.objects_at_once = s.chosen.objects_at_once
    s.face.table_bytes = s.chosen.table_bytes
    s.face.alloc = several_alloc
    s.face.release = several_release
    s.face.room = several_room
    s.face.adopt = several_adopt
    s.face.adopted = several_adopted
    s.face.objects = several_objects
    s.face.spare = several_spare
    s.face.thin = several_thin
    s.face.alloc_packed = several_alloc_packed
    s.face.put_back = several_put_back
    s.face.ephemeral = several_ephemeral
    s.face.check = several_check
    s.face.discard = several_discard
    return &s.face


cdef void several_tell(Allocator *self) noexcept nogil:
    """What is chosen, for whoever reads the counters; nothing is written to the file before."""
    zsmalloc_tell((<Several *>self).kind[ZSMALLOC])
    tell(<Several *>self)


cdef uint32_t allocator_broken(Allocator *allocator) noexcept nogil:
    """The number of broken invariants, counters included; slow."""
    cdef Held held
    cdef uint32_t broken
    memset(&held, 0, sizeof(held))
    broken = allocator.check(allocator, &held)
    return broken + wrong_counters(allocator.cells, &held)
