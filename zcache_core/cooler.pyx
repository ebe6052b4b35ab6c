"""The cooling thread: one round after another of what is needed most; and who waits for it.

    room short? -> drop ephemeral frames      above high? -> a batch goes down
    every 0.1 s -> the tier's own background work
    the disk was cut short -> what is in RAM is kept there, looked for piece by piece

It works without the GIL and sleeps when nothing is to be done.  Writers wait only when
not one frame is free, and do none of its work, but for one thing: when the tier
stalls, and the thread with it, they drop ephemeral frames themselves.

It is an ordinary thread, but has the class of the threads that serve while any of them waits for
room: else they wait for whoever has the CPU.  In a guest of one CPU that swaps onto itself, after
its server was killed: 0.6 to 1.3 s for the first batch, of 2 MiB, of which the disk took 0.1;
writes waited up to 1.2 s of 1.5, and in other runs were refused.

Bound: a writer waits no longer than its caller says.
Lock: `lock` guards the flags and waits, and is never held across anything else.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport timespec

from zcache_core.backing cimport change_class
from zcache_core.below cimport FRAMES_AT_ONCE, GATHER_BYTES, Tiers
from zcache_core.eviction cimport cool_batch, drop_frames, keep_cut_off, keep_hot, resort
from zcache_core.fullness cimport (
    frames_ephemeral, frames_left, free_target, has_ram_to_spare, must_cool,
)
from zcache_core.native cimport zc_load64, zc_store64
from zcache_core.pthread cimport (
    SCHED_OTHER, at_us, lock_take, now_us, pthread_cond_broadcast, pthread_cond_signal, pthread_cond_timedwait,
    pthread_mutex_unlock, pthread_setschedparam, sched_param,
)
from zcache_core.ramtier cimport store_wait_ready
from zcache_core.slots cimport Slot, slot_park, slot_release, slot_take_own, slot_unpark

cdef enum:
    # A tier with less room gets smaller batches; one frame's time must fit (see gather_batch).
    GATHER_LEAST = FRAMES_AT_ONCE * 4096
    TICK_US = 100000
    WAIT_STEP_US = 20000        # a waiting writer looks again
    # A tier that fails is tried again after 0.1, 0.3, 0.7 and 1.5 s: who waits meets four tries.
    HOPE_US = 1500000


cdef uint64_t batch_bytes(Tiers *t) noexcept nogil:
    """So much goes down at once: an eighth of a small pool, which has to go on meanwhile."""
    return min(<uint64_t>GATHER_BYTES, max(<uint64_t>GATHER_LEAST, <uint64_t>t.core.arena.target * 4096 // 8))


cdef bint has_left(Tiers *t, uint32_t some) noexcept nogil:
    """So many frames or pages left RAM, or became free to: who waits for room has reason to wait on."""
    if some:
        zc_store64(&t.core.lower.moved_us, <uint64_t>now_us())
    return some > 0


cdef bint turn(Tiers *t) noexcept nogil:
    """One round of what is needed most; whether anything moved.  No lock held."""
    cdef uint32_t target = free_target(t)
    cdef uint32_t left = frames_left(t)
    cdef uint64_t most = batch_bytes(t)
    cdef bint moved = False
    cdef Slot *slot
    if t.orders.draining or left < target:
        slot = slot_take_own(&t.core.slots)     # of a small pool 64 frames may be all that is hot
        moved = has_left(
            t, drop_frames(t, FRAMES_AT_ONCE if t.orders.draining else min(<uint32_t>FRAMES_AT_ONCE, 2 * target - left))
        )
        slot_release(slot)
    if must_cool(t) and t.cold.takes(t.cold):
        if not t.cold.has_room(t.cold, most):
            t.cold.tick(t.cold)         # what died meanwhile may do
            if not t.cold.has_room(t.cold, most):
                moved |= resort(t)
            while most > GATHER_LEAST and not t.cold.has_room(t.cold, most):
                most //= 2
        moved |= has_left(t, cool_batch(t, most))
    elif frames_ephemeral(t) and has_ram_to_spare(t) and short_below(t):
        if keep_hot(t, FRAMES_AT_ONCE):
            moved |= resort(t)          # what died there is spread over many segments
    return moved


cdef bint short_below(Tiers *t) noexcept nogil:
    """Whether the next large batch would find no room below, though nothing is the matter there."""
    if t.cold.reason(t.cold) or t.cold.has_room(t.cold, GATHER_BYTES):
        return False
    t.cold.tick(t.cold)
    return not t.cold.has_room(t.cold, GATHER_BYTES)


cdef bint fails_for_long(Tiers *t) noexcept nogil:
    """Whether the tier has failed for longer than a write may wait: then none waits for it."""
    if t.cold.reason(t.cold) == 0:
        zc_store64(<uint64_t *>&t.failing_since_us, 0)
        return False
    if t.failing_since_us == 0:
        zc_store64(<uint64_t *>&t.failing_since_us, <uint64_t>now_us())
    return now_us() - <int64_t>zc_load64(<uint64_t *>&t.failing_since_us) > HOPE_US


cdef void raise_thread(Tiers *t) noexcept nogil:
    """By a writer that waits: its class for the thread, also in the middle of a batch.  Lock held."""
    cdef sched_param param
    if not t.raised and t.policy != SCHED_OTHER:
        param.sched_priority = t.priority
        t.raised = pthread_setschedparam(t.thread, t.policy, &param) == 0


cdef void lower_thread(Tiers *t) noexcept nogil:
    """By the thread itself: an ordinary one again.  Lock held."""
    if t.raised:
        change_class(SCHED_OTHER, 0)
        t.raised = False


cdef void *cooling_thread(void *argument) noexcept nogil:
    cdef Tiers *t = <Tiers *>argument
    cdef timespec until
    cdef int64_t next_tick = 0
    cdef bint moved, walking
    store_wait_ready(t.core)
    lock_take(&t.lock)
    t.raised = False            # by now it is an ordinary one: who waits already raises it again
    while not t.stopping:
        pthread_mutex_unlock(&t.lock)
        moved = turn(t)
        if now_us() >= next_tick:
            t.cold.tick(t.cold)
            fails_for_long(t)
            next_tick = now_us() + TICK_US
        walking = keep_cut_off(t)
        lock_take(&t.lock)
        if t.waiting == 0:
            lower_thread(t)
        if moved:
            t.rounds += 1
            pthread_cond_broadcast(&t.room)
        elif not walking and not t.stopping:
            until = at_us(now_us() + (WAIT_STEP_US if t.waiting else TICK_US))
            pthread_cond_timedwait(&t.work, &t.lock, &until)
    pthread_mutex_unlock(&t.lock)
    return NULL


cdef bint tiers_wait_room(void *tiers, void *slot, int64_t deadline_us) noexcept nogil:
    """Wait until the cooling thread made progress; False when it is too late or hopeless."""
    cdef Tiers *t = <Tiers *>tiers
    cdef int64_t start = now_us()
    cdef timespec until
    cdef bint hope = start < deadline_us
    cdef bint stuck
    cdef uint64_t rounds
    if not hope or not t.running:
        return False
    if frames_ephemeral(t) == 0 and fails_for_long(t):
        return False            # there is nothing to drop, and will not be in time
    lock_take(&t.lock)
    rounds = t.rounds
    t.waiting += 1
    raise_thread(t)
    pthread_cond_signal(&t.work)
    until = at_us(min(deadline_us, start + WAIT_STEP_US))
    if not t.stopping and t.rounds == rounds:
        pthread_cond_timedwait(&t.room, &t.lock, &until)
    t.waiting -= 1
    stuck = t.rounds == rounds
    pthread_mutex_unlock(&t.lock)
    if stuck:
        slot_unpark(<Slot *>slot)           # frames are looked at
        has_left(t, drop_frames(t, FRAMES_AT_ONCE))     # the tier stalls, and the cooling thread with it
        slot_park(<Slot *>slot)
    return True
