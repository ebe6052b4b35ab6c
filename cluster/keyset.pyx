"""A set of pages in a version, filled and asked by records (peerwire): no object for a page.

    slot = hash(page, version) -> the next one that is free or has it     at most half of them are used

Bound: 32 to 64 bytes for each page that was in it at once; given back when it is empty.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from cluster.frames cimport RECORD_BYTES

cdef enum:
    SLOTS_LEAST = 64            # powers of two

ctypedef struct Key:
    uint64_t version
    uint32_t page
    uint32_t used


cdef inline Key key_at(const char *record) noexcept nogil:
    cdef Key key
    memcpy(&key.version, record, 8)
    memcpy(&key.page, record + 8, 4)
    key.used = 1
    return key


cdef inline uint64_t hash_of(const Key *key) noexcept nogil:
    """Mixed twice: pages written in order have versions in order, and often the difference is one number."""
    cdef uint64_t x = key.version * <uint64_t>0x9E3779B97F4A7C15 + key.page * <uint64_t>0xC2B2AE3D27D4EB4F
    x = (x ^ x >> 32) * <uint64_t>0x9E3779B97F4A7C15
    return x ^ x >> 29


cdef inline uint64_t place(const Key *keys, uint64_t slots, const Key *key) noexcept nogil:
    """Where it is, or would be."""
    cdef uint64_t at = hash_of(key) & (slots - 1)
    while keys[at].used and (keys[at].version != key.version or keys[at].page != key.page):
        at = (at + 1) & (slots - 1)
    return at


cdef class KeySet:
    """Empty, or with the pages of these records."""

    cdef Key *keys              # NULL: none
    cdef uint64_t slots
    cdef uint64_t n

    def __cinit__(self, records=b""):
        self.add(records)

    def __dealloc__(self):
        free(self.keys)

    def __len__(self):
        return self.n

    def __contains__(self, key):
        """(page, version)."""
        cdef Key wanted
        wanted.page, wanted.version = key
        return bool(self.n) and bool(self.keys[place(self.keys, self.slots, &wanted)].used)

    def add(self, bytes records not None):
        """Those that are in it stay, once.  Raises MemoryError, with none of them added."""
        cdef const char *at = PyBytes_AS_STRING(records)
        cdef uint64_t more = <uint64_t>len(records) // RECORD_BYTES
        cdef uint64_t i, to
        cdef Key key
        self._grow(self.n + more)
        for i in range(more):
            key = key_at(at + RECORD_BYTES * i)
            to = place(self.keys, self.slots, &key)
            self.n += not self.keys[to].used
            self.keys[to] = key

    def remove(self, bytes records not None):
        """Those of them that are in it."""
        cdef const char *at = PyBytes_AS_STRING(records)
        cdef uint64_t i
        cdef Key key
        for i in range(<uint64_t>len(records) // RECORD_BYTES):
            if self.n == 0:
                break
            key = key_at(at + RECORD_BYTES * i)
            self._take(place(self.keys, self.slots, &key))
        if self.n == 0:
            free(self.keys)
            self.keys, self.slots = NULL, 0

    def meets(self, bytes records not None):
        """Whether any of them is in it."""
        cdef const char *at = PyBytes_AS_STRING(records)
        cdef uint64_t i
        cdef Key key
        if self.n:
            for i in range(<uint64_t>len(records) // RECORD_BYTES):
                key = key_at(at + RECORD_BYTES * i)
                if self.keys[place(self.keys, self.slots, &key)].used:
                    return True
        return False

    cdef void _take(self, uint64_t hole) noexcept:
        """Empty a slot; who stands behind it because that was taken moves up."""
        cdef uint64_t mask = self.slots - 1
        cdef uint64_t at = hole
        cdef uint64_t home
        if not self.keys[hole].used:
            return
        self.n -= 1
        while True:
            at = (at + 1) & mask
            if not self.keys[at].used:
                break
            home = hash_of(&self.keys[at]) & mask
            if (at - home) & mask >= (at - hole) & mask:
                self.keys[hole] = self.keys[at]
                hole = at
        self.keys[hole].used = 0

    cdef object _grow(self, uint64_t n):
        """Room for so many."""
        cdef uint64_t slots = max(self.slots, <uint64_t>SLOTS_LEAST)
        cdef uint64_t i
        cdef Key *keys
        while slots < 2 * n:
            slots *= 2
        if n == 0 or slots == self.slots:
            return
        keys = <Key *>calloc(slots, sizeof(Key))
        if keys == NULL:
            raise MemoryError("no memory for pages that are dropped")
        for i in range(self.slots):
            if self.keys[i].used:
                keys[place(keys, slots, &self.keys[i])] = self.keys[i]
        free(self.keys)
        self.keys, self.slots = keys, slots
