"""Dictionaries: what zstd knows of this machine's pages before it sees one.

    superblock, four rows     bytes | first frame | checksum | number       number: the highest is the newest
    arena, frames             | 4 KiB of it | -> | 4 KiB | -> | the rest |  chained by their frame headers
    this process              a reader's table (DDict) for each; entries with codec 4 + row need it

A dictionary is written to frames that no row names; then its row is, the number of bytes last.
Killed before that, a server leaves frames that are nobody's.  After it every page of its codec
can be read by every successor.  It stays while one entry names its codec, wherever that page is: in
RAM, on the disk, at peers.  Neither can do without the index, so none is written down otherwise.

A row is used again when all four are taken: then the index is looked through, and one that no
entry names any more, and that no request under way may have seen there, is given up.  Until there
is one, the dictionaries that there are do.

Bounds: four of 112 KiB at most, each in frames, as a copy here and as tables beside it (27 KiB).  A start
that has no memory for these is refused, for it could read no page that needs them.  A
standby has the memory for all four before it waits.
Written by the thread that recompresses, with dense.turn, or before there is one.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport nanosleep, timespec

from zcache_core.arena cimport FRAME_DICTIONARY, NO_FRAME, Arena, arena_give, arena_take, frame_address
from zcache_core.codec cimport (
    codec_dictionary_make, codec_expect_copy, codec_expect_dictionary, codec_expect_zstd, codec_forget_copy,
)
from zcache_core.core cimport Core
from zcache_core.counter_ids cimport C_DICTIONARIES, C_DICTIONARY_FRAMES
from zcache_core.index cimport entry_load
from zcache_core.layout cimport (
    CODEC_ZSTD_WITH, DICTIONARIES, DICTIONARY_MOST, PAGE_BYTES, ST_DISK, ST_PEER, ST_RAM, ST_RAM_EPHEMERAL, DictionaryRow,
    Entry, codec_of, state_of,
)
from zcache_core.native cimport zc_hash, zc_load32, zc_load64, zc_release_fence, zc_store32
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock
from zcache_core.slots cimport REQUEST_SLOTS

cdef enum:
    FRAMES_MOST = DICTIONARY_MOST // PAGE_BYTES
    SHARED_DICTIONARY = 13      # a frame header's low four bits: docs/memory-format.md
    LOOKS = 2000                # at requests under way, 1 ms apart, before a dictionary is kept after all


cdef inline uint32_t frames_for(uint32_t bytes) noexcept nogil:
    return (bytes + PAGE_BYTES - 1) // PAGE_BYTES


cdef inline uint32_t next_frame(Arena *arena, uint32_t frame) noexcept nogil:
    return <uint32_t>arena.headers[frame].page_checksum


cdef uint32_t chain_of(Core *core, const DictionaryRow *row, uint32_t *frames) noexcept nogil:
    """The frames of a dictionary, in order; how many, 0 when they are not what they should be."""
    cdef Arena *arena = &core.arena
    cdef uint32_t wanted = frames_for(row.bytes)
    cdef uint32_t frame = row.first_frame
    cdef uint32_t n = 0
    if row.bytes == 0 or row.bytes > DICTIONARY_MOST:
        return 0
    while n < wanted:
        if frame >= arena.total or arena.headers[frame].identity != (SHARED_DICTIONARY | <uint64_t>n << 4):
            return 0
        frames[n] = frame
        frame = next_frame(arena, frame)
        n += 1
    return n


cdef void tell(Core *core) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t n = 0
    cdef uint64_t frames = 0
    for i in range(DICTIONARIES):
        if core.slots.dictionary[i] != NULL:
            n += 1
            frames += frames_for(core.dictionary_rows[i].bytes)
    core.dense.cells[C_DICTIONARIES] = n
    core.dense.cells[C_DICTIONARY_FRAMES] = frames


cdef uint32_t dictionary_read(Core *core, uint32_t number) noexcept nogil:
    """Copy a dictionary from its frames to slots.dictionary_copy; its length, 0 when it is damaged.

    Without memory for the copy (`codec_expect_copy`) 0 too.
    """
    cdef DictionaryRow *row = &core.dictionary_rows[number]
    cdef uint8_t *bytes
    cdef uint32_t frames[FRAMES_MOST]
    cdef uint32_t n = chain_of(core, row, frames)
    cdef uint32_t i
    if not codec_expect_copy(&core.slots):
        return 0
    bytes = core.slots.dictionary_copy
    for i in range(n):
        memcpy(bytes + i * PAGE_BYTES, frame_address(&core.arena, frames[i]), min(PAGE_BYTES, row.bytes - i * PAGE_BYTES))
    return row.bytes if n and <uint32_t>zc_hash(bytes, row.bytes) == row.checksum else 0


cdef bint load(Core *core, uint32_t number) noexcept nogil:
    """Make a predecessor's ready to be read with.  Of a damaged one the pages answer EIO; False: no memory."""
    cdef uint32_t frames[FRAMES_MOST]
    cdef uint32_t n, i, length
    if not codec_expect_copy(&core.slots) or not codec_expect_dictionary(&core.slots, number):
        return False
    length = dictionary_read(core, number)
    if length and codec_dictionary_make(&core.slots, number, core.slots.dictionary_copy, length):
        n = chain_of(core, &core.dictionary_rows[number], frames)
        for i in range(n):
            core.arena.frames[frames[i]].state = FRAME_DICTIONARY
    return True


cdef bint dictionaries_open(Core *core) noexcept nogil:
    """Of a file that is taken over, before its first page is read, or a frame is looked at.

    False: no memory.  Then nobody may serve: good pages would answer EIO, and a frame that a
    dictionary lies in would be given to others.
    """
    cdef uint32_t i
    for i in range(DICTIONARIES):
        if core.dictionary_rows[i].bytes and not load(core, i):
            return False
    codec_forget_copy(&core.slots)
    tell(core)
    return True


