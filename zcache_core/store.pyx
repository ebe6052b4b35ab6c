"""The store: the RAM tier.  Put, get, invalidate; who is cold; finding all again.

    put   same-filled? -> compress -> room -> header and blob -> ONE flip -> old room freed
    get   entry -> check -> decompress -> is the entry still the same?
    trim  flip to empty -> old room freed

Nothing is ever changed in place.  A write that finds no room leaves the old page
as it was.  Of two writes at once the one with the higher version stays; the other
counts as having come first.  A reader takes no lock: it reads the entry, checks
and decompresses, and looks at the entry again; if it changed, what was read may
be rubbish and is read anew.

Locks, in the order in which they may be taken together
    page_lock[page % 64]   partial writes of a page, one at a time (device.pyx)
    allocator.lock         frames' layout, lists, shared counter shard
    arena.lock             free and uncommitted frames (a leaf)
    index.lock             reserving versions (a leaf)
All have priority inheritance, and none is held across compression, a system call
that may block, or a wait.

Recency is one bit per frame, set by a read, cleared by the clock's hand when it
looks for victims (second chance).  It belongs here, not to the allocators.
"""

from libc.errno cimport EIO, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.time cimport nanosleep, timespec

from zcache_core.allocator cimport Allocator, object_blob, object_bytes, object_header
from zcache_core.arena cimport (
    FRAME_TAKEN, Arena, arena_commit_now, arena_free, arena_init, arena_start, arena_stop, arena_wait,
)
from zcache_core.codec cimport codec_compress, codec_decompress, codec_discard, codec_prepare
from zcache_core.counter_ids cimport (
    C_COMMIT_WAIT_US, C_COMMIT_WAITS, C_COMPRESS_POOR, C_CORRUPT_LOADS, C_DEVICE_PAGES,
    C_FAILED_STORES, C_FLIP_RETRIES, C_INVALIDATES, C_LOADS, C_LOADS_EMPTY, C_LOADS_SAME_FILLED,
    C_LOST_PAGES, C_PRIVATE_TABLE_BYTES, C_READ_RETRIES, C_REBUILD_US, C_REBUILT_PAGES,
    C_SAME_FILLED_PAGES, C_SAME_FILLED_PAGES_MAX, C_SUCC_STORES, C_SUPERSEDED_STORES,
)
from zcache_core.index cimport entry_flip, entry_load, index_init, versions_take
from zcache_core.layout cimport (
    CODEC_RAW, COUNTER_CELLS, COUNTER_SHARDS, HEADER_BYTES, PAGE_BYTES, PAGE_SHIFT, ST_EMPTY,
    ST_LOST, ST_RAM, ST_RAM_EPHEMERAL, ST_SAME, BlobHeader, Entry, codec_of, entry_is_sound,
    header_fill, header_matches, length_of, place_word, state_of, version_of, version_word, where_of,
)
from zcache_core.memfile cimport MemoryFile
from zcache_core.native cimport (
    zc_acquire_fence, zc_add64, zc_fill_words, zc_load32, zc_prefetch, zc_release_fence, zc_same_filled, zc_store32,
)
from zcache_core.pthread cimport lock_init, now_us, pthread_join, thread_start
from zcache_core.slots cimport SLOTS, Slot, count, slot_release, slot_take, slots_free, slots_init, slots_quiesce
from zcache_core.zbud cimport zbud_make

from zcache_core import codec as codec_names
from zcache_core.counters import STORED
from zcache_core.errors import ConfigError, MemoryFileError

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)

cdef extern from *:
    """
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif
    """
    enum: MADV_POPULATE_WRITE

cdef enum:
    # Longest wait for committed memory; NBD clients give a request 2 to 3 s at least.
    ROOM_WAIT_US = 1500000
    # Cache lines fetched ahead of a page's turn; the hardware follows from there
    # (128 KiB reads of real pages: EXPECTED)
    EXPECT_LINES = 8
    # A read that a writer overtakes this often in a row has met a bug, not a race.
    MOST_READ_TRIES = 100000


