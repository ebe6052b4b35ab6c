"""Codecs: one 4 KiB page to a blob and back, through liblz4 and libzstd.

An LZ4 blob is one LZ4 block.  A zstd blob is one frame without magic number,
content size, checksum or dictionary number: the entry knows what it is, the blob
header checks it, and four to nine bytes a page are worth having.  A blob that
decompresses to anything but exactly 4096 bytes is damaged; decompression is
always the bounds-checked variant, because the bytes may come back from a disk or
a peer, or be read while they change.

States and contexts belong to the slots and are warmed at start: compressing
allocates nothing.  Those for reading zstd lie in memory of ours, 94 KiB a slot; what a page
needs of it, about 36 KiB, is there before the first such page.  So is the room for what reading
with a dictionary needs: 140 KiB for each of them.  Contexts for compressing are mapped each on its own.

Sources: lz4 block format (lz4_Block_format.md), RFC 8878 for zstd.
"""

import array

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

from zcache_core.backing cimport back_range
from zcache_core.layout cimport (
    CODEC_LZ4, CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_WITH, DICTIONARIES, DICTIONARY_MOST, PAGE_BYTES,
)
from zcache_core.pthread cimport now_us
from zcache_core.slots cimport BLOB_ROOM, SLOTS, Slot, Slots, slot_release, slot_take, slots_free, slots_init

cdef extern from "<lz4.h>" nogil:
    int LZ4_sizeofState()
    int LZ4_compress_fast_extState(void *state, const char *src, char *dst, int src_size, int dst_size, int acceleration)
    int LZ4_decompress_safe(const char *src, char *dst, int src_size, int dst_size)

cdef extern from "<sys/mman.h>" nogil:
    enum: MADV_NOHUGEPAGE
    int madvise(void *at, size_t length, int advice)
    int mincore(void *at, size_t length, unsigned char *resident)

cdef extern from *:
    """
    #define ZSTD_STATIC_LINKING_ONLY    /* contexts in memory of our own */
    """

cdef extern from "mapped.h" nogil:
    ctypedef struct ZSTD_customMem:
        pass
    ZSTD_customMem zc_mapped

cdef extern from "<zstd.h>" nogil:
    ctypedef struct ZSTD_CCtx:
        pass
    ctypedef struct ZSTD_DCtx:
        pass
    enum ZSTD_cParameter:
        ZSTD_c_compressionLevel
        ZSTD_c_contentSizeFlag
        ZSTD_c_checksumFlag
        ZSTD_c_dictIDFlag
        ZSTD_c_experimentalParam2   # ZSTD_c_format
    enum ZSTD_dParameter:
        ZSTD_d_experimentalParam1   # ZSTD_d_format
    ZSTD_CCtx *ZSTD_createCCtx_advanced(ZSTD_customMem)
    size_t ZSTD_freeCCtx(ZSTD_CCtx *)
    size_t ZSTD_sizeof_CCtx(const ZSTD_CCtx *)
    size_t ZSTD_estimateDCtxSize()
    ZSTD_DCtx *ZSTD_initStaticDCtx(void *memory, size_t bytes)
    size_t ZSTD_CCtx_setParameter(ZSTD_CCtx *, ZSTD_cParameter, int)
    size_t ZSTD_DCtx_setParameter(ZSTD_DCtx *, ZSTD_dParameter, int)
    size_t ZSTD_compress2(ZSTD_CCtx *, void *dst, size_t room, const void *src, size_t length)
    size_t ZSTD_decompressDCtx(ZSTD_DCtx *, void *dst, size_t room, const void *src, size_t length)
    unsigned ZSTD_isError(size_t)
    ctypedef struct ZSTD_CDict:
        pass
    ctypedef struct ZSTD_DDict:
        pass
    ctypedef struct ZSTD_compressionParameters:
        pass
    enum ZSTD_dictLoadMethod_e:
        ZSTD_dlm_byCopy
    enum ZSTD_dictContentType_e:
        ZSTD_dct_auto
    ZSTD_compressionParameters ZSTD_getCParams(int level, unsigned long long source_bytes, size_t dictionary_bytes)
    ZSTD_CDict *ZSTD_createCDict_advanced(
        const void *bytes, size_t length, ZSTD_dictLoadMethod_e, ZSTD_dictContentType_e, ZSTD_compressionParameters,
        ZSTD_customMem
    )
    size_t ZSTD_freeCDict(ZSTD_CDict *)
    size_t ZSTD_CCtx_refCDict(ZSTD_CCtx *, const ZSTD_CDict *)
    size_t ZSTD_sizeof_CDict(const ZSTD_CDict *)
    size_t ZSTD_estimateDDictSize(size_t dictionary_bytes, ZSTD_dictLoadMethod_e)
    const ZSTD_DDict *ZSTD_initStaticDDict(
        void *memory, size_t bytes, const void *dictionary, size_t length, ZSTD_dictLoadMethod_e, ZSTD_dictContentType_e
    )
    size_t ZSTD_decompress_usingDDict(
        ZSTD_DCtx *, void *dst, size_t room, const void *src, size_t length, const ZSTD_DDict *
    )

