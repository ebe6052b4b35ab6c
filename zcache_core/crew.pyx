"""The crew: a second thread that compresses the far end of a long write.

A swapping kernel writes 128 KiB at a time, one request after the other, and four
fifths of such a request are compression.  The request's own thread takes its pages
from the front, the crew's thread from the back, each page by one compare-and-swap:

    page    0  1  2  3  4  5 ... 27 28 29 30 31
            m  m  m  m> .  .      .  . <c  d  d      m  the request's own (mine)
                                                     c  the crew is at it
                                                     d  done: the blob waits in crew.blobs

The crew only compresses.  Room, header and flip remain the request's, page by page in
its order, with the crew's blob instead of one of its own.  So nothing else in the core
knows of it, and a crew that never wakes costs the request nothing but the call.

Bound: one job at a time, for one request; others work alone.  A request waits for the
crew only where it is at that moment, one page.  It is of the same scheduling class as
the serving threads, so what keeps it from running would keep them too.  There is none
on one CPU, and it is not called when other requests have the CPUs.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from posix.time cimport nanosleep, timespec

from zcache_core.codec cimport codec_compress
from zcache_core.counter_ids cimport C_CREW_PAGES
from zcache_core.layout cimport CODEC_RAW, PAGE_BYTES
from zcache_core.native cimport zc_cas32, zc_load32, zc_same_filled, zc_store32
from zcache_core.pthread cimport (
    cond_init, lock_init, lock_take, pthread_cond_signal, pthread_cond_wait, pthread_join,
    pthread_mutex_unlock, sched_yield, thread_start_alike, zc_pause,
)
from zcache_core.slots cimport BLOB_ROOM, SLOTS, slot_park, slot_release, slot_take_own

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE

cdef extern from "<sched.h>" nogil:
    ctypedef struct cpu_set_t:
        pass
    int sched_getaffinity(int pid, size_t bytes, cpu_set_t *cpus)
    int CPU_COUNT(cpu_set_t *cpus)

cdef enum:
    FREE, MINE, AT_IT, DONE
    # Shorter writes are over before a sleeping thread is awake (5 to 50 us).
    LEAST_PAGES = 8
    # Looks at a page that the crew is at, before letting others run; a page takes about 5 us.
    SPINS = 2000
    BLOBS_BYTES = CREW_PAGES * BLOB_ROOM


cdef int crew_start(Crew *crew, Slots *slots, CodecChoice choice, uint32_t room_bytes) noexcept nogil:
    """Start it, in the caller's scheduling class; -1: no memory or no thread.

    With one CPU, or without compression, there is nothing to start: 0.
    """
    cdef cpu_set_t cpus
    cdef uint32_t i
    memset(crew, 0, sizeof(Crew))
    for i in range(CREW_PAGES):
        crew.state[i] = DONE        # what no job has offered is not to be looked at
    crew.slots = slots
    crew.choice = choice
    crew.room_bytes = room_bytes
    if sched_getaffinity(0, sizeof(cpus), &cpus) == 0:
        crew.cpus = CPU_COUNT(&cpus)
    if crew.cpus < 2 or choice.codec == CODEC_RAW:
        return 0
    crew.blobs = <uint8_t *>mmap(
        NULL, BLOBS_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0
    )
    if crew.blobs == MAP_FAILED:
        return -1
    lock_init(&crew.lock)
    cond_init(&crew.wake)
    crew.slot = slot_take_own(slots)
    slot_park(crew.slot)
    if thread_start_alike(&crew.thread, crew_run, crew, b"zc-crew"):
        slot_release(crew.slot)
        munmap(crew.blobs, BLOBS_BYTES)
        return -1
    zc_store32(&crew.running, 1)
    return 0


cdef uint64_t crew_memory_bytes(Crew *crew) noexcept nogil:
    return BLOBS_BYTES if crew.running else 0


cdef void crew_stop(Crew *crew) noexcept nogil:
    """No request is inside any more, nor comes."""
    if not crew.running:
        return
    zc_store32(&crew.running, 0)
    lock_take(&crew.lock)
    crew.stopping = 1
    pthread_cond_signal(&crew.wake)
    pthread_mutex_unlock(&crew.lock)
    pthread_join(crew.thread, NULL)
    slot_release(crew.slot)
    munmap(crew.blobs, BLOBS_BYTES)


# ---- the crew's side -------------------------------------------------------------------

cdef void *crew_run(void *argument) noexcept nogil:
    cdef Crew *crew = <Crew *>argument
    cdef uint64_t seen = 0
    while True:
        lock_take(&crew.lock)
        while crew.job == seen and not crew.stopping:
            pthread_cond_wait(&crew.wake, &crew.lock)
        seen = crew.job
        if crew.stopping:
            pthread_mutex_unlock(&crew.lock)
            return NULL
        pthread_mutex_unlock(&crew.lock)
        work_from_the_end(crew)


cdef void work_from_the_end(Crew *crew) noexcept nogil:
    """Compress pages until the request's own thread is met.

    When it wakes late, the job may be another already, or none: then either no page
    is free, or what is free belongs to the job whose data it sees after taking it.
    """
    cdef uint32_t i = CREW_PAGES
    cdef uint32_t done = 0
    cdef const uint8_t *data
    cdef uint64_t word
    while i:
        i -= 1
        if not zc_cas32(&crew.state[i], FREE, AT_IT):
            if done or zc_load32(&crew.pages) > i:
                break
            continue                # past the end of a shorter job
        data = crew.data + i * PAGE_BYTES
        crew.length[i] = 0
        if not zc_same_filled(data, &word):
            crew.length[i] = codec_compress(
                crew.slot, crew.choice, data, crew.blobs + i * BLOB_ROOM, crew.room_bytes
            )
            crew.slot.shard[C_CREW_PAGES] += 1
        done += 1
        zc_store32(&crew.state[i], DONE)


# ---- the request's side ------------------------------------------------------------------

cdef bint others_have_the_cpus(Crew *crew) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t busy = 0
    for i in range(SLOTS):
        if zc_load32(&crew.slots.slot[i].busy) == 1:
            busy += 1
            if busy >= crew.cpus:       # the caller is one of them
                return True
    return False


cdef uint32_t crew_offer(Crew *crew, const uint8_t *data, uint64_t pages) noexcept nogil:
    """Share the next pages (4096 bytes each at `data`): how many; 0: the caller works alone.

    Then crew_collect for each of them in order, and crew_close in any case.
    """
    cdef uint32_t n = <uint32_t>min(pages, <uint64_t>CREW_PAGES)
    cdef uint32_t i
    if n < LEAST_PAGES or not zc_load32(&crew.running) or zc_load32(&crew.taken):
        return 0
    if others_have_the_cpus(crew) or not zc_cas32(&crew.taken, 0, 1):
        return 0
    crew.data = data
    zc_store32(&crew.pages, n)
    for i in range(n):
        zc_store32(&crew.state[i], FREE)
    lock_take(&crew.lock)
    crew.job += 1
    pthread_cond_signal(&crew.wake)
    pthread_mutex_unlock(&crew.lock)
    return n


cdef bint take_or_wait(Crew *crew, uint32_t i) noexcept nogil:
    """Take page i; False when the crew has done it."""
    cdef uint32_t looks = 0
    cdef timespec nap
    if zc_cas32(&crew.state[i], FREE, MINE):
        return True
    nap.tv_sec = 0
    nap.tv_nsec = 50000
    while zc_load32(&crew.state[i]) == AT_IT:
        looks += 1
        if looks < SPINS:
            zc_pause()
        elif looks < 2 * SPINS:
            sched_yield()
        else:
            nanosleep(&nap, NULL)
    return False


cdef void crew_collect(Crew *crew, Slot *slot, uint32_t i) noexcept nogil:
    """Page i is next: slot.ahead is its blob when the crew made one, else NULL."""
    slot.ahead = NULL
    if not take_or_wait(crew, i):
        slot.ahead = crew.blobs + i * BLOB_ROOM
        slot.ahead_bytes = crew.length[i]


cdef void crew_close(Crew *crew) noexcept nogil:
    """The data are the caller's alone again; the crew is free for others."""
    cdef uint32_t i
    for i in range(zc_load32(&crew.pages)):
        take_or_wait(crew, i)
    zc_store32(&crew.taken, 0)
