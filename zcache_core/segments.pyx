"""The disk's segments: what is alive in each, which is free, and which to clean next.

    free --open--> being filled --close--> full --all dead--> free
                                            |
                                            +--chosen--> cleaned: what lives moves, then free

A segment is 256 KiB.  Larger ones are cleaned at a higher price (simulated with objects of
1.2 KiB on 512 MiB, 80 % alive, uniform random overwrites: 2.77 times the bytes at 1 MiB,
2.68 at 256 KiB, 2.65 at 128 KiB), and in smaller ones too much is lost at their ends: 63 raw
pages leave 1 % of 256 KiB, 31 leave 2.6 % of 128 KiB.

The victim is the one with the largest  dead share x age^0.15,  its age being the time since
something in it died (Rosenblum, The LFS Storage Manager, 1991, has cost and benefit with the
whole age).  What died lately will lose more if one waits.  Together with a log of its own for
what was moved once (disk.pyx) that makes 2.3 of 3.1 where a tenth of the pages gets nine tenths
of the writes (2.1 with age^0.2); under uniform writes, where age says nothing, it costs 0.01
(0.03).  Recorded swap traces need no cleaning at all: the kernel writes over what lies together.

One look at all segments chooses VICTIMS of them, so that a large disk is not looked through for
each.  Free segments have a bitmap.

Bound: 12 bytes and two bits for each segment.
Lock: all but live_bytes, died, emptied and reading cut_bits is guarded by the disk's lock, held by the caller.
"""

from libc.math cimport powf
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from zcache_core.native cimport zc_add32, zc_ctz64, zc_load32, zc_load64, zc_store32, zc_store64

cdef enum:
    # Segments with more life than this are not worth reading.  No less than 98: a promised
    # disk (1.05 times the device) full of raw pages is 97 % alive, and must find something
    # to clean nevertheless.
    VICTIM_MOST_PERCENT = 98