cdef enum:
    ZSTD_MAGICLESS = 1          # ZSTD_f_zstd1_magicless


cdef inline uint64_t reader_bytes() noexcept nogil:
    """Of one context for reading, in whole pages."""
    return (ZSTD_estimateDCtxSize() + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


cdef bint make_readers(Slots *slots) noexcept nogil:
    """Contexts for reading zstd in every slot, in one piece of memory.

    A memory file that is taken over may hold pages of either codec; untouched, they cost
    address space only, and two pages a slot.
    """
    cdef uint32_t i
    cdef ZSTD_DCtx *d
    slots.readers_bytes = SLOTS * reader_bytes()
    slots.readers = <uint8_t *>mmap(
        NULL, slots.readers_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    if slots.readers == MAP_FAILED:
        slots.readers = NULL
        return False
    for i in range(SLOTS):
        d = ZSTD_initStaticDCtx(slots.readers + i * reader_bytes(), reader_bytes())
        slots.slot[i].zstd_decompress = d
        if d == NULL or ZSTD_isError(ZSTD_DCtx_setParameter(d, ZSTD_d_experimentalParam1, ZSTD_MAGICLESS)):
            return False
    return True


cdef bint find_touched(uint8_t *touched) noexcept nogil:
    """Which pages of a context reading needs, seen at one of our own; False: no memory.

    Tried with a page of letters and repeats, and with one that is literals almost only: no page has more.
    """
    cdef uint64_t bytes = reader_bytes()
    cdef Slot slot
    cdef CodecChoice choice
    cdef uint64_t room = 4 * PAGE_BYTES
    cdef uint8_t *at = <uint8_t *>mmap(
        NULL, bytes + room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    cdef bint done = False
    if at == MAP_FAILED:
        return False
    madvise(at, bytes + room, MADV_NOHUGEPAGE)
    memset(&slot, 0, sizeof(slot))
    slot.zstd_decompress = ZSTD_initStaticDCtx(at, bytes)
    slot.page, slot.blob = at + bytes, at + bytes + PAGE_BYTES
    choice.codec, choice.level = CODEC_ZSTD, 3
    if slot.zstd_decompress != NULL and not ZSTD_isError(
        ZSTD_DCtx_setParameter(<ZSTD_DCtx *>slot.zstd_decompress, ZSTD_d_experimentalParam1, ZSTD_MAGICLESS)
    ) and codec_make(&slot, choice):
        fill_letters(&slot, 4)
        there_and_back(&slot, choice)
        fill_letters(&slot, 1)
        there_and_back(&slot, choice)
        done = mincore(at, bytes, touched) == 0
    codec_unmake(&slot)
    munmap(at, bytes + room)
    return done


cdef bint codec_expect_zstd(Slots *slots) noexcept nogil:
    """Pages of zstd may have to be read from now on: have memory for that; False: there is none."""
    cdef uint8_t touched[64]
    cdef uint64_t pages = reader_bytes() // PAGE_BYTES
    cdef uint64_t backed = 0
    cdef uint64_t i, page
    if slots.readers_backed:
        return True
    if pages > sizeof(touched) or not find_touched(touched):
        return False
    for i in range(SLOTS):
        for page in range(pages):
            if touched[page] & 1:
                if back_range(slots.readers + (i * pages + page) * PAGE_BYTES, PAGE_BYTES):
                    return False
                backed += PAGE_BYTES
    slots.readers_backed_bytes = backed
    slots.readers_backed = True
    return True


cdef bint codec_make(Slot *slot, CodecChoice choice) noexcept nogil:
    """A context for compressing in this slot, warmed, in place of the one it has; False: no memory."""
    cdef ZSTD_CCtx *c
    cdef size_t refused
    codec_unmake(slot)
    if choice.codec == CODEC_ZSTD:
        c = ZSTD_createCCtx_advanced(zc_mapped)
        slot.zstd_compress = c
        if c == NULL:
            return False
        refused = ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_compressionLevel, choice.level))
        refused |= ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_contentSizeFlag, 0))
        refused |= ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, 0))
        refused |= ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_dictIDFlag, 0))
        refused |= ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_experimentalParam2, ZSTD_MAGICLESS))
        if refused:
            return False
    warm(slot, choice)
    return True


