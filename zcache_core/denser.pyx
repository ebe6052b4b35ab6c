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
it rests nineteen times as long as it worked.  It compresses holding no lock and no slot, but not in
the class SCHED_IDLE: a killed server ends only after each of its threads has run once more, and the
last one gives the memory back.  Beside four busy loops on two cores that took 1.3 to 14.7 s, and a
standby waits for it.  What readers need for a page of zstd has memory before
the first such page is there.  What this thread needs it asks for itself, and only when the kernel
has that much without reclaim (backing.pyx): else an order is refused, and no dictionary made for now.

Bounds: 16 pages at a time; one byte a page of the device, 140 KiB of buffers and two contexts;
learning.pyx has its own.
What it is not: durable.  Ages begin anew with a server.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from zcache_core.allocator cimport object_bytes, object_fill, object_header
from zcache_core.backing cimport (
    back_range, backing_close, backing_may, backing_open, backing_round, backing_round_ends,
)
from zcache_core.codec cimport (
    CodecChoice, codec_compress, codec_context_bytes, codec_expect_zstd, codec_make, codec_unmake,
)
from zcache_core.core cimport MARK_AGE, MARK_COLD, MARK_TRIED, Core
from zcache_core.counter_ids cimport (
    C_PRIVATE_TABLE_BYTES, C_RECOMPRESS_AGE_S, C_RECOMPRESS_LEVEL, C_RECOMPRESS_POOR, C_RECOMPRESS_SAVED_BYTES,
    C_RECOMPRESS_US, C_RECOMPRESSED_PAGES, C_REFUSED_COMMANDS,
)
from zcache_core.dictionary cimport dictionaries_open, dictionary_newest
from zcache_core.headroom cimport headroom_bytes
from zcache_core.index cimport entry_flip, entry_load
from zcache_core.layout cimport (
    CODEC_ZSTD, COUNTER_CELLS, HEADER_BYTES, PAGE_BYTES, ST_RAM, ST_RAM_EPHEMERAL, Entry, codec_of, entry_is_sound,
    header_fill, length_of, place_word, state_of, version_of, version_word, where_of,
)
from zcache_core.learning cimport (
    Learner, learn_free, learn_from, learn_gather, learn_make, learn_publish, learn_start, learn_use, learn_wants,
)
from zcache_core.native cimport zc_add64, zc_load32, zc_release_fence
from zcache_core.pthread cimport (
    at_us, cond_init, lock_init, lock_take, now_us, pthread_cond_signal, pthread_cond_timedwait,
    pthread_cond_wait, pthread_join, pthread_mutex_unlock, thread_start,
)
from zcache_core.ramtier cimport load_blob, store_wait_ready
from zcache_core.slots cimport BLOB_ROOM, SLOTS, Slot, slot_release, slot_take_own
from zcache_core.tidying cimport requests_done

cdef enum:
    BATCH_PAGES = 16            # 0.5 ms of zstd:3; two changes of class, 1 us each, are nothing beside it
    AGE_STEPS = MARK_COLD - 1   # of recompress_age; a page becomes cold after one to one and a quarter
    # Rest per work while requests are served: at most 5 % of one CPU.
    REST = 19
    MOST_REST_US = 200000
    # Whether a CPU is spare: of so much time without a rest this thread had less than 4/5 of one.
    WINDOW_US = 20000
    CROWDED_BATCHES = 1000      # if not, it rests after each of so many: 10 s or more
    NOT_READY_US = 100000
    PIECE = 1 << 16             # marks, between two looks at whether to end
    # Asked for at once: contexts of level 19 with a dictionary, 0.5 MiB each, buffers, what readers need.
    NEEDED_BYTES = 4 << 20
    # While one is made 30 MiB are taken, in 2 to 4 s; others take memory meanwhile.
    LEARNING_BYTES = 64 << 20
    LOOK_AGAIN_US = 1000000     # for that memory

ctypedef struct Found:          # one page of a batch
    uint64_t page
    Entry entry
    uint32_t length_bytes       # of the tighter blob; 0: there is none

ctypedef struct Batch:
    Slot own                    # the context for compressing; no request's slot
    Slot plain                  # the same without a dictionary, to compare
    Learner learner
    int64_t look_again_us       # when there was no memory to learn with
    CodecChoice choice
    uint32_t n
    Found found[BATCH_PAGES]
    uint64_t memory_bytes       # of this struct and the two behind it
    uint8_t *pages              # BATCH_PAGES x PAGE_BYTES
    uint8_t *blobs              # BATCH_PAGES x BLOB_ROOM


# ---- one batch -------------------------------------------------------------------------

