"""C face of the request slots."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zcache_core.layout cimport COUNTER_CELLS, DICTIONARIES
from zcache_core.native cimport zc_add64, zc_bits64, zc_load64
from zcache_core.pthread cimport now_ns

cdef enum:
    SLOTS = 32
    REQUEST_SLOTS = 28          # of them: requests in flight inside the core; nbdkit starts 16 threads
    BLOB_ROOM = 4096 + 64       # one compressed page, and what a codec may write past it
    IO_ROOM = 16384             # one object from a disk, with the blocks around it

ctypedef struct Slot:
    uint32_t busy               # 0 free, 1 inside, 2 parked; taken by compare-and-swap
    uint32_t number
    uint64_t turn               # counts releases: how a waiter sees that a request ended
    uint64_t *shard             # this slot's counters; plain adds, one writer at a time
    void *lz4_state
    void *zstd_compress
    void *zstd_decompress
    uint8_t *blob               # BLOB_ROOM bytes: a page after compression
    uint8_t *page               # 4096 bytes: a page before or after a partial write
    uint8_t *io                 # IO_ROOM bytes, aligned to 4096: for reading from below
    int64_t room_since_us       # when this request first waited for room; 0: it did not yet
    const uint8_t *ahead        # the next page's blob, if the crew has made it; else NULL
    uint64_t ahead_bytes        # its length; 0: the page does not compress
    const uint64_t *fence       # the device's newest generation, in the memory file
    uint64_t generation         # of this request's connection; 0: fenced by nobody
    int64_t until_sample        # calls until one is timed again
    void **dictionaries         # those for reading, by row
    void *zstd_dictionary       # the one for compressing that zstd_compress refers to
    uint64_t padding[7]         # 192 bytes a slot: no cache line is two slots'

ctypedef struct Slots:
    Slot slot[SLOTS]
    uint64_t *shared            # the counter shard whose writers hold the allocator's lock
    uint64_t *background        # the counter shard whose writers hold the arena's lock
    uint8_t *memory
    uint64_t memory_bytes
    uint8_t *io                 # SLOTS x IO_ROOM; has memory only with a tier below
    void *dictionary[DICTIONARIES]  # tables for reading, in the room at dictionary_at; NULL: no such
    uint8_t *dictionary_at
    uint8_t *dictionary_copy    # one of them as it lies in the file, while it is looked at; else NULL
    uint64_t dictionary_bytes
    uint64_t dictionary_backed_bytes
    uint32_t dictionaries_backed    # rows whose room has memory, a bit each
    uint8_t *readers            # contexts for reading zstd, one after the other
    uint64_t readers_bytes
    uint64_t readers_backed_bytes
    bint readers_backed         # they have memory, as much as pages need

cdef int slots_init(Slots *slots, uint64_t *counters) noexcept nogil
cdef void slots_free(Slots *slots) noexcept nogil
cdef uint64_t slots_expect_io(Slots *slots) noexcept nogil
cdef Slot *slot_take(Slots *slots) noexcept nogil
cdef Slot *slot_take_own(Slots *slots) noexcept nogil
cdef void slot_release(Slot *slot) noexcept nogil
cdef void slot_park(Slot *slot) noexcept nogil
cdef void slot_unpark(Slot *slot) noexcept nogil
cdef void slots_quiesce(void *slots) noexcept nogil

cdef inline bint slot_is_fenced(Slot *slot) noexcept nogil:
    """Whether a newer attach has taken the device over: this request must change nothing.

    To be asked after the slot was taken and after it was unparked.  In between a fence
    waits for it (slots_quiesce), so the answer holds until the slot is parked or left.
    """
    return slot.generation != 0 and zc_load64(slot.fence) != slot.generation

cdef enum:
    HISTOGRAM_BUCKETS = 31      # one for each power of two, then their sum; counters.py has the picture
    SAMPLE_LEAST = 17           # of so many calls and up to SAMPLE_SPREAD more, one is timed
    SAMPLE_SPREAD = 31          # a mask; not every n-th, requests have a rhythm of their own

cdef inline void observe(Slot *slot, uint32_t histogram, uint64_t value) noexcept nogil:
    """One value more in a histogram (H_... of counter_ids)."""
    slot.shard[histogram + min(zc_bits64(value), <uint32_t>(HISTOGRAM_BUCKETS - 1))] += 1
    slot.shard[histogram + HISTOGRAM_BUCKETS] += value

cdef inline void observe_shared(uint64_t *cells, uint32_t histogram, uint64_t value) noexcept nogil:
    """The same in a shard that several threads write."""
    zc_add64(&cells[histogram + min(zc_bits64(value), <uint32_t>(HISTOGRAM_BUCKETS - 1))], 1)
    zc_add64(&cells[histogram + HISTOGRAM_BUCKETS], value)

cdef inline int64_t sample(Slot *slot) noexcept nogil:
    """Begin a call that is timed now and then: nanoseconds now, or 0: this one is not."""
    cdef int64_t now
    slot.until_sample -= 1
    if slot.until_sample > 0:
        return 0
    now = now_ns()
    slot.until_sample = SAMPLE_LEAST + (now & SAMPLE_SPREAD)
    return now

cdef inline void sampled(Slot *slot, uint32_t histogram, int64_t began_ns) noexcept nogil:
    """Its end: what `sample` said is `began_ns`."""
    if began_ns:
        observe(slot, histogram, <uint64_t>(now_ns() - began_ns))

cdef inline void count(Slot *slot, uint32_t cell, uint64_t n) noexcept nogil:
    slot.shard[cell] += n
