"""The allocators of one arena behind one face: new pages go to one, each frame knows its own.

    alloc                       -> the chosen one
    release, objects, ...       -> the one whose frame it is  (frame table: state)
    adopt, after a restart      -> the one that opened it     (frame header, in the memory file)

So a server may be started with another allocator than its predecessor had, and every
page is found where it was; a frame stays with its allocator until it is empty.  They
share the arena, the counters and one lock, the one in front.

What comes back from below may have been compressed for an allocator of larger objects than
the chosen one's: it goes to zbud, which takes all that any of them does.

Bound: one call through a pointer more than an allocator alone.  What it is not: a
choice by page.  All other pages of a moment go to the same allocator.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from zcache_core.accounting cimport wrong_counters
from zcache_core.allocator cimport Allocator, Held, frame_opener
from zcache_core.arena cimport FRAME_TAKEN, FRAME_ZSMALLOC, NO_FRAME, Arena
from zcache_core.committer cimport arena_adopt
from zcache_core.layout cimport PAGE_BYTES, PAGE_SHIFT
from zcache_core.pthread cimport lock_init
from zcache_core.z3fold cimport z3fold_make
from zcache_core.zbud cimport zbud_make
from zcache_core.zsmalloc cimport zsmalloc_make, zsmalloc_prepare

cdef enum:
    KINDS = 3

# In the order of FrameState: the state of a frame is FRAME_TAKEN and its allocator's place here.
ALLOCATORS = ("zbud", "z3fold", "zsmalloc")

ctypedef struct Several:
    Allocator face              # first: an Allocator * is a Several *
    Allocator *kind[KINDS]
    Allocator *chosen           # new pages go here
    Allocator *thinning         # whose frames are taken aside


cdef inline Allocator *owner(Allocator *self, uint64_t frame) noexcept nogil:
    """Whose a taken frame is.  Of a free one: any, and that one sees for itself."""
    cdef uint32_t state = self.arena.frames[frame].state
    if state < FRAME_TAKEN:
        return (<Several *>self).kind[0]
    return (<Several *>self).kind[min(state, <uint32_t>FRAME_ZSMALLOC) - FRAME_TAKEN]


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
    return its.adopt(its, where, bytes)


cdef void several_adopted(Allocator *self) noexcept nogil:
    cdef uint32_t i
    arena_adopt(self.arena)
    for i in range(KINDS):
        (<Several *>self).kind[i].adopted((<Several *>self).kind[i])


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


cdef uint32_t several_thin(Allocator *self) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t frame = NO_FRAME
    cdef Allocator *its
    for i in range(KINDS):
        its = (<Several *>self).kind[i]
        frame = its.thin(its)
        if frame != NO_FRAME:
            (<Several *>self).thinning = its
            break
    return frame


cdef bint several_alloc_packed(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef Allocator *its = (<Several *>self).thinning
    return its.alloc_packed(its, bytes, where)


cdef bint several_put_back(Allocator *self) noexcept nogil:
    cdef Allocator *its = (<Several *>self).thinning
    return its.put_back(its)


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
    if number == 2:
        zsmalloc_prepare(s.chosen)
    s.face.name = s.chosen.name
    s.face.arena = arena
    s.face.cells = cells
    s.face.largest_bytes = s.chosen.largest_bytes
    s.face.frames_at_once = s.chosen.frames_at_once
    s.face.objects_at_once = s.chosen.objects_at_once
    s.face.table_bytes = s.chosen.table_bytes
    s.face.alloc = several_alloc
    s.face.release = several_release
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


cdef uint32_t allocator_broken(Allocator *allocator) noexcept nogil:
    """The number of broken invariants, counters included; slow."""
    cdef Held held
    cdef uint32_t broken
    memset(&held, 0, sizeof(held))
    broken = allocator.check(allocator, &held)
    return broken + wrong_counters(allocator.cells, &held)
