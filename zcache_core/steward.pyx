"""The steward: the thread that hears commands and watches the machine's memory.

    pipe from the node process --> orders.pyx   pool, watermarks, draining
    pressure file, or meminfo ---> pressure.pyx -> the arena's target and what it gives back

It waits for either in one poll, without the GIL, and does no work that could take
long: the committer gives memory back, the cooling thread moves pages.  So a command is
obeyed also while a disk stalls.  On an idle machine it sleeps for good.

With a tier below, pressure lowers the target, so that pages go down and their frames
back to the system.  Without one nothing that is in use can go: only free frames are
given back, down to the reserve, and no write is refused for it.

Bound: one look a second while memory is short or was, and one a command.
"""

import os

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset
cimport cython

from zcache_core.arena cimport arena_squeeze
from zcache_core.core cimport Core
from zcache_core.counter_ids cimport C_MEMORY_PRESSURE, C_PRESSURE_STEPS, C_PRESSURE_WATCH
from zcache_core.layout cimport COUNTER_CELLS
from zcache_core.orders cimport Orders, orders_hear
from zcache_core.pressure cimport (
    WATCH_NOTHING, WATCH_TRIGGER, Pressure, pressure_close, pressure_is, pressure_lost, pressure_open,
    pressure_second_us, pressure_step,
)
from zcache_core.pthread cimport now_us, pthread_join, pthread_t, thread_start
from zcache_core.slots cimport SLOTS
from zcache_core.store cimport Store
from zcache_core.tiers cimport Cooling

from zcache_core.errors import ConfigError, MemoryFileError

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum: POLLIN, POLLPRI, POLLERR
    int poll(pollfd *fds, unsigned long n, int timeout_ms)

SYSTEM_WIDE = "/proc/pressure/memory"
MEMINFO = "/proc/meminfo"

ctypedef struct Work:
    Core *core
    Orders *orders              # the tiers' own, or ours when there are none
    Pressure pressure
    const char *meminfo
    uint64_t *cells
    int stop_fd                 # readable: end
    uint32_t lowered            # as the arena was told ...
    uint32_t goal               # ... of this pool
    pthread_t thread


cdef void steer(Work *w) noexcept nogil:
    """Tell the arena where to go, when that has changed."""
    cdef uint32_t goal = w.core.arena.goal
    cdef uint32_t lowered = w.pressure.lowered
    if goal == w.goal and lowered == w.lowered:
        return
    w.goal, w.lowered = goal, lowered
    arena_squeeze(
        &w.core.arena, goal - <uint32_t>(<uint64_t>goal * lowered // 1000) if w.orders.below else goal, lowered > 0
    )


cdef void watch(Work *w, short signals) noexcept nogil:
    cdef int64_t now = now_us()
    if w.pressure.watch == WATCH_TRIGGER and signals & POLLERR:
        pressure_lost(&w.pressure, w.meminfo)       # the cgroup is gone
        w.cells[C_PRESSURE_WATCH] = w.pressure.watch
    pressure_step(&w.pressure, pressure_is(&w.pressure, signals & POLLPRI, now), now)
    w.cells[C_PRESSURE_STEPS] += w.pressure.steps
    w.pressure.steps = 0
    w.cells[C_MEMORY_PRESSURE] = (
        w.pressure.pressed_us > 0 and now - w.pressure.pressed_us < 2 * w.pressure.window_s * pressure_second_us(&w.pressure)
    )


cdef int patience_ms(Work *w) noexcept nogil:
    """How long nothing has to be looked at unless somebody calls."""
    if w.pressure.watch == WATCH_NOTHING:
        return -1
    if w.pressure.watch == WATCH_TRIGGER and w.lowered == 0 and not w.cells[C_MEMORY_PRESSURE]:
        return -1
    return <int>(pressure_second_us(&w.pressure) // 1000) + 1


cdef void *steward_thread(void *argument) noexcept nogil:
    cdef Work *w = <Work *>argument
    cdef pollfd fds[3]
    fds[0].fd, fds[0].events = w.stop_fd, POLLIN
    fds[1].fd, fds[1].events = w.orders.fd, POLLIN
    while True:
        fds[2].fd = w.pressure.fd if w.pressure.watch == WATCH_TRIGGER else -1
        fds[2].events = POLLPRI
        fds[0].revents = fds[1].revents = fds[2].revents = 0
        poll(fds, 3, patience_ms(w))
        if fds[0].revents:
            return NULL
        if fds[1].revents & POLLIN:
            orders_hear(w.orders)
        elif fds[1].revents:
            fds[1].fd = -1          # nobody can write there any more
        watch(w, fds[2].revents)
        steer(w)


@cython.no_gc_clear         # its thread uses the store until it is stopped
cdef class Steward:
    """The steward of a started store and, if there is one, of the tiers below it.

    `command_fd` is a pipe's end for reading, or -1; `pressure` is "psi" (the whole system's),
    "none", or the path of a pressure file, like a cgroup's memory.pressure.  `pace` and
    `meminfo` are for tests: seconds in one second, and another /proc/meminfo.
    Raises ConfigError, MemoryFileError.
    """

    cdef Work work
    cdef Orders own
    cdef Store store
    cdef Cooling cooling
    cdef bytes meminfo
    cdef bint running

    def __cinit__(
        self, Store store not None, Cooling cooling=None, int command_fd=-1, str pressure="none",
        uint32_t pace=1, str meminfo=MEMINFO,
    ):
        cdef Work *w = &self.work
        memset(w, 0, sizeof(Work))
        memset(&self.own, 0, sizeof(Orders))
        w.stop_fd = w.pressure.fd = -1
        self.store, self.cooling, self.meminfo = store, cooling, os.fsencode(meminfo)
        w.core = &store.core
        w.meminfo = self.meminfo
        w.cells = store.memory.counters + (SLOTS + 4) * COUNTER_CELLS
        self.own.core = &store.core
        self.own.cells = w.cells
        w.orders = &self.own if cooling is None else &cooling.tiers.orders
        w.orders.fd = command_fd
        if command_fd >= 0:
            os.set_blocking(command_fd, False)
        if pressure != "none":
            path = SYSTEM_WIDE if pressure == "psi" else pressure
            if pressure != "psi" and not os.access(path, os.R_OK):
                raise ConfigError(f"there is no pressure file {path} to be read; use a cgroup's memory.pressure")
            encoded = os.fsencode(path)
            pressure_open(&w.pressure, encoded, w.meminfo)
        w.pressure.pace = max(<uint32_t>1, pace)
        w.goal = store.core.arena.goal
        w.cells[C_PRESSURE_WATCH] = w.pressure.watch

    def start(self):
        """Start the thread; the store is started."""
        self.work.stop_fd = os.eventfd(0)
        if thread_start(&self.work.thread, steward_thread, &self.work, b"zc-steward"):
            raise MemoryFileError("no thread could be started; raise the limit of processes")
        self.running = True

    def stop(self):
        """Stop the thread; before the tiers and the store are."""
        if not self.running:
            return
        self.running = False
        os.eventfd_write(self.work.stop_fd, 1)
        with nogil:
            pthread_join(self.work.thread, NULL)
        os.close(self.work.stop_fd)

    def __dealloc__(self):
        self.stop()
        pressure_close(&self.work.pressure)
