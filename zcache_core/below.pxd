"""The state of the tiers below one store, as a C struct: what all of their parts share.

    tiers.pyx       made, started, stopped; what the RAM tier calls
    fullness.pyx    how full the pool is; when to cool
    eviction.pyx    down: cold pages copied, ephemeral frames dropped, the tier tidied up
    cooler.pyx      the thread that does it; writers that wait for it
    ahead.pyx       the thread that fetches what is read in order before it is asked for
    fetching.pyx    up: pages read from below, and which of them earn a RAM copy
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.ahead cimport Ahead
from zcache_core.cold cimport COLD_BATCH, ColdPage, ColdTier
from zcache_core.core cimport Core
from zcache_core.layout cimport Entry
from zcache_core.orders cimport Orders
from zcache_core.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t

cdef enum:
    GATHER_BYTES = 1 << 21      # a batch: two of the disk's writes; what is cleaned at once
    RESORT_PAGES = 32768        # most objects cleaned at once
    FRAMES_AT_ONCE = 64         # victims looked at in one slot's time

ctypedef struct Tiers:
    Core *core
    ColdTier *cold              # the one tier below so far
    ColdTier *disk              # the disk itself, whatever is before it; NULL: none
    Ahead ahead                 # pages fetched before they are asked for
    Orders orders               # watermarks, draining: changed while the server runs
    uint64_t *cells             # counter shard of the cooling thread
    uint8_t *gathered           # GATHER_BYTES: blobs on their way down, or being cleaned
    ColdPage *batch             # COLD_BATCH
    Entry *entries              # COLD_BATCH: what each page of the batch was
    ColdPage *resort_batch      # RESORT_PAGES
    uint32_t *ghosts            # atomics: pages read once (fetching.pyx)
    uint64_t ghost_cells        # a power of two
    uint32_t keep_hand          # the frame where the search for hot ephemeral ones goes on
    uint64_t keep_bytes         # the disk's length that the index is walked for; DISK_WHOLE: it is not
    uint64_t keep_at            # the page where that walk goes on
    pthread_mutex_t dropping    # guards the choice of ephemeral frames to drop
    uint64_t cold_loads         # atomic
    int64_t failing_since_us    # the tier fails since then; 0: it does not.  A hint
    # guarded by `lock`
    pthread_mutex_t lock
    pthread_cond_t work         # the cooling thread waits here
    pthread_cond_t room         # writers wait here
    uint32_t waiting            # writers that do
    bint stopping
    bint cooling                # between high and low
    uint64_t rounds             # turns of the thread that made progress
    bint raised                 # the thread has the waiters' class
    pthread_t thread
    int policy, priority        # the class of the threads that serve
    bint running
