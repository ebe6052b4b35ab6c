"""C face of the arena: frames, their table, who takes and gives them."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.backing cimport Backing
from zcache_core.layout cimport BlobHeader
from zcache_core.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t

cdef enum:
    NO_FRAME = 0xFFFFFFFF
    BATCH = 256                 # frames committed or punched under one round: 1 MiB

cdef enum FrameState:
    FRAME_UNCOMMITTED = 0       # no memory behind it
    FRAME_FREE = 1              # committed, in reserve
    FRAME_TAKEN = 2             # from here on: an allocator's
    FRAME_ZBUD = 2              # whose it is
    FRAME_Z3FOLD = 3
    FRAME_ZSMALLOC = 4
    FRAME_TAIL = 5              # zsmalloc's too: a frame of a zspage that is not its first
    FRAME_DICTIONARY = 6        # nobody's: holds a part of a dictionary

cdef enum Held:                 # of a taken-over file
    HELD_UNMAPPED = 1           # who is free is known, but nothing may be punched: frames are being mapped
    HELD_UNKNOWN = 2            # nothing committed, nothing punched

ctypedef struct Frame:          # 16 bytes for each frame, in the server's own locked memory
    uint32_t next               # links of whatever list the frame is on
    uint32_t prev
    uint8_t state               # a FrameState
    uint8_t referenced          # read since the clock hand passed (the store's recency)
    uint8_t ephemeral_only      # the allocator's: every object here may be dropped
    uint8_t marks               # the allocator's own, and so are the next four:
    uint8_t first_chunks        # the buds of zbud and z3fold
    uint8_t last_chunks
    uint8_t middle_chunks
    uint8_t middle_start

ctypedef struct Arena:
    uint8_t *base
    BlobHeader *headers         # for pages kept raw: one per frame, in the memory file
    uint64_t *map               # in the memory file too: a bit per frame, set only if it has memory; under `lock`
    Frame *frames               # by frame number
    uint32_t total              # frames the memory file has room for
    # changed under `lock`; read without it where being a little late does not matter
    uint32_t limit              # most frames that may be committed; falls to `goal` as they go
    uint32_t goal               # what the limit was set to
    uint32_t target             # what use is steered to: goal, or less under memory pressure
    uint32_t reserve            # free frames to keep committed ahead of use
    # guarded by `lock`
    pthread_mutex_t lock
    pthread_cond_t work         # the committer waits here
    pthread_cond_t room         # takers wait here
    uint32_t free_head
    uint32_t free_count
    uint32_t bare_head          # frames given back, by list
    uint32_t bare_from          # and all from this number on, never committed yet
    uint32_t committed
    uint32_t moving             # of them, being committed or punched at this moment
    bint stopping
    bint failing                # no memory is to be had: who needs some is refused at once
    int64_t short_since_us      # memory is short: nothing was committed since; 0: it is not
    int64_t punching_us         # spent on giving memory back, in all
    int64_t punch_after_us      # the kernel refused to take memory back: try again then
    uint32_t held               # atomic: a Held, 0 in the ordinary case
    bint settling               # quiet: the reserve is enough
    bint keep_all               # commit=all: the reserve is the whole pool
    bint squeezed               # memory is short: give back what is not in use
    uint32_t over_waiting       # takers that may take the pool above its target
    uint32_t over_frames        # that one of them needs
    uint64_t *cells             # counter shard, written under `lock`
    Backing backing             # the committer's own
    const char *zoneinfo        # where it learns how much memory is left
    pthread_t thread
    bint running
    void (*quiesce)(void *) noexcept nogil
    void *quiesce_argument

cdef int arena_init(
    Arena *arena, uint8_t *base, BlobHeader *headers, uint64_t *map, uint32_t total, uint64_t *cells
) noexcept nogil
cdef void arena_tell(Arena *arena) noexcept nogil
cdef uint32_t arena_take(Arena *arena) noexcept nogil
cdef bint arena_wait(Arena *arena, uint32_t frames, int64_t deadline_us, bint over) noexcept nogil
cdef void arena_settle(Arena *arena) noexcept nogil
cdef void arena_give(Arena *arena, uint32_t frame) noexcept nogil
cdef bint arena_set_goal(Arena *arena, uint32_t frames, bint can_move) noexcept nogil
cdef void arena_keep_all(Arena *arena) noexcept nogil
cdef void arena_squeeze(Arena *arena, uint32_t target, bint squeezed) noexcept nogil

# for the committer; `lock` held
cdef void publish(Arena *arena) noexcept nogil
cdef uint32_t wanted(Arena *arena) noexcept nogil
cdef uint32_t surplus(Arena *arena) noexcept nogil
cdef void push_free(Arena *arena, uint32_t frame) noexcept nogil

cdef inline bint frame_has_memory(Arena *arena, uint32_t frame) noexcept nogil:
    return arena.map[frame >> 6] >> (frame & 63) & 1

cdef inline void frame_gets_memory(Arena *arena, uint32_t frame) noexcept nogil:
    """Noted after it is there."""
    arena.map[frame >> 6] |= <uint64_t>1 << (frame & 63)

cdef inline void frame_loses_memory(Arena *arena, uint32_t frame) noexcept nogil:
    """Noted before it is gone: at no moment does the map promise what is not there."""
    arena.map[frame >> 6] &= ~(<uint64_t>1 << (frame & 63))

cdef inline uint8_t *frame_address(Arena *arena, uint32_t frame) noexcept nogil:
    return arena.base + (<uint64_t>frame << 12)
