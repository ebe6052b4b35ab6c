"""The state of the disk tier, as a C struct: what its parts share (disk.pyx, diskput.pyx)."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdTier
from zcache_core.diskio cimport WriteRing
from zcache_core.diskobject cimport Whose
from zcache_core.pthread cimport pthread_mutex_t
from zcache_core.quota cimport Quota
from zcache_core.segments cimport RESORT_SEGMENTS, SEGMENT_BYTES, Segments

cdef enum:
    DISK_BYTES_LEAST = 8 << 20
    RESORT_BYTES = RESORT_SEGMENTS * SEGMENT_BYTES  # of room that resort wants
    # Never filled by put: resorting needs somewhere to write what lives in the segments that it
    # takes until they have 1 MiB, so less than 1.25 MiB.
    SPARE_SEGMENTS = 5

cdef extern from "<stdint.h>":
    const uint64_t DISK_WHOLE "UINT64_MAX"      # as many bytes: nothing is cut off

ctypedef struct Log:            # where objects are written behind one another
    uint32_t segment            # 0: none is open
    uint32_t fill_bytes         # of it, written or on its way

ctypedef struct Disk:
    ColdTier face               # first: a ColdTier * is a Disk *
    int fd
    uint64_t bytes              # of it that are ours
    Whose whose                 # part of every object
    uint64_t *cells             # a counter shard of its own: pages and live bytes are atomic,
                                # the rest belongs to the writing thread
    Quota quota                 # bytes a day
    WriteRing ring              # of the writing thread
    bint preallocated           # room once taken is never given away
    bint no_punching            # it was refused once
    pthread_mutex_t lock        # guards what follows
    Segments segments           # but for its atomics
    Log log[2]                  # of pages that come down, and of those that cleaning moves
    uint32_t resorting[RESORT_SEGMENTS]
    uint32_t resorting_live[RESORT_SEGMENTS]    # as it was when they were chosen
    uint32_t resorting_count
    bint held_back              # by the last put: whole segments only, the rest another time
    int failing                 # errno; atomic
    bint keep_first             # a cut file stays short until what is in RAM is kept there
    uint64_t cut_bytes          # its least length since it was long enough; DISK_WHOLE: it is
    uint64_t kept_bytes         # as it was when all was kept; DISK_WHOLE: nothing is
    int64_t retry_at_us
    int64_t retry_wait_us
