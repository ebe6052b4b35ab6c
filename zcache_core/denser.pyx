"""Recompression: pages that have gone cold are given a codec that packs tighter.

    a byte a page   age in quarters of recompress_age | tried in vain
                    a read makes the page young, a write young and untried (ramtier.pyx);
                    this module's clock makes all of them older

    cold, in RAM only, not zstd yet
      -> copied, checked, decompressed -> zstd -> less room in the allocator?
      -> room -> header and blob -> flip: same page, same version -> old room freed

The same move as in moving.pyx, but that length, codec and checksum change with the place; so a
copy that is on its way down meanwhile fails its flip, and is dropped.  A page that also lies
below stays as it is: its entry would have to tell of two lengths.  Killed in between, a server
leaves room that no entry points to.

What is won is what the allocator gives back: a smaller size class, not fewer bytes.  A page that
wins none is not tried again before it is written again, or there is another dictionary (learning.pyx).  The new room comes before the old one
goes, so in a pool that is taken to the last frame it begins when a few frames are free.

One thread (zc-dense), and it takes what is left over: while requests are served, or no CPU is spare,
a twentieth of one CPU (share.pyx).  It compresses holding no lock and no slot, but not in
the class SCHED_IDLE: a killed server ends only after each of its threads has run once more, and the
last one gives the memory back.  Beside four busy loops on two cores that took 1.3 to 14.7 s, and a
standby waits for it.  What readers need for a page of zstd has memory before
the first such page is there.  What this thread needs it asks for itself (denseroom.pyx) when there is a
cold page, and gives back when there was none for 10 s; no dictionary is made while memory is short.

Bounds: 16 pages at a time; one byte a page of the device; denseroom.pyx and learning.pyx have theirs.
What it is not: durable.  Ages begin anew with a server.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport timespec

from zcache_core.allocator cimport object_bytes, object_fill, object_header
from zcache_core.backing cimport backing_close, backing_open
from zcache_core.codec cimport codec_compress
from zcache_core.core cimport MARK_AGE, MARK_COLD, MARK_TRIED, Core, note_arrival
from zcache_core.counter_ids cimport (
    C_RECOMPRESS_AGE_S, C_RECOMPRESS_LEVEL, C_RECOMPRESS_POOR, C_RECOMPRESS_SAVED_BYTES, C_RECOMPRESS_US,
    C_RECOMPRESSED_PAGES, C_REFUSED_COMMANDS,
)
from zcache_core.denseroom cimport (
    BATCH_PAGES, Batch, Found, batch_of, dense_give_back, dense_is_ready, dense_prepare, dense_tell,
)
from zcache_core.dictionary cimport dictionaries_open
from zcache_core.headroom cimport headroom_bytes
from zcache_core.index cimport entry_flip, entry_load
from zcache_core.layout cimport (
    COUNTER_CELLS, HEADER_BYTES, PAGE_BYTES, ST_RAM, ST_RAM_EPHEMERAL, Entry, codec_of, entry_is_sound,
    header_fill, length_of, place_word, state_of, version_of, version_word, where_of,
)
from zcache_core.learning cimport learn_from, learn_gather, learn_make, learn_publish, learn_wants
from zcache_core.native cimport zc_load32, zc_release_fence
from zcache_core.pthread cimport (
    at_us, cond_init, lock_init, lock_take, now_us, pthread_cond_signal, pthread_cond_timedwait,
    pthread_cond_wait, pthread_join, pthread_mutex_unlock, thread_start,
)
from zcache_core.ramtier cimport load_blob, store_wait_ready
from zcache_core.share cimport REST, Share, share_begin, share_rest_us
from zcache_core.slots cimport BLOB_ROOM, Slot, slot_release, slot_take_own

cdef enum:
    AGE_STEPS = MARK_COLD - 1   # of recompress_age; a page becomes cold after one to one and a quarter
    MOST_REST_US = 200000
    NOT_READY_US = 100000
    PAUSED_US = 5000
    PIECE = 1 << 16             # marks, between two looks at whether to end
    # While a dictionary is made 30 MiB are taken, in 2 to 4 s; others take memory meanwhile.
    LEARNING_BYTES = 64 << 20
    LOOK_AGAIN_US = 1000000     # for that memory, and for what was given back
    # Without a cold page, or twice recompress_age: what is needed for them goes back.  Having it again takes 20 ms.
    IDLE_US = 10000000


# ---- one batch -------------------------------------------------------------------------

cdef bint may_gain(Core *core, uint64_t page, Entry *e) noexcept nogil:
    """Whether this page may be recompressed; what will not be so before it is written is marked."""
    e[0] = entry_load(&core.index, page)
    if not entry_is_sound(e.location, e.version) or state_of(e.version) == ST_RAM_EPHEMERAL:
        return False
    if state_of(e.version) == ST_RAM and codec_of(e.location) != batch_of(core).choice.codec:
        return True
    core.marks[page] |= MARK_TRIED
    return False


cdef uint64_t first_cold(Core *core, uint64_t page, uint64_t end, uint32_t least_age) noexcept nogil:
    """The first page from `page` on that may be recompressed, or `end`."""
    cdef Entry e
    while page < end:
        if not core.marks[page] & MARK_TRIED and core.marks[page] & MARK_AGE >= least_age and may_gain(core, page, &e):
            break
        page += 1
    return page


cdef uint64_t gather(Core *core, Batch *b, uint64_t page, uint64_t end, uint32_t least_age) noexcept nogil:
    """Read pages that may gain, from `page` on, into the batch; the page behind the last looked at."""
    cdef Slot *slot = slot_take_own(&core.slots)
    cdef uint8_t mark
    b.n = 0
    while page < end and b.n < BATCH_PAGES:
        mark = core.marks[page]
        if not mark & MARK_TRIED and mark & MARK_AGE >= least_age and may_gain(core, page, &b.found[b.n].entry):
            # a damaged one is left to be found where it is
            if load_blob(core, slot, page, b.found[b.n].entry, b.pages + b.n * PAGE_BYTES, True):
                b.found[b.n].page = page
                b.n += 1
        page += 1
    slot_release(slot)
    return page


cdef void compress(Core *core, Batch *b) noexcept nogil:
    """Outside of locks and slots: here the time goes."""
    cdef uint32_t most = core.allocator.largest_bytes - HEADER_BYTES
    cdef uint32_t i, length
    for i in range(b.n):
        length = length_of(b.found[i].entry.location)
        b.found[i].length_bytes = codec_compress(
            &b.own, b.choice, b.pages + i * PAGE_BYTES, b.blobs + i * BLOB_ROOM, min(length - 1, most)
        )
        learn_from(core, &b.learner, &b.own, &b.plain, b.choice, b.pages + i * PAGE_BYTES)


cdef bint lay_down(Core *core, const Found *f, const uint8_t *blob, uint32_t codec) noexcept nogil:
    """Give the page its tighter blob; False when there is no room, or it changed meanwhile."""
    cdef uint64_t to
    cdef Entry new
    if not core.allocator.alloc(core.allocator, object_bytes(f.length_bytes), &to):
        return False
    object_fill(&core.arena, to, f.length_bytes, blob)
    header_fill(
        object_header(&core.arena, to, f.length_bytes), version_of(f.entry.version), core.device, <uint32_t>f.page,
        f.length_bytes, codec, blob,
    )
    new.location = place_word(to, f.length_bytes, codec)
    new.version = version_word(version_of(f.entry.version), ST_RAM, new.location)
    note_arrival(core, f.page)
    zc_release_fence()
    if not entry_flip(&core.index, f.page, f.entry, new):
        core.allocator.release(core.allocator, to, object_bytes(f.length_bytes))
        return False
    core.allocator.release(core.allocator, where_of(f.entry.location), object_bytes(length_of(f.entry.location)))
    return True


cdef void finish(Core *core, Batch *b) noexcept nogil:
    cdef Found *f
    cdef uint32_t i
    cdef int64_t won
    cdef bint done
    for i in range(b.n):
        f = &b.found[i]
        won = 0
        if f.length_bytes:
            won = core.allocator.room(core.allocator, object_bytes(length_of(f.entry.location)))
            won -= core.allocator.room(core.allocator, object_bytes(f.length_bytes))
        if won <= 0:
            core.marks[f.page] |= MARK_TRIED
            core.dense.cells[C_RECOMPRESS_POOR] += 1
            continue
        lock_take(&core.tidy.turn)      # whoever counts everything waits for it
        done = lay_down(core, f, b.blobs + i * BLOB_ROOM, b.choice.codec)
        pthread_mutex_unlock(&core.tidy.turn)
        if done:
            core.marks[f.page] |= MARK_TRIED
            core.dense.cells[C_RECOMPRESSED_PAGES] += 1
            core.dense.cells[C_RECOMPRESS_SAVED_BYTES] += won


cdef void try_all_again(Core *core) noexcept nogil:
    """There is a new dictionary: what won nothing, or less, may win by it."""
    cdef uint64_t page
    for page in range(core.index.pages):
        core.marks[page] &= ~MARK_TRIED & 0xFF


cdef bint may_learn(Core *core, Batch *b) noexcept nogil:
    """Whether a dictionary is wanted, and there is memory to make one."""
    if not learn_wants(core, &b.learner, b.choice) or now_us() < b.look_again_us:
        return False
    if headroom_bytes(&core.dense.backing.headroom, LEARNING_BYTES) < LEARNING_BYTES:
        b.look_again_us = now_us() + LOOK_AGAIN_US
        return False
    return True


cdef void learn(Core *core, Batch *b, uint32_t least_age) noexcept nogil:
    """Make a dictionary, if there are pages enough, and use it if it is better."""
    learn_gather(core, &b.learner, least_age)
    learn_make(core, &b.learner, &b.own, b.choice)
    if learn_publish(core, &b.learner, &b.own, &b.choice):
        try_all_again(core)
    dense_tell(core)


cdef uint64_t one_batch(
    Core *core, int level, uint64_t page, uint64_t end, uint32_t least_age, bint *lacking
) noexcept nogil:
    """Recompress up to 16 pages from `page` on; where to go on.  Outside of a slot.

    `lacking`: there is something to do, but not what is needed for it (dense_prepare).
    """
    cdef int64_t start = now_us()
    cdef Batch *b
    cdef bint to_learn
    lock_take(&core.dense.turn)
    b = batch_of(core)
    page = first_cold(core, page, end, least_age)
    to_learn = may_learn(core, b)
    lacking[0] = (page < end or to_learn) and not dense_is_ready(core, level)
    if (page < end or to_learn) and not lacking[0]:
        if to_learn:
            learn(core, b, least_age)
        page = gather(core, b, page, end, least_age)
        compress(core, b)
        finish(core, b)
        core.dense.cells[C_RECOMPRESS_US] += <uint64_t>(now_us() - start)
        core.dense.worked_us = now_us()
    pthread_mutex_unlock(&core.dense.turn)
    return page


# ---- the thread ---------------------------------------------------------------------------

cdef bint nap(Core *core, int64_t until_us, int level) noexcept nogil:
    """Sleep; False when something else is wanted by now."""
    cdef timespec until = at_us(until_us)
    cdef bint go_on
    lock_take(&core.dense.lock)
    if not core.dense.stopping and core.dense.level == level:
        pthread_cond_timedwait(&core.dense.wake, &core.dense.lock, &until)
    go_on = not core.dense.stopping and core.dense.level == level
    pthread_mutex_unlock(&core.dense.lock)
    return go_on


cdef void grow_older(uint8_t *marks, uint64_t n) noexcept nogil:
    """A quarter of recompress_age is over.  A read meanwhile may be forgotten, once in a while."""
    cdef uint64_t i
    for i in range(n):
        if marks[i] & MARK_AGE < MARK_COLD:
            marks[i] += 1


cdef bint one_pass(Core *core, Share *share, int level) noexcept nogil:
    """All pages once; False when something else is wanted by now."""
    cdef uint64_t page = 0
    cdef uint64_t end
    cdef bint lacking
    cdef int64_t rest_us
    while page < core.index.pages:
        end = min(page + PIECE, core.index.pages)
        while page < end:
            while core.tidy.paused:         # both, or none
                if not nap(core, now_us() + PAUSED_US, level):
                    return False
            share_begin(share)
            page = one_batch(core, level, page, end, MARK_COLD, &lacking)
            if core.dense.stopping or core.dense.level != level:
                return False
            rest_us = share_rest_us(core, share, REST, MOST_REST_US)
            if lacking and not dense_prepare(core, level):
                rest_us = LOOK_AGAIN_US
            if rest_us and not nap(core, now_us() + rest_us, level):
                return False
    return True


cdef bint wanted(Core *core, int *level, uint32_t *age_s) noexcept nogil:
    """Wait until pages are to be recompressed; False: the thread is to end."""
    cdef bint go_on
    if core.dense.level == 0:
        dense_give_back(core)
    lock_take(&core.dense.lock)
    while core.dense.level == 0 and not core.dense.stopping:
        core.dense.cells[C_RECOMPRESS_LEVEL] = 0
        core.dense.cells[C_RECOMPRESS_AGE_S] = core.dense.age_s
        pthread_cond_wait(&core.dense.wake, &core.dense.lock)
    level[0], age_s[0] = core.dense.level, core.dense.age_s
    go_on = not core.dense.stopping
    pthread_mutex_unlock(&core.dense.lock)
    return go_on


cdef void refuse(Core *core, int level) noexcept nogil:
    """There is no memory for that level: what held before holds."""
    cdef int held = <int>core.dense.cells[C_RECOMPRESS_LEVEL]
    core.dense.cells[C_REFUSED_COMMANDS] += 1
    lock_take(&core.dense.lock)
    if core.dense.level == level:
        core.dense.level = held if held != level else 0
        core.dense.age_s = <uint32_t>core.dense.cells[C_RECOMPRESS_AGE_S]
    pthread_mutex_unlock(&core.dense.lock)


cdef bint told(Core *core, int level, uint32_t age_s) noexcept nogil:
    """An order holds from now on, or is refused: whether there is memory for it."""
    if core.dense.cells[C_RECOMPRESS_LEVEL] != <uint64_t>level:
        if not dense_prepare(core, level):
            refuse(core, level)
            return False
    elif batch_of(core).room != NULL:
        dense_prepare(core, level)      # of a predecessor's dictionary, if there was no memory for it
    core.dense.cells[C_RECOMPRESS_LEVEL] = level
    core.dense.cells[C_RECOMPRESS_AGE_S] = age_s
    return True


cdef void *recompressing(void *argument) noexcept nogil:
    cdef Core *core = <Core *>argument
    cdef int64_t step_us = now_us()
    cdef int64_t idle_us
    cdef int level
    cdef uint32_t age_s
    cdef Share share
    memset(&share, 0, sizeof(share))
    while wanted(core, &level, &age_s):
        if not zc_load32(&core.ready):
            nap(core, now_us() + NOT_READY_US, level)
            continue
        if not told(core, level, age_s):
            continue
        step_us = min(step_us, now_us() + <int64_t>age_s * (1000000 // AGE_STEPS))     # it may be shorter now
        if now_us() >= step_us:
            grow_older(core.marks, core.index.pages)
            step_us = now_us() + <int64_t>age_s * (1000000 // AGE_STEPS)
            if not one_pass(core, &share, level):
                continue
        idle_us = core.dense.worked_us + min(<int64_t>IDLE_US, <int64_t>age_s * 2000000)
        if now_us() >= idle_us:
            dense_give_back(core)
            idle_us = step_us
        nap(core, min(step_us, idle_us), level)
    return NULL


# ---- the face -----------------------------------------------------------------------------

cdef void dense_choose(Core *core, int level, uint32_t age_s) noexcept nogil:
    """zstd of that level from now on (0: nothing more), for pages unasked for in age_s seconds."""
    lock_take(&core.dense.lock)
    core.dense.level, core.dense.age_s = level, age_s
    pthread_cond_signal(&core.dense.wake)
    pthread_mutex_unlock(&core.dense.lock)


cdef bint dense_all(Core *core, int level) noexcept nogil:
    """Every page that may gain, cold or not, at once, in the calling thread; False: no memory."""
    cdef uint64_t page
    cdef uint32_t again
    cdef bint lacking
    store_wait_ready(core)
    if not dense_prepare(core, level):
        return False
    for again in range(2):              # a dictionary may come in between
        page = 0
        while page < core.index.pages:
            page = one_batch(core, level, page, core.index.pages, 0, &lacking)
            if lacking and not dense_prepare(core, level):      # the thread gave it back, or has another level
                return False
    dense_give_back(core)
    return True


cdef void dense_init(Core *core) noexcept nogil:
    lock_init(&core.dense.turn)
    lock_init(&core.dense.lock)
    cond_init(&core.dense.wake)
    core.dense.cells = core.slots.shared + 7 * COUNTER_CELLS
    core.dense.backing.headroom.fd = -1     # until there is the thread, nobody serves


cdef int dense_start(Core *core) noexcept nogil:
    """Start the thread; 0 or an errno.  It sleeps until dense_choose asks for something."""
    backing_open(&core.dense.backing, core.arena.zoneinfo)
    if thread_start(&core.dense.thread, recompressing, core, b"zc-dense") != 0:
        return EAGAIN
    core.dense.running = True
    return 0


cdef void dense_stop(Core *core) noexcept nogil:
    if not core.dense.running:
        return
    lock_take(&core.dense.lock)
    core.dense.stopping = True
    pthread_cond_signal(&core.dense.wake)
    pthread_mutex_unlock(&core.dense.lock)
    pthread_join(core.dense.thread, NULL)
    backing_close(&core.dense.backing)
    core.dense.running = False


cdef bint dense_begin(Core *core) noexcept nogil:
    """The memory file is taken over: what its dictionaries are; False: no memory.  The thread will use the newest."""
    return dictionaries_open(core)