# ---- entries ------------------------------------------------------------------------

cdef inline bint in_ram(uint32_t state) noexcept nogil:
    return state == ST_RAM or state == ST_RAM_EPHEMERAL


cdef inline bint place_is_possible(Core *core, uint64_t location) noexcept nogil:
    """Whether an object lies inside the arena and inside one frame."""
    cdef uint64_t where = where_of(location)
    cdef uint32_t room = object_bytes(length_of(location))
    if where >> PAGE_SHIFT >= core.arena.total:
        return False
    return (where & (PAGE_BYTES - 1)) + room <= PAGE_BYTES


cdef void dispose(Core *core, Slot *slot, Entry old) noexcept nogil:
    """Free what a replaced entry held.  A damaged one is left to the next rebuild."""
    cdef uint32_t state = state_of(old.version)
    if not entry_is_sound(old.location, old.version):
        return
    if in_ram(state):
        if place_is_possible(core, old.location):
            core.allocator.release(core.allocator, where_of(old.location), object_bytes(length_of(old.location)))
    elif state == ST_SAME:
        count(slot, C_SAME_FILLED_PAGES, <uint64_t>-1)
        zc_add64(&core.same_filled, <uint64_t>-1)
    elif state == ST_LOST:
        count(slot, C_LOST_PAGES, <uint64_t>-1)


cdef inline void count_same_filled(Core *core, Slot *slot) noexcept nogil:
    cdef uint64_t total = zc_add64(&core.same_filled, 1) + 1
    count(slot, C_SAME_FILLED_PAGES, 1)
    if total > slot.shard[C_SAME_FILLED_PAGES_MAX] and <int64_t>total > 0:
        slot.shard[C_SAME_FILLED_PAGES_MAX] = total


# ---- put ----------------------------------------------------------------------------

cdef bint find_room(Core *core, Slot *slot, uint32_t bytes, uint64_t *where) noexcept nogil:
    """Room for an object; waits, bounded, while memory is being committed."""
    cdef int64_t start, waited_us
    cdef bint found = False
    if core.allocator.alloc(core.allocator, bytes, where):
        return True
    start = now_us()
    while not found and arena_wait(&core.arena, start + ROOM_WAIT_US):
        found = core.allocator.alloc(core.allocator, bytes, where)
    waited_us = now_us() - start
    if found or waited_us >= ROOM_WAIT_US:      # else the pool was simply full
        count(slot, C_COMMIT_WAITS, 1)
        count(slot, C_COMMIT_WAIT_US, <uint64_t>waited_us)
    return found


cdef int place_page(
    Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version, Entry *new
) noexcept nogil:
    """Store the page's bytes and make the entry for them; 0 or ENOSPC.  Nothing points there yet."""
    cdef uint64_t word, where
    cdef uint32_t length, codec
    cdef const uint8_t *blob = slot.blob
    if zc_same_filled(data, &word):
        new.location = word
        new.version = version_word(version, ST_SAME, word)
        return 0
    codec = core.codec.codec
    length = codec_compress(slot, core.codec, data, slot.blob, core.allocator.largest_bytes - HEADER_BYTES)
    if length == 0:
        if codec != CODEC_RAW:
            count(slot, C_COMPRESS_POOR, 1)
        codec = CODEC_RAW
        length = PAGE_BYTES
        blob = data
    if not find_room(core, slot, object_bytes(length), &where):
        count(slot, C_FAILED_STORES, 1)
        return ENOSPC
    memcpy(object_blob(&core.arena, where, length), blob, length)
    header_fill(object_header(&core.arena, where, length), version, core.device, <uint32_t>page, length, codec, blob)
    new.location = place_word(where, length, codec)
    new.version = version_word(version, ST_RAM, new.location)
    return 0


cdef void withdraw(Core *core, Entry new) noexcept nogil:
    """Free the room of an entry that was never published."""
    if state_of(new.version) == ST_RAM:
        core.allocator.release(core.allocator, where_of(new.location), object_bytes(length_of(new.location)))


