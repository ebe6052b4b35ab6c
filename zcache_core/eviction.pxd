"""C face of what goes down and what leaves RAM."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.below cimport Tiers

cdef uint32_t cool_batch(Tiers *t, uint64_t most_bytes) noexcept nogil
cdef uint32_t drop_frames(Tiers *t, uint32_t most) noexcept nogil
cdef bint keep_cut_off(Tiers *t) noexcept nogil
cdef uint32_t keep_hot(Tiers *t, uint32_t most) noexcept nogil
cdef bint resort(Tiers *t) noexcept nogil
