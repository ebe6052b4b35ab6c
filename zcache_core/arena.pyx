"""The arena: 4 KiB frames of the memory file, committed ahead of use.

    frame    0 .......................................................... total
             | taken (allocator) | free (reserve) | uncommitted: a hole in the file |
    list       the allocator's     free_head        bare_head, and from bare_from on

A serving thread must never take a page fault: on a machine that swaps onto us the
fault may have to wait for a swap write that only we can complete.  So one
background thread keeps `reserve` frames committed (MADV_POPULATE_WRITE fills the
page tables too) and gives memory back in batches when far more is free:

    taken off the free list -> every request inside now has left (quiesce)
      -> punched (MADV_REMOVE) -> back as uncommitted

A taker that finds the reserve empty below the limit waits for the thread, bounded
by the caller's deadline (arena_wait); at the limit, or while the kernel gives no
memory, it is refused at once.

    0 ........ target .......... goal ......... limit ........ total
      ahead of use | only for a taker that says so | shrinking: given back as it is freed

The pool may be given another limit at any time (`goal`).  A smaller one holds at once
for what is committed anew; `limit` itself comes down with what is given back, so that
committed <= limit is true at every moment.  Under memory pressure the pool is steered
to a `target` below its goal: nothing is committed ahead above it, and what is free
there goes back.  A taker that would be refused otherwise may go above (`over`).

Bounds: committed <= limit, always; free <= 2 * reserve + one batch after the thread
has run.  Cost of a frame: 16 bytes here, 24 in the file (used by raw pages).

Lock: `lock` guards lists, counts and flags.  It is a leaf: an allocator may hold
its own lock when it takes or gives a frame; nothing is taken under this one.
"""

from libc.errno cimport EAGAIN, EINVAL, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from posix.time cimport timespec

from zcache_core.counter_ids cimport (
    C_COMMIT_FAILURES, C_COMMITTED_FRAMES, C_COMMITTED_FRAMES_MAX, C_FREE_FRAMES,
    C_POOL_LIMIT_FRAMES, C_POOL_SET_FRAMES, C_POOL_TARGET_FRAMES, C_PUNCHED_FRAMES,
)
from zcache_core.layout cimport HEADER_BYTES, PAGE_BYTES, PAGE_SHIFT, BlobHeader
from zcache_core.pthread cimport (
    at_us, cond_init, lock_init, now_us, pthread_cond_broadcast, pthread_cond_signal,
    pthread_cond_timedwait, pthread_cond_wait, pthread_join, lock_take,
    pthread_mutex_unlock, thread_start,
)

cdef extern from *:
    """
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23      /* Linux 5.14 */
    #endif
    static void zc_touch(volatile unsigned char *p) { __atomic_fetch_or(p, 0, __ATOMIC_RELAXED); }
    """
    void zc_touch(uint8_t *p) nogil

cdef extern from "<sys/mman.h>" nogil:
    enum: MADV_REMOVE, MADV_POPULATE_WRITE, MAP_POPULATE
    int madvise(void *addr, size_t length, int advice)

cdef enum:
    BATCH = 256                 # frames committed or punched under one round: 1 MiB
    # 1/64 of the pool: at 160 MB/s of compressed data coming in, 2 GiB has 0.2 s of reserve
    RESERVE_SHARE = 64
    RESERVE_LEAST = 1024        # 4 MiB
    RESERVE_MOST = 16384        # 64 MiB
    RETRY_US = 100000           # after the kernel refused memory
    OVER_BATCH = 64             # frames committed at once above the target: two requests of 128 KiB
    # Free frames left while memory is short: punching waits for every request inside, so
    # not for each frame; and a request of 128 KiB must not need the committer.
    SQUEEZE_SLACK = 64


cdef int populate(uint8_t *start, uint64_t length_bytes) noexcept nogil:
    """Back a range with memory, writable, in this process's page tables; 0 or an errno."""
    cdef uint64_t at = 0
    if madvise(start, length_bytes, MADV_POPULATE_WRITE) == 0:
        return 0
    if errno != EINVAL:
        return errno
    while at < length_bytes:
        zc_touch(start + at)
        at += PAGE_BYTES
    return 0


