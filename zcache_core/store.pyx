"""The store: one device's RAM tier, put together, started, and as Python sees it.

    memory file -> index, arena, slots, allocator, codec = Core (core.pxd)
    ramtier.pyx    put, get, invalidate, victims          takeover.pyx    finding all again

Locks, in the order in which they may be taken together
    page_lock[page % 64]   partial writes of a page, one at a time (device.pyx)
    tiers.dropping         choosing ephemeral frames (eviction.pyx)
    allocator.lock         frames' layout, lists, shared counter shard
    arena.lock             free and uncommitted frames (a leaf)
    index.lock             reserving versions (a leaf)
    ahead.lock             pages read ahead (a leaf)
    peers.lock             the end of the ring of copies dropped at peers (a leaf)
    crew.lock              its thread's sleep (a leaf)
    tidy.turn              emptying frames, one at a time; taken before all of these
    tidy.lock              its thread's sleep (a leaf)
    dense.turn             recompressing, one batch at a time; taken before tidy.turn
    dense.lock             its thread's sleep, and what is wanted of it (a leaf)
All have priority inheritance, and the leaves are never held across compression,
a system call that may block, or a wait.  Who reads whole pages takes none.
"""

import os

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from zcache_core.allocator cimport object_header
from zcache_core.arena cimport HELD_UNKNOWN, Frame, arena_init, arena_keep_all, arena_set_goal, arena_tell
from zcache_core.backing cimport back_range
from zcache_core.codec cimport codec_discard, codec_memory_bytes, codec_prepare
from zcache_core.committer cimport arena_commit_now, arena_free, arena_start
from zcache_core.core cimport PAGE_LOCKS, Core
from zcache_core.counter_ids cimport C_DEVICE_PAGES, C_PRIVATE_TABLE_BYTES
from zcache_core.crew cimport crew_memory_bytes, crew_start, crew_stop
from zcache_core.denser cimport dense_all, dense_begin, dense_choose, dense_init, dense_start, dense_stop
from zcache_core.denseroom cimport dense_free, dense_prepare, dense_tell
from zcache_core.dictionary cimport dictionaries_expect
from zcache_core.index cimport entry_load, index_init, versions_take
from zcache_core.layout cimport (
    CODEC_LZ4, CODEC_RAW, COUNTER_CELLS, COUNTER_SHARDS, HEADER_BYTES, PAGE_BYTES, ST_SAME, Entry, entry_is_sound, state_of, where_of,
)
from zcache_core.memfile cimport MemoryFile
from zcache_core.native cimport zc_store32
from zcache_core.pthread cimport (
    lock_init, lock_take, pthread_join, pthread_mutex_unlock, thread_start_alike,
)
from zcache_core.ramtier cimport (
    in_ram, is_below, load_blob, store_get, store_invalidate, store_put, store_victims, store_wait_ready,
)
from zcache_core.several cimport allocator_broken, several_make, several_tell
from zcache_core.slots cimport Slot, slot_release, slot_take, slots_free, slots_init, slots_quiesce
from zcache_core.takeover cimport takeover
from zcache_core.tidying cimport tidy_all, tidy_choose, tidy_pause, tidy_start, tidy_stop

from zcache_core import codec as codec_names
from zcache_core import process
from zcache_core.counters import STORED
from zcache_core.errors import ConfigError, MemoryFileError
from zcache_core.memfile import FOREIGN_DEVICE
from zcache_core.several import ALLOCATORS


# Of "zstd" alone.  From lengths of 4000 pages of four programs, room in zsmalloc against LZ4 there, without /
# with a dictionary of 112 KiB (and us a page with it): level 9 1.65 / 1.79 (107), 12 - / 1.80 (195),
# 13 - / 1.82 (251), 14 - / 1.89 (386), 15 1.74 / 1.90 (487), 19 1.74 / 1.92 (1062).  Reading costs the same.
RECOMPRESS_LEVEL = 15
RECOMPRESS_AGE_S_MAX = 7 * 86400


