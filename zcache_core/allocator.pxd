"""The face that every allocator has: room for one object in a frame of the arena.

    pages -> blob + 24 bytes of header = object -> allocator -> `where` in the arena

An allocator owns the layout inside the frames it has taken and nothing else: no
recency, no index, no codec.  It is a struct of function pointers with the state
behind it, made by `zbud_make` (later z3fold, zsmalloc), and every one must pass
the conformance suite in tests/t2_allocators.py.

Contract
    alloc     room for `bytes` (header included), at most `largest_bytes`, or exactly
              PAGE_BYTES: a whole frame for a raw page, whose header stands in the
              arena's header table.  False when no frame is to be had now; the
              caller waits (arena_wait) and tries again, or gives up.
    release   the room of one object; a frame with nothing left goes back.
    adopt     after a restart: this room is taken.  False when it cannot be (overlap,
              impossible place): the index entry is damaged.  Then `adopted` once.
    objects   what lives in a frame: at most `most` places and sizes; how many.
    ephemeral an object becomes droppable (+1) or is so no longer (-1); lock HELD by the
              caller, because the entry and the header change with it.
    check     the number of broken invariants (0), for tests; slow.
Every other call takes the allocator's own `lock` itself, which guards all its state and
the shared counter shard.  Lock order: allocator, then arena.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.arena cimport Arena, frame_address
from zcache_core.layout cimport HEADER_BYTES, PAGE_BYTES, PAGE_SHIFT, BlobHeader
from zcache_core.pthread cimport pthread_mutex_t

ctypedef struct Allocator:
    const char *name
    Arena *arena
    uint64_t *cells             # counter shard, written under `lock`
    uint32_t largest_bytes      # largest object that shares a frame, header included
    pthread_mutex_t lock
    bint (*alloc)(Allocator *, uint32_t bytes, uint64_t *where) noexcept nogil
    void (*release)(Allocator *, uint64_t where, uint32_t bytes) noexcept nogil
    bint (*adopt)(Allocator *, uint64_t where, uint32_t bytes) noexcept nogil
    void (*adopted)(Allocator *) noexcept nogil
    uint32_t (*objects)(Allocator *, uint32_t frame, uint64_t *where, uint32_t *bytes, uint32_t most) noexcept nogil
    void (*ephemeral)(Allocator *, uint64_t where, uint32_t bytes, int change) noexcept nogil
    uint32_t (*check)(Allocator *) noexcept nogil
    void (*discard)(Allocator *) noexcept nogil


cdef inline uint32_t object_bytes(uint32_t length_bytes) noexcept nogil:
    """Room that a blob needs: with its header, or a whole frame for a raw page."""
    return PAGE_BYTES if length_bytes == PAGE_BYTES else length_bytes + HEADER_BYTES

cdef inline BlobHeader *object_header(Arena *arena, uint64_t where, uint32_t length_bytes) noexcept nogil:
    if length_bytes == PAGE_BYTES:
        return arena.headers + (where >> PAGE_SHIFT)
    return <BlobHeader *>(arena.base + where)

cdef inline uint8_t *object_blob(Arena *arena, uint64_t where, uint32_t length_bytes) noexcept nogil:
    return arena.base + where + (0 if length_bytes == PAGE_BYTES else HEADER_BYTES)
