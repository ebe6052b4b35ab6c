"""C face of two tiers as one."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.cold cimport COLD_BATCH, ColdPage, ColdTier

cdef enum:
    PIECE_BYTES = 1 << 20       # peers with less room than that do not make up for a disk that fails

ctypedef struct Both:
    ColdTier face               # first: a ColdTier * is a Both *
    ColdTier *peers
    ColdTier *disk
    uint64_t get_us[2]          # smoothed, times SMOOTH: of peers, of the disk
    uint64_t gets[2]
    uint64_t puts
    bint resorting              # what is put now comes from the disk
    ColdPage again[COLD_BATCH]  # what one refused, for the other
    uint32_t whose[COLD_BATCH]

cdef void both_make(Both *b, ColdTier *peers, ColdTier *disk) noexcept nogil
