"""Tidying: objects are moved together, so that frames half empty become frames to give back.

    every 0.1 s:  could more than 1/32 of the frames in use be given back?
                  -> take the emptiest frames of an allocator aside, move what is in them to
                     others, give them back; until it is less than 1/64, or nothing goes
    another allocator was chosen?
                  -> the same with every frame of the others

One thread (zc-tidy), outside of the requests' way: it works in bursts of some frames, and while
requests are served it takes a fortieth of one CPU (share.pyx), with the time in which the committer
gives the frames back: that was 103 ms of 159, and each time interrupts all who serve.  (With a twentieth
writers of 128 KiB, which use two CPUs, lost 6 %.)  With nobody there it goes on at
once, and so it does while a write waits for room, or the pool is all but full: then what it frees is
wanted more than what it takes.  Its locks are the ones of every request, held as shortly.

When pages have gone and nothing moves any more, the arena's reserve is brought back to its
usual size too.

Bounds: one frame (or zspage) at a time, some 40 us; no memory of its own but a request slot.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport timespec

from zcache_core.arena cimport NO_FRAME, arena_settle
from zcache_core.core cimport Core
from zcache_core.counter_ids cimport C_COMPACTED_FRAMES, C_COMPACTION_US, C_MIGRATING
from zcache_core.layout cimport HEADER_BYTES
from zcache_core.moving cimport empty_frame
from zcache_core.native cimport zc_load32
from zcache_core.pthread cimport (
    at_us, cond_init, lock_init, lock_take, now_us, pthread_cond_signal, pthread_cond_timedwait,
    pthread_join, pthread_mutex_unlock, thread_start,
)
from zcache_core.ramtier cimport store_wait_ready
from zcache_core.several cimport several_choose
from zcache_core.share cimport REST, Share, requests_done, room_is_wanted, share_also, share_begin, share_rest_us
from zcache_core.slots cimport Slot, count, slot_release, slot_take_own

cdef enum:
    TICK_US = 100000
    START_SHARE = 32            # of the frames in use: worth beginning
    STOP_SHARE = 64
    MOST_REST_US = 200000
    LOOK_US = 20000             # meanwhile, whether room is wanted
    MOST_FAILURES = 64          # frames in a row that could not be emptied: enough for now
    SETTLE_TICKS = 10           # of quiet, before the reserve is brought back to its size


cdef uint32_t frames_in_use(Core *core) noexcept nogil:
    cdef uint32_t n
    lock_take(&core.arena.lock)
    n = core.arena.committed - core.arena.free_count - core.arena.moving
    pthread_mutex_unlock(&core.arena.lock)
    return n


cdef bint tidy_one(Core *core, bint *emptied) noexcept nogil:
    """Empty one frame or zspage; False when there is none that is worth it."""
    cdef Slot *slot
    cdef uint32_t frame
    cdef int64_t start = now_us()
    lock_take(&core.tidy.turn)
    frame = core.allocator.thin(core.allocator)
    if frame != NO_FRAME:
        slot = slot_take_own(&core.slots)
        empty_frame(core, slot, frame)
        emptied[0] = core.allocator.put_back(core.allocator)
        count(slot, C_COMPACTED_FRAMES, emptied[0])
        count(slot, C_COMPACTION_US, <uint64_t>(now_us() - start))
        slot_release(slot)
    pthread_mutex_unlock(&core.tidy.turn)
    return frame != NO_FRAME


cdef uint64_t tidy_all(Core *core) noexcept nogil:
    """All that goes, at once, in the calling thread (outside of a slot); frames or zspages given back."""
    cdef uint64_t done = 0
    cdef uint32_t failures = 0
    cdef bint emptied = False
    store_wait_ready(core)
    while failures < MOST_FAILURES and tidy_one(core, &emptied):
        done += emptied
        failures = 0 if emptied else failures + 1
    arena_settle(&core.arena)
    return done


cdef bint nap(Core *core, int64_t us) noexcept nogil:
    """Sleep; False when the thread is to end."""
    cdef timespec until = at_us(now_us() + us)
    cdef bint go_on
    lock_take(&core.tidy.lock)
    if not core.tidy.stopping:
        pthread_cond_timedwait(&core.tidy.wake, &core.tidy.lock, &until)
    go_on = not core.tidy.stopping
    pthread_mutex_unlock(&core.tidy.lock)
    return go_on


cdef inline bint worth_it(Core *core, uint32_t share) noexcept nogil:
    """Pages are to move to another allocator, or more than 1/share of the frames could be given back."""
    if core.allocator.cells[C_MIGRATING]:
        return True
    return core.allocator.spare(core.allocator) * share > frames_in_use(core)


cdef bint rest(Core *core, int64_t us) noexcept nogil:
    """Not while room is wanted; False when the thread is to end."""
    cdef int64_t piece_us
    while us > 0 and not room_is_wanted(core):
        piece_us = min(us, <int64_t>LOOK_US)
        if not nap(core, piece_us):
            return False
        us -= piece_us
    return not core.tidy.stopping


cdef bint tidy_round(Core *core, Share *share) noexcept nogil:
    """Until little is left to gain; False when the thread is to end."""
    cdef uint32_t failures = 0
    cdef bint emptied = False
    cdef int64_t punching_us = core.arena.punching_us
    while failures < MOST_FAILURES and not core.tidy.paused and worth_it(core, STOP_SHARE):
        share_begin(share)
        if not tidy_one(core, &emptied):
            break
        failures = 0 if emptied else failures + 1
        share_also(share, core.arena.punching_us - punching_us)
        punching_us = core.arena.punching_us
        if not rest(core, share_rest_us(core, share, 2 * REST, MOST_REST_US)):
            return False
    return True


cdef void *tidying(void *argument) noexcept nogil:
    cdef Core *core = <Core *>argument
    cdef uint32_t quiet = 0
    cdef uint64_t seen = 0
    cdef Share share
    memset(&share, 0, sizeof(share))
    while nap(core, TICK_US):
        if not zc_load32(&core.ready) or core.tidy.paused:
            continue
        if worth_it(core, START_SHARE) and not tidy_round(core, &share):
            break
        quiet = quiet + 1 if requests_done(core) == seen else 0
        seen = requests_done(core)
        if quiet == SETTLE_TICKS:
            arena_settle(&core.arena)
    return NULL


cdef void tidy_pause(Core *core, bint paused) noexcept nogil:
    """Move nothing in the background for now, or go on."""
    lock_take(&core.tidy.lock)
    core.tidy.paused = paused
    pthread_cond_signal(&core.tidy.wake)
    pthread_mutex_unlock(&core.tidy.lock)


cdef bint tidy_choose(Core *core, uint32_t number) noexcept nogil:
    """New pages go to ALLOCATORS[number], and old ones will move there; False when there is no memory.

    Outside of a slot.  It waits for one frame to be emptied, at most.
    """
    cdef bint done
    lock_take(&core.tidy.turn)
    done = several_choose(core.allocator, number)
    if done:
        core.crew.room_bytes = core.allocator.largest_bytes - HEADER_BYTES
    pthread_mutex_unlock(&core.tidy.turn)
    return done


cdef int tidy_start(Core *core) noexcept nogil:
    """Start the thread; 0 or an errno."""
    lock_init(&core.tidy.lock)
    cond_init(&core.tidy.wake)
    core.tidy.stopping = False
    if thread_start(&core.tidy.thread, tidying, core, b"zc-tidy") != 0:
        return EAGAIN
    core.tidy.running = True
    return 0


cdef void tidy_stop(Core *core) noexcept nogil:
    if not core.tidy.running:
        return
    lock_take(&core.tidy.lock)
    core.tidy.stopping = True
    pthread_cond_signal(&core.tidy.wake)
    pthread_mutex_unlock(&core.tidy.lock)
    pthread_join(core.tidy.thread, NULL)
    core.tidy.running = False
