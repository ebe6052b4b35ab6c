"""Zspages: chains of frames, the lists they stand on, and what the memory file says of them.

    frame header in the memory file (24 bytes, that of a raw page where the frame holds one)
        word 0     12 (zsmalloc) | place in the chain (4 bits) | frames (8) | bytes of an object
        word 1     next frame (32 bits; all ones: the last) | head (32)

The one who takes a chain writes them, before any entry points there.  Everything here is
called with the allocator's lock held, or, when adopting, before anyone else is there.
See zsmalloc.pyx for the whole.
"""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.allocator cimport Held
from zcache_core.arena cimport FRAME_TAIL, FRAME_TAKEN, FRAME_ZSMALLOC, NO_FRAME, Arena, arena_give, arena_take
from zcache_core.layout cimport BlobHeader
from zcache_core.sizeclass cimport CHAIN_MOST, SizeClass


# ---- lists ------------------------------------------------------------------------------

cdef void link_zspage(Zsmalloc *z, uint32_t head) noexcept nogil:
    """The zspage's number of objects has changed: onto its list."""
    cdef ZsFrame *f = row_of(z, head)
    cdef uint32_t all_places = class_of(z, head).objects
    cdef uint32_t *first
    if f.group == ASIDE:
        return
    f.prev = f.next = NO_FRAME
    f.group = FULL
    if f.objects == all_places:
        return
    f.group = f.objects * GROUPS // all_places
    first = &z.head[f.class_number][f.group]
    f.next = first[0]
    if f.next != NO_FRAME:
        row_of(z, f.next).prev = head
    first[0] = head


cdef void unlink_zspage(Zsmalloc *z, uint32_t head) noexcept nogil:
    cdef ZsFrame *f = row_of(z, head)
    if f.group >= GROUPS:
        return
    if f.prev != NO_FRAME:
        row_of(z, f.prev).next = f.next
    else:
        z.head[f.class_number][f.group] = f.next
    if f.next != NO_FRAME:
        row_of(z, f.next).prev = f.prev


cdef bint all_ephemeral(Zsmalloc *z, uint32_t head) noexcept nogil:
    cdef uint32_t frame = head
    while frame != NO_FRAME:
        if z.bits[frame].used != z.bits[frame].ephemeral:
            return False
        frame = next_in_chain(z, frame)
    return True


# ---- chains -------------------------------------------------------------------------------

cdef uint32_t zspage_open(Zsmalloc *z, uint32_t number) noexcept nogil:
    """A chain of frames for class `number`, on no list; its head, or NO_FRAME."""
    cdef const SizeClass *c = &z.classes.row[number]
    cdef uint32_t chain[CHAIN_MOST + 1]
    cdef uint32_t i
    cdef ZsFrame *f
    cdef BlobHeader *header
    for i in range(c.frames):
        chain[i] = arena_take(z.face.arena)
        if chain[i] == NO_FRAME:
            while i:
                i -= 1
                arena_give(z.face.arena, chain[i])
            return NO_FRAME
    chain[c.frames] = NO_FRAME
    for i in range(c.frames):
        header = z.face.arena.headers + chain[i]
        header.identity = chain_identity(z, c, i)
        header.page_checksum = chain_links(chain[i + 1], chain[0])
        z.bits[chain[i]].used = z.bits[chain[i]].ephemeral = 0
        f = row_of(z, chain[i])
        f.class_number = number
        f.place = i
        f.objects = 0
        f.group = FULL
        f.prev = chain[0]
        f.state = FRAME_TAIL if i else FRAME_ZSMALLOC
    zspages_in(z, number)[0] += 1
    return chain[0]


cdef void zspage_close(Zsmalloc *z, uint32_t head) noexcept nogil:
    cdef uint32_t frame = head
    cdef uint32_t next
    zspages_in(z, row_of(z, head).class_number)[0] -= 1
    if head == z.aside:
        z.aside = NO_FRAME
    while frame != NO_FRAME:
        next = next_in_chain(z, frame)
        arena_give(z.face.arena, frame)
        frame = next


# ---- after a restart -----------------------------------------------------------------------

cdef bint chain_is_whole(Zsmalloc *z, const SizeClass *c, uint32_t head) noexcept nogil:
    """Whether the frame headers tell of a zspage of class `c` that starts there, none of it taken."""
    cdef Arena *arena = z.face.arena
    cdef uint32_t frame = head
    cdef uint32_t place
    for place in range(c.frames):
        if frame >= arena.total or arena.frames[frame].state >= FRAME_TAKEN:
            return False
        if arena.headers[frame].identity != chain_identity(z, c, place):
            return False
        if arena.headers[frame].page_checksum >> 32 != head:
            return False
        frame = next_in_chain(z, frame)
    return frame == NO_FRAME


