"""What every allocator counts, in one way: pages, their bytes, and the frames they fill.

    an object counts as persistent or ephemeral      pers_zpages ..., eph_zpages ...
    a frame as ephemeral when all of its objects are, else as persistent

So a frame leaves its class before anything in it changes, and enters one after.  All of
it under the allocator's lock, in the allocator's shard; a peak is kept with each gauge.
"""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.allocator cimport Held
from zcache_core.counter_ids cimport (
    C_BUDDIED_COUNT, C_EPH_PAGEFRAMES, C_EPH_PAGEFRAMES_MAX, C_EPH_ZBYTES, C_EPH_ZPAGES, C_EPH_ZPAGES_MAX,
    C_PERS_PAGEFRAMES, C_PERS_PAGEFRAMES_MAX, C_PERS_ZBYTES, C_PERS_ZBYTES_MAX, C_PERS_ZPAGES,
    C_PERS_ZPAGES_MAX, C_RAW_PAGES, C_UNBUDDIED_COUNT,
)
from zcache_core.layout cimport HEADER_BYTES, PAGE_BYTES


cdef inline void count_object(uint64_t *cells, uint32_t bytes, bint ephemeral, int change) noexcept nogil:
    """One object of `bytes`, header included, more (change 1) or less (-1)."""
    cdef uint64_t length = bytes - HEADER_BYTES if bytes < PAGE_BYTES else PAGE_BYTES
    if ephemeral:
        cells[C_EPH_ZPAGES] += <uint64_t>change
        cells[C_EPH_ZBYTES] += <uint64_t>change * length
        cells[C_EPH_ZPAGES_MAX] = max(cells[C_EPH_ZPAGES_MAX], cells[C_EPH_ZPAGES])
    else:
        cells[C_PERS_ZPAGES] += <uint64_t>change
        cells[C_PERS_ZBYTES] += <uint64_t>change * length
        cells[C_PERS_ZPAGES_MAX] = max(cells[C_PERS_ZPAGES_MAX], cells[C_PERS_ZPAGES])
        cells[C_PERS_ZBYTES_MAX] = max(cells[C_PERS_ZBYTES_MAX], cells[C_PERS_ZBYTES])


cdef inline void leave_class(uint64_t *cells, uint32_t frames, bint ephemeral_only) noexcept nogil:
    cells[C_EPH_PAGEFRAMES if ephemeral_only else C_PERS_PAGEFRAMES] -= frames


cdef inline void enter_class(uint64_t *cells, uint32_t frames, bint ephemeral_only) noexcept nogil:
    cdef uint32_t which = C_EPH_PAGEFRAMES if ephemeral_only else C_PERS_PAGEFRAMES
    cdef uint32_t peak = C_EPH_PAGEFRAMES_MAX if ephemeral_only else C_PERS_PAGEFRAMES_MAX
    cells[which] += frames
    cells[peak] = max(cells[peak], cells[which])


cdef inline uint32_t wrong_counters(const uint64_t *cells, const Held *held) noexcept nogil:
    """How many counters say something else than what was found."""
    cdef uint32_t wrong = 0
    wrong += held.buddied != cells[C_BUDDIED_COUNT]
    wrong += held.unbuddied != cells[C_UNBUDDIED_COUNT]
    wrong += held.raw_pages != cells[C_RAW_PAGES]
    wrong += held.frames != cells[C_PERS_PAGEFRAMES] + cells[C_EPH_PAGEFRAMES]
    wrong += held.ephemeral_frames != cells[C_EPH_PAGEFRAMES]
    wrong += held.pages != cells[C_PERS_ZPAGES] + cells[C_EPH_ZPAGES]
    wrong += held.ephemeral_pages != cells[C_EPH_ZPAGES]
    return wrong
