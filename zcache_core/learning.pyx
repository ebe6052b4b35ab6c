"""Learning: a dictionary from pages of this machine, and whether it still wins.

    2048 cold pages, from all  -> 7 of 8 to ZDICT -> a dictionary
    over the device               the 8th: 3 % smaller with it than with what is used now?
                                  -> published (dictionary.pyx), used for all pages from here on
    every 32nd page            -> compressed without it too: after 128 of these less than 2 % smaller?
                                  -> samples again, and the old one is replaced by one that wins

A dictionary that is no better leaves all as it is; the next is tried after twice as many pages.
It runs in the class and the time of the thread that recompresses (denser.pyx), in 2 to 4 s for each
dictionary, and not at all while the machine's memory is short.

Bounds: 8 MiB of samples and what ZDICT needs (20 MiB), while one is made.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from zcache_core.codec cimport CodecChoice, codec_compress, codec_load_dictionary, codec_make, codec_unmake
from zcache_core.core cimport MARK_AGE, Core
from zcache_core.counter_ids cimport C_DICTIONARY_TRAININGS
from zcache_core.dictionary cimport dictionary_publish, dictionary_read
from zcache_core.index cimport entry_load
from zcache_core.layout cimport (
    CODEC_ZSTD, CODEC_ZSTD_WITH, DICTIONARY_MOST, PAGE_BYTES, Entry, entry_is_sound, state_of,
)
from zcache_core.ramtier cimport in_ram, load_blob
from zcache_core.slots cimport Slot, slot_release, slot_take_own

cdef extern from "<zdict.h>" nogil:
    size_t ZDICT_trainFromBuffer(void *dictionary, size_t room, const void *samples, const size_t *sizes, unsigned n)
    unsigned ZDICT_isError(size_t)

cdef enum:
    SAMPLES = 2048
    TRAINED = SAMPLES // 8 * 7
    WIN_PERCENT = 3             # of a new dictionary over what is used
    KEEP_PERCENT = 2            # of the one in use over none
    COMPARE_EVERY = 32          # 6 % of the time
    COMPARED = 128
    PATIENCE_PAGES = 1 << 16
    PATIENCE_MOST = 1 << 24
    SHARE_OF_POOL = 128         # a dictionary is no larger than this part of it
    LEAST_BYTES = 16 << 10
    TURNS = 16                  # over the device, while samples are looked for


cdef void learn_start(Learner *l) noexcept nogil:
    memset(l, 0, sizeof(Learner))
    l.patience_pages = PATIENCE_PAGES


cdef void learn_free(Learner *l) noexcept nogil:
    if l.samples != NULL:
        munmap(l.samples, SAMPLES * PAGE_BYTES)
    free(l.made)
    l.samples = l.made = NULL
    l.n = 0


cdef bint learn_use(Core *core, Slot *own, CodecChoice *choice, int row) noexcept nogil:
    """Compress with the dictionary of that row, or (-1) with none; False: no memory, nothing can be compressed."""
    cdef uint32_t length = 0
    choice.codec = CODEC_ZSTD
    if not codec_make(own, choice[0]):
        return False
    if row >= 0:
        length = dictionary_read(core, row)
        if length and codec_load_dictionary(own, core.slots.dictionary_copy, length, choice.level):
            choice.codec = CODEC_ZSTD_WITH + row
    return True


# ---- samples, and what the one in use wins ---------------------------------------------------

cdef uint32_t room_for_one(Core *core) noexcept nogil:
    """Bytes that a dictionary may have in a pool of this size; 0: none."""
    cdef uint64_t share = <uint64_t>core.arena.goal // SHARE_OF_POOL * PAGE_BYTES
    return <uint32_t>min(share, <uint64_t>DICTIONARY_MOST) if share >= LEAST_BYTES else 0


cdef bint learn_wants(Core *core, Learner *l, CodecChoice choice) noexcept nogil:
    """Whether samples are to be gathered now."""
    if l.wait_pages or l.made != NULL or room_for_one(core) == 0:
        return False
    if core.arena.squeezed or core.arena.failing or core.arena.short_since_us:
        return False
    return choice.codec == CODEC_ZSTD or l.lost


cdef bint near(Core *core, Slot *slot, uint64_t page, uint32_t least_age, uint8_t *data) noexcept nogil:
    """Read a page that is as old as those that are recompressed; False: it is not, or not in RAM."""
    cdef Entry e
    if core.marks[page] & MARK_AGE < least_age:
        return False
    e = entry_load(&core.index, page)
    return (
        in_ram(state_of(e.version)) and entry_is_sound(e.location, e.version)
        and load_blob(core, slot, page, e, data, True)
    )


cdef void learn_gather(Core *core, Learner *l, uint32_t least_age) noexcept nogil:
    """Copy pages from all over the device together, some of each part of it."""
    cdef uint64_t stride = max(core.index.pages // SAMPLES, <uint64_t>1)
    cdef uint64_t page
    cdef uint32_t turn
    cdef Slot *slot
    cdef void *at
    at = mmap(NULL, SAMPLES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if at == MAP_FAILED:
        return
    l.samples, l.n = <uint8_t *>at, 0
    for turn in range(min(TURNS, stride)):
        page = turn * stride // min(TURNS, stride)
        while page < core.index.pages and l.n < SAMPLES:
            slot = slot_take_own(&core.slots)
            l.n += near(core, slot, page, least_age, l.samples + l.n * PAGE_BYTES)
            slot_release(slot)
            page += stride


cdef inline uint32_t length_with(Slot *slot, CodecChoice choice, const uint8_t *page) noexcept nogil:
    cdef uint32_t length = codec_compress(slot, choice, page, slot.blob, PAGE_BYTES - 1)
    return length if length else PAGE_BYTES


cdef void compare(Learner *l, Slot *own, Slot *plain, CodecChoice choice, const uint8_t *page) noexcept nogil:
    """This page with the dictionary and without; samples are wanted when that is hardly larger."""
    l.with_bytes += length_with(own, choice, page)
    choice.codec = CODEC_ZSTD
    l.without_bytes += length_with(plain, choice, page)
    l.compared += 1
    if l.compared == COMPARED:
        l.lost = l.with_bytes * 100 > l.without_bytes * (100 - KEEP_PERCENT)
        l.compared = l.with_bytes = l.without_bytes = 0


cdef void learn_from(
    Core *core, Learner *l, Slot *own, Slot *plain, CodecChoice choice, const uint8_t *page
) noexcept nogil:
    """This page was compressed."""
    if choice.codec != CODEC_ZSTD:
        l.met += 1
        if l.met % COMPARE_EVERY == 0:
            compare(l, own, plain, choice, page)
    if l.wait_pages:
        l.wait_pages -= 1


# ---- a new one ---------------------------------------------------------------------------

cdef uint32_t train(const uint8_t *samples, uint8_t *dictionary, uint32_t room_bytes) noexcept nogil:
    cdef size_t *sizes = <size_t *>malloc(TRAINED * sizeof(size_t))
    cdef size_t got
    cdef uint32_t i
    if sizes == NULL:
        return 0
    for i in range(TRAINED):
        sizes[i] = PAGE_BYTES
    got = ZDICT_trainFromBuffer(dictionary, room_bytes, samples, sizes, TRAINED)
    free(sizes)
    return 0 if ZDICT_isError(got) else <uint32_t>got


cdef void spread(uint8_t *samples) noexcept nogil:
    """Every eighth page to the end: what judges shall be of all parts of the samples."""
    cdef uint8_t page[PAGE_BYTES]
    cdef uint32_t i
    for i in range(SAMPLES - TRAINED):
        memcpy(page, samples + 8 * i * PAGE_BYTES, PAGE_BYTES)
        memcpy(samples + 8 * i * PAGE_BYTES, samples + (TRAINED + i) * PAGE_BYTES, PAGE_BYTES)
        memcpy(samples + (TRAINED + i) * PAGE_BYTES, page, PAGE_BYTES)


cdef uint64_t length_of_all(Slot *own, CodecChoice choice, const uint8_t *pages) noexcept nogil:
    """Of the pages that judge."""
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(TRAINED, SAMPLES):
        total += length_with(own, choice, pages + i * PAGE_BYTES)
    return total


cdef bint is_better(Learner *l, Slot *own, CodecChoice choice, const uint8_t *dictionary, uint32_t bytes) noexcept nogil:
    """Whether pages that it was not made from are smaller with it, by enough."""
    cdef Slot trial = own[0]
    cdef uint64_t before = length_of_all(own, choice, l.samples)
    cdef bint better = False
    choice.codec = CODEC_ZSTD
    trial.zstd_compress = trial.zstd_dictionary = NULL
    if codec_make(&trial, choice) and codec_load_dictionary(&trial, dictionary, bytes, choice.level):
        choice.codec = CODEC_ZSTD_WITH
        better = length_of_all(&trial, choice, l.samples) * 100 < before * (100 - WIN_PERCENT)
    codec_unmake(&trial)
    return better


cdef void learn_make(Core *core, Learner *l, Slot *own, CodecChoice choice) noexcept nogil:
    """When there are samples enough: make a dictionary of them, kept in `made` if it is better."""
    cdef uint8_t *made
    cdef uint32_t bytes
    if l.samples == NULL:
        return
    if l.n < SAMPLES:
        munmap(l.samples, SAMPLES * PAGE_BYTES)
        l.samples = NULL
        l.wait_pages = SAMPLES
        return
    spread(l.samples)
    made = <uint8_t *>malloc(DICTIONARY_MOST)
    bytes = train(l.samples, made, room_for_one(core)) if made != NULL else 0
    core.dense.cells[C_DICTIONARY_TRAININGS] += 1
    if bytes and is_better(l, own, choice, made, bytes):
        l.made, l.made_bytes = made, bytes
    else:
        free(made)
    munmap(l.samples, SAMPLES * PAGE_BYTES)
    l.samples = NULL
    l.wait_pages = l.patience_pages
    l.patience_pages = min(2 * l.patience_pages, <uint32_t>PATIENCE_MOST)


cdef bint learn_publish(Core *core, Learner *l, Slot *own, CodecChoice *choice) noexcept nogil:
    """Use what was made; whether that is so.  In the ordinary class: it takes locks."""
    cdef int row
    if l.made == NULL:
        return False
    row = dictionary_publish(core, l.made, l.made_bytes, <int>choice.codec - CODEC_ZSTD_WITH)
    free(l.made)
    l.made = NULL
    l.lost = False
    l.compared = l.with_bytes = l.without_bytes = 0
    if row >= 0:
        l.patience_pages, l.wait_pages = PATIENCE_PAGES, 0
        learn_use(core, own, choice, row)
    return row >= 0
