"""Tiers: what leaves RAM and when, and what comes back; put together, started, stopped.

    RAM tier -- drop, adopt --------------------------------> ColdTier (disk; peers; both)
             -- fetch ---------> fetching.pyx ---------------->
             -- wait for room -> cooler.pyx -> eviction.pyx -->

What is hot stays: cold pages go down in batches and are ephemeral from then on; their
RAM copies stay, to be read, until room is needed, and are then dropped without any I/O.
The parts are named in below.pxd, the locks in their files and in store.pyx.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from zcache_core.ahead cimport ahead_discard, ahead_make, ahead_start, ahead_stop
from zcache_core.backup cimport backup_make
from zcache_core.both cimport both_make
from zcache_core.bothstate cimport SWEEP_ROOM, Both
from zcache_core.below cimport GATHER_BYTES, RESORT_PAGES, Tiers
from zcache_core.cold cimport COLD_BATCH, COLD_CAPSULE, ColdPage, ColdTier
from zcache_core.cooler cimport cooling_thread, tiers_wait_room
from zcache_core.counter_ids cimport C_PRIVATE_TABLE_BYTES
from zcache_core.crypt cimport Crypt, Sealer
from zcache_core.disk cimport disk_cut, disk_discard, disk_keep_first, disk_make, disk_memory_bytes
from zcache_core.diskrun cimport disk_get_many
from zcache_core.diskstate cimport DISK_BYTES_LEAST, DISK_WHOLE
from zcache_core.fetching cimport ghost_cells, tiers_fetch, tiers_mend
from zcache_core.layout cimport BACKED_BITS, COUNTER_CELLS, Entry
from zcache_core.orders cimport orders_tell
from zcache_core.pthread cimport (
    cond_init, lock_init, lock_take, pthread_cond_broadcast, pthread_cond_signal, pthread_join,
    pthread_mutex_unlock, sched_getparam, sched_getscheduler, sched_param, thread_start,
)
from zcache_core.peers cimport peers_memory_bytes
from zcache_core.peertier cimport PeerTier
from zcache_core.slots cimport SLOTS, slots_expect_io
from zcache_core.store cimport Store

from zcache_core.errors import ConfigError, MemoryFileError

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE


# ---- what the RAM tier calls, beside fetch and wait_room -----------------------------------

cdef void tiers_drop(void *tiers, const ColdPage *page) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    t.cold.drop(t.cold, page)


cdef bint tiers_adopt(void *tiers, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    return t.cold.adopt(t.cold, where, length_bytes)


cdef int tiers_holds(void *tiers, uint64_t where) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    return t.cold.holds(t.cold, where)


cdef void tiers_adopted(void *tiers) noexcept nogil:
    cdef Tiers *t = <Tiers *>tiers
    t.cold.adopted(t.cold)


# ---- Python's view -------------------------------------------------------------------------------

@cython.no_gc_clear         # its thread uses the store until it is stopped
cdef class Cooling:
    """The tiers below one store: a disk, peers, or both.  Make it before store.start().

    `peers` is the tier of those.  `fd` (-1: no disk) is an open file or block device of which `disk_bytes` are ours; `preallocated`
    says that its room was promised, `encrypt` that pages are encrypted on it (what is
    there already is read either way), `writeback_limit` how many bytes a day may be written
    (0: as many as need be).  `found_bytes`: a file that was there was only so long (0: long enough); what
    pages have behind that is gone.  `backup`: a page that leaves has a copy at one peer and one on the disk.
    Raises ConfigError, MemoryFileError.
    """

    def __cinit__(
        self, Store store not None, int fd=-1, uint64_t disk_bytes=0, preallocated=False, int high=90, int low=80,
        bint encrypt=False, uint64_t writeback_limit=0, PeerTier peers=None, bint backup=False,
        uint64_t found_bytes=0,
    ):
        cdef uint64_t io_bytes
        cdef Tiers *t = &self.tiers
        cdef Crypt *crypt = NULL
        memset(t, 0, sizeof(Tiers))
        if not 0 < low <= high <= 100:
            raise ConfigError(f"watermarks low={low} and high={high} are out of order; use 0 < low <= high <= 100")
        if fd < 0 and peers is None:
            raise ConfigError("there is nothing below; give it a disk, or peers")
        if fd >= 0 and disk_bytes < DISK_BYTES_LEAST:
            raise ConfigError(f"a disk of {disk_bytes} bytes is too small; use at least 8 MiB")
        if disk_bytes >> 47:
            raise ConfigError("a disk has less than 128 TiB; use a smaller disk_size")
        if backup and (fd < 0 or peers is None):
            raise ConfigError("backup=disk needs a disk and peers; give it both")
        if backup and disk_bytes >> BACKED_BITS:
            raise ConfigError("backup=disk takes at most 512 GiB of disk; use disk_size=512G, or backup=none")
        self.store = store
        self.peers = peers
        t.core = &store.core
        t.orders.high_percent, t.orders.low_percent = high, low
        t.orders.writeback_limit_bytes = writeback_limit
        t.orders.fd = -1
        t.orders.core = &store.core
        t.orders.below = True
        t.keep_bytes = DISK_WHOLE
        t.cells = store.memory.counters + (SLOTS + 2) * COUNTER_CELLS
        if encrypt or not store.memory.fresh:
            self.sealer = Sealer(store.memory)
            crypt = &self.sealer.crypt
        if fd >= 0:
            self.disk = disk_make(
                fd, disk_bytes, store.memory.super, store.core.device, preallocated,
                store.memory.counters + (SLOTS + 3) * COUNTER_CELLS, crypt, encrypt,
                &t.orders.writeback_limit_bytes,
            )
            if self.disk == NULL:
                raise MemoryFileError("no memory for the disk's tables; choose a smaller pool")
            self.disk.get_many = disk_get_many
            t.disk = self.disk
            disk_keep_first(self.disk)
            if 0 < found_bytes < disk_bytes:
                disk_cut(self.disk, found_bytes)
        t.cold = self._with_peers(backup)
        t.orders.cells = store.memory.counters + (SLOTS + 4) * COUNTER_CELLS
        orders_tell(&t.orders)
        t.gathered = pages_of(GATHER_BYTES)
        if self.both != NULL:
            assert <uint64_t>SWEEP_ROOM <= <uint64_t>GATHER_BYTES
            self.both.room = t.gathered
        t.batch = <ColdPage *>pages_of(COLD_BATCH * sizeof(ColdPage))
        t.entries = <Entry *>pages_of(COLD_BATCH * sizeof(Entry))
        t.resort_batch = <ColdPage *>pages_of(RESORT_PAGES * sizeof(ColdPage))
        io_bytes = slots_expect_io(&store.core.slots)
        t.ghost_cells = ghost_cells(store.core.arena.total)
        t.ghosts = <uint32_t *>pages_of(t.ghost_cells * sizeof(uint32_t))
        if not (io_bytes and t.cold and t.gathered and t.batch and t.entries and t.resort_batch and t.ghosts):
            raise MemoryFileError("no memory for the tiers' buffers; choose a smaller pool")
        if not ahead_make(&t.ahead, t.core, t.cold, store.memory.counters + (SLOTS + 5) * COUNTER_CELLS):
            raise MemoryFileError("no memory for reading ahead; choose a smaller pool")
        t.cells[C_PRIVATE_TABLE_BYTES] = (
            (disk_memory_bytes(self.disk) if self.disk != NULL else 0) + io_bytes
            + (peers_memory_bytes() + sizeof(Both) if peers is not None else 0) + GATHER_BYTES + t.ghost_cells * sizeof(uint32_t)
            + COLD_BATCH * (sizeof(ColdPage) + sizeof(Entry)) + RESORT_PAGES * sizeof(ColdPage)
        )
        lock_init(&t.lock)
        lock_init(&t.dropping)
        cond_init(&t.work)
        cond_init(&t.room)
        store.core.lower.fetch = tiers_fetch
        store.core.lower.mend = tiers_mend
        store.core.lower.drop = tiers_drop
        store.core.lower.adopt = tiers_adopt
        store.core.lower.adopted = tiers_adopted
        store.core.lower.holds = tiers_holds
        store.core.lower.wait_room = tiers_wait_room
        store.core.lower.peers = peers is not None
        store.core.lower.disk = self.disk != NULL
        store.core.lower.tiers = t

    cdef ColdTier *_with_peers(self, bint backup):
        """The disk alone, or what puts peers before it; NULL without memory."""
        if self.peers is None:
            return self.disk
        self.both = <Both *>pages_of(sizeof(Both))
        if self.both == NULL:
            return NULL
        self.peers.peers.core = &self.store.core
        both_make(self.both, &self.peers.peers.face, self.disk)
        backup_make(self.both, &self.peers.peers, self.store.memory.counters + (SLOTS + 3) * COUNTER_CELLS, backup)
        return &self.both.face

    def start(self):
        """Start the threads, from one of the class of those that serve; the store is started."""
        cdef sched_param param
        self.tiers.policy = sched_getscheduler(0)
        self.tiers.priority = param.sched_priority if sched_getparam(0, &param) == 0 else 0
        self.tiers.ahead.cold = self.tiers.cold
        if ahead_start(&self.tiers.ahead) or thread_start(&self.tiers.thread, cooling_thread, &self.tiers, b"zc-cool"):
            raise MemoryFileError("no thread could be started; raise the limit of processes")
        self.tiers.running = True

    def stop(self):
        """Stop the threads; pages below stay readable until the store stops."""
        cdef Tiers *t = &self.tiers
        if not t.running:
            return
        with nogil:
            ahead_stop(&t.ahead)
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
            self.store.core.lower.peers = self.store.core.lower.disk = False
        if self.disk != NULL:
            disk_discard(self.disk)
        ahead_discard(&self.tiers.ahead)
        unmap(self.both, sizeof(Both))
        unmap(self.tiers.gathered, GATHER_BYTES)
        unmap(self.tiers.batch, COLD_BATCH * sizeof(ColdPage))
        unmap(self.tiers.entries, COLD_BATCH * sizeof(Entry))
        unmap(self.tiers.resort_batch, RESORT_PAGES * sizeof(ColdPage))
        unmap(self.tiers.ghosts, self.tiers.ghost_cells * sizeof(uint32_t))

    def wrap_disk(self, wrapper):
        """Before start, with peers: put a tier between both and the disk, as `wrap` does above both."""
        self.wrapper = wrapper(PyCapsule_New(self.both.disk, COLD_CAPSULE, NULL))
        self.both.disk = <ColdTier *>PyCapsule_GetPointer(self.wrapper.capsule, COLD_CAPSULE)
        return self.wrapper

    def wrap(self, wrapper):
        """Before start: put a tier between this and the disk, `wrapper(capsule)` with its own `capsule`."""
        self.wrapper = wrapper(PyCapsule_New(self.tiers.cold, COLD_CAPSULE, NULL))
        self.tiers.cold = <ColdTier *>PyCapsule_GetPointer(self.wrapper.capsule, COLD_CAPSULE)
        return self.wrapper

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
