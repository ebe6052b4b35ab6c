"""C face of two tiers as one."""

from zcache_core.bothstate cimport Both
from zcache_core.cold cimport ColdTier

cdef void both_make(Both *b, ColdTier *peers, ColdTier *disk) noexcept nogil