cdef bint may_gain(Core *core, uint64_t page, Entry *e) noexcept nogil:
    """Whether this page may be recompressed; what will not be so before it is written is marked."""
    e[0] = entry_load(&core.index, page)
    if not entry_is_sound(e.location, e.version) or state_of(e.version) == ST_RAM_EPHEMERAL:
        return False
    if state_of(e.version) == ST_RAM and codec_of(e.location) != (<Batch *>core.dense.batch).choice.codec:
        return True
    core.marks[page] |= MARK_TRIED
    return False


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
    zc_add64(&core.arrivals, 1)
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


cdef void learn(Core *core, Batch *b, uint32_t least_age) noexcept nogil:
    """Make a dictionary first, if one is wanted, and there are pages and memory for it."""
    if not learn_wants(core, &b.learner, b.choice) or now_us() < b.look_again_us:
        return
    if headroom_bytes(&core.dense.backing.headroom, LEARNING_BYTES) < LEARNING_BYTES:
        b.look_again_us = now_us() + LOOK_AGAIN_US
        return
    learn_gather(core, &b.learner, least_age)
    learn_make(core, &b.learner, &b.own, b.choice)
    if learn_publish(core, &b.learner, &b.own, &b.choice):
        try_all_again(core)
    dense_tell(core)


cdef uint64_t one_batch(Core *core, uint64_t page, uint64_t end, uint32_t least_age, uint32_t *pages) noexcept nogil:
    """Recompress up to 16 pages from `page` on; where to go on.  Outside of a slot."""
    cdef int64_t start = now_us()
    cdef Batch *b
    lock_take(&core.dense.turn)
    b = <Batch *>core.dense.batch
    learn(core, b, least_age)
    page = gather(core, b, page, end, least_age)
    pages[0] = b.n
    if b.n:
        compress(core, b)
        finish(core, b)
        core.dense.cells[C_RECOMPRESS_US] += <uint64_t>(now_us() - start)
    pthread_mutex_unlock(&core.dense.turn)
    return page


# ---- what it needs -----------------------------------------------------------------------

cdef uint8_t *backed(uint64_t bytes) noexcept nogil:
    """Zeroed memory that is there; NULL: there is none."""
    cdef void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if at == MAP_FAILED:
        return NULL
    if back_range(<uint8_t *>at, bytes):
        munmap(at, bytes)
        return NULL
    return <uint8_t *>at


cdef Batch *make_batch() noexcept nogil:
    cdef uint64_t bytes = sizeof(Batch) + (BATCH_PAGES + 2) * (PAGE_BYTES + BLOB_ROOM)
    cdef Batch *b = <Batch *>backed(bytes)
    if b == NULL:
        return NULL
    b.memory_bytes = bytes
    b.pages = <uint8_t *>b + sizeof(Batch)
    b.blobs = b.pages + BATCH_PAGES * PAGE_BYTES
    b.own.blob = b.blobs + BATCH_PAGES * BLOB_ROOM
    b.own.page = b.own.blob + BLOB_ROOM
    b.plain.blob = b.own.page + PAGE_BYTES
    b.plain.page = b.plain.blob + BLOB_ROOM
    learn_start(&b.learner)
    return b


cdef bint is_usable(const Batch *b, int level) noexcept nogil:
    return b != NULL and b.choice.level == level and b.own.zstd_compress != NULL and b.plain.zstd_compress != NULL


cdef bint make_all(Core *core, int level) noexcept nogil:
    """Buffers, marks, contexts, and the newest dictionary used; False: no memory."""
    cdef Batch *b
    cdef CodecChoice choice
    choice.codec, choice.level = CODEC_ZSTD, level
    if core.dense.batch == NULL:
        core.dense.batch = make_batch()
    b = <Batch *>core.dense.batch
    if core.marks == NULL:
        core.marks = backed(core.index.pages)
    if b == NULL or core.marks == NULL or not codec_expect_zstd(&core.slots):
        return False
    b.choice.level = 0
    if not codec_make(&b.plain, choice) or not learn_use(core, &b.own, &choice, dictionary_newest(core)):
        return False
    b.choice = choice
    return True