cdef int store_replace(
    Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version, const Entry *expected
) noexcept nogil:
    """Put, but only onto the entry `expected` (any entry when NULL).

    0, ENOSPC (the old content stays), or RAN_OUT when the entry was another.
    """
    cdef Entry old, new
    cdef int error = place_page(core, slot, page, data, version, &new)
    if error:
        return error
    if state_of(new.version) == ST_SAME:
        count_same_filled(core, slot)
    zc_release_fence()
    while True:
        if expected != NULL:
            old = expected[0]
        else:
            old = entry_load(&core.index, page)
            if version_of(old.version) > version and entry_is_sound(old.location, old.version):
                dispose(core, slot, new)
                count(slot, C_SUPERSEDED_STORES, 1)
                return 0
        if entry_flip(&core.index, page, old, new):
            break
        count(slot, C_FLIP_RETRIES, 1)
        if expected != NULL:
            dispose(core, slot, new)
            return RAN_OUT
    dispose(core, slot, old)
    count(slot, C_SUCC_STORES, 1)
    return 0


cdef int store_put(Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version) noexcept nogil:
    """Store one page (4096 bytes at `data`); 0 or ENOSPC."""
    return store_replace(core, slot, page, data, version, NULL)


# ---- get ----------------------------------------------------------------------------

cdef inline bint load_blob(Core *core, Slot *slot, uint64_t page, Entry e, uint8_t *data) noexcept nogil:
    cdef uint64_t where = where_of(e.location)
    cdef uint32_t length = length_of(e.location)
    cdef const uint8_t *blob
    if not place_is_possible(core, e.location):
        return False
    blob = object_blob(&core.arena, where, length)
    if not header_matches(
        object_header(&core.arena, where, length), version_of(e.version), core.device, <uint32_t>page, e.location, blob
    ):
        return False
    return codec_decompress(slot, codec_of(e.location), blob, length, data)


cdef int store_get(Core *core, Slot *slot, uint64_t page, uint8_t *data, Entry *seen) noexcept nogil:
    """Read one page into `data`; 0 or EIO.  `seen` (or NULL) gets the entry that was read."""
    cdef Entry e, again
    cdef uint32_t state, tries
    cdef bint good
    count(slot, C_LOADS, 1)
    for tries in range(MOST_READ_TRIES):
        e = entry_load(&core.index, page)
        state = state_of(e.version)
        good = entry_is_sound(e.location, e.version)
        if not good:
            pass
        elif in_ram(state):
            good = load_blob(core, slot, page, e, data)
        elif state == ST_SAME:
            zc_fill_words(data, e.location)
        elif state == ST_EMPTY:
            memset(data, 0, PAGE_BYTES)
        else:
            good = False
        zc_acquire_fence()
        again = entry_load(&core.index, page)
        if again.version == e.version and again.location == e.location:
            break
        count(slot, C_READ_RETRIES, 1)
    else:
        good = False
    if not good:
        if state != ST_LOST or not entry_is_sound(e.location, e.version):
            count(slot, C_CORRUPT_LOADS, 1)
        return EIO
    if seen != NULL:
        seen[0] = e
    if in_ram(state):
        if not core.arena.frames[where_of(e.location) >> PAGE_SHIFT].referenced:
            core.arena.frames[where_of(e.location) >> PAGE_SHIFT].referenced = 1
    elif state == ST_SAME:
        count(slot, C_LOADS_SAME_FILLED, 1)
    else:
        count(slot, C_LOADS_EMPTY, 1)
    return 0


cdef void store_expect(Core *core, uint64_t page) noexcept nogil:
    """The page will be read in a moment: have the start of its blob come to the cache."""
    cdef Entry e
    cdef const uint8_t *at
    cdef uint32_t i
    if page >= core.index.pages:
        return
    e = core.index.entries[page]        # may be torn: only a hint
    if in_ram(state_of(e.version)) and place_is_possible(core, e.location):
        at = core.arena.base + where_of(e.location)
        for i in range(EXPECT_LINES):
            zc_prefetch(at + i * 64)


