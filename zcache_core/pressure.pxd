"""C face of the watch over the machine's memory."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef enum Watch:                # as the counter pressure_watch tells it
    WATCH_NOTHING = 0
    WATCH_TRIGGER = 1           # the kernel says when tasks stall for memory
    WATCH_STALLS = 2            # the same file, read once a second
    WATCH_AVAILABLE = 3         # no PSI here: how much memory is left

ctypedef struct Pressure:
    int fd                      # the pressure file, or /proc/meminfo
    uint32_t watch
    uint32_t pace               # so many seconds pass in one; 1 but in tests
    uint32_t window_s           # of the trigger
    uint64_t stalled_us         # at the last look ...
    int64_t looked_us           # ... which was then
    int64_t pressed_us          # when there was pressure last; 0: never
    int64_t stepped_us          # when `lowered` changed last
    uint32_t lowered            # per mille by which the pool's target is below its limit
    uint64_t steps              # how often it was lowered

cdef void pressure_open(Pressure *p, const char *psi, const char *meminfo) noexcept nogil
cdef void pressure_close(Pressure *p) noexcept nogil
cdef void pressure_lost(Pressure *p, const char *meminfo) noexcept nogil
cdef bint pressure_is(Pressure *p, bint signalled, int64_t now) noexcept nogil
cdef void pressure_step(Pressure *p, bint pressed, int64_t now) noexcept nogil
cdef int64_t pressure_second_us(Pressure *p) noexcept nogil