cdef int codec_prepare(Slots *slots, CodecChoice choice) noexcept nogil:
    """Make and warm the contexts that `choice` needs in every slot; -1: no memory."""
    cdef uint32_t i
    if LZ4_sizeofState() > 16640 or not make_readers(slots) or not make_dictionary_rooms(slots):
        return -1
    if choice.codec == CODEC_ZSTD and not codec_expect_zstd(slots):
        return -1
    for i in range(SLOTS):
        if not codec_make(&slots.slot[i], choice):
            return -1
    return 0


cdef void fill_letters(Slot *slot, uint32_t repeats) noexcept nogil:
    """A page of letters; every second piece repeats what stands before, `repeats` of 4 bytes in it."""
    cdef uint32_t i
    cdef uint32_t x = 1
    for i in range(PAGE_BYTES):
        x = x * 1664525 + 1013904223
        slot.page[i] = slot.page[i - 97] if i >= 97 and i // 128 % 2 and i % 128 < 32 * repeats else 97 + (x >> 28)


cdef void warm(Slot *slot, CodecChoice choice) noexcept nogil:
    """One page there and back, of the kind that makes a codec use all it has: letters and repeats."""
    fill_letters(slot, 4)
    there_and_back(slot, choice)


cdef void there_and_back(Slot *slot, CodecChoice choice) noexcept nogil:
    cdef uint32_t length
    length = codec_compress(slot, choice, slot.page, slot.blob, PAGE_BYTES)
    if length:
        codec_decompress(slot, choice.codec, slot.blob, length, slot.page)


cdef uint64_t codec_memory_bytes(Slots *slots) noexcept nogil:
    """What the contexts that are in use take, beside the slots."""
    cdef uint64_t total = slots.readers_backed_bytes if slots.readers_backed else 0
    cdef uint32_t i
    for i in range(SLOTS):
        total += codec_context_bytes(&slots.slot[i])
    return total


cdef uint64_t codec_context_bytes(const Slot *slot) noexcept nogil:
    """Of one slot's context for compressing."""
    return ZSTD_sizeof_CCtx(<ZSTD_CCtx *>slot.zstd_compress) + ZSTD_sizeof_CDict(<ZSTD_CDict *>slot.zstd_dictionary)


cdef void codec_discard(Slots *slots) noexcept nogil:
    cdef uint32_t i
    for i in range(SLOTS):
        codec_unmake(&slots.slot[i])
        slots.slot[i].zstd_decompress = NULL
    if slots.readers != NULL:
        munmap(slots.readers, slots.readers_bytes)
    slots.readers = NULL
    slots.readers_backed = False
    for i in range(DICTIONARIES):
        slots.dictionary[i] = NULL
    if slots.dictionary_at != NULL:
        munmap(slots.dictionary_at, slots.dictionary_bytes)
    slots.dictionary_at = NULL
    codec_forget_copy(slots)
    slots.dictionaries_backed = 0


cdef void codec_unmake(Slot *slot) noexcept nogil:
    ZSTD_freeCCtx(<ZSTD_CCtx *>slot.zstd_compress)
    ZSTD_freeCDict(<ZSTD_CDict *>slot.zstd_dictionary)
    slot.zstd_compress = slot.zstd_dictionary = NULL


cdef bint codec_load_dictionary(Slot *slot, const uint8_t *bytes, uint32_t length_bytes, int level) noexcept nogil:
    """Have what codec_make made compress with this dictionary, of which a copy is kept; False: no memory."""
    cdef ZSTD_CDict *c = ZSTD_createCDict_advanced(
        bytes, length_bytes, ZSTD_dlm_byCopy, ZSTD_dct_auto, ZSTD_getCParams(level, PAGE_BYTES, length_bytes), zc_mapped
    )
    if c == NULL or ZSTD_isError(ZSTD_CCtx_refCDict(<ZSTD_CCtx *>slot.zstd_compress, c)):
        ZSTD_freeCDict(c)
        return False
    slot.zstd_dictionary = c
    return True


