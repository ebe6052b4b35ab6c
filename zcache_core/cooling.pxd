"""C face of the moves between RAM and what is below."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.cold cimport ColdPage
from zcache_core.core cimport Core
from zcache_core.layout cimport Entry
from zcache_core.slots cimport Slot

cdef uint32_t page_at(Core *core, uint64_t where, uint32_t bytes) noexcept nogil
cdef bint copy_for_below(
    Core *core, uint64_t where, uint32_t bytes, ColdPage *page, Entry *entry, uint8_t *blob
) noexcept nogil
cdef bint make_ephemeral(Core *core, uint64_t page, Entry entry, uint64_t lower) noexcept nogil
cdef bint drop_ram_copy(Core *core, uint64_t page, Entry entry) noexcept nogil
cdef bint leave_damaged_copy(Core *core, uint64_t page, Entry entry, uint64_t lower) noexcept nogil
cdef bint leave_for_lost(Core *core, uint64_t page, Entry entry) noexcept nogil
cdef bint keep_in_ram(Core *core, uint64_t page, Entry entry, uint64_t *lower) noexcept nogil
cdef bint promote(Core *core, Slot *slot, uint64_t page, Entry entry, const uint8_t *blob, bint *alone) noexcept nogil
cdef uint64_t lower_now(Core *core, const ColdPage *page) noexcept nogil
cdef bint copy_moved(Core *core, const ColdPage *old, uint64_t where) noexcept nogil
cdef bint still_needed(Core *core, const ColdPage *page) noexcept nogil
