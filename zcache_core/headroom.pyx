"""Headroom: how much memory can be taken at this moment without waiting for reclaim.

On a machine that swaps onto us, an allocation that has to wait for reclaim may wait
for a swap write that only we can complete.  Whoever allocates while serving asks here
first:

    a zone    0 ..... min ..... low ..... high ............ free
              | kernel's own |<------- may be taken ------->|
              | + what is kept from us for lower zones' users |

The kernel gives a page without any wait from a zone whose free pages stay above its min
watermark plus what it protects from allocations like ours (mm/page_alloc.c, Linux 6.1:
__zone_watermark_ok).  It would let a real-time thread go a quarter of min deeper, but
that is what the sockets of swap itself live on; with it two of two lab runs did not end
in their time (why was not looked into).
The sum over zones of what is above that can be taken.  With far more free than all
watermarks together, sysinfo(2) alone says so, in 0.3 us; /proc/zoneinfo takes 50 us.

What it is not: a promise.  Others take memory too, between the look and the taking;
a cgroup's limit and a NUMA policy are not looked at.  Without /proc/zoneinfo it says
that there is enough.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport strtoull
from libc.string cimport memchr, memmove, memset, strlen, strncmp

from zcache_core.layout cimport PAGE_BYTES
from zcache_core.pthread cimport now_us

cdef extern from "<fcntl.h>" nogil:
    enum: O_RDONLY, O_CLOEXEC
    int open(const char *path, int flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t length, long offset)
    int close(int fd)

cdef extern from "<sys/sysinfo.h>" nogil:
    struct sysinfo_s "sysinfo":
        unsigned long freeram
        unsigned int mem_unit
    int sysinfo(sysinfo_s *answer)

cdef enum:
    LOOK_AGAIN_US = 1000000     # the watermarks are settings, and may be changed
    PLENTY = 2                  # times the high watermark: as much as others take in a few time slices
    MARGIN_SHARE = 8           # of min: for what others take meanwhile, and counts that lag


ctypedef struct Zone:
    uint64_t free, min, high, protection
    bint known


ctypedef struct Zones:
    uint64_t usable             # pages above all that is not ours
    uint64_t plenty             # free pages with which no zone can be short
    uint64_t zones


# ---- reading /proc/zoneinfo ---------------------------------------------------------------

cdef inline const char *after(const char *line, const char *word) noexcept nogil:
    """What follows `word` at the start of the line, spaces apart, or NULL."""
    while line[0] == c' ':
        line += 1
    return line + strlen(word) if strncmp(line, word, strlen(word)) == 0 else NULL


cdef void zone_ends(Zones *sum, Zone *zone) noexcept nogil:
    cdef uint64_t kept = zone.min + zone.min // MARGIN_SHARE + zone.protection
    if zone.known:
        sum.zones += 1
        sum.usable += zone.free - kept if zone.free > kept else 0
        sum.plenty += PLENTY * max(zone.high, kept) + zone.protection
    memset(zone, 0, sizeof(Zone))


cdef uint64_t largest_number(const char *text) noexcept nogil:
    """Of "(0, 0, 3400)"."""
    cdef uint64_t most = 0
    while text[0] and text[0] != c')':
        if c'0' <= text[0] <= c'9':
            most = max(most, strtoull(text, <char **>&text, 10))
        else:
            text += 1
    return most


cdef void hear_line(Zones *sum, Zone *zone, const char *line) noexcept nogil:
    cdef const char *rest
    if after(line, b"Node ") != NULL:
        zone_ends(sum, zone)
    elif (rest := after(line, b"pages free ")) != NULL:
        zone.free = strtoull(rest, NULL, 10)
        zone.known = True
    elif (rest := after(line, b"min ")) != NULL:
        zone.min = strtoull(rest, NULL, 10)
    elif (rest := after(line, b"high ")) != NULL and zone.high == 0:     # per-CPU lists have one too: "high:"
        zone.high = strtoull(rest, NULL, 10)
    elif (rest := after(line, b"protection:")) != NULL:
        zone.protection = largest_number(rest)


cdef bint read_zones(Headroom *h, Zones *sum) noexcept nogil:
    """Sum the zones up; False when the file cannot be read."""
    cdef Zone zone
    cdef ssize_t n
    cdef long at = 0
    cdef size_t kept = 0
    cdef char *line
    cdef char *end
    memset(sum, 0, sizeof(Zones))
    memset(&zone, 0, sizeof(Zone))
    while True:
        n = pread(h.fd, h.text + kept, ZONE_TEXT_BYTES - 1 - kept, at)
        if n <= 0:
            break
        at += n
        kept += n
        line = h.text
        end = <char *>memchr(line, c'\n', kept)
        while end != NULL:
            end[0] = 0
            hear_line(sum, &zone, line)
            kept -= end + 1 - line
            line = end + 1
            end = <char *>memchr(line, c'\n', kept)
        if kept >= ZONE_TEXT_BYTES - 1:
            return False            # a line longer than the buffer: not this file
        memmove(h.text, line, kept)
    zone_ends(sum, &zone)
    return n == 0 and sum.zones > 0


# ---- the answer ---------------------------------------------------------------------------

cdef void headroom_open(Headroom *h, const char *zoneinfo) noexcept nogil:
    """Look at this file (/proc/zoneinfo) from now on.

    Once at once: the kernel makes a buffer for whoever reads it first, and keeps it.
    """
    memset(h, 0, sizeof(Headroom))
    h.fd = open(zoneinfo, O_RDONLY | O_CLOEXEC)
    headroom_bytes(h, 0)


cdef void headroom_close(Headroom *h) noexcept nogil:
    if h.fd >= 0:
        close(h.fd)
    h.fd = -1


cdef bint headroom_is_plenty(Headroom *h, uint64_t bytes) noexcept nogil:
    """Whether there is so much more than so many bytes that no zone has to be looked at."""
    cdef sysinfo_s now
    if h.fd < 0:
        return True
    if h.looked_us == 0 or now_us() - h.looked_us >= LOOK_AGAIN_US or sysinfo(&now) != 0:
        return False
    return <uint64_t>now.freeram * now.mem_unit > h.plenty_bytes + bytes


cdef uint64_t headroom_bytes(Headroom *h, uint64_t enough_bytes) noexcept nogil:
    """Bytes that can be taken now without reclaim; of plenty, `enough_bytes`."""
    cdef Zones sum
    if headroom_is_plenty(h, enough_bytes) or not read_zones(h, &sum):
        return enough_bytes
    h.plenty_bytes = sum.plenty * PAGE_BYTES
    h.looked_us = now_us()
    return sum.usable * PAGE_BYTES
