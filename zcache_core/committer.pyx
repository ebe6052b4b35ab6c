"""The committer: the thread that keeps the arena's frames committed ahead of use.

    wanted()  -> claimed off the uncommitted lists -> backed with memory -> free list
    surplus() -> off the free list -> every request inside now has left (quiesce)
              -> punched (MADV_REMOVE) -> back as uncommitted

What is free and how much is wanted is the arena's (arena.pyx).  Here is what takes time:
system calls, one batch at a time, with the arena's lock dropped.  While serving no memory
is asked for that would need reclaim (backing.pyx): then the pool does not grow for now,
looks again every 5 ms, and after 0.1 s writes that need a frame are refused.

Frames that the kernel does not take back (it refuses inside an mlocked mapping) stay on
the free list and are counted; it is tried again after 0.1 s.
"""

from libc.errno cimport EAGAIN, ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from posix.mman cimport MAP_FAILED, munmap
from posix.time cimport timespec

from zcache_core.arena cimport (
    BATCH, FRAME_UNCOMMITTED, NO_FRAME, Arena, Frame, frame_address, frame_gets_memory,
    frame_loses_memory, publish, push_free, surplus, wanted,
)
from zcache_core.backing cimport (
    back_range, backing_close, backing_may, backing_open, backing_round, backing_round_ends,
)
from zcache_core.counter_ids cimport (
    C_COMMIT_FAILURES, C_COMMIT_PAUSES, C_PUNCHED_FRAMES, C_PUNCH_FAILURES,
)
from zcache_core.layout cimport HEADER_BYTES, PAGE_BYTES, PAGE_SHIFT
from zcache_core.pthread cimport (
    at_us, lock_take, now_us, pthread_cond_broadcast, pthread_cond_timedwait,
    pthread_cond_wait, pthread_join, pthread_mutex_unlock, thread_start,
)

cdef extern from "<sys/mman.h>" nogil:
    enum: MADV_REMOVE
    int madvise(void *addr, size_t length, int advice)

cdef enum:
    RETRY_US = 100000           # after the kernel refused memory, or refused to take it back
    # While memory is short: frames committed between two looks at what is left, 64 KiB, about
    # 30 us; how soon to look again; and how long writes wait for it before they are refused.
    STEP = 16
    LOOK_US = 5000
    PATIENCE_US = 100000


