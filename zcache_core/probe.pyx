"""One allocator on an arena of its own, as Python sees it: for tests and measurements.

The conformance suite of all allocators (tests/t2_allocators.py) and the density
measurements hold an allocator by this handle; the store does not.
"""

import os

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from zcache_core.adoption cimport arena_adopt_rest
from zcache_core.allocator cimport Allocator, frame_next, object_header
from zcache_core.arena cimport (
    Arena, arena_init, arena_tell, arena_wait,
)
from zcache_core.committer cimport arena_commit_now, arena_free, arena_start
from zcache_core.layout cimport COUNTER_CELLS, PAGE_BYTES, BlobHeader
from zcache_core.memfile cimport MemoryFile
from zcache_core.pthread cimport now_us
from zcache_core.several cimport allocator_broken, several_make, several_tell

from zcache_core.several import ALLOCATORS


cdef class Probe:
    """Allocator `name` over the whole arena of `memory`; its index is not looked at.

    The counters are the memory file's, so `counters.read(memory)` tells them.  `zoneinfo`: where
    it learns how much memory the system has left.
    """

    cdef Arena arena
    cdef Allocator *allocator
    cdef MemoryFile memory
    cdef bytes zoneinfo

    def __cinit__(
        self, MemoryFile memory not None, str name="zbud", uint32_t reserve_frames=0, str zoneinfo="/proc/zoneinfo"
    ):
        cdef uint64_t *cells = memory.counters
        memset(&self.arena, 0, sizeof(Arena))
        self.memory = memory
        if name not in ALLOCATORS:
            raise ValueError(f"unknown allocator {name!r}")
        if arena_init(
            &self.arena, memory.arena, memory.frame_headers, memory.frame_map, <uint32_t>memory.super.pool_frames, cells
        ):
            raise MemoryError("no memory for the frame table")
        self.zoneinfo = os.fsencode(zoneinfo)
        self.arena.zoneinfo = self.zoneinfo
        if reserve_frames:
            self.arena.reserve = reserve_frames
        self.allocator = several_make(&self.arena, cells + COUNTER_CELLS, ALLOCATORS.index(name))
        if self.allocator == NULL:
            raise MemoryError("no memory for the allocator")
        arena_tell(&self.arena)
        several_tell(self.allocator)

    def __dealloc__(self):
        arena_free(&self.arena)
        if self.allocator != NULL:
            self.allocator.discard(self.allocator)

    def start(self):
        """Commit the reserve and start the committing thread."""
        if arena_commit_now(&self.arena, self.arena.reserve) or arena_start(&self.arena):
            raise MemoryError("the arena could not be started")

    @property
    def largest_bytes(self):
        """Largest object that shares a frame, header included."""
        return self.allocator.largest_bytes

    @property
    def free_frames(self):
        return self.arena.free_count

    @property
    def committed_frames(self):
        return self.arena.committed

    def alloc(self, uint32_t size_bytes, wait=True):
        """Where an object of that size (or exactly 4096: a raw page) now has room, or None."""
        cdef uint64_t where
        cdef bint found
        if not 24 < size_bytes <= self.allocator.largest_bytes and size_bytes != PAGE_BYTES:
            raise ValueError("an object has a header, and fits, or is a raw page")
        with nogil:
            found = self.allocator.alloc(self.allocator, size_bytes, &where)
        while not found and wait and arena_wait(&self.arena, self.allocator.frames_at_once, now_us() + 2000000, False):
            found = self.allocator.alloc(self.allocator, size_bytes, &where)
        return where if found else None

    def release(self, uint64_t where, uint32_t size_bytes):
        """Free the room of one object."""
        self.allocator.release(self.allocator, where, size_bytes)

    def adopt(self, uint64_t where, uint32_t size_bytes):
        """Before start: this room is taken; False when it cannot be."""
        return bool(self.allocator.adopt(self.allocator, where, size_bytes))

    def adopted(self):
        """All has been adopted: the rest of the arena is free."""
        self.allocator.adopted(self.allocator)
        arena_adopt_rest(&self.arena)

    def objects(self, uint32_t frame):
        """[(where, size in bytes as the allocator knows it)] of what lives in a frame."""
        cdef uint64_t where[64]
        cdef uint32_t sizes[64]
        n = self.allocator.objects(self.allocator, frame, where, sizes, 64)
        return [(where[i], sizes[i]) for i in range(n)]

    def pieces(self, uint64_t where, uint32_t size_bytes):
        """[(offset in the arena, bytes)] of an object: one piece, or two where it goes on in another frame."""
        here = min(size_bytes, PAGE_BYTES - where % PAGE_BYTES)
        if here == size_bytes:
            return [(where, size_bytes)]
        following = frame_next(&self.arena, where // PAGE_BYTES)
        return [(where, here), (following * PAGE_BYTES, size_bytes - here)]

    @property
    def frames_at_once(self):
        """Most frames that room for one object may need."""
        return self.allocator.frames_at_once

    def header_offset(self, uint64_t where, uint32_t size_bytes):
        """Byte offset in the memory file of an object's header."""
        length = PAGE_BYTES if size_bytes == PAGE_BYTES else size_bytes - 24
        return <char *>object_header(&self.arena, where, length) - <char *>self.memory.base

    def check(self):
        """Number of broken invariants; 0 when all is well."""
        return allocator_broken(self.allocator)