cdef inline uint64_t dictionary_room() noexcept nogil:
    """For reading with one: its copy and tables, in whole pages."""
    return (
        (ZSTD_estimateDDictSize(DICTIONARY_MOST, ZSTD_dlm_byCopy) + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    )


cdef bint make_dictionary_rooms(Slots *slots) noexcept nogil:
    """Room for all of them; untouched it is address space only."""
    cdef void *at
    slots.dictionary_bytes = DICTIONARIES * dictionary_room()
    at = mmap(NULL, slots.dictionary_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if at == MAP_FAILED:
        return False
    slots.dictionary_at = <uint8_t *>at
    return True


cdef bint codec_expect_copy(Slots *slots) noexcept nogil:
    """A dictionary may have to be taken from the file: have memory for a copy; False: there is none."""
    cdef void *at
    if slots.dictionary_copy != NULL:
        return True
    at = mmap(NULL, DICTIONARY_MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if at == MAP_FAILED:
        return False
    if back_range(<uint8_t *>at, DICTIONARY_MOST):
        munmap(at, DICTIONARY_MOST)
        return False
    slots.dictionary_copy = <uint8_t *>at
    slots.dictionary_backed_bytes += DICTIONARY_MOST
    return True


cdef void codec_forget_copy(Slots *slots) noexcept nogil:
    """Until it is expected again."""
    if slots.dictionary_copy != NULL:
        munmap(slots.dictionary_copy, DICTIONARY_MOST)
        slots.dictionary_backed_bytes -= DICTIONARY_MOST
    slots.dictionary_copy = NULL


cdef bint codec_expect_dictionary(Slots *slots, uint32_t number) noexcept nogil:
    """Pages with the dictionary of this row may have to be read from now on: have memory; False: there is none."""
    if slots.dictionaries_backed >> number & 1:
        return True
    if back_range(slots.dictionary_at + number * dictionary_room(), dictionary_room()):
        return False
    slots.dictionary_backed_bytes += dictionary_room()
    slots.dictionaries_backed |= <uint32_t>1 << number
    return True


cdef bint codec_dictionary_make(Slots *slots, uint32_t number, const uint8_t *bytes, uint32_t length_bytes) noexcept nogil:
    """Have pages of this row's codec read with this dictionary, which is copied; False: no memory, or it is none."""
    if not codec_expect_dictionary(slots, number):
        return False
    slots.dictionary[number] = <void *>ZSTD_initStaticDDict(
        slots.dictionary_at + number * dictionary_room(), dictionary_room(), bytes, length_bytes, ZSTD_dlm_byCopy,
        ZSTD_dct_auto,
    )
    return slots.dictionary[number] != NULL


cdef uint32_t codec_compress(
    Slot *slot, CodecChoice choice, const uint8_t *page, uint8_t *blob, uint32_t room_bytes
) noexcept nogil:
    """Compress one page into `blob`; its length, or 0 when it needs more than `room_bytes`."""
    cdef int n
    cdef size_t z
    if choice.codec == CODEC_LZ4:
        n = LZ4_compress_fast_extState(
            slot.lz4_state, <const char *>page, <char *>blob, PAGE_BYTES, room_bytes, 1
        )
        return n if n > 0 else 0
    if choice.codec >= CODEC_ZSTD and slot.zstd_compress != NULL:
        z = ZSTD_compress2(<ZSTD_CCtx *>slot.zstd_compress, blob, room_bytes, page, PAGE_BYTES)
        return 0 if ZSTD_isError(z) else <uint32_t>z
    return 0


cdef bint codec_decompress(
    Slot *slot, uint32_t codec, const uint8_t *blob, uint32_t length_bytes, uint8_t *page
) noexcept nogil:
    """Write the 4096 bytes of the page; False when the blob is damaged."""
    cdef size_t z
    if codec == CODEC_LZ4:
        return LZ4_decompress_safe(<const char *>blob, <char *>page, length_bytes, PAGE_BYTES) == PAGE_BYTES
    if codec == CODEC_RAW:
        memcpy(page, blob, PAGE_BYTES)
        return length_bytes == PAGE_BYTES
    if codec == CODEC_ZSTD and slot.zstd_decompress != NULL:
        z = ZSTD_decompressDCtx(<ZSTD_DCtx *>slot.zstd_decompress, page, PAGE_BYTES, blob, length_bytes)
        return z == PAGE_BYTES
    if CODEC_ZSTD_WITH <= codec < CODEC_ZSTD_WITH + DICTIONARIES and slot.dictionaries[codec - CODEC_ZSTD_WITH] != NULL:
        z = ZSTD_decompress_usingDDict(
            <ZSTD_DCtx *>slot.zstd_decompress, page, PAGE_BYTES, blob, length_bytes,
            <const ZSTD_DDict *>slot.dictionaries[codec - CODEC_ZSTD_WITH],
        )
        return z == PAGE_BYTES
    return False


NAMES = {"none": CODEC_RAW, "lz4": CODEC_LZ4, "zstd": CODEC_ZSTD}


def parse(str text):
    """`lz4`, `zstd`, `zstd:LEVEL` (1 to 19) or `none` -> (codec number, level).

    Raises ValueError with a sentence that says what to write instead.
    """
    name, _, level = text.partition(":")
    if name not in NAMES or (level and name != "zstd"):
        raise ValueError(f"unknown codec {text!r}; use lz4, zstd, zstd:LEVEL or none")
    if level and not (level.isdigit() and 1 <= int(level) <= 19):
        raise ValueError(f"zstd level {level!r} is out of range; use zstd:1 to zstd:19")
    return NAMES[name], int(level or 3)


cdef class Codec:
    """One codec with contexts of its own, for tests and benchmarks (the store has its slots)."""

    cdef Slots slots
    cdef uint64_t[34][512] cells      # SLOTS + 2 shards
    cdef CodecChoice choice

    def __cinit__(self, str text="lz4"):
        self.choice.codec, self.choice.level = parse(text)
        memset(&self.slots, 0, sizeof(Slots))
        memset(self.cells, 0, sizeof(self.cells))
        if slots_init(&self.slots, &self.cells[0][0]) or codec_prepare(&self.slots, self.choice):
            raise MemoryError("no memory for compression contexts")

    def __dealloc__(self):
        codec_discard(&self.slots)
        slots_free(&self.slots)

    def compress(self, bytes page, uint32_t room_bytes=PAGE_BYTES):
        """One page (4096 bytes) -> blob, or None when it needs more than room_bytes."""
        cdef uint8_t blob[BLOB_ROOM]
        if len(page) != PAGE_BYTES or not 0 < room_bytes <= PAGE_BYTES:
            raise ValueError("a page is 4096 bytes, and room at most as much")
        n = codec_compress(&self.slots.slot[0], self.choice, page, blob, room_bytes)
        return (<char *>blob)[:n] if n else None

    def decompress(self, bytes blob):
        """Blob -> page of 4096 bytes.  Raises ValueError when it is damaged."""
        cdef uint8_t page[PAGE_BYTES]
        if not codec_decompress(&self.slots.slot[0], self.choice.codec, blob, len(blob), page):
            raise ValueError("damaged blob: it does not decompress to one page")
        return (<char *>page)[:PAGE_BYTES]

    def time_compress(self, const uint8_t[::1] pages not None, int rounds=1):
        """Seconds that a bare loop of the library takes to compress all pages, `rounds` times.

        No store, no room limit: the other side of the store's own measurements.
        """
        cdef uint8_t blob[2 * PAGE_BYTES]
        cdef uint64_t n = pages.shape[0] // PAGE_BYTES
        cdef uint64_t i
        cdef int64_t start
        cdef uint32_t total = 0
        with nogil:
            start = now_us()
            for _ in range(rounds):
                for i in range(n):
                    total += codec_compress(&self.slots.slot[0], self.choice, &pages[i * PAGE_BYTES], blob, sizeof(blob))
        return (now_us() - start) / 1e6 + 0 * total

    def time_decompress(self, const uint8_t[::1] pages not None, int rounds=1):
        """As time_compress, for decompressing the blobs of these pages.

        The pages go round in a buffer of 128 KiB, as a client's requests do.
        """
        cdef uint8_t blob[2 * PAGE_BYTES]
        cdef uint64_t n = pages.shape[0] // PAGE_BYTES
        cdef uint64_t i
        cdef int64_t start
        cdef uint32_t good = 0
        blobs = bytearray()
        ends = array.array("Q", [0])
        for i in range(n):
            blobs += (<char *>blob)[: codec_compress(&self.slots.slot[0], self.choice, &pages[i * PAGE_BYTES], blob, sizeof(blob))]
            ends.append(len(blobs))
        cdef const uint8_t[::1] all_blobs = blobs
        cdef const uint64_t[::1] at = ends
        cdef uint8_t[::1] out = bytearray(32 * PAGE_BYTES)
        with nogil:
            start = now_us()
            for _ in range(rounds):
                for i in range(n):
                    good += codec_decompress(
                        &self.slots.slot[0], self.choice.codec, &all_blobs[at[i]], <uint32_t>(at[i + 1] - at[i]),
                        &out[i % 32 * PAGE_BYTES],
                    )
        if good != n * rounds:
            raise ValueError("a page did not come back")
        return (now_us() - start) / 1e6
