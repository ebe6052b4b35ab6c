"""C face of the crew: one more thread for the pages of a long write."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.codec cimport CodecChoice
from zcache_core.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t
from zcache_core.slots cimport Slot, Slots

cdef enum:
    CREW_PAGES = 32             # 128 KiB: the longest write of a swapping kernel

ctypedef struct Crew:
    Slots *slots
    Slot *slot                  # for its compression states; parked: it looks at no frame
    CodecChoice choice
    uint32_t room_bytes
    uint32_t cpus
    uint32_t running
    uint32_t stopping           # with `job` under the lock
    uint64_t job
    uint32_t taken              # atomic: a request has it
    uint32_t pages              # of this job
    const uint8_t *data
    uint32_t state[CREW_PAGES]  # atomic: who has which page
    uint32_t length[CREW_PAGES]
    uint8_t *blobs
    pthread_mutex_t lock
    pthread_cond_t wake
    pthread_t thread

cdef int crew_start(Crew *crew, Slots *slots, CodecChoice choice, uint32_t room_bytes) noexcept nogil
cdef uint64_t crew_memory_bytes(Crew *crew) noexcept nogil
cdef void crew_stop(Crew *crew) noexcept nogil
cdef uint32_t crew_offer(Crew *crew, const uint8_t *data, uint64_t pages) noexcept nogil
cdef void crew_collect(Crew *crew, Slot *slot, uint32_t i) noexcept nogil
cdef void crew_close(Crew *crew) noexcept nogil
