"""C face of what is counted on at peers, and the peer tier's state."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdPage, ColdTier
from zcache_core.core cimport Core
from zcache_core.crypt cimport Crypt
from zcache_core.layout cimport Superblock
from zcache_core.pthread cimport pthread_mutex_t
from zcache_core.ring cimport RING_CELLS, Ring

ctypedef struct Peers:
    ColdTier face               # first: a ColdTier * is a Peers *
    Ring *ring
    Core *core                  # whose entries are told of moves; NULL: a tier alone, in tests
    Superblock *super
    Crypt *crypt
    uint64_t *cells             # atomics: its counter shard
    uint32_t device
    bint backup                 # pages have one copy here as a rule, and one on the disk
    uint32_t copies             # that a page put now is to have; 0: as many as `replicas` says
    int fd                      # of the ring
    int wake_fd
    int64_t get_bound_us
    int64_t put_bound_us
    uint32_t busy[RING_CELLS]   # atomics: get cells in use
    pthread_mutex_t lock        # guards the end of the ring of drops

cdef void count_alone(Peers *p, int sign) noexcept nogil
cdef void count_backed(Peers *p, int sign) noexcept nogil
cdef void count_page(Peers *p, uint64_t where, uint32_t length_bytes, int sign) noexcept nogil
cdef void tell_dropped(Peers *p, const ColdPage *page, uint64_t where) noexcept nogil
cdef void hear_notes(Peers *p) noexcept nogil
