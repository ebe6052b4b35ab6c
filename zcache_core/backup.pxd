"""C face of backup=disk."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.bothstate cimport Both
from zcache_core.cold cimport ColdPage
from zcache_core.peernotes cimport Peers

cdef void backup_make(Both *b, Peers *peers, uint64_t *disk_cells, bint backs_up) noexcept nogil
cdef uint32_t backup_put(Both *b, ColdPage *pages, uint32_t n) noexcept nogil
cdef int backup_get(Both *b, ColdPage *page, uint8_t *io) noexcept nogil
cdef void backup_get_many(Both *b, ColdPage *pages, uint32_t n, uint8_t *room, uint64_t room_bytes) noexcept nogil
cdef void backup_drop(Both *b, const ColdPage *page) noexcept nogil
cdef bint backup_adopt(Both *b, uint64_t where, uint32_t length_bytes) noexcept nogil
cdef bint give_up_disk_copy(Both *b, const ColdPage *page) noexcept nogil
cdef int backup_holds(Both *b, uint64_t where) noexcept nogil
cdef void backup_tick(Both *b) noexcept nogil
