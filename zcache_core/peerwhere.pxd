"""C face of the addresses of pages at peers."""

from libc.stdint cimport uint64_t

from zcache_core.layout cimport DonorRow, Superblock

cdef bint row_is_used(const DonorRow *row) noexcept nogil
cdef bint where_is_possible(const Superblock *super, uint64_t where) noexcept nogil
cdef uint64_t where_without(uint64_t where, uint64_t other) noexcept nogil
