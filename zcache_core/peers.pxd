"""C face of the peer tier."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdTier
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
    int fd                      # of the ring
    int wake_fd
    int64_t get_bound_us
    int64_t put_bound_us
    uint32_t busy[RING_CELLS]   # atomics: get cells in use
    pthread_mutex_t lock        # guards the end of the ring of drops

cdef uint64_t peers_memory_bytes() noexcept nogil
cdef bint peers_make(Peers *p, Superblock *super, uint32_t device, uint64_t *cells) noexcept nogil
cdef void peers_discard(Peers *p) noexcept nogil
