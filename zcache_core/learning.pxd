"""C face of learning: dictionaries from this machine's own pages."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.codec cimport CodecChoice
from zcache_core.core cimport Core
from zcache_core.slots cimport Slot

ctypedef struct Learner:
    uint8_t *samples            # pages, or NULL: none are being gathered
    uint32_t n
    uint32_t wait_pages         # that are compressed before samples are gathered again
    uint32_t patience_pages     # doubles with each dictionary that was no better
    uint32_t met                # pages compressed with the dictionary
    uint32_t compared           # of them without it, too
    uint64_t with_bytes
    uint64_t without_bytes
    bint lost                   # the one in use hardly wins
    uint8_t *made               # a dictionary that is better than what is used, or NULL
    uint32_t made_bytes

cdef void learn_start(Learner *l) noexcept nogil
cdef void learn_free(Learner *l) noexcept nogil
cdef bint learn_use(Core *core, Slot *own, CodecChoice *choice, int row) noexcept nogil
cdef void learn_from(
    Core *core, Learner *l, Slot *own, Slot *plain, CodecChoice choice, const uint8_t *page
) noexcept nogil
cdef bint learn_wants(Core *core, Learner *l, CodecChoice choice) noexcept nogil
cdef void learn_gather(Core *core, Learner *l, uint32_t least_age) noexcept nogil
cdef void learn_make(Core *core, Learner *l, Slot *own, CodecChoice choice) noexcept nogil
cdef bint learn_publish(Core *core, Learner *l, Slot *own, CodecChoice *choice) noexcept nogil
