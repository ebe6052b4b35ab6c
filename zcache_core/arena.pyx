"""The arena: 4 KiB frames of the memory file, committed ahead of use.

    frame    0 .......................................................... total
             | taken (allocator) | free (reserve) | uncommitted: a hole in the file |
    list       the allocator's     free_head        bare_head, and from bare_from on

A serving thread must never take a page fault: on a machine that swaps onto us the
fault may have to wait for a swap write that only we can complete.  So one
background thread keeps `reserve` frames committed (backing.pyx), as long as that needs
no reclaim, and gives memory back in batches when far more is free:

    taken off the free list -> every request inside now has left (quiesce)
      -> punched (MADV_REMOVE) -> back as uncommitted

A taker that finds the reserve empty below the limit waits for the thread, bounded
by the caller's deadline (arena_wait); at the limit, or while the kernel gives no
memory or has had too little for 0.1 s, it is refused at once.

    0 ........ target .......... goal ......... limit ........ total
      ahead of use | only for a taker that says so | shrinking: given back as it is freed

The pool may be given another limit at any time (`goal`).  A smaller one holds at once
for what is committed anew; `limit` itself comes down with what is given back, so that
committed <= limit is true at every moment.  Under memory pressure the pool is steered
to a `target` below its goal: nothing is committed ahead above it, and what is free
there goes back.  A taker that would be refused otherwise may go above (`over`).

Bounds: committed <= limit, always; free <= 2 * reserve + one batch after the thread
has run, and about the reserve when all has been quiet for a second.  Cost of a frame: 16 bytes here, 24 in the file (used by raw pages).

Lock: `lock` guards lists, counts and flags.  It is a leaf: an allocator may hold
its own lock when it takes or gives a frame; nothing is taken under this one.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap,
)
from posix.time cimport timespec

from zcache_core.counter_ids cimport (
    C_COMMITTED_FRAMES, C_COMMITTED_FRAMES_MAX, C_FREE_FRAMES,
    C_POOL_LIMIT_FRAMES, C_POOL_SET_FRAMES, C_POOL_TARGET_FRAMES,
)
from zcache_core.layout cimport BlobHeader
from zcache_core.pthread cimport (
    at_us, cond_init, lock_init, lock_take, pthread_cond_broadcast, pthread_cond_signal,
    pthread_cond_timedwait, pthread_mutex_unlock,
)

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE

cdef enum:
    # 1/64 of the pool: at 160 MB/s of compressed data coming in, 2 GiB has 0.2 s of reserve
    RESERVE_SHARE = 64
    RESERVE_LEAST = 1024        # 4 MiB
    RESERVE_MOST = 16384        # 64 MiB
    OVER_BATCH = 64             # frames committed at once above the target: two requests of 128 KiB
    # Free frames left while memory is short: punching waits for every request inside, so
    # not for each frame; and a request of 128 KiB must not need the committer.
    SQUEEZE_SLACK = 64


cdef inline uint32_t reserve_for(uint32_t frames) noexcept nogil:
    return min(frames, max(<uint32_t>RESERVE_LEAST, min(<uint32_t>RESERVE_MOST, frames // RESERVE_SHARE)))


cdef int arena_init(
    Arena *arena, uint8_t *base, BlobHeader *headers, uint64_t *map, uint32_t total, uint64_t *cells
) noexcept nogil:
    """An arena of uncommitted frames; 0 or ENOMEM."""
    memset(arena, 0, sizeof(Arena))
    arena.base = base
    arena.headers = headers
    arena.map = map
    arena.total = total
    arena.limit = arena.goal = arena.target = total
    arena.reserve = reserve_for(total)
    arena.free_head = NO_FRAME
    arena.bare_head = NO_FRAME
    arena.cells = cells
    arena.zoneinfo = b"/proc/zoneinfo"
    arena.frames = <Frame *>mmap(
        NULL, <size_t>total * sizeof(Frame), PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0,
    )
    if <void *>arena.frames == MAP_FAILED:
        return ENOMEM
    lock_init(&arena.lock)
    cond_init(&arena.work)
    cond_init(&arena.room)
    return 0


cdef void arena_tell(Arena *arena) noexcept nogil:
    """Its settings, for whoever reads the counters; nothing is written to the file before."""
    arena.cells[C_POOL_LIMIT_FRAMES] = arena.limit
    arena.cells[C_POOL_SET_FRAMES] = arena.goal
    arena.cells[C_POOL_TARGET_FRAMES] = arena.target


# ---- taking and giving, by allocators -------------------------------------------

cdef void publish(Arena *arena) noexcept nogil:
    arena.limit = max(arena.goal, arena.committed)
    arena.cells[C_POOL_LIMIT_FRAMES] = arena.limit
    arena.cells[C_FREE_FRAMES] = arena.free_count
    arena.cells[C_COMMITTED_FRAMES] = arena.committed
    if arena.committed > arena.cells[C_COMMITTED_FRAMES_MAX]:
        arena.cells[C_COMMITTED_FRAMES_MAX] = arena.committed


cdef uint32_t wanted(Arena *arena) noexcept nogil:
    """Frames to commit now.  Lock held."""
    if arena.held == HELD_UNKNOWN:
        return 0
    if arena.free_count < arena.reserve and arena.committed < arena.target:
        return min(arena.reserve - arena.free_count, arena.target - arena.committed)
    if arena.over_waiting and arena.free_count < arena.over_frames and arena.committed < arena.goal:
        return min(<uint32_t>OVER_BATCH, arena.goal - arena.committed)
    return 0


cdef uint32_t surplus(Arena *arena) noexcept nogil:
    """Free frames to give back now.  Lock held."""
    cdef uint32_t n = 0
    if arena.held:
        return 0
    if arena.free_count > 2 * arena.reserve + BATCH:
        n = BATCH
    if arena.settling and arena.free_count > arena.reserve + arena.reserve // 8:
        n = arena.free_count - arena.reserve
    if arena.committed > arena.goal:
        n = max(n, min(arena.free_count, arena.committed - arena.goal))
    if arena.squeezed and arena.free_count > SQUEEZE_SLACK:
        if arena.free_count > arena.reserve + SQUEEZE_SLACK:
            n = max(n, arena.free_count - arena.reserve)
        if arena.committed > arena.target:
            n = max(n, min(arena.free_count - SQUEEZE_SLACK, arena.committed - arena.target))
    return n


cdef uint32_t arena_take(Arena *arena) noexcept nogil:
    """A committed frame, or NO_FRAME at once when the reserve is empty."""
    cdef uint32_t frame
    lock_take(&arena.lock)
    frame = arena.free_head
    if frame != NO_FRAME:
        arena.free_head = arena.frames[frame].next
        arena.free_count -= 1
        arena.frames[frame].state = FRAME_TAKEN
        arena.frames[frame].referenced = 1
        arena.cells[C_FREE_FRAMES] = arena.free_count
    # half empty: enough left while the thread wakes, and not a system call for each frame;
    # after a failure it wakes by itself, or each refused write would make the kernel look for memory
    if arena.free_count * 2 < arena.reserve and arena.committed < arena.target and not arena.failing and not arena.short_since_us:
        pthread_cond_signal(&arena.work)
    pthread_mutex_unlock(&arena.lock)
    return frame


cdef void push_free(Arena *arena, uint32_t frame) noexcept nogil:
    cdef Frame *f = &arena.frames[frame]
    f.state = FRAME_FREE
    f.first_chunks = f.last_chunks = f.middle_chunks = f.middle_start = f.marks = 0
    f.prev = NO_FRAME
    f.next = arena.free_head
    arena.free_head = frame
    arena.free_count += 1


cdef void arena_give(Arena *arena, uint32_t frame) noexcept nogil:
    """Take a frame back from an allocator."""
    lock_take(&arena.lock)
    push_free(arena, frame)
    arena.cells[C_FREE_FRAMES] = arena.free_count
    if surplus(arena):
        pthread_cond_signal(&arena.work)
    pthread_cond_signal(&arena.room)
    pthread_mutex_unlock(&arena.lock)


cdef void arena_settle(Arena *arena) noexcept nogil:
    """It is quiet: give back what is free beyond the reserve, once."""
    lock_take(&arena.lock)
    arena.settling = True
    if surplus(arena):
        pthread_cond_signal(&arena.work)
    pthread_mutex_unlock(&arena.lock)


cdef bint arena_wait(Arena *arena, uint32_t frames, int64_t deadline_us, bint over) noexcept nogil:
    """Wait for that many free frames.  True: try again.  False: full, no memory, or too late.

    `over`: the pool may go above its target for it, up to its goal.
    """
    cdef bint again, late
    cdef timespec until = at_us(deadline_us)
    lock_take(&arena.lock)
    while arena.free_count < frames:
        if arena.failing or not arena.running:
            break
        if arena.committed >= (arena.goal if over else arena.target) and arena.moving == 0 and arena.held != HELD_UNKNOWN:
            break
        arena.over_waiting += over
        arena.over_frames = frames
        if not arena.short_since_us:    # else it looks again by itself
            pthread_cond_signal(&arena.work)
        late = pthread_cond_timedwait(&arena.room, &arena.lock, &until) != 0
        arena.over_waiting -= over
        if late:
            break
    again = arena.free_count >= frames
    pthread_mutex_unlock(&arena.lock)
    return again


# ---- another limit, and memory pressure ---------------------------------------------

cdef bint arena_set_goal(Arena *arena, uint32_t frames, bint can_move) noexcept nogil:
    """Another limit: at once for what is committed anew, step by step for what is.

    False, and nothing has changed, when the memory file has not room for so many, or when
    more are in use and their pages cannot move elsewhere (`can_move`: there is a tier below).
    """
    cdef bint good
    lock_take(&arena.lock)
    good = 0 < frames and frames <= arena.total
    if good and not can_move:
        good = arena.committed - arena.free_count - arena.moving <= frames
    if good:
        arena.goal = frames
        arena.target = min(arena.target, frames) if arena.squeezed else frames
        arena.reserve = frames if arena.keep_all else reserve_for(frames)
        arena.cells[C_POOL_SET_FRAMES] = arena.goal
        arena.cells[C_POOL_TARGET_FRAMES] = arena.target
        publish(arena)
        pthread_cond_signal(&arena.work)
        pthread_cond_broadcast(&arena.room)
    pthread_mutex_unlock(&arena.lock)
    return good


cdef void arena_keep_all(Arena *arena) noexcept nogil:
    """commit=all: the reserve is the whole pool, whatever its limit is."""
    lock_take(&arena.lock)
    arena.keep_all = True
    arena.reserve = arena.goal
    pthread_mutex_unlock(&arena.lock)


cdef void arena_squeeze(Arena *arena, uint32_t target, bint squeezed) noexcept nogil:
    """Steer use to `target` frames (at most the goal); `squeezed`: give back what is free."""
    lock_take(&arena.lock)
    arena.target = min(target, arena.goal)
    arena.squeezed = squeezed
    arena.cells[C_POOL_TARGET_FRAMES] = arena.target
    pthread_cond_signal(&arena.work)
    pthread_cond_broadcast(&arena.room)
    pthread_mutex_unlock(&arena.lock)
