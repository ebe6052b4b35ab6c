"""Memory pressure: is this machine short of memory, and how far should the pool go down.

    tasks stall for memory 10 % of the time -> 5 % of the pool less, each second, to 25 %
    calm for 10 s                           -> 2 % more, each second, until all is back

The kernel measures stalls (PSI, Linux 4.20; Documentation/accounting/psi.rst).  Where it
lets us, a trigger in the pressure file wakes us when they pass a tenth of a window, and
an idle machine costs nothing; else the file's total is read once a second.  The file is
the whole system's or a cgroup's own.  Where there is none, too little available memory
(a sixteenth of all) counts as pressure.

Down is fast because who waits for memory waits now; up is slow, so that the pool does
not swing with the load (PSI as what steers such a thing: Weiner et al., TMO, ASPLOS 2022).

Bound: three quarters of the pool, one small read a second.  No lock, no allocation.
What it is not: it decides, and moves nothing (steward.pyx).
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport strtoull
from libc.string cimport memset, strlen, strstr

cdef extern from "<fcntl.h>" nogil:
    enum: O_RDONLY, O_RDWR, O_CLOEXEC, O_NONBLOCK
    int open(const char *path, int flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t length, long offset)
    ssize_t write(int fd, const void *data, size_t length)
    int close(int fd)

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_s "statfs":
        long f_type
    int fstatfs(int fd, statfs_s *answer)

cdef extern from "<linux/magic.h>" nogil:
    enum: PROC_SUPER_MAGIC, CGROUP2_SUPER_MAGIC

cdef enum:
    DOWN = 50                   # per mille of the pool, each second
    UP = 20
    LOWERED_MOST = 750
    CALM_S = 10
    STALL_SHARE = 10            # pressure: stalled more than one part in so many
    AVAILABLE_SHARE = 16        # and where there is no PSI: less left than one part in so many
    TEXT_BYTES = 2048


cdef int64_t pressure_second_us(Pressure *p) noexcept nogil:
    """A second, as long as this watch takes it to be."""
    return 1000000 // p.pace


# ---- what is watched -------------------------------------------------------------------

cdef bint is_kernels(int fd) noexcept nogil:
    """Whether the kernel makes this file: only there a trigger can be set."""
    cdef statfs_s answer
    return fstatfs(fd, &answer) == 0 and (answer.f_type == PROC_SUPER_MAGIC or answer.f_type == CGROUP2_SUPER_MAGIC)


cdef bint set_trigger(Pressure *p, const char *text, uint32_t window_s) noexcept nogil:
    p.window_s = window_s
    return write(p.fd, text, strlen(text) + 1) > 0


cdef uint64_t number_after(const char *text, const char *word, bint *found) noexcept nogil:
    cdef const char *at = strstr(text, word)
    found[0] = at != NULL
    return strtoull(at + strlen(word), NULL, 10) if at != NULL else 0


cdef bint read_text(int fd, char *text) noexcept nogil:
    cdef ssize_t n = pread(fd, text, TEXT_BYTES - 1, 0)
    text[max(<ssize_t>0, n)] = 0
    return n > 0


cdef bint read_stalled(Pressure *p, uint64_t *us) noexcept nogil:
    """Time in which some task stalled, since the start of the system; the file's first line."""
    cdef char text[TEXT_BYTES]
    cdef bint found
    if not read_text(p.fd, text):
        return False
    us[0] = number_after(text, b"total=", &found)
    return found


cdef void pressure_lost(Pressure *p, const char *meminfo) noexcept nogil:
    """The pressure file is gone or was never there: watch available memory."""
    pressure_close(p)
    p.fd = open(meminfo, O_RDONLY | O_CLOEXEC)
    p.watch = WATCH_AVAILABLE if p.fd >= 0 else WATCH_NOTHING


cdef void pressure_open(Pressure *p, const char *psi, const char *meminfo) noexcept nogil:
    """Watch the pressure file `psi` as well as it can be; without it, `meminfo`.

    A process without CAP_SYS_RESOURCE may only use windows of 2 s (psi.rst).
    """
    cdef uint64_t us
    memset(p, 0, sizeof(Pressure))
    p.pace = p.window_s = 1
    p.fd = open(psi, O_RDWR | O_NONBLOCK | O_CLOEXEC)
    if p.fd >= 0 and is_kernels(p.fd):
        if set_trigger(p, b"some 100000 1000000", 1) or set_trigger(p, b"some 200000 2000000", 2):
            p.watch = WATCH_TRIGGER
            return
    pressure_close(p)
    p.window_s = 1
    p.fd = open(psi, O_RDONLY | O_CLOEXEC)
    if p.fd >= 0 and read_stalled(p, &us):
        p.watch = WATCH_STALLS
        return
    pressure_lost(p, meminfo)


cdef void pressure_close(Pressure *p) noexcept nogil:
    if p.fd >= 0:
        close(p.fd)
    p.fd = -1


# ---- is there pressure -----------------------------------------------------------------

cdef bint stalls_now(Pressure *p, int64_t now) noexcept nogil:
    cdef uint64_t us
    cdef uint64_t before = p.stalled_us
    cdef int64_t since = p.looked_us
    if not read_stalled(p, &us):
        return False
    p.stalled_us, p.looked_us = us, now
    return since > 0 and us > before and (us - before) * STALL_SHARE > <uint64_t>(now - since) * p.pace


cdef bint little_is_left(Pressure *p, int64_t now) noexcept nogil:
    cdef char text[TEXT_BYTES]
    cdef bint has_total, has_available
    cdef uint64_t total, available
    p.looked_us = now
    if not read_text(p.fd, text):
        return False
    total = number_after(text, b"MemTotal:", &has_total)
    available = number_after(text, b"MemAvailable:", &has_available)
    return has_total and has_available and available < total // AVAILABLE_SHARE


cdef bint pressure_is(Pressure *p, bint signalled, int64_t now) noexcept nogil:
    """Whether memory is short at this moment; `signalled`: the trigger said so."""
    if p.watch == WATCH_TRIGGER:
        return signalled
    if p.watch == WATCH_NOTHING or now - p.looked_us < pressure_second_us(p):
        return False
    return stalls_now(p, now) if p.watch == WATCH_STALLS else little_is_left(p, now)


# ---- how far down ------------------------------------------------------------------------

cdef void pressure_step(Pressure *p, bint pressed, int64_t now) noexcept nogil:
    """Lower the pool's target by a step, or raise it, or neither."""
    cdef int64_t second = pressure_second_us(p)
    cdef int64_t since = now - p.stepped_us
    if pressed:
        p.pressed_us = now
        if p.lowered < LOWERED_MOST and 10 * since >= 9 * second * p.window_s:
            p.lowered = min(<uint32_t>LOWERED_MOST, p.lowered + DOWN * p.window_s)
            p.stepped_us = now
            p.steps += 1
    elif p.lowered and now - p.pressed_us >= CALM_S * second and since >= second:
        p.lowered = p.lowered - UP if p.lowered > UP else 0
        p.stepped_us = now
