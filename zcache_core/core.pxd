"""The state of one device's store, as a C struct: what every part of the RAM tier shares."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport Arena
from zcache_core.backing cimport Backing
from zcache_core.codec cimport CodecChoice
from zcache_core.cold cimport ColdPage
from zcache_core.crew cimport Crew
from zcache_core.index cimport Index
from zcache_core.layout cimport DictionaryRow, Entry
from zcache_core.native cimport zc_add64, zc_load64
from zcache_core.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t
from zcache_core.slots cimport Slots

# What the RAM tier asks of those below it.  They stand on a higher floor and put
# their functions here; without them (tiers NULL) RAM is all there is.
ctypedef struct Lower:
    void *tiers
    bint peers                  # what is there: pages of a tier that is not are left as they are
    bint disk
    uint64_t moved_us           # atomic: when pages last left RAM, or became free to; 0: not yet
    # read a page whose copy is below: 0, or EIO
    int (*fetch)(void *tiers, void *slot, uint64_t page, Entry e, uint8_t *data) noexcept nogil
    # read a page whose RAM copy (entry e, ephemeral) is damaged from below; True: `data` is right
    bint (*mend)(void *tiers, void *slot, uint64_t page, Entry e, uint8_t *data) noexcept nogil
    # a copy below is not needed any more
    void (*drop)(void *tiers, const ColdPage *) noexcept nogil
    # a takeover found this copy in the index; False: it cannot be
    bint (*adopt)(void *tiers, uint64_t where, uint32_t length_bytes) noexcept nogil
    void (*adopted)(void *tiers) noexcept nogil
    # whether the copy there may be counted on now: a page leaves RAM for no other
    int (*holds)(void *tiers, uint64_t where) noexcept nogil
    # wait, in a parked slot, until there may be room in RAM again; False: too late, or there will be none
    bint (*wait_room)(void *tiers, void *slot, int64_t deadline_us) noexcept nogil

# The thread that moves objects together (tidying.pyx).
ctypedef struct Tidy:
    pthread_mutex_t turn        # one frame is emptied at a time
    pthread_mutex_t lock        # guards `stopping`
    pthread_cond_t wake
    pthread_t thread
    bint running
    bint stopping
    bint paused                 # moves nothing for now (to measure what it costs)

# The thread that recompresses cold pages (denser.pyx).
ctypedef struct Dense:
    pthread_mutex_t turn        # one batch at a time: guards its buffers and contexts, and `choice`
    pthread_mutex_t lock        # guards the three below
    pthread_cond_t wake
    bint stopping
    int level                   # wanted: zstd's level; 0: nothing is recompressed
    uint32_t age_s              # wanted: pages that nobody asked for in so long are cold
    pthread_t thread
    bint running
    bint readers_counted        # memory for reading zstd is in private_table_bytes
    Backing backing             # of the thread: what may be taken
    void *batch                 # denseroom.pxd, or NULL: nothing was recompressed yet
    int64_t worked_us           # when there was a cold page last
    uint64_t *cells             # counter shard, written by who has the turn

cdef enum:
    PAGE_LOCKS = 64
    ARRIVALS = 512              # counters of arrivals, by page
    # A page's mark: quarters of recompress_age since it was asked for, and whether it was
    # tried in vain since it was written.
    MARK_AGE = 7
    MARK_COLD = 5               # no older than this
    MARK_TRIED = 128
    WOULD_BLOCK = 0x7F000002    # store_get: the page is below and the caller may not wait
    RAN_OUT = 0x7F000001        # store_replace: the entry is no longer the expected one

ctypedef struct Core:
    Index index
    Arena arena
    Allocator *allocator
    Slots slots
    CodecChoice codec
    Crew crew
    Lower lower
    Tidy tidy
    Dense dense
    DictionaryRow *dictionary_rows  # in the memory file
    uint8_t *marks              # by page, or NULL: nobody wants to know
    uint32_t device             # number in the superblock's device table
    uint32_t serving            # atomic: between start and stop; else requests are refused
    uint32_t ready              # atomic: the allocator knows what is taken
    uint32_t clock_hand[2]      # of persistent and of ephemeral frames
    uint64_t same_filled        # atomic
    uint64_t arrivals[ARRIVALS]     # atomic: pages that came to a place with the version they had
    pthread_mutex_t page_lock[PAGE_LOCKS]
    pthread_t rebuilder
    bint rebuilding

cdef inline void note_arrival(Core *core, uint64_t page) noexcept nogil:
    """Before its entry is flipped to the new place.  (One counter for all had readers look twice at what stood still.)"""
    zc_add64(&core.arrivals[page % ARRIVALS], 1)

cdef inline uint64_t arrivals_of(Core *core, uint64_t page) noexcept nogil:
    return zc_load64(&core.arrivals[page % ARRIVALS])
