"""What recompression needs of memory: had before the first page, given back when nothing is to be done.

    from the first order on    a byte a page of the device; what readers of zstd need, in every slot;
                               what is known of dictionaries: one page
    while pages are cold       two contexts with their tables, 2 MB with a dictionary at level 15;
                               140 KiB of buffers; a dictionary as it lies in the file, 112 KiB

All of it is asked for by the thread that recompresses, never by one that serves, and only when
the kernel has that much without reclaim (backing.pyx).  An order that finds no memory is refused;
later, what was given back and cannot be had again is waited for.

The second half is mapped memory of its own, not the heap's, so that it really goes back.  Of 512 MiB of
pages of four programs its 2 MB are 2 % of all that storing them costs: 1.73 times what zram holds
with them, 1.77 without.
"""

from libc.stdint cimport uint8_t, uint64_t
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from zcache_core.backing cimport back_range, backing_may, backing_round, backing_round_ends
from zcache_core.codec cimport (
    CodecChoice, codec_context_bytes, codec_expect_zstd, codec_forget_copy, codec_make, codec_unmake,
)
from zcache_core.counter_ids cimport C_PRIVATE_TABLE_BYTES
from zcache_core.dictionary cimport dictionary_newest
from zcache_core.layout cimport CODEC_ZSTD, PAGE_BYTES
from zcache_core.learning cimport learn_free, learn_start, learn_use
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock
from zcache_core.slots cimport BLOB_ROOM

cdef enum:
    ROOM_BYTES = (BATCH_PAGES + 2) * (PAGE_BYTES + BLOB_ROOM)
    # Asked for at once: contexts of level 19 with a dictionary, 0.5 MiB each, buffers, what readers need.
    NEEDED_BYTES = 4 << 20


cdef uint8_t *backed(uint64_t bytes) noexcept nogil:
    """Zeroed memory that is there; NULL: there is none."""
    cdef void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if at == MAP_FAILED:
        return NULL
    if back_range(<uint8_t *>at, bytes):
        munmap(at, bytes)
        return NULL
    return <uint8_t *>at


cdef bint make_room(Batch *b) noexcept nogil:
    if b.room != NULL:
        return True
    b.room = backed(ROOM_BYTES)
    if b.room == NULL:
        return False
    b.pages = b.room
    b.blobs = b.pages + BATCH_PAGES * PAGE_BYTES
    b.own.blob = b.blobs + BATCH_PAGES * BLOB_ROOM
    b.own.page = b.own.blob + BLOB_ROOM
    b.plain.blob = b.own.page + PAGE_BYTES
    b.plain.page = b.plain.blob + BLOB_ROOM
    return True


cdef bint dense_is_ready(Core *core, int level) noexcept nogil:
    """Whether pages can be recompressed with this level now.  With dense.turn."""
    cdef Batch *b = batch_of(core)
    return (
        b != NULL and b.choice.level == level and b.room != NULL
        and b.own.zstd_compress != NULL and b.plain.zstd_compress != NULL
    )


cdef bint make_all(Core *core, int level) noexcept nogil:
    """Buffers, marks, contexts, and the newest dictionary used; False: no memory."""
    cdef Batch *b
    cdef CodecChoice choice
    choice.codec, choice.level = CODEC_ZSTD, level
    if core.dense.batch == NULL:
        core.dense.batch = backed(sizeof(Batch))
        if core.dense.batch != NULL:
            learn_start(&batch_of(core).learner)
    b = batch_of(core)
    if core.marks == NULL:
        core.marks = backed(core.index.pages)
    if b == NULL or core.marks == NULL or not make_room(b) or not codec_expect_zstd(&core.slots):
        return False
    b.choice.level = 0
    if not codec_make(&b.plain, choice) or not learn_use(core, &b.own, &choice, dictionary_newest(core)):
        return False
    b.choice = choice
    return True


cdef bint dense_prepare(Core *core, int level) noexcept nogil:
    """Have all that recompressing with this level needs; False: no memory."""
    cdef Batch *b
    cdef bint done
    cdef uint64_t bytes = NEEDED_BYTES + core.index.pages
    lock_take(&core.dense.turn)
    b = batch_of(core)
    # after a takeover, a predecessor's dictionary is not used yet
    if not dense_is_ready(core, level) or (b.choice.codec == CODEC_ZSTD and dictionary_newest(core) >= 0):
        backing_round(&core.dense.backing, bytes)
        if backing_may(&core.dense.backing, bytes):
            make_all(core, level)
        backing_round_ends(&core.dense.backing)
        if core.index.entries != NULL:      # the memory file is ours
            dense_tell(core)
    done = dense_is_ready(core, level)
    pthread_mutex_unlock(&core.dense.turn)
    return done


cdef void dense_give_back(Core *core) noexcept nogil:
    """There is nothing to do: let go of what is only needed while there is."""
    cdef Batch *b
    lock_take(&core.dense.turn)
    b = batch_of(core)
    if b != NULL and b.room != NULL:
        codec_unmake(&b.own)
        codec_unmake(&b.plain)
        munmap(b.room, ROOM_BYTES)
        b.room = b.pages = b.blobs = NULL
        codec_forget_copy(&core.slots)
        dense_tell(core)
    pthread_mutex_unlock(&core.dense.turn)


cdef void dense_tell(Core *core) noexcept nogil:
    """What all this and dictionaries have taken, for the counters."""
    cdef Batch *b = batch_of(core)
    cdef uint64_t bytes = core.slots.dictionary_backed_bytes
    if b != NULL:
        bytes += PAGE_BYTES + core.index.pages + codec_context_bytes(&b.own) + codec_context_bytes(&b.plain)
        bytes += ROOM_BYTES if b.room != NULL else 0
        bytes += 0 if core.dense.readers_counted else core.slots.readers_backed_bytes
    core.dense.cells[C_PRIVATE_TABLE_BYTES] = bytes


cdef void dense_free(Core *core) noexcept nogil:
    """Nobody is inside any more."""
    cdef Batch *b = batch_of(core)
    if b != NULL:
        codec_unmake(&b.own)
        codec_unmake(&b.plain)
        learn_free(&b.learner)
        if b.room != NULL:
            munmap(b.room, ROOM_BYTES)
        munmap(b, sizeof(Batch))
    if core.marks != NULL:
        munmap(core.marks, core.index.pages)
    core.dense.batch = NULL
    core.marks = NULL
