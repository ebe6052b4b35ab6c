"""C face of the disk tier."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdTier
from zcache_core.crypt cimport Crypt
from zcache_core.diskobject cimport Whose
from zcache_core.layout cimport Superblock
from zcache_core.pthread cimport pthread_mutex_t
from zcache_core.quota cimport Quota

cdef enum:
    # Written in pieces of up to 1 MiB, one segment; cleaned and punched as a whole.
    SEGMENT_BYTES = 1 << 20
    BLOCK_BYTES = 4096          # of O_DIRECT: what every disk takes

cdef enum SegmentState:
    SEG_FREE = 0
    SEG_OPEN = 1                # being filled
    SEG_FULL = 2
    SEG_RESORT = 3              # being cleaned
    SEG_TRIED = 4               # full, and cleaning left something alive: others first

ctypedef struct Segment:
    uint32_t live_bytes         # atomic
    uint32_t state              # atomic; changed under `lock`

ctypedef struct Disk:
    ColdTier face               # first: a ColdTier * is a Disk *
    int fd
    Whose whose                 # part of every object
    uint32_t segments           # number 0 is the disk's own header: not used
    Segment *segment
    uint64_t *cells             # a counter shard of its own: pages and live bytes are atomic,
                                # the rest belongs to the writing thread
    uint8_t *buffer             # SEGMENT_BYTES, aligned: what is being gathered
    Quota quota                 # bytes a day
    bint preallocated           # room once taken is never given away
    pthread_mutex_t lock        # guards what follows, and changes of state
    uint32_t open_segment
    uint32_t fill_bytes         # written so far in the open segment
    uint32_t free_segments
    uint32_t next_free          # where to look first
    uint32_t resorting
    int failing                 # errno; atomic
    int64_t retry_at_us
    int64_t retry_wait_us

cdef ColdTier *disk_make(
    int fd, uint64_t disk_bytes, Superblock *super, uint32_t device, bint preallocated, uint64_t *cells,
    Crypt *crypt, bint encrypt, const uint64_t *limit_bytes,
) noexcept nogil
cdef uint64_t disk_memory_bytes(ColdTier *tier) noexcept nogil
cdef void disk_discard(ColdTier *tier) noexcept nogil
