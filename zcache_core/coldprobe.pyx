"""One cold tier on its own, as Python sees it: for the suite that every tier passes.

As probe.pyx is for allocators: tests/t4_cold.py holds a tier by this handle; the
store does not.  Calls go straight to the ColdTier's functions (cold.pxd), without the
GIL, so that threads may try what the contract allows them.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport timespec

from zcache_core.cold cimport COLD_BATCH, COLD_CAPSULE, HOLDS, ColdPage, ColdTier, cold_page
from zcache_core.crypt cimport Sealer
from zcache_core.disk cimport disk_discard, disk_make
from zcache_core.diskstate cimport RESORT_BYTES, Disk
from zcache_core.layout cimport COUNTER_CELLS, PAGE_BYTES, codec_of, length_of, place_word
from zcache_core.memfile cimport MemoryFile
from zcache_core.pthread cimport CLOCK_MONOTONIC, clock_gettime
from zcache_core.slots cimport IO_ROOM, SLOTS

import os
from array import array

cdef enum:
    OBJECTS_MOST = RESORT_BYTES // 32       # no object is smaller

    TIMED_PAGES = 64
    TIMED_MOST = 1 << 18

BATCH_MOST = COLD_BATCH


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef class ColdProbe:
    """A disk tier of `disk_bytes` over an open file, for device 0 of `memory`.

    `encrypt`: what is put is encrypted with the memory file's key, by cipher number `cipher`
    (0: the CPU's best).  The counters are the memory file's, so `counters.read(memory)` tells them.  An
    object is told as (page, version, length_codec, blob): codec in the low 4 bits.
    """

    cdef ColdTier *tier
    cdef ColdTier *disk
    cdef MemoryFile memory
    cdef Sealer sealer
    cdef public uint64_t limit_bytes    # written in a day, 0: none
    cdef object wrapper
    cdef uint8_t *room

    def __cinit__(
        self, MemoryFile memory not None, int fd, uint64_t disk_bytes, preallocated=False, epoch=None,
        bint encrypt=False, uint32_t cipher=0,
    ):
        self.memory = memory
        self.sealer = Sealer(memory, cipher)
        self.tier = self.disk = disk_make(
            fd, disk_bytes, memory.super, 0, preallocated, memory.counters + (SLOTS + 3) * COUNTER_CELLS,
            &self.sealer.crypt, encrypt, &self.limit_bytes,
        )
        self.room = <uint8_t *>mmap(NULL, RESORT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if self.disk == NULL or <void *>self.room == MAP_FAILED:
            raise MemoryError("no memory for the tier")
        if epoch is not None:
            (<Disk *>self.disk).whose.epoch = epoch

    def __dealloc__(self):
        if self.disk != NULL:
            disk_discard(self.disk)
        if self.room != NULL and <void *>self.room != MAP_FAILED:
            munmap(self.room, RESORT_BYTES)

    def wrap(self, wrapper):
        """Put another tier above it, as Cooling.wrap does."""
        self.wrapper = wrapper(PyCapsule_New(self.tier, COLD_CAPSULE, NULL))
        self.tier = <ColdTier *>PyCapsule_GetPointer(self.wrapper.capsule, COLD_CAPSULE)
        return self.wrapper

    def put(self, objects):
        """Store a batch of objects; [(where, errno)] in their order."""
        cdef uint32_t n = len(objects)
        cdef ColdPage *pages
        cdef uint32_t i, good
        if n > COLD_BATCH:
            raise ValueError(f"a batch has at most {COLD_BATCH} pages")
        pages = <ColdPage *>calloc(max(n, 1), sizeof(ColdPage))
        if pages == NULL:
            raise MemoryError()
        try:
            for i in range(n):
                page, version, length_codec, blob = objects[i]
                pages[i].page, pages[i].version, pages[i].length_codec = page, version, length_codec
                pages[i].blob = <uint8_t *><char *>blob
                pages[i].error = -1
                assert len(blob) == length_of(pages[i].length_codec)
            with nogil:
                good = self.tier.put(self.tier, pages, n)
            answer = [(pages[i].where, pages[i].error) for i in range(n)]
        finally:
            free(pages)
        assert good == sum(not error for _, error in answer), "put tells how many are good"
        return answer

    def get(self, uint32_t page, uint64_t version, uint64_t where, uint32_t length_codec):
        """The blob of one object.  Raises OSError with the tier's errno."""
        cdef uint8_t blob[PAGE_BYTES]
        cdef ColdPage wanted
        cdef int error
        cdef uint8_t *io = <uint8_t *>mmap(NULL, IO_ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if <void *>io == MAP_FAILED:
            raise MemoryError()
        wanted.page, wanted.version, wanted.where, wanted.length_codec = page, version, where, length_codec
        wanted.blob = blob
        with nogil:
            error = self.tier.get(self.tier, &wanted, io)
            munmap(io, IO_ROOM)
        if error:
            raise OSError(error, os.strerror(error))
        return (<char *>blob)[: length_of(length_codec)]

    def time_gets(self, wanted, int64_t until_us):
        """Fetch (page, version, where, length_codec) each together, again and again: [ns of each time].

        Until the monotonic clock's `until_us`.  Raises OSError with the errno of what failed.
        """
        cdef uint32_t n = len(wanted)
        cdef uint32_t i
        cdef uint64_t times = 0
        cdef int error = 0
        cdef int64_t before, now
        if not 0 < n <= TIMED_PAGES:
            raise ValueError(f"1 to {TIMED_PAGES} pages")
        spent = array("Q", bytes(8 * TIMED_MOST))
        cdef uint64_t[::1] view = spent
        cdef ColdPage *pages = <ColdPage *>calloc(n, sizeof(ColdPage))
        cdef uint8_t *blobs = <uint8_t *>calloc(n, PAGE_BYTES)
        try:
            if pages == NULL or blobs == NULL:
                raise MemoryError()
            for i in range(n):
                pages[i].page, pages[i].version, pages[i].where, pages[i].length_codec = wanted[i]
                pages[i].blob = blobs + i * PAGE_BYTES
            with nogil:
                before = now_ns()
                while before < 1000 * until_us and times < TIMED_MOST and not error:
                    if n == 1:
                        error = self.tier.get(self.tier, pages, self.room)
                    else:
                        self.tier.get_many(self.tier, pages, n, self.room, RESORT_BYTES)
                        for i in range(n):
                            error = error or pages[i].error
                    now = now_ns()
                    view[times] = <uint64_t>(now - before)
                    before = now
                    times += 1
        finally:
            free(pages)
            free(blobs)
        if error:
            raise OSError(error, os.strerror(error))
        return spent[:times].tolist()

    def drop(self, uint64_t where, uint32_t length_bytes, uint32_t page=0, uint64_t version=0):
        """This copy is not needed any more."""
        cdef ColdPage copy = cold_page(page, version, where, place_word(0, length_bytes, 0))
        self.tier.drop(self.tier, &copy)

    def adopt(self, uint64_t where, uint32_t length_bytes):
        """After a restart: a copy is here; False when it cannot be."""
        return bool(self.tier.adopt(self.tier, where, length_bytes))

    def adopted(self):
        """All are known."""
        self.tier.adopted(self.tier)

    def takes(self):
        """Whether a put is worth trying now."""
        return bool(self.tier.takes(self.tier))

    def holds(self, uint64_t where):
        """Whether this copy may be counted on now."""
        return self.tier.holds(self.tier, where) == HOLDS

    def has_room(self, uint64_t size_bytes):
        """Whether a batch of that many bytes would find room now."""
        return bool(self.tier.has_room(self.tier, size_bytes))

    def resort(self):
        """[(object, where)] of the container with least life; then put, drop, and `resorted`."""
        cdef ColdPage *pages = <ColdPage *>calloc(OBJECTS_MOST, sizeof(ColdPage))
        cdef uint32_t i, n
        if pages == NULL:
            raise MemoryError()
        try:
            with nogil:
                n = self.tier.resort(self.tier, pages, OBJECTS_MOST, self.room, RESORT_BYTES)
            return [
                (
                    (
                        pages[i].page, pages[i].version, pages[i].length_codec,
                        (<char *>pages[i].blob)[: length_of(pages[i].length_codec)],
                    ),
                    pages[i].where,
                )
                for i in range(n)
            ]
        finally:
            free(pages)

    def resorted(self):
        """The objects that resort told are written anew."""
        self.tier.resorted(self.tier)

    def tick(self):
        """Background work of the tier."""
        self.tier.tick(self.tier)

    @property
    def reason(self):
        """0, or the errno of the failure that degrades the tier now."""
        return self.tier.reason(self.tier)

    def segments(self):
        """[(live bytes, state)] of every segment of the disk, number 0 being its header."""
        cdef Disk *d = <Disk *>self.disk
        return [(d.segments.at[i].live_bytes, d.segments.at[i].state) for i in range(d.segments.count)]
