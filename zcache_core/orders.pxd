"""C face of the commands to a running server."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.core cimport Core

ctypedef struct Orders:
    int fd                      # pipe with commands of the node process, or -1
    Core *core
    bint below                  # there is a tier below: high, low and draining mean something
    uint32_t high_percent       # of the pool: writeback starts above ...
    uint32_t low_percent        # ... and stops here
    uint64_t writeback_limit_bytes  # a day, 0: none.  Atomic: read by who writes
    bint draining               # everything goes down, and RAM copies are dropped
    uint64_t *cells             # counter shard that tells what holds

cdef void orders_tell(Orders *o) noexcept nogil
cdef void orders_hear(Orders *o) noexcept nogil
