"""Tiers: what leaves RAM and when, and what comes back.

                 high %          all of the pool
    +---------------+-----------------+
    | persistent    |  ephemeral      |  free, kept at 1/32 by dropping ephemeral frames
    +---------------+-----------------+
    above high: the coldest persistent frames are copied down in batches until low

One thread, the cooling thread, does all of it, without the GIL: it picks cold frames
(whole ones, so that a frame is really freed), copies their pages down, and flips
them to ephemeral; their RAM copies stay, to be read, until room is needed, and are
then dropped without any I/O. It also has the tier tidy itself up. Writers only
wait when not one frame is free, and do none of this work, but for one thing: when the
tier stalls, and the thread with it, they drop ephemeral frames themselves.

A page that is read from below is only given a RAM copy when it is read a second
time within the next 2 * pool reads from below (`ghosts` remembers): a scan of the
whole device cannot push the hot pages out.

Bounds: one batch (1 MiB, 512 pages) on its way at a time; a writer waits no longer
than its caller says.
Locks: `lock` guards the flags and waits, and is never held across anything else;
`dropping` is held while ephemeral frames are chosen and dropped.
"""

import os

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
cimport cython
from libc.errno cimport EILSEQ, EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport timespec

from zcache_core.codec cimport codec_decompress
from zcache_core.cold cimport COLD_BATCH, COLD_CAPSULE, ColdPage, ColdTier
from zcache_core.cooling cimport (
    copy_for_below, copy_moved, drop_ram_copy, make_ephemeral, page_at, promote, still_needed,
)
from zcache_core.core cimport Core
from zcache_core.counter_ids cimport (
    C_COLD_LOADS, C_DISK_CLEANED_BYTES, C_DISK_CORRUPT_PAGES, C_DISK_READ_ERRORS, C_EPH_PAGEFRAMES,
    C_EVICTED_EPH_PAGEFRAMES, C_FAILED_WRITEBACK_PAGES,
    C_OUTSTANDING_WRITEBACK_PAGES, C_OVERTAKEN_WRITEBACK_PAGES, C_POOL_WAIT_US, C_POOL_WAITS,
    C_PROMOTED_PAGES, C_WRITTEN_BACK_PAGES,
)
from zcache_core.disk cimport SEGMENT_BYTES, disk_discard, disk_make
from zcache_core.index cimport entry_load
from zcache_core.layout cimport (
    COUNTER_CELLS, PAGE_BYTES, ST_RAM_EPHEMERAL, Entry, codec_of, length_of, state_of, version_of,
    where_of,
)
from zcache_core.native cimport zc_add64, zc_load64, zc_store64
from zcache_core.orders cimport orders_hear, orders_tell
from zcache_core.pthread cimport (
    at_us, cond_init, lock_init, lock_take, now_us, pthread_cond_broadcast, pthread_cond_signal,
    pthread_cond_timedwait, pthread_join, pthread_mutex_unlock, thread_start,
)
from zcache_core.ramtier cimport store_victims, store_wait_ready
from zcache_core.slots cimport SLOTS, Slot, count, slot_park, slot_release, slot_take, slot_unpark
from zcache_core.store cimport Store

from zcache_core.errors import ConfigError, MemoryFileError

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE

cdef enum:
    FRAMES_AT_ONCE = 64         # victims looked at in one slot's time
    MOST_OBJECTS = 64           # in one frame, of any allocator
    # A tier with less room gets smaller batches; one frame's time must fit (see gather_batch).
    GATHER_LEAST = FRAMES_AT_ONCE * 4096
    TICK_US = 100000
    FREE_SHARE = 32             # of the pool is kept free of ephemeral frames
    FREE_MOST = 8192
    WAIT_STEP_US = 20000        # a waiting writer looks again


# ---- how full --------------------------------------------------------------------------

cdef uint32_t frames_taken(Tiers *t) noexcept nogil:
    """Frames in use by the allocator."""
    cdef uint32_t taken
    lock_take(&t.core.arena.lock)
    taken = t.core.arena.committed - t.core.arena.free_count - t.core.arena.moving
    pthread_mutex_unlock(&t.core.arena.lock)
    return taken


cdef inline uint64_t frames_ephemeral(Tiers *t) noexcept nogil:
    return zc_load64(&t.core.slots.shared[C_EPH_PAGEFRAMES])


cdef inline uint64_t frames_persistent(Tiers *t) noexcept nogil:
    cdef int64_t n = <int64_t>frames_taken(t) - <int64_t>frames_ephemeral(t)
    return <uint64_t>n if n > 0 else 0


