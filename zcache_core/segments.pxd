"""C face of the disk's segments: what is alive in each, which is free, which to clean."""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    SEGMENT_BYTES = 1 << 18     # the head of segments.pyx says why
    VICTIMS = 32                # chosen in one look at all segments
    RESORT_SEGMENTS = 8         # cleaned together

cdef enum SegmentState:
    SEG_FREE = 0
    SEG_OPEN = 1                # being filled
    SEG_FULL = 2
    SEG_RESORT = 3              # being cleaned
    SEG_TRIED = 4               # full, and cleaning moved nothing out of it: others first

ctypedef struct Segment:
    uint32_t live_bytes         # atomic
    uint32_t state              # changed under the disk's lock
    uint32_t died               # clock when something in it died, or it was filled; atomic

ctypedef struct Segments:
    uint32_t count              # number 0 is the disk's own header: not used
    Segment *at
    uint64_t *free_bits         # a bit for each: free
    uint64_t *cut_bits          # a bit for each: the disk was cut short since it was opened; atomics
    uint32_t free_count
    uint32_t next_free          # where to look first
    uint32_t clock              # segments opened so far: what ages are measured in
    uint32_t emptied            # atomic: some may be free at the next look
    uint32_t victim[VICTIMS]
    uint32_t victims

cdef int segments_make(Segments *s, uint64_t disk_bytes) noexcept nogil
cdef void segments_discard(Segments *s) noexcept nogil
cdef uint32_t segments_open(Segments *s, uint32_t wanted, uint32_t keep_free) noexcept nogil
cdef void segments_close(Segments *s, uint32_t number) noexcept nogil
cdef void segments_give_back(Segments *s, uint32_t number) noexcept nogil
cdef void segments_take(Segments *s, uint32_t number) noexcept nogil
cdef uint32_t segments_victim(Segments *s) noexcept nogil
cdef void segments_doubt(Segments *s) noexcept nogil
cdef bint segments_is_cut(Segments *s, uint32_t number) noexcept nogil
cdef void segments_died(Segments *s, uint32_t number, uint32_t bytes) noexcept nogil


cdef inline bint segment_is_full(const Segment *segment) noexcept nogil:
    return segment.state == SEG_FULL or segment.state == SEG_TRIED
