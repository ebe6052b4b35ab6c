"""C face of how full the pool is."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.below cimport Tiers

cdef uint64_t frames_ephemeral(Tiers *t) noexcept nogil
cdef uint64_t frames_persistent(Tiers *t) noexcept nogil
cdef uint32_t frames_left(Tiers *t) noexcept nogil
cdef uint32_t free_target(Tiers *t) noexcept nogil
cdef bint has_ram_to_spare(Tiers *t) noexcept nogil
cdef bint must_cool(Tiers *t) noexcept nogil
