"""C face of the tiers: the struct behind the class."""

from zcache_core.below cimport Tiers
from zcache_core.bothstate cimport Both
from zcache_core.cold cimport ColdTier
from zcache_core.crypt cimport Sealer
from zcache_core.peertier cimport PeerTier
from zcache_core.store cimport Store


cdef class Cooling:
    cdef Tiers tiers
    cdef Store store
    cdef ColdTier *disk         # NULL: none
    cdef PeerTier peers         # None: none
    cdef Both *both             # of the two; NULL without peers
    cdef Sealer sealer          # None: nothing on the disk is encrypted, or will be
    cdef object wrapper         # of the disk, kept alive

    cdef ColdTier *_with_peers(self, bint backup)
