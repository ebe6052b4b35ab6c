"""The face that every allocator has: room for one object in a frame of the arena.

    pages -> blob + 24 bytes of header = object -> allocator -> `where` in the arena

An allocator owns the layout inside the frames it has taken and nothing else: no
recency, no index, no codec.  It is a struct of function pointers with the state
behind it.  There is one of each kind on an arena (zbud, z3fold, zsmalloc),
and in front of them one that knows whose a frame is (several.pyx): that one has all
the store's calls.  Every kind must pass the conformance suite in tests/t2_allocators.py.

Whose a frame is stands in its row of the frame table, and for a successor in its header
in the memory file (`frame_open`).

Contract
    alloc     room for `bytes` (header included), at most `largest_bytes`, or exactly
              PAGE_BYTES: a whole frame for a raw page, whose header stands in the
              arena's header table.  False when `frames_at_once` frames are not to be
              had now; the caller waits (arena_wait) and tries again, or gives up.
              The room may go on in a second frame: object_blob and object_fill know.
    release   the room of one object; a frame with nothing left goes back.
    room      bytes of frames that an object of so many bytes really takes: its chunks, or its
              class's share of a zspage.  No lock.
    adopt     after a restart: this room is taken.  False when it cannot be (overlap,
              impossible place): the index entry is damaged.  Then `adopted` once.
    objects   what lives in a frame: at most `most` places and sizes; how many.  Of frames
              that are only freed together all is told for the first, nothing for the others.
    ephemeral an object becomes droppable (+1) or is so no longer (-1); lock HELD by the
              caller, because the entry and the header change with it.
    spare     about how many frames could be given back by moving objects together.
    thin      take frames aside whose objects have room in others: the first of them, or
              NO_FRAME.  Nothing new is placed there; one at a time, by one thread.
    aside     take this frame aside, whatever room there is; False when it holds a raw page,
              or is not the first of those that are freed together.
    alloc_packed    as alloc, in frames in use other than those, of the same allocator.
    put_back  they are as all others again; True when they were emptied, and are gone.
    check     the number of broken invariants (0), for tests; slow.  Adds what it found
              to `held`, which `wrong_counters` compares with the counters.
Every other call takes the lock itself: one lock for all allocators of an arena, which guards
all their state and the shared counter shard.  Lock order: allocator, then arena.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zcache_core.arena cimport FRAME_TAKEN, FRAME_ZSMALLOC, NO_FRAME, Arena, Frame, frame_address
from zcache_core.layout cimport HEADER_BYTES, PAGE_BYTES, PAGE_SHIFT, BlobHeader
from zcache_core.native cimport zc_load32
from zcache_core.pthread cimport pthread_mutex_t

cdef enum:
    SHARED = 8                  # in a frame's header: a raw page's ends in the device's number, below 8

ctypedef struct Held:           # counted by looking at every frame
    uint64_t frames
    uint64_t ephemeral_frames   # of them: those with nothing else
    uint64_t pages
    uint64_t ephemeral_pages    # of them
    uint64_t raw_pages          # of them
    uint64_t buddied            # frames of zbud and z3fold with two buds or more
    uint64_t unbuddied          # and with one

ctypedef struct Allocator:
    const char *name
    Arena *arena
    uint64_t *cells             # counter shard, written under `lock`
    uint32_t largest_bytes      # largest object that shares a frame, header included
    uint64_t table_bytes        # private memory it needs beside the frame table
    uint32_t frames_at_once     # most frames that room for one object may need, and so are freed together
    uint32_t objects_at_once    # most objects in them
    pthread_mutex_t lock        # of the one in front
    pthread_mutex_t *guard      # the same, for those behind it
    uint32_t state              # FrameState of its frames
    bint (*alloc)(Allocator *, uint32_t bytes, uint64_t *where) noexcept nogil
    void (*release)(Allocator *, uint64_t where, uint32_t bytes) noexcept nogil
    uint32_t (*room)(Allocator *, uint32_t bytes) noexcept nogil
    bint (*adopt)(Allocator *, uint64_t where, uint32_t bytes) noexcept nogil
    void (*adopted)(Allocator *) noexcept nogil
    uint32_t (*objects)(Allocator *, uint32_t frame, uint64_t *where, uint32_t *bytes, uint32_t most) noexcept nogil
    uint32_t (*spare)(Allocator *) noexcept nogil
    uint32_t (*thin)(Allocator *) noexcept nogil
    bint (*aside)(Allocator *, uint32_t frame) noexcept nogil
    bint (*alloc_packed)(Allocator *, uint32_t bytes, uint64_t *where) noexcept nogil
    bint (*put_back)(Allocator *) noexcept nogil
    void (*ephemeral)(Allocator *, uint64_t where, uint32_t bytes, int change) noexcept nogil
    uint32_t (*check)(Allocator *, Held *held) noexcept nogil
    void (*discard)(Allocator *) noexcept nogil


cdef inline Frame *frame_open(Allocator *self, uint32_t frame) noexcept nogil:
    """A frame was taken for objects that share it: say whose it is."""
    self.arena.headers[frame].identity = SHARED | self.state
    self.arena.frames[frame].state = self.state
    return &self.arena.frames[frame]

cdef inline uint32_t frame_opener(Arena *arena, uint32_t frame) noexcept nogil:
    """The FrameState that frame_open noted in the memory file; something else if it noted none."""
    return (arena.headers[frame].identity & 0xF) ^ SHARED

cdef inline uint32_t object_bytes(uint32_t length_bytes) noexcept nogil:
    """Room that a blob needs: with its header, or a whole frame for a raw page."""
    return PAGE_BYTES if length_bytes == PAGE_BYTES else length_bytes + HEADER_BYTES

cdef inline BlobHeader *object_header(Arena *arena, uint64_t where, uint32_t length_bytes) noexcept nogil:
    """Where an object's header stands, in one piece always (zsmalloc's objects start at multiples of 32)."""
    if length_bytes == PAGE_BYTES:
        return arena.headers + (where >> PAGE_SHIFT)
    return <BlobHeader *>(arena.base + where)

cdef inline uint32_t bytes_here(uint64_t where, uint32_t length_bytes) noexcept nogil:
    """Bytes of the blob that stand in the frame in which the object starts."""
    cdef uint32_t start = <uint32_t>(where & (PAGE_BYTES - 1)) + HEADER_BYTES
    return length_bytes if length_bytes == PAGE_BYTES else min(length_bytes, PAGE_BYTES - start)

cdef inline uint8_t *blob_start(Arena *arena, uint64_t where, uint32_t length_bytes) noexcept nogil:
    return arena.base + where + (0 if length_bytes == PAGE_BYTES else HEADER_BYTES)

cdef inline uint32_t frame_next(Arena *arena, uint32_t frame) noexcept nogil:
    """The frame in which an object that starts in this one goes on; NO_FRAME when there is none.

    For readers without a lock: what is read may be old, but never leads to a frame without
    memory (unless a taken-over file is still being sorted; then no frame loses it).
    """
    cdef uint32_t next = <uint32_t>arena.headers[frame].page_checksum
    if frame_opener(arena, frame) != FRAME_ZSMALLOC or next >= arena.total:
        return NO_FRAME
    if zc_load32(&arena.held) == 0 and arena.frames[next].state < FRAME_TAKEN:
        return NO_FRAME
    return next

cdef inline const uint8_t *object_blob(
    Arena *arena, uint64_t where, uint32_t length_bytes, uint8_t *buffer
) noexcept nogil:
    """The blob in one piece: where it stands, or, if it goes on in another frame, copied to `buffer`.

    NULL when the object is not there any more.
    """
    cdef uint32_t here = bytes_here(where, length_bytes)
    cdef uint32_t next
    if here == length_bytes:
        return blob_start(arena, where, length_bytes)
    next = frame_next(arena, <uint32_t>(where >> PAGE_SHIFT))
    if next == NO_FRAME:
        return NULL
    memcpy(buffer, blob_start(arena, where, length_bytes), here)
    memcpy(buffer + here, frame_address(arena, next), length_bytes - here)
    return buffer

cdef inline void object_fill(Arena *arena, uint64_t where, uint32_t length_bytes, const uint8_t *blob) noexcept nogil:
    """Write a blob into room that the caller has got from alloc."""
    cdef uint32_t here = bytes_here(where, length_bytes)
    memcpy(blob_start(arena, where, length_bytes), blob, here)
    if here < length_bytes:
        memcpy(
            frame_address(arena, <uint32_t>arena.headers[where >> PAGE_SHIFT].page_checksum),
            blob + here, length_bytes - here,
        )
