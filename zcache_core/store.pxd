"""C face of the store: what the device, and later the tiers, call."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport Arena
from zcache_core.codec cimport CodecChoice
from zcache_core.index cimport Index
from zcache_core.layout cimport Entry
from zcache_core.memfile cimport MemoryFile
from zcache_core.pthread cimport pthread_mutex_t, pthread_t
from zcache_core.slots cimport Slot, Slots

cdef enum:
    PAGE_LOCKS = 64
    RAN_OUT = 0x7F000001        # store_replace: the entry is no longer the expected one

ctypedef struct Core:
    Index index
    Arena arena
    Allocator *allocator
    Slots slots
    CodecChoice codec
    uint32_t device             # number in the superblock's device table
    uint32_t ready              # atomic: the allocator knows what is taken
    uint32_t clock_hand
    uint64_t same_filled        # atomic
    pthread_mutex_t page_lock[PAGE_LOCKS]
    pthread_t rebuilder
    bint rebuilding

cdef int store_put(Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version) noexcept nogil
cdef int store_replace(
    Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version, const Entry *expected
) noexcept nogil
cdef int store_get(Core *core, Slot *slot, uint64_t page, uint8_t *data, Entry *seen) noexcept nogil
cdef void store_expect(Core *core, uint64_t page) noexcept nogil
cdef void store_invalidate(Core *core, Slot *slot, uint64_t page, uint64_t version) noexcept nogil
cdef void store_wait_ready(Core *core) noexcept nogil
cdef uint32_t store_victims(Core *core, uint32_t *frames, uint32_t most) noexcept nogil


cdef class Store:
    cdef Core core
    cdef readonly MemoryFile memory
    cdef readonly str allocator_name
    cdef readonly str codec_text
    cdef readonly str commit
    cdef bint open
    cdef bint started
    cdef object _require_open(self)