cdef int commit_range(Arena *arena, uint32_t first, uint32_t n) noexcept nogil:
    """Back frames [first, first + n) and their headers with memory; 0 or an errno."""
    cdef uint64_t head = <uint64_t>first * HEADER_BYTES // PAGE_BYTES * PAGE_BYTES
    cdef uint64_t tail = (<uint64_t>(first + n) * HEADER_BYTES + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    cdef int error = back_range(<uint8_t *>arena.headers + head, tail - head)
    if error:
        return error
    return back_range(frame_address(arena, first), <uint64_t>n << PAGE_SHIFT)


# ---- one batch up, one batch back ---------------------------------------------------

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


cdef uint32_t run_from(const uint32_t *batch, uint32_t at, uint32_t end) noexcept nogil:
    """How many frames from batch[at] on lie side by side."""
    cdef uint32_t run = 1
    while at + run < end and batch[at + run] == batch[at] + run:
        run += 1
    return run


cdef void note_commit(Arena *arena, bint all_done, bint some_done, bint short) noexcept nogil:
    """Who waits for room must know whether to go on waiting.  Lock held."""
    cdef int64_t now
    if all_done or not short:
        arena.short_since_us = 0
        arena.failing = not all_done
        arena.cells[C_COMMIT_FAILURES] += not all_done
        return
    now = now_us()
    arena.cells[C_COMMIT_PAUSES] += 1
    if some_done or arena.short_since_us == 0:
        arena.short_since_us = now
    arena.failing = now - arena.short_since_us >= PATIENCE_US


cdef bint commit_batch(Arena *arena, uint32_t most, bint careful) noexcept nogil:
    """One round of committing; False when it was not all.  Lock held, and dropped inside.

    `careful`: while serving, only what can be had without waiting for reclaim.
    """
    cdef uint32_t batch[BATCH]
    cdef uint32_t n, i, run
    cdef uint32_t done = 0
    cdef int error = 0
    cdef bint short = False
    n = claim_bare(arena, batch, min(most, BATCH))
    pthread_mutex_unlock(&arena.lock)
    qsort(batch, n, sizeof(uint32_t), by_number)
    if careful:
        backing_round(&arena.backing, BATCH * 2 * PAGE_BYTES)
    while done < n and error == 0:
        run = run_from(batch, done, min(n, done + STEP) if careful else n)
        short = careful and not backing_may(&arena.backing, (run + 2) * <uint64_t>PAGE_BYTES)
        if short:
            break
        error = commit_range(arena, batch[done], run)
        if error == 0:
            done += run
    if careful:
        backing_round_ends(&arena.backing)
    lock_take(&arena.lock)
    arena.moving -= n
    for i in range(done):
        frame_gets_memory(arena, batch[done - 1 - i])
        push_free(arena, batch[done - 1 - i])
    if done < n:
        return_bare(arena, batch + done, n - done)
    note_commit(arena, done == n, done > 0, short)
    publish(arena)
    pthread_cond_broadcast(&arena.room)
    return done == n


cdef void punch_batch(Arena *arena, uint32_t most) noexcept nogil:
    """Give up to `most` free frames back, and up to one batch.  Lock held, and dropped inside."""
    cdef uint32_t batch[BATCH]
    cdef uint32_t kept[BATCH]
    cdef uint32_t n = 0
    cdef uint32_t at = 0
    cdef uint32_t gone = 0
    cdef uint32_t kept_count = 0
    cdef uint32_t run, i
    cdef int64_t start
    while n < min(most, <uint32_t>BATCH) and arena.free_head != NO_FRAME:
        batch[n] = arena.free_head
        arena.free_head = arena.frames[batch[n]].next
        arena.frames[batch[n]].state = FRAME_UNCOMMITTED
        frame_loses_memory(arena, batch[n])
        n += 1
    arena.free_count -= n
    arena.moving += n
    pthread_mutex_unlock(&arena.lock)
    if arena.quiesce != NULL:
        arena.quiesce(arena.quiesce_argument)
    start = now_us()
    qsort(batch, n, sizeof(uint32_t), by_number)
    while at < n:
        run = run_from(batch, at, n)
        if madvise(frame_address(arena, batch[at]), <size_t>run << PAGE_SHIFT, MADV_REMOVE):
            for i in range(at, at + run):
                kept[kept_count] = batch[i]
                kept_count += 1
        else:
            for i in range(at, at + run):
                batch[gone] = batch[i]
                gone += 1
        at += run
    lock_take(&arena.lock)
    arena.punching_us += now_us() - start
    arena.moving -= n
    for i in range(kept_count):     # the memory is still there, and still ours
        frame_gets_memory(arena, kept[kept_count - 1 - i])
        push_free(arena, kept[kept_count - 1 - i])
    return_bare(arena, batch, gone)
    arena.cells[C_PUNCHED_FRAMES] += gone
    arena.cells[C_PUNCH_FAILURES] += kept_count > 0
    arena.punch_after_us = now_us() + RETRY_US if kept_count else 0
    arena.settling &= kept_count == 0
    publish(arena)
    pthread_cond_broadcast(&arena.room)     # who waits may now ask for these to be committed


# ---- the thread ---------------------------------------------------------------------

cdef void *committer(void *argument) noexcept nogil:
    cdef Arena *arena = <Arena *>argument
    cdef timespec until
    lock_take(&arena.lock)
    while not arena.stopping:
        if wanted(arena):
            if not commit_batch(arena, wanted(arena), True):
                until = at_us(now_us() + (LOOK_US if arena.short_since_us else RETRY_US))
                pthread_cond_timedwait(&arena.work, &arena.lock, &until)
        elif surplus(arena) and now_us() >= arena.punch_after_us:
            punch_batch(arena, surplus(arena))
        elif surplus(arena):
            until = at_us(arena.punch_after_us)
            pthread_cond_timedwait(&arena.work, &arena.lock, &until)
        else:
            # What was short is not wanted any more.  Nobody wakes a thread that failed (arena_take).
            arena.failing = False
            arena.short_since_us = 0
            arena.settling = False
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
        good = commit_batch(arena, goal - arena.committed, False)
    pthread_mutex_unlock(&arena.lock)
    return 0 if good else ENOMEM


cdef int arena_start(Arena *arena) noexcept nogil:
    """Start the committer; 0 or an errno."""
    arena.stopping = False
    backing_open(&arena.backing, arena.zoneinfo)
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
    backing_close(&arena.backing)


cdef void arena_free(Arena *arena) noexcept nogil:
    arena_stop(arena)
    if arena.frames != NULL and <void *>arena.frames != MAP_FAILED:
        munmap(arena.frames, <size_t>arena.total * sizeof(Frame))
    arena.frames = NULL
