"""The state of one device's store, as a C struct: what every part of the RAM tier shares."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport Arena
from zcache_core.codec cimport CodecChoice
from zcache_core.index cimport Index
from zcache_core.pthread cimport pthread_mutex_t, pthread_t
from zcache_core.slots cimport Slots

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
    uint32_t serving            # atomic: between start and stop; else requests are refused
    uint32_t ready              # atomic: the allocator knows what is taken
    uint32_t clock_hand
    uint64_t same_filled        # atomic
    pthread_mutex_t page_lock[PAGE_LOCKS]
    pthread_t rebuilder
    bint rebuilding
