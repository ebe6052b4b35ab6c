"""The peer tier as Python makes it: one memory file's donors, and the ring for its node process."""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t, uint32_t, uint64_t

from zcache_core.cold cimport COLD_CAPSULE, HOLDS
from zcache_core.crypt cimport Sealer
from zcache_core.layout cimport COUNTER_CELLS, DONOR_ID_BYTES, DONORS, DonorRow
from zcache_core.memfile cimport MemoryFile
from zcache_core.native cimport zc_store32
from zcache_core.peers cimport peers_discard, peers_make
from zcache_core.peerwhere cimport row_is_used
from zcache_core.slots cimport SLOTS

from zcache_core.errors import MemoryFileError


cdef class PeerTier:
    """The tier over one memory file's donors, and the ring that its node process takes.

    Raises MemoryFileError.  `fd` and `wake_fd` are for the node (ringside.RingSide); they stay
    open as long as this lives.
    """

    def __cinit__(self, MemoryFile memory not None):
        self.peers.fd = self.peers.wake_fd = -1
        self.memory = memory
        self.sealer = Sealer(memory, 0, True)
        self.peers.crypt = &self.sealer.crypt
        if not peers_make(&self.peers, memory.super, 0, memory.counters + (SLOTS + 6) * COUNTER_CELLS):
            raise MemoryFileError("no memory for the ring to the node process; choose a smaller pool")
        self.capsule = PyCapsule_New(&self.peers.face, COLD_CAPSULE, NULL)

    def __dealloc__(self):
        peers_discard(&self.peers)

    @property
    def fd(self):
        """Of the shared memory."""
        return self.peers.fd

    @property
    def wake_fd(self):
        """Of the eventfd that says that there is something in it."""
        return self.peers.wake_fd

    def set_bounds(self, int64_t get_us, int64_t put_us):
        """Other bounds of the waits, for tests."""
        self.peers.get_bound_us, self.peers.put_bound_us = get_us, put_us

    def end_for_good(self):
        """The memory file goes with us: the node tells the donors when it ends."""
        zc_store32(&self.peers.ring.head.over, 1)

    def holds(self, uint64_t where):
        """Whether the copies at this address may be counted on now."""
        return self.peers.face.holds(&self.peers.face, where) == HOLDS

    def donors(self):
        """[(id, epoch, copies that the index counts on)] by row; id None: unused."""
        cdef uint32_t i
        cdef DonorRow *row
        found = []
        for i in range(DONORS):
            row = &self.memory.super.donors[i]
            name = (<char *>row.id)[:DONOR_ID_BYTES] if row_is_used(row) else None
            found.append((name, row.epoch, self.peers.ring.head.copies[i]))
        return found