def recompress_level(str codec):
    """`zstd`, `zstd:LEVEL` or `none` -> zstd's level, 0 for none.  Raises ConfigError."""
    try:
        number, level = codec_names.parse(codec)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if number == CODEC_LZ4:
        raise ConfigError("lz4 packs no tighter; use recompress=zstd, zstd:LEVEL or none")
    if number == CODEC_RAW:
        return 0
    return level if ":" in codec else RECOMPRESS_LEVEL


@cython.no_gc_clear         # its threads use the memory file until it is stopped
cdef class Store:
    """The RAM tier of one device on one memory file.

    allocator "zbud", "z3fold" or "zsmalloc"; codec "lz4", "zstd", "zstd:LEVEL" or "none"; commit "ahead" or
    "all"; `tidy`: with the threads that compact and recompress in the background; `zoneinfo`: where it
    learns how much memory is left.  Raises ConfigError for other words, MemoryFileError without memory.
    Call start() before the first request, in the process that serves.  On a file that is only expected
    (`MemoryFile.expect`) all its memory is had, and nothing written; begin() when the file is taken.
    """

    def __cinit__(
        self, MemoryFile memory, str allocator="zbud", str codec="lz4", str commit="ahead", bint tidy=True,
        str zoneinfo="/proc/zoneinfo",
    ):
        cdef Core *core = &self.core
        cdef uint32_t i
        memset(core, 0, sizeof(Core))
        if allocator not in ALLOCATORS:
            raise ConfigError(f"unknown allocator {allocator!r}; use {' or '.join(ALLOCATORS)}")
        if commit not in ("ahead", "all"):
            raise ConfigError(f"unknown commit {commit!r}; use ahead or all")
        try:
            core.codec.codec, core.codec.level = codec_names.parse(codec)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if memory.base == NULL or not (memory.writable or memory.expected):
            raise MemoryFileError("a store needs a memory file that is open for writing")
        if memory.devices()[0][0] == FOREIGN_DEVICE:
            raise MemoryFileError(f"the memory file {memory.name} is a node's that lends it; name another")
        self.memory = memory
        self.codec_text, self.commit = codec, commit
        if slots_init(&core.slots, memory.counters) or codec_prepare(&core.slots, core.codec) or arena_init(
            &core.arena, memory.arena, memory.frame_headers, memory.frame_map,
            <uint32_t>memory.super.pool_frames, core.slots.background,
        ):
            raise MemoryFileError("no memory for the store's tables; choose a smaller pool")
        core.arena.quiesce = slots_quiesce
        core.arena.quiesce_argument = &core.slots
        core.allocator = several_make(&core.arena, core.slots.shared, ALLOCATORS.index(allocator))
        if core.allocator == NULL:
            raise MemoryFileError("no memory for the allocator; choose a smaller pool")
        for i in range(PAGE_LOCKS):
            lock_init(&core.page_lock[i])
        self.tidy = tidy
        self.zoneinfo = os.fsencode(zoneinfo)
        core.arena.zoneinfo = self.zoneinfo
        if memory.expected and not dictionaries_expect(core):
            raise MemoryFileError("no memory to read recompressed pages with; choose a smaller pool")
        lock_init(&core.tidy.turn)
        core.index.pages = memory.super.device_pages    # all that is known of the index before begin()
        dense_init(core)
        self.open = True
        if memory.writable:
            self.begin()

    def begin(self):
        """The memory file is ours: what it counts is ours.

        Gauges say what is now; a file that is taken over tells the past.
        """
        cdef Core *core = &self.core
        cdef int shard, cell
        if self.begun:
            return
        assert self.memory.writable
        self.begun = True
        index_init(&core.index, self.memory.index, self.memory.super.device_pages, &self.memory.super.devices[0])
        for cell, counter in enumerate(STORED):
            if counter.kind == "gauge":
                for shard in range(COUNTER_SHARDS):
                    self.memory.counters[shard * COUNTER_CELLS + cell] = 0
        arena_tell(&core.arena)
        several_tell(core.allocator)
        core.slots.background[C_DEVICE_PAGES] = core.index.pages
        core.slots.background[C_PRIVATE_TABLE_BYTES] = (
            core.slots.memory_bytes + codec_memory_bytes(&core.slots) + core.arena.total * <uint64_t>sizeof(Frame)
            + core.allocator.table_bytes
        )
        core.dictionary_rows = self.memory.super.dictionaries
        if not self.memory.fresh and not dense_begin(core):     # before anybody reads
            raise MemoryFileError("no memory to read recompressed pages with; free some, and start again")
        core.dense.readers_counted = core.slots.readers_backed
        dense_tell(core)

    def start(self):
        """Commit the index and the reserve, start the threads; serve from now on."""
        self._require_open()
        cdef Core *core = &self.core
        cdef int error
        if self.started:
            return
        with nogil:
            error = back_range(<uint8_t *>self.memory.base, self.memory.super.frame_headers_offset)
        if error:
            raise MemoryFileError("there is not enough memory for the index; choose a smaller device")
        if self.commit == "all":
            arena_keep_all(&core.arena)
        if not self.memory.fresh:
            core.arena.held = HELD_UNKNOWN
            if thread_start_alike(&core.rebuilder, takeover, core, b"zc-takeover") != 0:
                raise MemoryFileError("no thread could be started; raise the limit of processes")
            core.rebuilding = True
        else:
            if arena_commit_now(&core.arena, core.arena.reserve) and self.commit == "all":
                raise MemoryFileError("there is not enough memory for the whole pool; choose a smaller pool")
            zc_store32(&core.ready, 1)
        if arena_start(&core.arena) or crew_start(
            &core.crew, &core.slots, core.codec, core.allocator.largest_bytes - HEADER_BYTES
        ):
            raise MemoryFileError("no thread could be started; raise the limit of processes")
        core.slots.background[C_PRIVATE_TABLE_BYTES] += crew_memory_bytes(&core.crew)
        if self.tidy and (tidy_start(core) or dense_start(core)):
            raise MemoryFileError("no thread could be started; raise the limit of processes")
        self.memory.fresh = False       # the next store on this file takes it over
        zc_store32(&core.serving, 1)
        self.started = True

    def stop(self):
        """Stop the threads and let go of everything but the memory file.  Serve nothing after."""
        cdef Core *core = &self.core
        if not self.open:
            return
        self.open = False
        zc_store32(&core.serving, 0)
        with nogil:
            dense_stop(core)
            tidy_stop(core)
            slots_quiesce(&core.slots)
            if core.rebuilding:
                pthread_join(core.rebuilder, NULL)
                core.rebuilding = False
            crew_stop(&core.crew)
            arena_free(&core.arena)
            core.allocator.discard(core.allocator)
            codec_discard(&core.slots)
            dense_free(core)
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
            error = store_get(&self.core, slot, page, data, NULL, True)
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

    def set_pool(self, uint64_t pool_bytes):
        """Another limit of the pool, of whole frames; a smaller one is reached as pages leave.

        Raises ConfigError when the memory file has no room for it, or more is in use
        and there is no tier below.
        """
        self._require_open()
        frames = pool_bytes // PAGE_BYTES
        if frames > self.core.arena.total:
            raise ConfigError(f"the memory file has room for a pool of {self.core.arena.total * PAGE_BYTES} bytes")
        if pool_bytes % PAGE_BYTES or not arena_set_goal(&self.core.arena, frames, self.core.lower.tiers != NULL):
            raise ConfigError(f"a pool of {pool_bytes} bytes is no whole number of frames, or less than is in use")

    def set_allocator(self, str name):
        """New pages go to this allocator; those of the others move there in the background.

        Raises ConfigError for another name, MemoryFileError without memory for its table.
        """
        cdef bint done
        cdef uint32_t number
        self._require_open()
        if name not in ALLOCATORS:
            raise ConfigError(f"unknown allocator {name!r}; use {' or '.join(ALLOCATORS)}")
        number = ALLOCATORS.index(name)
        with nogil:
            done = tidy_choose(&self.core, number)
        if not done:
            raise MemoryFileError("no memory for the allocator; choose a smaller pool")

    @property
    def allocator_name(self):
        """Where new pages go."""
        self._require_open()
        return (<bytes>self.core.allocator.name).decode()

    def set_recompress(self, str codec, uint32_t age_s):
        """Recompress pages that nobody asked for in age_s seconds: "zstd", "zstd:LEVEL", or "none" of them.

        The thread does it when it has the memory for that; the counters tell.  Raises ConfigError,
        MemoryFileError.
        """
        self._require_open()
        cdef int level = recompress_level(codec)
        if not 0 < age_s <= RECOMPRESS_AGE_S_MAX:
            raise ConfigError(f"recompress_age={age_s} is out of range; use 1 to {RECOMPRESS_AGE_S_MAX} seconds")
        # before the start here, so that a server which waits for memory does not serve yet
        if level and not self.started and not dense_prepare(&self.core, level):
            raise MemoryFileError("no memory to recompress with; leave recompress= out, or choose a smaller pool")
        dense_choose(&self.core, level, age_s)

    def recompress(self, str codec="zstd"):
        """Recompress every page that wins by it, now, cold or not.  Raises ConfigError, MemoryFileError."""
        cdef bint done
        cdef int level = recompress_level(codec)
        self._require_page(0)
        if level == 0:
            raise ConfigError("recompress takes zstd or zstd:LEVEL")
        with nogil:
            done = dense_all(&self.core, level)
        if not done:
            raise MemoryFileError("no memory to recompress with; choose a smaller pool")

    def compact(self):
        """Move objects together as far as that goes, now; how many frames or zspages were emptied."""
        cdef uint64_t done
        self._require_open()
        with nogil:
            done = tidy_all(&self.core)
        return done

    def pause_background(self, bint paused=True):
        """Move and recompress nothing in the background, until told to go on: what it costs others is measured so."""
        self._require_open()
        tidy_pause(&self.core, paused)

    def entry(self, uint64_t page):
        """(location word, version word) of a page."""
        self._require_page(page)
        cdef Entry e = entry_load(&self.core.index, page)
        return e.location, e.version

    def victims(self, uint32_t most):
        """Up to `most` cold frames, coldest first as the clock sees it."""
        cdef uint32_t frames[256]
        self._require_open()
        n = store_victims(&self.core, frames, min(most, 256), False)
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
        cdef uint64_t below = 0
        cdef uint64_t broken = 0
        self._require_page(0)
        with nogil:
            store_wait_ready(core)
            lock_take(&core.tidy.turn)      # nothing is on its way from one frame to another
            slot = slot_take(&core.slots)
            for page in range(core.index.pages):
                e = entry_load(&core.index, page)
                if not entry_is_sound(e.location, e.version):
                    broken += 1
                elif in_ram(state_of(e.version)):
                    in_frames += 1
                    broken += not load_blob(core, slot, page, e, slot.page, False)
                elif state_of(e.version) == ST_SAME:
                    same += 1
                elif is_below(state_of(e.version)):
                    below += 1
            slot_release(slot)
            broken += allocator_broken(core.allocator)
        from zcache_core.counters import read
        counted = read(self.memory)
        broken += counted["pers_zpages"] + counted["eph_zpages"] != in_frames
        broken += counted["same_filled_pages"] != same
        lock_take(&core.arena.lock)
        in_use = core.arena.committed - core.arena.free_count - core.arena.moving
        pthread_mutex_unlock(&core.arena.lock)
        pthread_mutex_unlock(&core.tidy.turn)
        broken += in_use != counted["pers_pageframes"] + counted["eph_pageframes"] + counted["dictionary_frames"]
        copies = counted["disk_pages"] + counted["pers_pages_remoted"] - counted["backed_pages"]
        broken += copies != below + counted["eph_zpages"]
        return broken