# ---- invalidate, victims ----------------------------------------------------------------

cdef void store_invalidate(Core *core, Slot *slot, uint64_t page, uint64_t version) noexcept nogil:
    """Forget one page: it reads as zeros from now on."""
    cdef Entry old, new
    new.location = 0
    new.version = version_word(version, ST_EMPTY, 0)
    while True:
        old = entry_load(&core.index, page)
        if state_of(old.version) == ST_EMPTY and entry_is_sound(old.location, old.version):
            return
        if version_of(old.version) > version and entry_is_sound(old.location, old.version):
            count(slot, C_SUPERSEDED_STORES, 1)
            return
        if entry_flip(&core.index, page, old, new):
            break
        count(slot, C_FLIP_RETRIES, 1)
    dispose(core, slot, old)
    count(slot, C_INVALIDATES, 1)


cdef uint32_t store_victims(Core *core, uint32_t *frames, uint32_t most) noexcept nogil:
    """Up to `most` cold frames, by second chance; how many.  Two rounds at most."""
    cdef uint32_t n = 0
    cdef uint64_t steps
    cdef uint32_t at = core.clock_hand
    for steps in range(2 * <uint64_t>core.arena.total):
        if n == most:
            break
        if core.arena.frames[at].state == FRAME_TAKEN:
            if core.arena.frames[at].referenced:
                core.arena.frames[at].referenced = 0
            else:
                frames[n] = at
                n += 1
        at += 1
        if at == core.arena.total:
            at = 0
    core.clock_hand = at
    return n


# ---- finding all again --------------------------------------------------------------------

cdef void store_wait_ready(Core *core) noexcept nogil:
    """Writers wait until the rebuild has told the allocator what is taken; readers need not."""
    cdef timespec nap
    nap.tv_sec = 0
    nap.tv_nsec = 200000
    while not zc_load32(&core.ready):
        nanosleep(&nap, NULL)


cdef void mark_lost(Core *core, Slot *slot, uint64_t page, Entry old) noexcept nogil:
    cdef Entry new
    new.location = 0
    new.version = version_word(versions_take(&core.index, 1), ST_LOST, 0)
    if entry_flip(&core.index, page, old, new):
        count(slot, C_LOST_PAGES, 1)


cdef void *rebuild(void *argument) noexcept nogil:
    """Tell the allocator what the index holds.  Readers are served meanwhile."""
    cdef Core *core = <Core *>argument
    cdef Slot *slot = slot_take(&core.slots)
    cdef int64_t start = now_us()
    cdef uint64_t page
    cdef uint32_t state
    cdef Entry e
    for page in range(core.index.pages):
        e = entry_load(&core.index, page)
        state = state_of(e.version)
        if not entry_is_sound(e.location, e.version):
            mark_lost(core, slot, page, e)
        elif in_ram(state):
            if place_is_possible(core, e.location) and core.allocator.adopt(
                core.allocator, where_of(e.location), object_bytes(length_of(e.location))
            ):
                count(slot, C_REBUILT_PAGES, 1)
            else:
                mark_lost(core, slot, page, e)
        elif state == ST_SAME:
            count_same_filled(core, slot)
            count(slot, C_REBUILT_PAGES, 1)
        elif state == ST_LOST:
            count(slot, C_LOST_PAGES, 1)
    core.allocator.adopted(core.allocator)
    count(slot, C_REBUILD_US, <uint64_t>(now_us() - start))
    slot_release(slot)
    zc_store32(&core.ready, 1)
    return NULL


# ---- Python's view ------------------------------------------------------------------------

