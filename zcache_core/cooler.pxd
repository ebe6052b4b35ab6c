"""C face of the cooling thread."""

from libc.stdint cimport int64_t

cdef void *cooling_thread(void *tiers) noexcept nogil
cdef bint tiers_wait_room(void *tiers, void *slot, int64_t deadline_us) noexcept nogil
