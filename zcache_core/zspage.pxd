"""C face of zspages: zsmalloc's state, and what is done to one chain of frames.  Lock held, all of it."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.accounting cimport enter_class, leave_class
from zcache_core.allocator cimport SHARED, Allocator, Held
from zcache_core.arena cimport FRAME_TAIL
from zcache_core.layout cimport PAGE_BYTES
from zcache_core.sizeclass cimport CLASS_CELLS, SIZES, STARTS, SizeClass, SizeClasses

cdef enum:
    GROUPS = 4                  # of zspages of a class, by how full they are
    RAW = 255                   # class number of a raw page's frame
    START_BYTES = PAGE_BYTES // STARTS
    FULL = 255                  # group: on no list
    ASIDE = 254                 # being emptied: on no list

ctypedef struct ZsFrame:        # a row of the frame table, as zsmalloc uses it (arena.pxd: Frame)
    uint32_t next
    uint32_t prev               # of a tail: its head
    uint8_t state
    uint8_t referenced
    uint8_t ephemeral_only      # of a head: of the whole zspage
    uint8_t marks
    uint8_t class_number
    uint8_t place               # in the chain
    uint8_t objects             # of a head: in use
    uint8_t group               # of a head: its list

ctypedef struct Bits:           # of one frame: objects that start in it
    uint32_t used
    uint32_t ephemeral

ctypedef struct Zsmalloc:
    Allocator face              # first: an Allocator * is a Zsmalloc *
    SizeClasses classes
    Bits *bits                  # by frame
    uint32_t head[SIZES][GROUPS]
    uint32_t aside              # head of the zspage that is being emptied, or NO_FRAME
    uint32_t cursor             # class at which `thin` looks next


cdef void link_zspage(Zsmalloc *z, uint32_t head) noexcept nogil
cdef void unlink_zspage(Zsmalloc *z, uint32_t head) noexcept nogil
cdef bint all_ephemeral(Zsmalloc *z, uint32_t head) noexcept nogil
cdef uint32_t zspage_open(Zsmalloc *z, uint32_t number) noexcept nogil
cdef void zspage_close(Zsmalloc *z, uint32_t head) noexcept nogil
cdef bint zspage_adopt(Zsmalloc *z, uint32_t frame, uint32_t number) noexcept nogil
cdef uint32_t zspages_broken(Zsmalloc *z, Held *held) noexcept nogil


cdef inline ZsFrame *row_of(Zsmalloc *z, uint32_t frame) noexcept nogil:
    return <ZsFrame *>&z.face.arena.frames[frame]


cdef inline uint32_t head_of(Zsmalloc *z, uint32_t frame) noexcept nogil:
    return row_of(z, frame).prev if row_of(z, frame).state == FRAME_TAIL else frame


cdef inline uint32_t next_in_chain(Zsmalloc *z, uint32_t frame) noexcept nogil:
    return <uint32_t>z.face.arena.headers[frame].page_checksum


cdef inline const SizeClass *class_of(Zsmalloc *z, uint32_t head) noexcept nogil:
    return &z.classes.row[row_of(z, head).class_number]


cdef inline uint64_t *zspages_in(Zsmalloc *z, uint32_t number) noexcept nogil:
    return z.face.cells + CLASS_CELLS + 2 * number


cdef inline uint64_t *objects_in(Zsmalloc *z, uint32_t number) noexcept nogil:
    return z.face.cells + CLASS_CELLS + 2 * number + 1


cdef inline uint32_t bit_at(uint64_t where) noexcept nogil:
    return <uint32_t>1 << ((where & (PAGE_BYTES - 1)) // START_BYTES)


cdef inline uint32_t offset_of(const SizeClass *c, uint32_t place, uint32_t bit) noexcept nogil:
    """Offset in its frame of the object that starts in piece `bit` of frame `place` of a zspage."""
    cdef uint32_t piece = place * PAGE_BYTES + bit * START_BYTES
    return (piece + c.bytes - 1) // c.bytes * c.bytes - place * PAGE_BYTES


cdef inline uint64_t chain_identity(const Zsmalloc *z, const SizeClass *c, uint32_t place) noexcept nogil:
    """First word of a frame's header: whose, place in the chain, frames in it, size of its objects."""
    return SHARED | z.face.state | (place << 4) | (c.frames << 8) | (<uint64_t>c.bytes << 16)


cdef inline uint64_t chain_links(uint32_t next, uint32_t head) noexcept nogil:
    return <uint64_t>head << 32 | next


cdef inline void leave(Zsmalloc *z, uint32_t head) noexcept nogil:
    """Before any change of a zspage's objects."""
    if row_of(z, head).objects:
        leave_class(z.face.cells, class_of(z, head).frames, row_of(z, head).ephemeral_only)


cdef inline void enter(Zsmalloc *z, uint32_t head) noexcept nogil:
    """After it."""
    if row_of(z, head).objects:
        row_of(z, head).ephemeral_only = all_ephemeral(z, head)
        enter_class(z.face.cells, class_of(z, head).frames, row_of(z, head).ephemeral_only)