cdef int segments_make(Segments *s, uint64_t disk_bytes) noexcept nogil:
    """All free but number 0; -1 without memory."""
    cdef uint32_t i
    memset(s, 0, sizeof(Segments))
    s.count = <uint32_t>(disk_bytes // SEGMENT_BYTES)
    s.at = <Segment *>calloc(s.count, sizeof(Segment))
    s.free_bits = <uint64_t *>calloc(s.count // 64 + 1, 8)
    s.cut_bits = <uint64_t *>calloc(s.count // 64 + 1, 8)
    if s.at == NULL or s.free_bits == NULL or s.cut_bits == NULL:
        return -1
    for i in range(1, s.count):
        s.free_bits[i // 64] |= <uint64_t>1 << (i % 64)
    s.free_count = s.count - 1
    s.next_free = 1
    return 0


cdef void segments_discard(Segments *s) noexcept nogil:
    free(s.at)
    free(s.free_bits)
    free(s.cut_bits)
    s.cut_bits = NULL
    s.at = NULL
    s.free_bits = NULL


# ---- free and not -----------------------------------------------------------------------

cdef void segments_take(Segments *s, uint32_t number) noexcept nogil:
    """A free one is not free any more."""
    s.free_bits[number // 64] &= ~(<uint64_t>1 << (number % 64))
    s.free_count -= 1


cdef void segments_give_back(Segments *s, uint32_t number) noexcept nogil:
    s.at[number].state = SEG_FREE
    s.free_bits[number // 64] |= <uint64_t>1 << (number % 64)
    s.free_count += 1


cdef uint32_t first_free(Segments *s, uint32_t start) noexcept nogil:
    """The first free one at or behind `start`, then from the beginning; there is one."""
    cdef uint32_t words = s.count // 64 + 1
    cdef uint32_t i
    cdef uint32_t at = start // 64
    cdef uint64_t bits = s.free_bits[at] & (~<uint64_t>0 << (start % 64))
    for i in range(words + 1):
        if bits:
            return at * 64 + <uint32_t>zc_ctz64(bits)
        at = (at + 1) % words
        bits = s.free_bits[at]
    return 0


cdef uint32_t segments_open(Segments *s, uint32_t wanted, uint32_t keep_free) noexcept nogil:
    """Open a free segment, leaving `keep_free` of them: `wanted` itself, or any when it is 0.

    Its number; 0 when there is none.
    """
    cdef uint32_t number = wanted
    if s.free_count <= keep_free or wanted >= s.count:
        return 0
    if wanted == 0:
        number = first_free(s, s.next_free if s.next_free < s.count else 1)
    elif s.at[wanted].state != SEG_FREE:
        return 0
    if number == 0:
        return 0
    segments_take(s, number)
    zc_store64(&s.cut_bits[number // 64], s.cut_bits[number // 64] & ~(<uint64_t>1 << (number % 64)))
    s.clock += 1
    s.at[number].state = SEG_OPEN
    zc_store32(&s.at[number].died, s.clock)
    s.next_free = number + 1
    return number


cdef void segments_close(Segments *s, uint32_t number) noexcept nogil:
    s.at[number].state = SEG_FULL
    if zc_load32(&s.at[number].live_bytes) == 0:
        zc_add32(&s.emptied, 1)


cdef void segments_doubt(Segments *s) noexcept nogil:
    """The disk was cut short: what is in any segment may be gone."""
    cdef uint32_t i
    for i in range(s.count // 64 + 1):
        zc_store64(&s.cut_bits[i], ~<uint64_t>0)


cdef bint segments_is_cut(Segments *s, uint32_t number) noexcept nogil:
    """Whether the disk was cut short since it was opened.  Any thread, no lock."""
    return zc_load64(&s.cut_bits[number // 64]) >> (number % 64) & 1


cdef void segments_died(Segments *s, uint32_t number, uint32_t bytes) noexcept nogil:
    """So many bytes of it are not alive any more.  Any thread, no lock."""
    cdef Segment *segment = &s.at[number]
    zc_store32(&segment.died, s.clock)
    if zc_add32(&segment.live_bytes, <uint32_t>-<int>bytes) == bytes:
        zc_add32(&s.emptied, 1)


# ---- which to clean ----------------------------------------------------------------------

cdef float gain(Segments *s, uint32_t number) noexcept nogil:
    """How much is won by cleaning it; 0: nothing."""
    cdef uint32_t live = zc_load32(&s.at[number].live_bytes)
    cdef uint32_t age = s.clock - zc_load32(&s.at[number].died) + 1
    if s.at[number].state != SEG_FULL or live >= SEGMENT_BYTES // 100 * VICTIM_MOST_PERCENT:
        return 0
    return <float>(SEGMENT_BYTES - live) * powf(<float>age, 0.15)


cdef void choose(Segments *s) noexcept nogil:
    """The best of them, best last, by one look at all: VICTIMS, or fewer of a small disk."""
    cdef float gains[VICTIMS]
    cdef float g
    cdef uint32_t i, j
    cdef uint32_t most = min(<uint32_t>VICTIMS, max(<uint32_t>RESORT_SEGMENTS, s.count // 64))
    s.victims = 0
    for i in range(1, s.count):
        g = gain(s, i)
        if g <= 0 or s.victims == most and g <= gains[0]:
            continue
        if s.victims == most:       # the least of them makes room
            for j in range(1, most):
                gains[j - 1], s.victim[j - 1] = gains[j], s.victim[j]
            s.victims -= 1
        j = s.victims
        while j > 0 and gains[j - 1] > g:
            gains[j], s.victim[j] = gains[j - 1], s.victim[j - 1]
            j -= 1
        gains[j], s.victim[j] = g, i
        s.victims += 1


cdef uint32_t segments_victim(Segments *s) noexcept nogil:
    """The full segment that is best cleaned now, 0 when none is worth it.

    One that cleaning could not empty (damage, a failing disk) waits until all others had
    their turn, so that it never keeps them from theirs.
    """
    cdef uint32_t i
    cdef uint32_t looks
    for looks in range(2):
        while s.victims:
            s.victims -= 1
            if gain(s, s.victim[s.victims]) > 0:
                return s.victim[s.victims]
        if looks == 0:
            choose(s)
    for i in range(1, s.count):
        if s.at[i].state == SEG_TRIED:
            s.at[i].state = SEG_FULL
    return 0
