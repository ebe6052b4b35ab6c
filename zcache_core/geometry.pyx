"""Where the parts of a memory file lie, and page tables for them before they are needed.

    superblock | keys | counters | index | frame map | frame headers | arena
    \______________________________________________/  \____________________/
      mapped ahead: every page                    one page of every 2 MiB that has memory

Who maps ahead only reads, and only what the frame map says is there: a look at a hole of the
segment would fill it.  (The owner may give back the very frame that we look at: then its memory
comes back, and is found when it is committed again.)

What it is not: the file; that is memfile.pyx.
"""

import struct

from libc.stdint cimport uint8_t, uint64_t

from zcache_core.layout cimport COUNTER_CELLS, COUNTER_SHARDS, PAGE_BYTES, BlobHeader, Entry, Superblock
from zcache_core.pthread cimport sched_yield

from zcache_core.errors import MemoryFileError

cdef extern from *:
    """
    static void zc_glance(volatile unsigned char *p) { (void)*p; }
    """
    void zc_glance(uint8_t *p) nogil

cdef enum:
    TABLE_BYTES = 2 << 20       # address space of one page table
    # Looked at before those of our real-time class have their turn: who serves comes first.
    TURN_BYTES = 256 << 10

GEOMETRY = struct.Struct("<8Q")


def _page_up(n: int) -> int:
    return (n + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


cdef uint64_t map_bytes(uint64_t frames) noexcept nogil:
    """Room of the frame map, which ends where the frame headers begin: whole words, whole pages."""
    return (frames + 63) // 64 * 8 + PAGE_BYTES - 1 & ~<uint64_t>(PAGE_BYTES - 1)


def geometry_of(device_bytes: int, pool_bytes: int, epoch: int) -> bytes:
    """The eight fixed words of the superblock, in file order; the first is the file's size."""
    device_pages = device_bytes // PAGE_BYTES
    frames = pool_bytes // PAGE_BYTES
    counters_offset = 2 * PAGE_BYTES        # behind superblock and keys
    index_offset = counters_offset + _page_up(COUNTER_CELLS * COUNTER_SHARDS * 8)
    headers_offset = index_offset + _page_up(device_pages * sizeof(Entry)) + map_bytes(frames)
    arena_offset = headers_offset + _page_up(frames * sizeof(BlobHeader))
    file_bytes = arena_offset + frames * PAGE_BYTES
    return GEOMETRY.pack(
        file_bytes, epoch, frames, counters_offset, headers_offset, arena_offset,
        index_offset, device_pages,
    )


def check_sizes(device_bytes: int, pool_bytes: int) -> None:
    """Raises MemoryFileError for sizes that no memory file can have."""
    for what, n in (("device", device_bytes), ("pool", pool_bytes)):
        if n <= 0 or n % PAGE_BYTES:
            raise MemoryFileError(
                f"the {what} size {n} is no positive multiple of {PAGE_BYTES} bytes; "
                f"use {max(PAGE_BYTES, n // PAGE_BYTES * PAGE_BYTES)}"
            )
    if device_bytes // PAGE_BYTES > 1 << 32:
        raise MemoryFileError("a device has at most 16 TiB (2^32 pages); use a smaller size")


cdef void look_at(uint8_t *start, uint64_t length) noexcept nogil:
    """Read a byte of each page, which maps it (and, most often, its neighbours)."""
    cdef uint64_t at = 0
    while at < length:
        zc_glance(start + at)
        at += PAGE_BYTES
        if at % TURN_BYTES == 0:
            sched_yield()


cdef void map_ahead(uint8_t *base) noexcept nogil:
    """Page tables for what has memory in the file that is mapped at `base`."""
    cdef Superblock *s = <Superblock *>base
    cdef uint64_t *has_memory = <uint64_t *>(base + s.frame_headers_offset - map_bytes(s.pool_frames))
    cdef uint64_t frame
    cdef uint8_t *at
    cdef uint8_t *head
    cdef uint64_t table = 0         # the last one that is there, of the frames and of their headers
    cdef uint64_t head_table = 0
    look_at(base, s.frame_headers_offset)
    for frame in range(s.pool_frames):
        if not has_memory[frame >> 6] >> (frame & 63) & 1:
            continue
        at = base + s.arena_offset + frame * PAGE_BYTES
        head = base + s.frame_headers_offset + frame * sizeof(BlobHeader)
        if <uint64_t>at // TABLE_BYTES != table:
            table = <uint64_t>at // TABLE_BYTES
            look_at(at, 1)
            sched_yield()
        if <uint64_t>head // TABLE_BYTES != head_table:
            head_table = <uint64_t>head // TABLE_BYTES
            look_at(head, 1)