cdef bint zspage_adopt(Zsmalloc *z, uint32_t frame, uint32_t number) noexcept nogil:
    """The zspage that this frame is of is taken; False when the headers do not tell of a whole one."""
    cdef const SizeClass *c = &z.classes.row[number]
    cdef uint32_t head = <uint32_t>(z.face.arena.headers[frame].page_checksum >> 32)
    cdef uint32_t at = head
    cdef uint32_t place
    cdef ZsFrame *f
    if not chain_is_whole(z, c, head):
        return False
    for place in range(c.frames):
        f = row_of(z, at)
        f.state = FRAME_TAIL if place else FRAME_ZSMALLOC
        f.class_number, f.place, f.objects, f.group, f.prev = number, place, 0, FULL, head
        z.bits[at].used = z.bits[at].ephemeral = 0
        at = next_in_chain(z, at)
    zspages_in(z, number)[0] += 1
    return True


# ---- for tests ---------------------------------------------------------------------------

cdef uint32_t broken_zspage(Zsmalloc *z, uint32_t head, Held *held) noexcept nogil:
    cdef const SizeClass *c = class_of(z, head)
    cdef uint32_t broken = 0
    cdef uint32_t place = 0
    cdef uint32_t objects = 0
    cdef uint32_t frame = head
    cdef uint32_t bits
    while frame != NO_FRAME and place < c.frames:
        broken += row_of(z, frame).state != (FRAME_TAIL if place else FRAME_ZSMALLOC)
        broken += row_of(z, frame).place != place or row_of(z, frame).class_number != row_of(z, head).class_number
        broken += place > 0 and row_of(z, frame).prev != head
        broken += z.face.arena.headers[frame].identity != chain_identity(z, c, place)
        broken += (z.bits[frame].used & ~c.starts[place]) != 0 or (z.bits[frame].ephemeral & ~z.bits[frame].used) != 0
        bits = z.bits[frame].used
        while bits:
            objects += 1
            bits &= bits - 1
        bits = z.bits[frame].ephemeral
        while bits:
            held.ephemeral_pages += 1
            bits &= bits - 1
        place += 1
        frame = next_in_chain(z, frame)
    broken += frame != NO_FRAME or place != c.frames
    broken += objects != row_of(z, head).objects or objects == 0
    broken += row_of(z, head).ephemeral_only != all_ephemeral(z, head)
    held.pages += objects
    held.frames += c.frames
    held.ephemeral_frames += c.frames if row_of(z, head).ephemeral_only else 0
    return broken


cdef uint32_t broken_lists(Zsmalloc *z, uint64_t *in_lists) noexcept nogil:
    cdef uint32_t broken = 0
    cdef uint32_t number, group, head
    for number in range(z.classes.n):
        for group in range(GROUPS):
            head = z.head[number][group]
            while head != NO_FRAME:
                in_lists[0] += 1
                broken += row_of(z, head).group != group or row_of(z, head).class_number != number
                broken += row_of(z, head).objects * GROUPS // class_of(z, head).objects != group
                head = row_of(z, head).next
    return broken


cdef uint32_t zspages_broken(Zsmalloc *z, Held *held) noexcept nogil:
    """Broken invariants: zspages in themselves, lists and numbers against zspages."""
    cdef uint64_t in_lists = 0
    cdef uint64_t with_room = 0
    cdef uint64_t zspages = 0
    cdef uint64_t shared = 0
    cdef uint32_t broken = broken_lists(z, &in_lists)
    cdef uint32_t frame, number
    for frame in range(z.face.arena.total):
        if row_of(z, frame).state != FRAME_ZSMALLOC:
            continue
        if row_of(z, frame).class_number == RAW:
            held.frames += 1
            held.pages += 1
            held.raw_pages += 1
            held.ephemeral_frames += row_of(z, frame).ephemeral_only
            held.ephemeral_pages += row_of(z, frame).ephemeral_only
        else:
            broken += broken_zspage(z, frame, held)
            with_room += row_of(z, frame).group < GROUPS
            broken += (row_of(z, frame).group == ASIDE) != (frame == z.aside)
            zspages += 1
            shared += row_of(z, frame).objects
    broken += in_lists != with_room
    for number in range(z.classes.n):
        zspages -= zspages_in(z, number)[0]
        shared -= objects_in(z, number)[0]
    return broken + (zspages != 0) + (shared != 0)
