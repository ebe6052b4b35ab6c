"""C face of reading ahead."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdPage, ColdTier
from zcache_core.core cimport Core
from zcache_core.layout cimport BlobHeader, Entry
from zcache_core.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t
from zcache_core.slots cimport Slot

cdef enum:
    AHEAD_CELLS = 256           # pages kept ready; 1 MiB
    AHEAD_BATCH = 16            # fetched at once
    AHEAD_ORDERS = 16           # stretches waiting to be fetched
    AHEAD_STREAMS = 8           # readers told apart

cdef enum CellState:
    CELL_EMPTY = 0
    CELL_LOADING = 1
    CELL_READY = 2

ctypedef struct Cell:           # one page ready, by page % AHEAD_CELLS
    uint32_t state
    uint32_t page
    uint64_t version
    uint64_t arrivals           # of pages in RAM, before its entry was read
    BlobHeader header           # made when the blob came, checked when it is used

ctypedef struct Stretch:
    uint32_t first
    uint32_t end

ctypedef struct Stream:
    uint64_t next               # the page that would continue it
    uint64_t until              # asked to be fetched up to here
    uint32_t run                # reads in order so far
    uint64_t turn               # when it was seen last

ctypedef struct Ahead:
    Core *core
    ColdTier *cold
    uint64_t *cells_counters    # counter shard of the thread
    uint8_t *memory             # AHEAD_CELLS blobs, one batch, room for reading
    Cell cell[AHEAD_CELLS]
    ColdPage batch[AHEAD_BATCH]
    ColdPage group[AHEAD_BATCH] # of the batch: those that lie close together
    pthread_t thread
    # guarded by `lock`
    pthread_mutex_t lock
    pthread_cond_t work         # the thread waits here
    pthread_cond_t done         # who wants what is just coming
    Stretch order[AHEAD_ORDERS]
    uint32_t orders
    Stream stream[AHEAD_STREAMS]
    uint64_t turns
    bint running
    bint stopping

cdef bint ahead_make(Ahead *a, Core *core, ColdTier *cold, uint64_t *counters) noexcept nogil
cdef void ahead_discard(Ahead *a) noexcept nogil
cdef int ahead_start(Ahead *a) noexcept nogil
cdef void ahead_stop(Ahead *a) noexcept nogil
cdef bint ahead_take(Ahead *a, Slot *slot, uint64_t page, Entry e) noexcept nogil
cdef void ahead_note(Ahead *a, uint64_t page) noexcept nogil