cdef bint dense_prepare(Core *core, int level) noexcept nogil:
    """Have all that recompressing with this level needs; False: no memory, all is as before."""
    cdef Batch *b
    cdef bint done
    cdef uint64_t bytes = NEEDED_BYTES + core.index.pages
    lock_take(&core.dense.turn)
    b = <Batch *>core.dense.batch
    # after a takeover, a predecessor's dictionary is not used yet
    if not is_usable(b, level) or (b.choice.codec == CODEC_ZSTD and dictionary_newest(core) >= 0):
        backing_round(&core.dense.backing, bytes)
        if backing_may(&core.dense.backing, bytes):
            make_all(core, level)
        backing_round_ends(&core.dense.backing)
        if core.index.entries != NULL:      # the memory file is ours
            dense_tell(core)
    done = is_usable(<Batch *>core.dense.batch, level)
    pthread_mutex_unlock(&core.dense.turn)
    return done


cdef void dense_begin(Core *core) noexcept nogil:
    """The memory file is taken over: what its dictionaries are.  The thread will use the newest."""
    dictionaries_open(core)


cdef void dense_tell(Core *core) noexcept nogil:
    """What dense_prepare and dictionaries have taken, for the counters."""
    cdef Batch *b = <Batch *>core.dense.batch
    cdef uint64_t bytes = core.slots.dictionary_backed_bytes
    if b != NULL:
        bytes += b.memory_bytes + codec_context_bytes(&b.own) + codec_context_bytes(&b.plain) + core.index.pages
        bytes += 0 if core.dense.readers_counted else core.slots.readers_backed_bytes
    core.dense.cells[C_PRIVATE_TABLE_BYTES] = bytes


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


cdef int64_t thread_us() noexcept nogil:
    """CPU time of this thread."""
    cdef timespec used
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used)
    return <int64_t>used.tv_sec * 1000000 + used.tv_nsec // 1000


cdef bint one_pass(Core *core, int level) noexcept nogil:
    """All pages once; False when something else is wanted by now."""
    cdef uint64_t page = 0
    cdef uint64_t turns, end
    cdef uint32_t pages
    cdef uint32_t crowded = 0
    cdef int64_t start, spent, worked
    cdef int64_t all_spent = 0, all_worked = 0      # since the last rest
    while page < core.index.pages:
        end = min(page + PIECE, core.index.pages)
        while page < end:
            turns = requests_done(core)
            start, worked = now_us(), thread_us()
            page = one_batch(core, page, end, MARK_COLD, &pages)
            spent, worked = now_us() - start, thread_us() - worked
            if core.dense.stopping or core.dense.level != level:
                return False
            all_spent, all_worked = all_spent + spent, all_worked + worked
            if all_spent > WINDOW_US:
                if all_worked * 5 < all_spent * 4:
                    crowded = CROWDED_BATCHES
                all_spent = all_worked = 0
            if pages and (crowded or requests_done(core) > turns + 1):      # more than this thread's own
                crowded = max(crowded, 1) - 1
                all_spent = all_worked = 0
                if not nap(core, now_us() + min(spent * REST, <int64_t>MOST_REST_US), level):
                    return False
    return True


cdef bint wanted(Core *core, int *level, uint32_t *age_s) noexcept nogil:
    """Wait until pages are to be recompressed; False: the thread is to end."""
    cdef bint go_on
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


cdef void *recompressing(void *argument) noexcept nogil:
    cdef Core *core = <Core *>argument
    cdef int64_t step_us = now_us()
    cdef int level
    cdef uint32_t age_s
    while wanted(core, &level, &age_s):
        if not zc_load32(&core.ready):
            nap(core, now_us() + NOT_READY_US, level)
            continue
        if not dense_prepare(core, level):
            refuse(core, level)
            continue
        core.dense.cells[C_RECOMPRESS_LEVEL] = level
        core.dense.cells[C_RECOMPRESS_AGE_S] = age_s
        step_us = min(step_us, now_us() + <int64_t>age_s * (1000000 // AGE_STEPS))     # it may be shorter now
        if now_us() >= step_us:
            grow_older(core.marks, core.index.pages)
            step_us = now_us() + <int64_t>age_s * (1000000 // AGE_STEPS)
            if not one_pass(core, level):
                continue
        nap(core, step_us, level)
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
    cdef uint32_t pages, again
    store_wait_ready(core)
    if not dense_prepare(core, level):
        return False
    for again in range(2):              # a dictionary may come in between
        page = 0
        while page < core.index.pages:
            page = one_batch(core, page, core.index.pages, 0, &pages)
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


cdef void dense_free(Core *core) noexcept nogil:
    """Nobody is inside any more."""
    cdef Batch *b = <Batch *>core.dense.batch
    if b != NULL:
        codec_unmake(&b.own)
        codec_unmake(&b.plain)
        learn_free(&b.learner)
        munmap(b, b.memory_bytes)
    if core.marks != NULL:
        munmap(core.marks, core.index.pages)
    core.dense.batch = NULL
    core.marks = NULL
