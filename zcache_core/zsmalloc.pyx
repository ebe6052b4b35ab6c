"""zsmalloc: objects of one size class side by side in a zspage, a chain of one to eight frames.

    zspage of 3 frames, anywhere in the arena      head          tail          tail
                                                   |0 0 1 1 2 2 3|3 4 4 5 5 6 6|7 7 8 8 9 9 .|

An object may go on in the next frame of its chain, so hardly a byte is left at a frame's
end; sizeclass.pyx has the sizes.  A new object goes to the fullest zspage of its class that
has room, else a chain of frames is taken for a new one.  A zspage with nothing left gives
its frames back.

    list of a zspage with room   head[class][group]: by its share of places in use, in quarters
    frame table                  head: links, class, objects      tail: its head in `prev`
    two words for each frame     one bit for each 128 bytes: an object that starts there is
                                 in use / is ephemeral
    memory file, frame header    class size, place in the chain, next frame and head: readers
                                 without a lock and a successor find the chain there

The words in the frame headers are written when the chain is taken, before any entry points
into it, and stay until nothing does.  A raw page has a frame to itself.

Guarantees: constant time but for the eight frames of a chain; at most 64 objects in a zspage.
What it cannot do: free a frame while one object of its zspage lives, so what has been freed
in pieces is put together again by moving objects (`thin` in allocator.pxd).  8 bytes of
private memory for each frame of the pool.
Source: the idea is that of mm/zsmalloc.c in Linux.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from zcache_core.accounting cimport count_object, enter_class, leave_class
from zcache_core.allocator cimport Allocator, Held
from zcache_core.arena cimport FRAME_TAKEN, FRAME_ZSMALLOC, NO_FRAME, Arena, arena_give, arena_take
from zcache_core.backing cimport back_range
from zcache_core.counter_ids cimport C_RAW_PAGES
from zcache_core.layout cimport PAGE_BYTES, PAGE_SHIFT
from zcache_core.native cimport zc_ctz64
from zcache_core.pthread cimport lock_take, pthread_mutex_t, pthread_mutex_unlock
from zcache_core.sizeclass cimport CHAIN_MOST, CLASS_CELLS, OBJECTS_MOST, SizeClass, class_for, sizeclasses_make
from zcache_core.zspage cimport (
    ASIDE, FULL, GROUPS, RAW, Bits, ZsFrame, Zsmalloc, all_ephemeral, bit_at, class_of, enter, head_of,
    leave, link_zspage, next_in_chain, objects_in, offset_of, row_of, unlink_zspage, zspage_adopt,
    zspage_close, zspage_open, zspages_broken, zspages_in,
)


# ---- room, lock held --------------------------------------------------------------------

cdef bint place_object(Zsmalloc *z, uint32_t number, bint packed, uint64_t *where) noexcept nogil:
    """Room for one object of class `number`; `packed`: in a zspage that is there already."""
    cdef const SizeClass *c = &z.classes.row[number]
    cdef uint32_t head = NO_FRAME
    cdef uint32_t group = GROUPS
    cdef uint32_t frame, room, bit
    while group and head == NO_FRAME:
        group -= 1
        head = z.head[number][group]
    if head != NO_FRAME:
        unlink_zspage(z, head)
        leave(z, head)
    else:
        if not packed:
            head = zspage_open(z, number)
        if head == NO_FRAME:
            return False
    frame = head
    while True:
        room = c.starts[row_of(z, frame).place] & ~z.bits[frame].used
        if room:
            break
        frame = next_in_chain(z, frame)
    bit = zc_ctz64(room)
    z.bits[frame].used |= <uint32_t>1 << bit
    where[0] = (<uint64_t>frame << PAGE_SHIFT) + offset_of(c, row_of(z, frame).place, bit)
    row_of(z, head).objects += 1
    objects_in(z, number)[0] += 1
    row_of(z, head).referenced = 1
    enter(z, head)
    link_zspage(z, head)
    return True


cdef bint place_raw(Zsmalloc *z, uint64_t *where) noexcept nogil:
    cdef uint32_t frame = arena_take(z.face.arena)
    if frame == NO_FRAME:
        return False
    row_of(z, frame).state = FRAME_ZSMALLOC
    row_of(z, frame).class_number = RAW
    row_of(z, frame).ephemeral_only = False
    row_of(z, frame).referenced = 0         # a frame for one page: it leaves early
    z.face.cells[C_RAW_PAGES] += 1
    enter_class(z.face.cells, 1, False)
    where[0] = <uint64_t>frame << PAGE_SHIFT
    return True


# ---- the face -------------------------------------------------------------------------------

cdef bint zsmalloc_alloc(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef bint placed
    lock_take(self.guard)
    if bytes == PAGE_BYTES:
        placed = place_raw(z, where)
    else:
        placed = place_object(z, class_for(&z.classes, bytes), False, where)
    if placed:
        count_object(self.cells, bytes, False, 1)
    pthread_mutex_unlock(self.guard)
    return placed


cdef uint32_t zsmalloc_room(Allocator *self, uint32_t bytes) noexcept nogil:
    cdef const SizeClass *c
    if bytes > self.largest_bytes:
        return PAGE_BYTES
    c = &(<Zsmalloc *>self).classes.row[class_for(&(<Zsmalloc *>self).classes, bytes)]
    return c.frames * PAGE_BYTES // c.objects


cdef void release_raw(Zsmalloc *z, uint32_t frame) noexcept nogil:
    count_object(z.face.cells, PAGE_BYTES, row_of(z, frame).ephemeral_only, -1)
    leave_class(z.face.cells, 1, row_of(z, frame).ephemeral_only)
    z.face.cells[C_RAW_PAGES] -= 1
    arena_give(z.face.arena, frame)


cdef void release_object(Zsmalloc *z, uint64_t where, uint32_t bytes) noexcept nogil:
    cdef Bits *bits = &z.bits[where >> PAGE_SHIFT]
    cdef uint32_t head = head_of(z, <uint32_t>(where >> PAGE_SHIFT))
    unlink_zspage(z, head)
    leave(z, head)
    count_object(z.face.cells, bytes, bits.ephemeral & bit_at(where), -1)
    bits.used &= ~bit_at(where)
    bits.ephemeral &= ~bit_at(where)
    row_of(z, head).objects -= 1
    objects_in(z, row_of(z, head).class_number)[0] -= 1
    if row_of(z, head).objects:
        enter(z, head)
        link_zspage(z, head)
    else:
        zspage_close(z, head)


cdef void zsmalloc_release(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    lock_take(self.guard)
    if bytes == PAGE_BYTES:
        release_raw(<Zsmalloc *>self, <uint32_t>(where >> PAGE_SHIFT))
    else:
        release_object(<Zsmalloc *>self, where, bytes)
    pthread_mutex_unlock(self.guard)


cdef void zsmalloc_ephemeral(Allocator *self, uint64_t where, uint32_t bytes, int change) noexcept nogil:
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef uint32_t frame = <uint32_t>(where >> PAGE_SHIFT)
    cdef uint32_t head = head_of(z, frame)
    count_object(self.cells, bytes, change < 0, -1)
    count_object(self.cells, bytes, change > 0, 1)
    if bytes == PAGE_BYTES:
        leave_class(self.cells, 1, row_of(z, frame).ephemeral_only)
        row_of(z, frame).ephemeral_only = change > 0
        enter_class(self.cells, 1, change > 0)
        return
    leave(z, head)
    z.bits[frame].ephemeral ^= bit_at(where)
    enter(z, head)


# ---- after a restart: single-threaded, before anything is allocated -----------------------------

cdef bint adopt_object(Zsmalloc *z, uint64_t where, uint32_t bytes) noexcept nogil:
    cdef uint32_t frame = <uint32_t>(where >> PAGE_SHIFT)
    cdef uint32_t number = class_for(&z.classes, bytes)
    cdef const SizeClass *c = &z.classes.row[number]
    cdef uint32_t place = z.face.arena.headers[frame].identity >> 4 & 0xF
    cdef ZsFrame *f = row_of(z, frame)
    if bytes > z.classes.largest_bytes or place >= c.frames or not c.starts[place] & bit_at(where):
        return False
    if (where & (PAGE_BYTES - 1)) != offset_of(c, place, zc_ctz64(bit_at(where))):
        return False
    if f.state < FRAME_TAKEN and not zspage_adopt(z, frame, number):
        return False
    if f.state < FRAME_ZSMALLOC or f.class_number != number or f.place != place:
        return False
    if z.bits[frame].used & bit_at(where):
        return False
    leave(z, head_of(z, frame))
    z.bits[frame].used |= bit_at(where)
    row_of(z, head_of(z, frame)).objects += 1
    objects_in(z, number)[0] += 1
    enter(z, head_of(z, frame))
    return True


cdef bint zsmalloc_adopt(Allocator *self, uint64_t where, uint32_t bytes) noexcept nogil:
    """Marks, and leaves the lists to `adopted`."""
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef uint64_t frame = where >> PAGE_SHIFT
    if frame >= self.arena.total:
        return False
    if bytes < PAGE_BYTES:
        if not adopt_object(z, where, bytes):
            return False
    else:
        if self.arena.frames[frame].state >= FRAME_TAKEN or where & (PAGE_BYTES - 1):
            return False
        row_of(z, <uint32_t>frame).state = FRAME_ZSMALLOC
        row_of(z, <uint32_t>frame).class_number = RAW
        row_of(z, <uint32_t>frame).ephemeral_only = False
        self.cells[C_RAW_PAGES] += 1
        enter_class(self.cells, 1, False)
    count_object(self.cells, bytes, False, 1)
    return True


cdef void zsmalloc_adopted(Allocator *self) noexcept nogil:
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef uint32_t frame
    lock_take(self.guard)
    for frame in range(self.arena.total):
        if row_of(z, frame).state == FRAME_ZSMALLOC and row_of(z, frame).class_number != RAW:
            link_zspage(z, frame)
    pthread_mutex_unlock(self.guard)


# ---- emptying zspages -----------------------------------------------------------------------

cdef inline uint64_t free_places(Zsmalloc *z, uint32_t number) noexcept nogil:
    return zspages_in(z, number)[0] * z.classes.row[number].objects - objects_in(z, number)[0]


cdef uint32_t zsmalloc_spare(Allocator *self) noexcept nogil:
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef uint64_t frames = 0
    cdef uint32_t number
    lock_take(self.guard)
    for number in range(z.classes.n):
        frames += free_places(z, number) // z.classes.row[number].objects * z.classes.row[number].frames
    pthread_mutex_unlock(self.guard)
    return <uint32_t>frames


cdef uint32_t zsmalloc_thin(Allocator *self) noexcept nogil:
    """One of the emptiest zspages of a class that has room for its objects in others."""
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef uint32_t step, number, group
    lock_take(self.guard)
    for step in range(z.classes.n):
        number = (z.cursor + step) % z.classes.n
        if z.aside != NO_FRAME or free_places(z, number) < z.classes.row[number].objects:
            continue
        z.cursor = number
        for group in range(GROUPS):
            if z.head[number][group] != NO_FRAME:
                z.aside = z.head[number][group]
                unlink_zspage(z, z.aside)
                row_of(z, z.aside).group = ASIDE
                break
        break
    number = z.aside
    pthread_mutex_unlock(self.guard)
    return number


cdef bint zsmalloc_aside(Allocator *self, uint32_t frame) noexcept nogil:
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef bint taken
    lock_take(self.guard)
    taken = z.aside == NO_FRAME and row_of(z, frame).state == FRAME_ZSMALLOC and row_of(z, frame).class_number != RAW
    if taken:
        unlink_zspage(z, frame)
        z.aside = frame
        row_of(z, frame).group = ASIDE
    pthread_mutex_unlock(self.guard)
    return taken


cdef bint zsmalloc_alloc_packed(Allocator *self, uint32_t bytes, uint64_t *where) noexcept nogil:
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef bint placed
    lock_take(self.guard)
    placed = place_object(z, class_for(&z.classes, bytes), True, where)
    if placed:
        count_object(self.cells, bytes, False, 1)
    pthread_mutex_unlock(self.guard)
    return placed


cdef bint zsmalloc_put_back(Allocator *self) noexcept nogil:
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef bint gone
    lock_take(self.guard)
    gone = z.aside == NO_FRAME
    if not gone:
        row_of(z, z.aside).group = FULL
        link_zspage(z, z.aside)
        z.aside = NO_FRAME
        z.cursor += 1           # its objects would not go: another class next time
    pthread_mutex_unlock(self.guard)
    return gone


# ---- looking -----------------------------------------------------------------------------------

cdef uint32_t zsmalloc_objects(
    Allocator *self, uint32_t frame, uint64_t *where, uint32_t *bytes, uint32_t most
) noexcept nogil:
    """For the head of a zspage all of its objects, with the class's size; for a tail none."""
    cdef Zsmalloc *z = <Zsmalloc *>self
    cdef uint32_t n = 0
    cdef uint32_t at, used
    cdef const SizeClass *c
    lock_take(self.guard)
    if row_of(z, frame).state == FRAME_ZSMALLOC and row_of(z, frame).class_number == RAW and most:
        where[0] = <uint64_t>frame << PAGE_SHIFT
        bytes[0] = PAGE_BYTES
        n = 1
    elif row_of(z, frame).state == FRAME_ZSMALLOC:
        c = class_of(z, frame)
        at = frame
        while at != NO_FRAME:
            used = z.bits[at].used
            while used and n < most:
                where[n] = (<uint64_t>at << PAGE_SHIFT) + offset_of(c, row_of(z, at).place, zc_ctz64(used))
                bytes[n] = c.bytes
                n += 1
                used &= used - 1
            at = next_in_chain(z, at)
    pthread_mutex_unlock(self.guard)
    return n


