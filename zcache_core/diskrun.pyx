"""Neighbours on the disk read at once: one read from the first to the last of them.

    | object wanted | other | object wanted | object wanted |
    ^ one pread ------------------------------------------- ^

Sixteen pages that left together lie within 64 KiB: one read of that costs a disk hardly
more than one of 4 KiB.  Every object proves itself as if it had been read alone.
"""

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.types cimport off_t

from zcache_core.cold cimport ColdPage, ColdTier
from zcache_core.diskio cimport BLOCK_BYTES
from zcache_core.diskobject cimport cipher_of, object_read, object_room, offset_of
from zcache_core.diskstate cimport Disk
from zcache_core.layout cimport length_of
from zcache_core.segments cimport SEGMENT_BYTES

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t length, off_t offset)


cdef inline uint64_t end_of(const ColdPage *page) noexcept nogil:
    return offset_of(page.where) + object_room(cipher_of(page.where), length_of(page.length_codec))


cdef uint64_t read_most(int fd, uint8_t *data, uint64_t length, uint64_t offset) noexcept nogil:
    """How many bytes could be read; fewer at the end of the file or an error."""
    cdef uint64_t done = 0
    cdef ssize_t n
    while done < length:
        n = pread(fd, data + done, length - done, <off_t>(offset + done))
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            break
        done += <uint64_t>n
    return done


cdef void disk_get_many(ColdTier *tier, ColdPage *pages, uint32_t n, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    """Each page's blob and error, as by `get`; in one read if they fit into `room`."""
    cdef Disk *d = <Disk *>tier
    cdef uint64_t start = <uint64_t>-1
    cdef uint64_t end = 0
    cdef uint64_t got
    cdef uint32_t i
    for i in range(n):
        start = min(start, offset_of(pages[i].where) // BLOCK_BYTES * BLOCK_BYTES)
        end = max(end, (end_of(&pages[i]) + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES)
    if n == 0 or end - start > room_bytes or end > <uint64_t>d.segments.count * SEGMENT_BYTES:
        for i in range(n):
            pages[i].error = tier.get(tier, &pages[i], room)
        return
    got = read_most(d.fd, room, end - start, start)
    for i in range(n):
        if end_of(&pages[i]) - start > got:
            pages[i].error = EIO
        else:
            pages[i].error = object_read(&d.whose, room + (offset_of(pages[i].where) - start), &pages[i])