cdef class Store:
    """The RAM tier of one device on one memory file.

    allocator "zbud"; codec "lz4", "zstd", "zstd:LEVEL" or "none"; commit "ahead" or
    "all".  Raises ConfigError for other words, MemoryFileError without memory.
    Call start() before the first request, in the process that serves.
    """

    def __cinit__(self, MemoryFile memory, str allocator="zbud", str codec="lz4", str commit="ahead"):
        cdef Core *core = &self.core
        cdef uint32_t i
        memset(core, 0, sizeof(Core))
        if allocator != "zbud":
            raise ConfigError(f"unknown allocator {allocator!r}; use zbud")
        if commit not in ("ahead", "all"):
            raise ConfigError(f"unknown commit {commit!r}; use ahead or all")
        try:
            core.codec.codec, core.codec.level = codec_names.parse(codec)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if memory.base == NULL or not memory.writable:
            raise MemoryFileError("a store needs a memory file that is open for writing")
        self.memory = memory
        self.allocator_name, self.codec_text, self.commit = allocator, codec, commit
        self._reset_gauges()
        index_init(&core.index, memory.index, &memory.super.devices[0])
        if slots_init(&core.slots, memory.counters) or codec_prepare(&core.slots, core.codec) or arena_init(
            &core.arena, memory.arena, memory.frame_headers, <uint32_t>memory.super.pool_frames, core.slots.background
        ):
            raise MemoryFileError("no memory for the store's tables; choose a smaller pool")
        core.arena.quiesce = slots_quiesce
        core.arena.quiesce_argument = &core.slots
        core.allocator = zbud_make(&core.arena, core.slots.shared)
        if core.allocator == NULL:
            raise MemoryFileError("no memory for the allocator; choose a smaller pool")
        for i in range(PAGE_LOCKS):
            lock_init(&core.page_lock[i])
        core.slots.background[C_DEVICE_PAGES] = core.index.pages
        core.slots.background[C_PRIVATE_TABLE_BYTES] = core.slots.memory_bytes + core.arena.total * 16
        self.open = True

    def _reset_gauges(self):
        """Gauges say what is now; a file that is taken over tells the past."""
        cdef int shard, cell
        for cell, counter in enumerate(STORED):
            if counter.kind == "gauge":
                for shard in range(COUNTER_SHARDS):
                    self.memory.counters[shard * COUNTER_CELLS + cell] = 0

    def start(self):
        """Commit the index and the reserve, start the threads; serve from now on."""
        self._require_open()
        cdef Core *core = &self.core
        if self.started:
            return
        with nogil:
            madvise(self.memory.base, self.memory.super.frame_headers_offset, MADV_POPULATE_WRITE)
        if self.commit == "all":
            core.arena.reserve = core.arena.limit
        if not self.memory.fresh:
            core.arena.held = True
            if thread_start(&core.rebuilder, rebuild, core) != 0:
                raise MemoryFileError("no thread could be started; raise the limit of processes")
            core.rebuilding = True
        else:
            if arena_commit_now(&core.arena, core.arena.reserve) and self.commit == "all":
                raise MemoryFileError("there is not enough memory for the whole pool; choose a smaller pool")
            zc_store32(&core.ready, 1)
        if arena_start(&core.arena):
            raise MemoryFileError("no thread could be started; raise the limit of processes")
        self.started = True

    def stop(self):
        """Stop the threads and let go of everything but the memory file.  Serve nothing after."""
        cdef Core *core = &self.core
        if not self.open:
            return
        self.open = False
        with nogil:
            if core.rebuilding:
                pthread_join(core.rebuilder, NULL)
                core.rebuilding = False
            arena_free(&core.arena)
            core.allocator.discard(core.allocator)
            codec_discard(&core.slots)
            slots_free(&core.slots)
        self.started = False

    def __dealloc__(self):
        self.stop()

    cdef object _require_open(self):
        if not self.open:
            raise MemoryFileError("the store is stopped; make a new one")

    def _require_page(self, uint64_t page):
        self._require_open()
        if not self.started:
            raise MemoryFileError("the store is not started; call start() first")
        if page >= self.core.index.pages:
            raise IndexError(f"page {page} is past the end of the device")

    def put(self, uint64_t page, const uint8_t[::1] data not None):
        """Store one page of 4096 bytes.  Raises OSError(ENOSPC) when no room is left."""
        cdef Slot *slot
        cdef int error
        self._require_page(page)
        if data.shape[0] != PAGE_BYTES:
            raise ValueError("a page is 4096 bytes")
        with nogil:
            store_wait_ready(&self.core)
            slot = slot_take(&self.core.slots)
            error = store_put(&self.core, slot, page, &data[0], versions_take(&self.core.index, 1))
            slot_release(slot)
        if error:
            raise OSError(error, "no room for the page")

    def get(self, uint64_t page):
        """The page's 4096 bytes.  Raises OSError(EIO) when they are lost or damaged."""
        cdef Slot *slot
        cdef int error
        cdef uint8_t data[PAGE_BYTES]
        self._require_page(page)
        with nogil:
            slot = slot_take(&self.core.slots)
            error = store_get(&self.core, slot, page, data, NULL)
            slot_release(slot)
        if error:
            raise OSError(error, "the page is lost or damaged")
        return (<char *>data)[:PAGE_BYTES]

    def invalidate(self, uint64_t first, uint64_t n=1):
        """Forget pages first .. first + n - 1."""
        cdef Slot *slot
        cdef uint64_t page, version
        self._require_page(first + n - 1)
        with nogil:
            store_wait_ready(&self.core)
            slot = slot_take(&self.core.slots)
            version = versions_take(&self.core.index, 1)
            for page in range(first, first + n):
                store_invalidate(&self.core, slot, page, version)
            slot_release(slot)

    def wait_ready(self):
        """Return when a taken-over file is fully known again."""
        self._require_open()
        with nogil:
            store_wait_ready(&self.core)

    def entry(self, uint64_t page):
        """(location word, version word) of a page."""
        self._require_page(page)
        cdef Entry e = entry_load(&self.core.index, page)
        return e.location, e.version

    def victims(self, uint32_t most):
        """Up to `most` cold frames, coldest first as the clock sees it."""
        cdef uint32_t frames[256]
        self._require_open()
        n = store_victims(&self.core, frames, min(most, 256))
        return [frames[i] for i in range(n)]

    def pages_in_frame(self, uint32_t frame):
        """Numbers of the pages that live in a frame now."""
        cdef uint64_t where[64]
        cdef uint32_t sizes[64]
        cdef uint32_t i
        cdef uint64_t page
        cdef Entry e
        self._require_open()
        if frame >= self.core.arena.total:
            raise IndexError(f"frame {frame} is past the end of the arena")
        found = []
        for i in range(self.core.allocator.objects(self.core.allocator, frame, where, sizes, 64)):
            page = object_header(&self.core.arena, where[i], sizes[i]).page_checksum >> 32
            if page >= self.core.index.pages:
                continue
            e = entry_load(&self.core.index, page)
            if in_ram(state_of(e.version)) and where_of(e.location) == where[i]:
                found.append(page)
        return found

    def check(self):
        """Broken invariants (0 when all is well); for tests, with no request in flight.

        The allocator's own, and: every entry sound, every blob whole, as many pages
        in the index as in the allocator (so no frame leaks).
        """
        cdef Core *core = &self.core
        cdef Slot *slot
        cdef Entry e
        cdef uint64_t page
        cdef uint64_t in_frames = 0
        cdef uint64_t same = 0
        cdef uint64_t broken = 0
        self._require_page(0)
        with nogil:
            store_wait_ready(core)
            slot = slot_take(&core.slots)
            for page in range(core.index.pages):
                e = entry_load(&core.index, page)
                if not entry_is_sound(e.location, e.version):
                    broken += 1
                elif in_ram(state_of(e.version)):
                    in_frames += 1
                    broken += not load_blob(core, slot, page, e, slot.page)
                elif state_of(e.version) == ST_SAME:
                    same += 1
            slot_release(slot)
            broken += core.allocator.check(core.allocator)
        from zcache_core.counters import read
        counted = read(self.memory)
        broken += counted["pers_zpages"] != in_frames
        broken += counted["same_filled_pages"] != same
        broken += counted["pers_pageframes"] + counted["free_frames"] != counted["committed_frames"]
        return broken
