"""Request slots: everything a request needs, allocated once, at start.

A request takes one of 28 slots for its time inside the core and finds there its
compression states, its buffers and its shard of the counters.  So the hot path
allocates nothing, and the number of requests inside is bounded; a twenty-ninth
waits (counted as slot_waits).  Four more are for the core's own threads (crew, takeover,
cooling, tidying: one each): they must find one while every request waits for the room
that they make (40 writers, without: a write waited 1.6 s and was refused beside an empty disk).

The slots are also how the core knows that no reader can still look at a frame
that has left the index: `slots_quiesce` waits until every request that was inside
when it was called has left.  (A reader that raced with an overwrite checks the
entry again and tries anew; but it must not touch a frame that has been punched,
because that would bring the memory back.)

    slot[i]  | busy | turn | shard -> counters | page 4096 | lz4 16 KiB | blob 4160 |   io 16 KiB

Bound: 32 slots x about 25 KiB, plus 16 KiB when there is a tier below, plus zstd's contexts when
zstd is the codec.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from posix.time cimport nanosleep, timespec

from zcache_core.backing cimport back_range
from zcache_core.counter_ids cimport C_SLOT_WAITS, H_SLOT_WAIT
from zcache_core.layout cimport COUNTER_CELLS, PAGE_BYTES
from zcache_core.native cimport zc_cas32, zc_full_fence, zc_load32, zc_load64, zc_store32, zc_store64
from zcache_core.pthread cimport now_us, sched_yield

cdef extern from *:
    """
    static __thread unsigned zc_last_slot;      /* where this thread looks first */
    """
    unsigned int zc_last_slot

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE

cdef enum:
    LZ4_STATE_BYTES = 16640     # LZ4_sizeofState() of every 1.x; checked by the codec
    # page first, so that it starts a cache line as every slot does
    SLOT_BYTES = (PAGE_BYTES + LZ4_STATE_BYTES + BLOB_ROOM + 63) // 64 * 64


cdef int slots_init(Slots *slots, uint64_t *counters) noexcept nogil:
    """Allocate and touch all slots; -1 when the system has no memory."""
    cdef uint32_t i
    cdef uint8_t *at
    memset(slots, 0, sizeof(Slots))
    slots.memory_bytes = SLOTS * SLOT_BYTES
    slots.memory = <uint8_t *>mmap(
        NULL, slots.memory_bytes, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0,
    )
    slots.io = <uint8_t *>mmap(
        NULL, SLOTS * IO_ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    if slots.memory == MAP_FAILED or slots.io == MAP_FAILED:
        return -1
    for i in range(SLOTS):
        at = slots.memory + i * SLOT_BYTES
        slots.slot[i].number = i
        slots.slot[i].shard = counters + i * COUNTER_CELLS
        slots.slot[i].io = slots.io + i * IO_ROOM
        slots.slot[i].page = at
        slots.slot[i].dictionaries = slots.dictionary
        slots.slot[i].lz4_state = at + PAGE_BYTES
        slots.slot[i].blob = at + PAGE_BYTES + LZ4_STATE_BYTES
    slots.shared = counters + SLOTS * COUNTER_CELLS
    slots.background = counters + (SLOTS + 1) * COUNTER_CELLS
    return 0


cdef void slots_free(Slots *slots) noexcept nogil:
    if slots.memory != NULL and slots.memory != MAP_FAILED:
        munmap(slots.memory, slots.memory_bytes)
    if slots.io != NULL and slots.io != MAP_FAILED:
        munmap(slots.io, SLOTS * IO_ROOM)
    slots.memory = slots.io = NULL


cdef uint64_t slots_expect_io(Slots *slots) noexcept nogil:
    """There is a tier below: have memory to read from there with.  Bytes of it, 0 when there is none."""
    return 0 if back_range(slots.io, SLOTS * IO_ROOM) else SLOTS * IO_ROOM


cdef Slot *slot_take(Slots *slots) noexcept nogil:
    """A free slot for a request; waits when all of those are taken."""
    return take_one(slots, 0, REQUEST_SLOTS)


cdef Slot *slot_take_own(Slots *slots) noexcept nogil:
    """A slot for one of the core's own threads."""
    return take_one(slots, REQUEST_SLOTS, SLOTS - REQUEST_SLOTS)


cdef Slot *take_one(Slots *slots, uint32_t start, uint32_t n) noexcept nogil:
    """A free one of `n` slots from `start` on, the one this thread had last if possible."""
    global zc_last_slot
    cdef uint32_t first = zc_last_slot
    cdef uint32_t i, at
    cdef uint32_t rounds = 0
    cdef int64_t began_us = 0
    cdef timespec nap
    nap.tv_sec = 0
    nap.tv_nsec = 50000
    while True:
        for i in range(n):
            at = start + (first + i) % n
            if zc_load32(&slots.slot[at].busy) == 0 and zc_cas32(&slots.slot[at].busy, 0, 1):
                zc_last_slot = at - start
                slots.slot[at].room_since_us = 0
                slots.slot[at].ahead = NULL
                slots.slot[at].generation = 0
                if rounds:
                    slots.slot[at].shard[C_SLOT_WAITS] += 1
                    observe(&slots.slot[at], H_SLOT_WAIT, <uint64_t>(now_us() - began_us))
                return &slots.slot[at]
        if rounds == 0:
            began_us = now_us()
        rounds += 1
        if rounds < 16:
            sched_yield()
        else:
            nanosleep(&nap, NULL)


cdef void slot_release(Slot *slot) noexcept nogil:
    zc_store64(&slot.turn, slot.turn + 1)
    zc_store32(&slot.busy, 0)


cdef void slot_park(Slot *slot) noexcept nogil:
    """The request waits, and looks at no frame until it is unparked: as if it had left."""
    zc_store32(&slot.busy, 2)


cdef void slot_unpark(Slot *slot) noexcept nogil:
    zc_store32(&slot.busy, 1)
    zc_full_fence()             # before the next look at an entry


cdef void slots_quiesce(void *argument) noexcept nogil:
    """Return when every request that is inside now has left or parked.  Slots * as void *."""
    cdef Slots *slots = <Slots *>argument
    cdef uint64_t turns[SLOTS]
    cdef uint32_t i
    cdef timespec nap
    nap.tv_sec = 0
    nap.tv_nsec = 20000
    zc_full_fence()
    for i in range(SLOTS):
        turns[i] = zc_load64(&slots.slot[i].turn)
    for i in range(SLOTS):
        while zc_load32(&slots.slot[i].busy) == 1 and zc_load64(&slots.slot[i].turn) == turns[i]:
            nanosleep(&nap, NULL)
