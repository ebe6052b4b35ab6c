"""C face of the memory file: where its parts lie in this process."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.layout cimport BlobHeader, Entry, Keys, Superblock


cdef class MemoryFile:
    cdef readonly int shmid
    cdef readonly bint writable
    cdef readonly bint stays_locked
    cdef public bint fresh
    cdef readonly bint expected     # mapped beforehand, not ours yet
    cdef object _name
    cdef object _lock
    cdef uint8_t *base
    cdef Superblock *super
    cdef Keys *keys             # NULL for who only reads
    cdef uint64_t *counters
    cdef Entry *index
    cdef uint64_t *frame_map     # a bit for each frame: set if it has memory
    cdef BlobHeader *frame_headers
    cdef uint8_t *arena

    cdef bint lower_of(self, uint64_t page, Entry e, uint64_t *lower) noexcept nogil
    cdef Superblock *_open_super(self) except NULL
    cdef object _attach(self, bint writable)
    cdef object _detach(self)
    cdef object _check(self)
    cdef object _make_keys(self)
    cdef uint64_t _devices_crc(self)
