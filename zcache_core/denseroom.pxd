"""C face of what recompression needs of memory."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.codec cimport CodecChoice
from zcache_core.core cimport Core
from zcache_core.layout cimport Entry
from zcache_core.learning cimport Learner
from zcache_core.slots cimport Slot

cdef enum:
    BATCH_PAGES = 16            # 0.5 ms of zstd:3; two changes of class, 1 us each, are nothing beside it

ctypedef struct Found:          # one page of a batch
    uint64_t page
    Entry entry
    uint32_t length_bytes       # of the tighter blob; 0: there is none

ctypedef struct Batch:          # kept from the first order on: one page of memory
    Learner learner
    int64_t look_again_us       # when there was no memory to learn with
    CodecChoice choice
    uint32_t n
    Found found[BATCH_PAGES]
    # had while there is something to do: both contexts, and the room, or none of them
    Slot own                    # the context for compressing; no request's slot
    Slot plain                  # the same without a dictionary, to compare
    uint8_t *room
    uint8_t *pages              # in it: BATCH_PAGES x PAGE_BYTES
    uint8_t *blobs              # BATCH_PAGES x BLOB_ROOM

cdef inline Batch *batch_of(Core *core) noexcept nogil:
    return <Batch *>core.dense.batch

cdef bint dense_is_ready(Core *core, int level) noexcept nogil
cdef bint dense_prepare(Core *core, int level) noexcept nogil
cdef void dense_give_back(Core *core) noexcept nogil
cdef void dense_tell(Core *core) noexcept nogil
cdef void dense_free(Core *core) noexcept nogil