cdef int commit_range(Arena *arena, uint32_t first, uint32_t n) noexcept nogil:
    """Back frames [first, first + n) and their headers with memory; 0 or an errno."""
    cdef uint64_t head = <uint64_t>first * HEADER_BYTES // PAGE_BYTES * PAGE_BYTES
    cdef uint64_t tail = (<uint64_t>(first + n) * HEADER_BYTES + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    cdef int error = populate(<uint8_t *>arena.headers + head, tail - head)
    if error:
        return error
    return populate(frame_address(arena, first), <uint64_t>n << PAGE_SHIFT)


cdef inline uint32_t reserve_for(uint32_t frames) noexcept nogil:
    return min(frames, max(<uint32_t>RESERVE_LEAST, min(<uint32_t>RESERVE_MOST, frames // RESERVE_SHARE)))


cdef int arena_init(Arena *arena, uint8_t *base, BlobHeader *headers, uint32_t total, uint64_t *cells) noexcept nogil:
    """An arena of uncommitted frames; 0 or ENOMEM."""
    memset(arena, 0, sizeof(Arena))
    arena.base = base
    arena.headers = headers
    arena.total = total
    arena.limit = arena.goal = arena.target = total
    arena.reserve = reserve_for(total)
    arena.free_head = NO_FRAME
    arena.bare_head = NO_FRAME
    arena.cells = cells
    arena.frames = <Frame *>mmap(
        NULL, <size_t>total * sizeof(Frame), PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0,
    )
    if <void *>arena.frames == MAP_FAILED:
        return ENOMEM
    lock_init(&arena.lock)
    cond_init(&arena.work)
    cond_init(&arena.room)
    cells[C_POOL_LIMIT_FRAMES] = cells[C_POOL_SET_FRAMES] = cells[C_POOL_TARGET_FRAMES] = total
    return 0


cdef void arena_free(Arena *arena) noexcept nogil:
    arena_stop(arena)
    if arena.frames != NULL and <void *>arena.frames != MAP_FAILED:
        munmap(arena.frames, <size_t>arena.total * sizeof(Frame))
    arena.frames = NULL


# ---- taking and giving, by allocators -------------------------------------------

cdef inline void publish(Arena *arena) noexcept nogil:
    arena.limit = max(arena.goal, arena.committed)
    arena.cells[C_POOL_LIMIT_FRAMES] = arena.limit
    arena.cells[C_FREE_FRAMES] = arena.free_count
    arena.cells[C_COMMITTED_FRAMES] = arena.committed
    if arena.committed > arena.cells[C_COMMITTED_FRAMES_MAX]:
        arena.cells[C_COMMITTED_FRAMES_MAX] = arena.committed


cdef uint32_t wanted(Arena *arena) noexcept nogil:
    """Frames to commit now.  Lock held."""
    if arena.held:
        return 0
    if arena.free_count < arena.reserve and arena.committed < arena.target:
        return min(arena.reserve - arena.free_count, arena.target - arena.committed)
    if arena.over_waiting and arena.free_count == 0 and arena.committed < arena.goal:
        return min(<uint32_t>OVER_BATCH, arena.goal - arena.committed)
    return 0


cdef uint32_t surplus(Arena *arena) noexcept nogil:
    """Free frames to give back now.  Lock held."""
    cdef uint32_t n = 0
    if arena.free_count > 2 * arena.reserve + BATCH:
        n = BATCH
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
    if arena.free_count * 2 < arena.reserve and arena.committed < arena.target and not arena.failing:
        pthread_cond_signal(&arena.work)
    pthread_mutex_unlock(&arena.lock)
    return frame


cdef void push_free(Arena *arena, uint32_t frame) noexcept nogil:
    cdef Frame *f = &arena.frames[frame]
    f.state = FRAME_FREE
    f.first_chunks = 0
    f.last_chunks = 0
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


cdef bint arena_wait(Arena *arena, int64_t deadline_us, bint over) noexcept nogil:
    """Wait for a free frame.  True: try again.  False: full, no memory, or too late.

    `over`: the pool may go above its target for it, up to its goal.
    """
    cdef bint again, late
    cdef timespec until = at_us(deadline_us)
    lock_take(&arena.lock)
    while arena.free_count == 0:
        if arena.failing or not arena.running:
            break
        if arena.committed >= (arena.goal if over else arena.target) and arena.moving == 0:
            break
        arena.over_waiting += over
        pthread_cond_signal(&arena.work)
        late = pthread_cond_timedwait(&arena.room, &arena.lock, &until) != 0
        arena.over_waiting -= over
        if late:
            break
    again = arena.free_count > 0
    pthread_mutex_unlock(&arena.lock)
    return again


# ---- the committer ----------------------------------------------------------------

cdef uint32_t claim_bare(Arena *arena, uint32_t *batch, uint32_t most) noexcept nogil:
    """Take up to `most` uncommitted frames off their lists; how many.  Lock held."""
    cdef uint32_t n = 0
    most = min(most, arena.goal - arena.committed) if arena.committed < arena.goal else 0
    while n < most and arena.bare_head != NO_FRAME:
        batch[n] = arena.bare_head
        arena.bare_head = arena.frames[batch[n]].next
        n += 1
    while n < most and arena.bare_from < arena.total:
        batch[n] = arena.bare_from
        arena.bare_from += 1
        n += 1
    arena.committed += n            # claimed: nobody commits past the limit meanwhile
    arena.moving += n
    return n


cdef int by_number(const void *a, const void *b) noexcept nogil:
    cdef uint32_t x = (<const uint32_t *>a)[0]
    cdef uint32_t y = (<const uint32_t *>b)[0]
    return (x > y) - (x < y)


cdef void return_bare(Arena *arena, const uint32_t *batch, uint32_t n) noexcept nogil:
    """Frames without memory go on the uncommitted list.  Lock held."""
    cdef uint32_t i
    cdef Frame *f
    for i in range(n):
        f = &arena.frames[batch[n - 1 - i]]
        f.state = FRAME_UNCOMMITTED
        f.next = arena.bare_head
        arena.bare_head = batch[n - 1 - i]
    arena.committed -= n


cdef bint commit_batch(Arena *arena, uint32_t most) noexcept nogil:
    """One round of committing; False when the kernel refused.  Lock held, and dropped inside."""
    cdef uint32_t batch[BATCH]
    cdef uint32_t n, i, run
    cdef uint32_t done = 0
    cdef int error = 0
    n = claim_bare(arena, batch, min(most, BATCH))
    pthread_mutex_unlock(&arena.lock)
    qsort(batch, n, sizeof(uint32_t), by_number)
    while done < n and error == 0:
        run = 1
        while done + run < n and batch[done + run] == batch[done] + run:
            run += 1
        error = commit_range(arena, batch[done], run)
        if error == 0:
            done += run
    lock_take(&arena.lock)
    arena.moving -= n
    for i in range(done):
        push_free(arena, batch[done - 1 - i])
    if done < n:
        return_bare(arena, batch + done, n - done)
        arena.cells[C_COMMIT_FAILURES] += 1
    arena.failing = done < n
    publish(arena)
    pthread_cond_broadcast(&arena.room)
    return done == n


cdef void punch_batch(Arena *arena, uint32_t most) noexcept nogil:
    """Give up to `most` free frames back, and up to one batch.  Lock held, and dropped inside."""
    cdef uint32_t batch[BATCH]
    cdef uint32_t n = 0
    cdef uint32_t run
    cdef uint32_t at = 0
    while n < min(most, <uint32_t>BATCH) and arena.free_head != NO_FRAME:
        batch[n] = arena.free_head
        arena.free_head = arena.frames[batch[n]].next
        arena.frames[batch[n]].state = FRAME_UNCOMMITTED
        n += 1
    arena.free_count -= n
    arena.moving += n
    pthread_mutex_unlock(&arena.lock)
    if arena.quiesce != NULL:
        arena.quiesce(arena.quiesce_argument)
    qsort(batch, n, sizeof(uint32_t), by_number)
    while at < n:
        run = 1
        while at + run < n and batch[at + run] == batch[at] + run:
            run += 1
        madvise(frame_address(arena, batch[at]), <size_t>run << PAGE_SHIFT, MADV_REMOVE)
        at += run
    lock_take(&arena.lock)
    arena.moving -= n
    return_bare(arena, batch, n)
    arena.cells[C_PUNCHED_FRAMES] += n
    publish(arena)
    pthread_cond_broadcast(&arena.room)     # who waits may now ask for these to be committed


cdef void *committer(void *argument) noexcept nogil:
    cdef Arena *arena = <Arena *>argument
    cdef timespec until
    lock_take(&arena.lock)
    while not arena.stopping:
        if wanted(arena):
            if not commit_batch(arena, wanted(arena)):
                until = at_us(now_us() + RETRY_US)
                pthread_cond_timedwait(&arena.work, &arena.lock, &until)
        elif surplus(arena):
            punch_batch(arena, surplus(arena))
        else:
            pthread_cond_wait(&arena.work, &arena.lock)
    pthread_mutex_unlock(&arena.lock)
    return NULL


cdef int arena_commit_now(Arena *arena, uint32_t frames) noexcept nogil:
    """Commit that many frames before returning; 0 or ENOMEM."""
    cdef uint32_t goal
    cdef bint good = True
    lock_take(&arena.lock)
    goal = min(arena.goal, arena.committed + frames)
    while good and arena.committed < goal:
        good = commit_batch(arena, goal - arena.committed)
    pthread_mutex_unlock(&arena.lock)
    return 0 if good else ENOMEM


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


cdef int arena_start(Arena *arena) noexcept nogil:
    """Start the committer; 0 or an errno."""
    arena.stopping = False
    if thread_start(&arena.thread, committer, arena, b"zc-commit") != 0:
        return EAGAIN
    arena.running = True
    return 0


cdef void arena_stop(Arena *arena) noexcept nogil:
    if not arena.running:
        return
    lock_take(&arena.lock)
    arena.stopping = True
    arena.running = False
    pthread_cond_broadcast(&arena.work)
    pthread_cond_broadcast(&arena.room)
    pthread_mutex_unlock(&arena.lock)
    pthread_join(arena.thread, NULL)


cdef void arena_adopt(Arena *arena) noexcept nogil:
    """After a rebuild marked the taken frames: all others lose their memory.

    The predecessor's reserve and whatever it was writing when it died lie there.  Those
    that are taken have memory, but this process has no page tables for them yet.
    """
    cdef uint32_t i = 0
    cdef uint32_t start
    cdef uint32_t taken = 0
    lock_take(&arena.lock)
    arena.bare_from = arena.total
    arena.bare_head = NO_FRAME
    while i < arena.total:
        start = i
        while i < arena.total and arena.frames[i].state != FRAME_TAKEN:
            i += 1
        if i > start:
            madvise(frame_address(arena, start), <size_t>(i - start) << PAGE_SHIFT, MADV_REMOVE)
        start = i
        while i < arena.total and arena.frames[i].state == FRAME_TAKEN:
            taken += 1
            i += 1
        if i > start and commit_range(arena, start, i - start):
            arena.cells[C_COMMIT_FAILURES] += 1
    for i in range(arena.total):
        start = arena.total - 1 - i
        if arena.frames[start].state != FRAME_TAKEN:
            arena.frames[start].state = FRAME_UNCOMMITTED
            arena.frames[start].next = arena.bare_head
            arena.bare_head = start
    arena.committed = taken
    arena.held = False
    publish(arena)
    pthread_cond_signal(&arena.work)
    pthread_mutex_unlock(&arena.lock)
