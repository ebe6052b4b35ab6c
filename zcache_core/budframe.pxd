"""Where buds stand in one frame of 64 chunks.

    chunk  0 1 2 ...                                              ... 62 63
           +--------------+------------+--------------+------------------+
           | first bud    | middle bud | free         |         last bud |
           +--------------+------------+--------------+------------------+
                            z3fold only

A bud goes first if the first place is free, else last, else in the middle, right behind the
first, so that what is free stays in one run while a frame fills.

    first freed   the gap from 0 to the next bud      last freed    up to the frame's end
    middle freed  the gap between first and last

A raw page is a first bud of all 64 chunks.  All calls with the allocator's lock held; places:
how many buds a frame may hold, 2 or 3.
"""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.arena cimport Frame
from zcache_core.layout cimport CHUNK_BYTES, NCHUNKS, PAGE_BYTES

cdef enum:
    LARGEST_CHUNKS = NCHUNKS - 1
    FIRST = 1                   # bits of Frame.marks: this bud is ephemeral
    MIDDLE = 2
    LAST = 4


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


cdef inline uint32_t gap_of(const Frame *f, uint32_t places) noexcept nogil:
    """Chunks of the largest bud that may be placed here."""
    cdef uint32_t gap = 0
    if f.first_chunks == 0:
        gap = before(f)
    if f.last_chunks == 0:
        gap = max(gap, behind(f))
    if f.first_chunks and f.last_chunks and f.middle_chunks == 0 and places == 3:
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


cdef inline bint take_chunks(Frame *f, uint32_t places, uint32_t start, uint32_t chunks) noexcept nogil:
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
    elif f.middle_chunks or places == 2:
        return False
    else:
        f.middle_chunks = chunks
        f.middle_start = start
    return True


cdef inline uint32_t broken_frame(const Frame *f) noexcept nogil:
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