cdef uint32_t zsmalloc_check(Allocator *self, Held *held) noexcept nogil:
    cdef uint32_t broken
    lock_take(self.guard)
    broken = zspages_broken(<Zsmalloc *>self, held)
    pthread_mutex_unlock(self.guard)
    return broken


cdef void zsmalloc_discard(Allocator *self) noexcept nogil:
    cdef Zsmalloc *z = <Zsmalloc *>self
    munmap(z.bits, <size_t>self.arena.total * sizeof(Bits))
    free(z)


cdef bint zsmalloc_prepare(Allocator *self) noexcept nogil:
    """Before it is chosen for new pages: back its table with memory; False when there is none."""
    return back_range(<uint8_t *>(<Zsmalloc *>self).bits, <uint64_t>self.arena.total * sizeof(Bits)) == 0


cdef void zsmalloc_tell(Allocator *self) noexcept nogil:
    """No zspage yet, whatever a predecessor counted."""
    memset(self.cells + CLASS_CELLS, 0, 2 * (<Zsmalloc *>self).classes.n * sizeof(uint64_t))


cdef Allocator *zsmalloc_make(Arena *arena, uint64_t *cells, pthread_mutex_t *guard) noexcept nogil:
    """A zsmalloc allocator on `arena`; NULL when there is no memory."""
    cdef Zsmalloc *z = <Zsmalloc *>calloc(1, sizeof(Zsmalloc))
    if z == NULL:
        return NULL
    z.bits = <Bits *>mmap(
        NULL, <size_t>arena.total * sizeof(Bits), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    if <void *>z.bits == MAP_FAILED:
        free(z)
        return NULL
    sizeclasses_make(&z.classes)
    z.aside = NO_FRAME
    memset(z.head, 0xFF, sizeof(z.head))        # NO_FRAME
    z.face.name = b"zsmalloc"
    z.face.arena = arena
    z.face.cells = cells
    z.face.guard = guard
    z.face.state = FRAME_ZSMALLOC
    z.face.largest_bytes = z.classes.largest_bytes
    z.face.frames_at_once = CHAIN_MOST
    z.face.objects_at_once = OBJECTS_MOST
    z.face.table_bytes = <uint64_t>arena.total * sizeof(Bits)
    z.face.alloc = zsmalloc_alloc
    z.face.release = zsmalloc_release
    z.face.room = zsmalloc_room
    z.face.adopt = zsmalloc_adopt
    z.face.adopted = zsmalloc_adopted
    z.face.objects = zsmalloc_objects
    z.face.spare = zsmalloc_spare
    z.face.thin = zsmalloc_thin
    z.face.aside = zsmalloc_aside
    z.face.alloc_packed = zsmalloc_alloc_packed
    z.face.put_back = zsmalloc_put_back
    z.face.ephemeral = zsmalloc_ephemeral
    z.face.check = zsmalloc_check
    z.face.discard = zsmalloc_discard
    return &z.face