cdef bint dictionaries_expect(Core *core) noexcept nogil:
    """A file may be taken over when there is no memory to be had: have what any of its pages may need."""
    cdef uint32_t i
    for i in range(DICTIONARIES):
        if not codec_expect_dictionary(&core.slots, i):
            return False
    return codec_expect_copy(&core.slots) and codec_expect_zstd(&core.slots)


cdef int dictionary_newest(Core *core) noexcept nogil:
    """Row of the newest one; -1: there is none."""
    cdef int found = -1
    cdef int i
    for i in range(DICTIONARIES):
        if core.slots.dictionary[i] != NULL and (
            found < 0 or core.dictionary_rows[i].number > core.dictionary_rows[found].number
        ):
            found = i
    return found


# ---- giving one up ---------------------------------------------------------------------

cdef uint32_t named(Core *core) noexcept nogil:
    """A bit for each row whose codec an entry names."""
    cdef uint32_t found = 0
    cdef uint64_t page
    cdef uint32_t state, codec
    cdef Entry e
    for page in range(core.index.pages):
        e = entry_load(&core.index, page)
        state = state_of(e.version)
        codec = codec_of(e.location)
        if codec >= CODEC_ZSTD_WITH and (
            state == ST_RAM or state == ST_RAM_EPHEMERAL or state == ST_DISK or state == ST_PEER
        ):
            found |= <uint32_t>1 << (codec - CODEC_ZSTD_WITH)
    return found


cdef bint all_requests_ended(Core *core) noexcept nogil:
    """Whether every request that is inside now, parked ones too, has left before long."""
    cdef uint64_t turns[REQUEST_SLOTS]
    cdef uint32_t i
    cdef uint32_t looks = 0
    cdef timespec nap
    nap.tv_sec = 0
    nap.tv_nsec = 1000000
    for i in range(REQUEST_SLOTS):
        turns[i] = zc_load64(&core.slots.slot[i].turn)
    for i in range(REQUEST_SLOTS):
        while zc_load32(&core.slots.slot[i].busy) and zc_load64(&core.slots.slot[i].turn) == turns[i]:
            looks += 1
            if looks > LOOKS or core.dense.stopping:
                return False
            nanosleep(&nap, NULL)
    return True


cdef int free_row(Core *core, int current) noexcept nogil:
    """A row for another dictionary, one that nothing names given up for it if need be; -1: none."""
    cdef uint32_t frames[FRAMES_MOST]
    cdef uint32_t in_use, n, j
    cdef int i
    for i in range(DICTIONARIES):
        if core.dictionary_rows[i].bytes == 0:
            return i
    in_use = named(core)
    for i in range(DICTIONARIES):
        if i == current or in_use >> i & 1 or not all_requests_ended(core):
            continue
        lock_take(&core.tidy.turn)      # whoever counts everything waits for it
        n = chain_of(core, &core.dictionary_rows[i], frames) if core.slots.dictionary[i] != NULL else 0
        zc_store32(&core.dictionary_rows[i].bytes, 0)
        core.slots.dictionary[i] = NULL
        for j in range(n):
            arena_give(&core.arena, frames[j])
        tell(core)
        pthread_mutex_unlock(&core.tidy.turn)
        return i
    return -1


# ---- a new one -------------------------------------------------------------------------

cdef bint write_frames(Core *core, const uint8_t *bytes, uint32_t length_bytes, uint32_t *frames) noexcept nogil:
    cdef Arena *arena = &core.arena
    cdef uint32_t n = frames_for(length_bytes)
    cdef uint32_t got = 0
    cdef uint32_t i
    lock_take(&core.allocator.lock)     # between taken and ours nobody shall look at a frame
    while got < n:
        frames[got] = arena_take(arena)
        if frames[got] == NO_FRAME:
            break
        arena.frames[frames[got]].state = FRAME_DICTIONARY
        got += 1
    pthread_mutex_unlock(&core.allocator.lock)
    if got < n:
        for i in range(got):
            arena_give(arena, frames[i])
        return False
    for i in range(n):
        memcpy(frame_address(arena, frames[i]), bytes + i * PAGE_BYTES, min(PAGE_BYTES, length_bytes - i * PAGE_BYTES))
        arena.headers[frames[i]].identity = SHARED_DICTIONARY | <uint64_t>i << 4
        arena.headers[frames[i]].page_checksum = frames[i + 1] if i + 1 < n else NO_FRAME
    return True


cdef int dictionary_publish(Core *core, const uint8_t *bytes, uint32_t length_bytes, int current) noexcept nogil:
    """Keep a dictionary in the memory file from now on; its row, or -1: no row or no room now.

    `current`: the row that is in use, which is not given up for it; -1: none.
    """
    cdef uint32_t frames[FRAMES_MOST]
    cdef int newest = dictionary_newest(core)
    cdef int number = free_row(core, current)
    cdef DictionaryRow *row
    if number < 0:
        return -1
    lock_take(&core.tidy.turn)          # whoever counts everything waits for it
    if not codec_dictionary_make(&core.slots, number, bytes, length_bytes):
        number = -1
    elif not write_frames(core, bytes, length_bytes, frames):
        core.slots.dictionary[number] = NULL
        number = -1
    else:
        row = &core.dictionary_rows[number]
        row.first_frame = frames[0]
        row.checksum = <uint32_t>zc_hash(bytes, length_bytes)
        row.number = core.dictionary_rows[newest].number + 1 if newest >= 0 else 1
        zc_release_fence()
        zc_store32(&row.bytes, length_bytes)
    tell(core)
    pthread_mutex_unlock(&core.tidy.turn)
    return number