cdef inline uint32_t frames_left(Tiers *t) noexcept nogil:
    cdef uint32_t taken = frames_taken(t)
    return t.core.arena.limit - taken if t.core.arena.limit > taken else 0


cdef inline uint32_t free_target(Tiers *t) noexcept nogil:
    return min(<uint32_t>FREE_MOST, t.core.arena.limit // FREE_SHARE + 4)


cdef bint must_cool(Tiers *t) noexcept nogil:
    """Above high until low; or nothing left to drop while room is short."""
    cdef uint64_t now = frames_persistent(t) * 100
    if t.orders.draining:
        return frames_persistent(t) > 0
    if now > <uint64_t>t.core.arena.limit * t.orders.high_percent:
        t.cooling = True
    elif now <= <uint64_t>t.core.arena.limit * t.orders.low_percent:
        t.cooling = False
    return t.cooling or t.waiting > 0 and frames_ephemeral(t) == 0


# ---- down -------------------------------------------------------------------------------

cdef uint32_t gather_batch(Tiers *t, uint64_t most_bytes) noexcept nogil:
    """Copy the pages of cold frames together; how many.  Inside a slot, so no frame is punched."""
    cdef uint32_t frames[FRAMES_AT_ONCE]
    cdef uint64_t where[MOST_OBJECTS]
    cdef uint32_t bytes[MOST_OBJECTS]
    cdef uint32_t found, objects, i, j
    cdef uint32_t n = 0
    cdef uint64_t filled = 0
    cdef Slot *slot = slot_take(&t.core.slots)
    while n + 2 * FRAMES_AT_ONCE <= COLD_BATCH and filled + FRAMES_AT_ONCE * PAGE_BYTES <= most_bytes:
        found = store_victims(t.core, frames, FRAMES_AT_ONCE, False)
        for i in range(found):
            objects = t.core.allocator.objects(t.core.allocator, frames[i], where, bytes, MOST_OBJECTS)
            for j in range(objects):
                if n < COLD_BATCH and filled + PAGE_BYTES <= most_bytes and copy_for_below(
                    t.core, where[j], bytes[j], &t.batch[n], &t.entries[n], t.gathered + filled
                ):
                    filled += length_of(t.entries[n].location)
                    n += 1
        if found < FRAMES_AT_ONCE:
            break
    slot_release(slot)
    return n


cdef uint32_t cool_batch(Tiers *t, uint64_t most_bytes) noexcept nogil:
    """One batch of cold pages becomes ephemeral; how many did."""
    cdef uint32_t n = gather_batch(t, most_bytes)
    cdef uint32_t i
    cdef uint32_t done = 0
    if n == 0:
        return 0
    t.cells[C_OUTSTANDING_WRITEBACK_PAGES] = n
    t.cold.put(t.cold, t.batch, n)
    for i in range(n):
        if t.batch[i].error:
            t.cells[C_FAILED_WRITEBACK_PAGES] += 1
        elif make_ephemeral(t.core, t.batch[i].page, t.entries[i], t.batch[i].where):
            done += 1
        else:
            t.cells[C_OVERTAKEN_WRITEBACK_PAGES] += 1
            t.cold.drop(t.cold, t.batch[i].where, length_of(t.batch[i].length_codec))
    t.cells[C_WRITTEN_BACK_PAGES] += done
    t.cells[C_OUTSTANDING_WRITEBACK_PAGES] = 0
    return done


cdef uint32_t drop_frames(Tiers *t, uint32_t most) noexcept nogil:
    """Up to `most` ephemeral frames lose their pages, coldest first; how many.  No I/O.

    The caller is inside a slot.
    """
    cdef uint32_t frames[FRAMES_AT_ONCE]
    cdef uint64_t where[MOST_OBJECTS]
    cdef uint32_t bytes[MOST_OBJECTS]
    cdef uint32_t objects, i, j, page, found
    cdef uint32_t dropped = 0
    cdef bint one
    cdef Entry e
    lock_take(&t.dropping)
    found = store_victims(t.core, frames, min(most, <uint32_t>FRAMES_AT_ONCE), True) if frames_ephemeral(t) else 0
    for i in range(found):
        one = False
        objects = t.core.allocator.objects(t.core.allocator, frames[i], where, bytes, MOST_OBJECTS)
        for j in range(objects):
            page = page_at(t.core, where[j], bytes[j])
            if page >= t.core.index.pages:
                continue
            e = entry_load(&t.core.index, page)
            if state_of(e.version) == ST_RAM_EPHEMERAL and where_of(e.location) == where[j]:
                one |= drop_ram_copy(t.core, page, e, t.cold.state)
        dropped += one
    t.cells[C_EVICTED_EPH_PAGEFRAMES] += dropped
    pthread_mutex_unlock(&t.dropping)
    return dropped


# ---- tidying the tier ---------------------------------------------------------------------

cdef bint resort(Tiers *t) noexcept nogil:
    """Write the living objects of the emptiest segment anew; whether any moved."""
    cdef uint32_t found = t.cold.resort(t.cold, t.resort_batch, RESORT_PAGES, t.resort_room, SEGMENT_BYTES)
    cdef uint32_t n = 0
    cdef uint32_t done = 0
    cdef uint32_t i, first, piece
    cdef uint64_t old
    cdef ColdPage moved[COLD_BATCH]
    if found == 0:
        return False
    for i in range(found):
        if still_needed(t.core, &t.resort_batch[i], t.cold.state):
            t.resort_batch[n] = t.resort_batch[i]
            n += 1
    first = 0
    while first < n:
        piece = min(n - first, <uint32_t>COLD_BATCH)
        for i in range(piece):
            moved[i] = t.resort_batch[first + i]
        t.cold.put(t.cold, moved, piece)
        for i in range(piece):
            if moved[i].error:
                continue
            t.cells[C_DISK_CLEANED_BYTES] += length_of(moved[i].length_codec)
            old = t.resort_batch[first + i].where
            if copy_moved(t.core, &t.resort_batch[first + i], t.cold.state, moved[i].where):
                t.cold.drop(t.cold, old, length_of(moved[i].length_codec))
                done += 1
            else:
                t.cold.drop(t.cold, moved[i].where, length_of(moved[i].length_codec))
        first += piece
    t.cold.resorted(t.cold)
    t.cold.tick(t.cold)
    return done > 0


# ---- the cooling thread ---------------------------------------------------------------------

cdef bint turn(Tiers *t) noexcept nogil:
    """One round of what is needed most; whether anything moved.  No lock held."""
    cdef uint32_t target = free_target(t)
    cdef uint64_t most = GATHER_BYTES
    cdef bint moved = False
    cdef Slot *slot
    if t.orders.draining or frames_left(t) < target:
        slot = slot_take(&t.core.slots)
        moved = drop_frames(t, FRAMES_AT_ONCE) > 0
        slot_release(slot)
    if must_cool(t):
        if not t.cold.has_room(t.cold, GATHER_BYTES):
            t.cold.tick(t.cold)         # what died meanwhile may do
            if not t.cold.has_room(t.cold, GATHER_BYTES):
                moved |= resort(t)
            while most > GATHER_LEAST and not t.cold.has_room(t.cold, most):
                most //= 2
        moved |= cool_batch(t, most) > 0
    return moved


cdef void *cooling_thread(void *argument) noexcept nogil:
    cdef Tiers *t = <Tiers *>argument
    cdef timespec until
    cdef int64_t next_tick = 0
    cdef bint moved
    store_wait_ready(t.core)
    lock_take(&t.lock)
    while not t.stopping:
        pthread_mutex_unlock(&t.lock)
        moved = turn(t)
        if now_us() >= next_tick:
            t.cold.tick(t.cold)
            orders_hear(&t.orders)
            next_tick = now_us() + TICK_US
        lock_take(&t.lock)
        if moved:
            t.rounds += 1
            pthread_cond_broadcast(&t.room)
        elif not t.stopping:
            until = at_us(now_us() + (WAIT_STEP_US if t.waiting else TICK_US))
            pthread_cond_timedwait(&t.work, &t.lock, &until)
    pthread_mutex_unlock(&t.lock)
    return NULL


# ---- what the RAM tier calls -----------------------------------------------------------------

cdef bint earns_ram(Tiers *t, uint64_t page) noexcept nogil:
    """Whether this page was read from below a short while ago; remembers that it is now."""
    cdef uint64_t now = zc_add64(&t.cold_loads, 1)
    cdef uint64_t *ghost = t.ghosts + (page * <uint64_t>0x9E3779B97F4A7C15 >> 48) % GHOSTS
    cdef uint64_t seen = zc_load64(ghost)
    zc_store64(ghost, (now << 32) | <uint32_t>(page + 1))
    if <uint32_t>seen != <uint32_t>(page + 1):
        return False
    return <uint32_t>(now - (seen >> 32)) < 2 * <uint64_t>t.core.arena.limit


cdef int tiers_fetch(void *tiers, void *slot_argument, uint64_t page, Entry e, uint8_t *data) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    cdef Slot *slot = <Slot *>slot_argument
    cdef ColdPage wanted
    cdef Entry now
    cdef int error
    if state_of(e.version) != t.cold.state:
        return EIO
    wanted.page = <uint32_t>page
    wanted.version = version_of(e.version)
    wanted.where = where_of(e.location)
    wanted.length_codec = e.location & 0xFFFF
    wanted.blob = slot.blob
    count(slot, C_COLD_LOADS, 1)
    slot_park(slot)             # a disk may stall: the committer must not wait for it
    error = t.cold.get(t.cold, &wanted, slot.io)
    slot_unpark(slot)
    if error == 0 and not codec_decompress(slot, codec_of(e.location), slot.blob, length_of(e.location), data):
        error = EILSEQ
    if error:
        # A copy that moved or died while it was read is no fault: the caller looks again.
        now = entry_load(&t.core.index, page)
        if now.location == e.location and now.version == e.version:
            count(slot, C_DISK_READ_ERRORS if error == EIO else C_DISK_CORRUPT_PAGES, 1)
        return EIO
    if earns_ram(t, page) and promote(t.core, slot, page, e, slot.blob):
        count(slot, C_PROMOTED_PAGES, 1)
    return 0


cdef void tiers_drop(void *tiers, uint32_t state, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    if state == t.cold.state:
        t.cold.drop(t.cold, where, length_bytes)


cdef bint tiers_adopt(void *tiers, uint32_t state, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    return state == t.cold.state and t.cold.adopt(t.cold, where, length_bytes)


cdef void tiers_adopted(void *tiers) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    t.cold.adopted(t.cold)


cdef bint tiers_wait_room(void *tiers, int64_t deadline_us) noexcept nogil:
    """Wait until the cooling thread made progress; False when it is too late or hopeless."""
    cdef Tiers *t = <Tiers *>tiers
    cdef int64_t start = now_us()
    cdef timespec until
    cdef bint hope = start < deadline_us
    cdef bint stuck
    cdef uint64_t rounds
    if not hope or not t.running:
        return False
    if frames_ephemeral(t) == 0 and t.cold.reason(t.cold):
        return False            # the tier fails, and there is nothing to drop
    lock_take(&t.lock)
    rounds = t.rounds
    t.waiting += 1
    pthread_cond_signal(&t.work)
    until = at_us(min(deadline_us, start + WAIT_STEP_US))
    if not t.stopping and t.rounds == rounds:
        pthread_cond_timedwait(&t.room, &t.lock, &until)
    t.waiting -= 1
    stuck = t.rounds == rounds
    pthread_mutex_unlock(&t.lock)
    if stuck:
        drop_frames(t, FRAMES_AT_ONCE)      # the tier stalls, and the cooling thread with it
    zc_add64(&t.cells[C_POOL_WAITS], 1)
    zc_add64(&t.cells[C_POOL_WAIT_US], <uint64_t>(now_us() - start))
    return True


# ---- Python's view -------------------------------------------------------------------------------

@cython.no_gc_clear         # its thread uses the store until it is stopped
cdef class Cooling:
    """The tiers below one store: a disk, so far.  Make it before store.start().

    `fd` is an open file or block device of which `disk_bytes` are ours; `preallocated`
    says that its room was promised.  Raises ConfigError, MemoryFileError.
    """

    cdef Tiers tiers
    cdef Store store
    cdef ColdTier *disk
    cdef object wrapper         # of the disk, kept alive

    def __cinit__(
        self, Store store not None, int fd, uint64_t disk_bytes, preallocated=False, int high=90, int low=80
    ):
        cdef Tiers *t = &self.tiers
        memset(t, 0, sizeof(Tiers))
        if not 0 < low <= high <= 100:
            raise ConfigError(f"watermarks low={low} and high={high} are out of order; use 0 < low <= high <= 100")
        if disk_bytes < 8 * SEGMENT_BYTES:
            raise ConfigError(f"a disk of {disk_bytes} bytes is too small; use at least 8 MiB")
        self.store = store
        t.core = &store.core
        t.orders.high_percent, t.orders.low_percent = high, low
        t.orders.fd = -1
        t.cells = store.memory.counters + (SLOTS + 2) * COUNTER_CELLS
        t.cold = self.disk = disk_make(
            fd, disk_bytes, store.memory.super.epoch, store.core.device, preallocated,
            store.memory.counters + (SLOTS + 3) * COUNTER_CELLS,
        )
        t.orders.cells = t.cells
        orders_tell(&t.orders)
        t.gathered = pages_of(GATHER_BYTES)
        t.resort_room = pages_of(SEGMENT_BYTES)
        t.batch = <ColdPage *>pages_of(COLD_BATCH * sizeof(ColdPage))
        t.entries = <Entry *>pages_of(COLD_BATCH * sizeof(Entry))
        t.resort_batch = <ColdPage *>pages_of(RESORT_PAGES * sizeof(ColdPage))
        t.ghosts = <uint64_t *>pages_of(GHOSTS * sizeof(uint64_t))
        if not (self.disk and t.gathered and t.resort_room and t.batch and t.entries and t.resort_batch and t.ghosts):
            raise MemoryFileError("no memory for the tiers' buffers; choose a smaller pool")
        lock_init(&t.lock)
        lock_init(&t.dropping)
        cond_init(&t.work)
        cond_init(&t.room)
        store.core.lower.fetch = tiers_fetch
        store.core.lower.drop = tiers_drop
        store.core.lower.adopt = tiers_adopt
        store.core.lower.adopted = tiers_adopted
        store.core.lower.wait_room = tiers_wait_room
        store.core.lower.tiers = t

    def start(self):
        """Start the cooling thread; the store is started."""
        if thread_start(&self.tiers.thread, cooling_thread, &self.tiers, b"zc-cool"):
            raise MemoryFileError("no thread could be started; raise the limit of processes")
        self.tiers.running = True

    def stop(self):
        """Stop the thread; pages below stay readable until the store stops."""
        cdef Tiers *t = &self.tiers
        if not t.running:
            return
        with nogil:
            lock_take(&t.lock)
            t.stopping = True
            t.running = False
            pthread_cond_broadcast(&t.work)
            pthread_cond_broadcast(&t.room)
            pthread_mutex_unlock(&t.lock)
            pthread_join(t.thread, NULL)

    def __dealloc__(self):
        self.stop()
        if self.store is not None:
            self.store.core.lower.tiers = NULL
        if self.disk != NULL:
            disk_discard(self.disk)
        unmap(self.tiers.gathered, GATHER_BYTES)
        unmap(self.tiers.resort_room, SEGMENT_BYTES)
        unmap(self.tiers.batch, COLD_BATCH * sizeof(ColdPage))
        unmap(self.tiers.entries, COLD_BATCH * sizeof(Entry))
        unmap(self.tiers.resort_batch, RESORT_PAGES * sizeof(ColdPage))
        unmap(self.tiers.ghosts, GHOSTS * sizeof(uint64_t))

    def wrap(self, wrapper):
        """Before start: put a tier between this and the disk, `wrapper(capsule)` with its own `capsule`."""
        self.wrapper = wrapper(PyCapsule_New(self.tiers.cold, COLD_CAPSULE, NULL))
        self.tiers.cold = <ColdTier *>PyCapsule_GetPointer(self.wrapper.capsule, COLD_CAPSULE)
        return self.wrapper

    def listen(self, int fd):
        """Obey the commands (commands.py) that come through this pipe, at most 0.1 s later."""
        os.set_blocking(fd, False)
        self.tiers.orders.fd = fd

    def set_watermarks(self, int high, int low):
        """New watermarks, in percent of the pool.  Raises ConfigError."""
        if not 0 < low <= high <= 100:
            raise ConfigError(f"watermarks low={low} and high={high} are out of order; use 0 < low <= high <= 100")
        self.tiers.orders.high_percent, self.tiers.orders.low_percent = high, low
        orders_tell(&self.tiers.orders)

    def drain(self, bint on=True):
        """Move everything below and drop the RAM copies; `drain(False)` goes back to normal."""
        self.tiers.orders.draining = on
        orders_tell(&self.tiers.orders)
        pthread_cond_signal(&self.tiers.work)

    @property
    def reason(self):
        """0, or the errno of the failure that degrades the tier now."""
        return self.tiers.cold.reason(self.tiers.cold)


cdef uint8_t *pages_of(size_t length) noexcept:
    """Zeroed, touched memory of that length, NULL when there is none."""
    cdef void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
    return NULL if at == MAP_FAILED else <uint8_t *>at


cdef void unmap(void *at, size_t length) noexcept:
    if at != NULL:
        munmap(at, length)
