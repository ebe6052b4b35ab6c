"""C face of moving objects within RAM."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.core cimport Core
from zcache_core.slots cimport Slot

cdef enum:
    OBJECTS_IN_A_FRAME = 64     # most objects that any allocator tells of one frame

cdef bint move_object(Core *core, Slot *slot, uint64_t where, uint32_t bytes) noexcept nogil
cdef uint32_t empty_frame(Core *core, Slot *slot, uint32_t frame) noexcept nogil
