"""C face of the peer tier's object."""

from zcache_core.crypt cimport Sealer
from zcache_core.memfile cimport MemoryFile
from zcache_core.peernotes cimport Peers


cdef class PeerTier:
    cdef Peers peers
    cdef MemoryFile memory
    cdef Sealer sealer
    cdef readonly object capsule
