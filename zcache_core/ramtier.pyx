"""The RAM tier: put, get, invalidate, who is cold.  All of it without the GIL.

    put   same-filled? -> compress -> room -> header and blob -> ONE flip -> old room freed
    get   entry -> check -> decompress -> is the entry still the same?
    trim  flip to empty -> old room freed

Nothing is ever changed in place.  A write that finds no room leaves the old page
as it was.  Of two writes at once the one that flips last came last; versions only
grow, so it takes a new one if the other's is higher.  A reader takes no lock: it reads the entry, checks
and decompresses, and looks at the entry again; if it changed, what was read may
be rubbish and is read anew.  A page can leave its place and be back while its reader sleeps, and its
entry looks as before: `arrivals`, counted by page, tells.  Then the blob is copied before it is checked, and that
copy is decompressed, wherever the page is by then.

Recency is one bit per frame (of a zspage: of any of its frames), set by a read, cleared by
the clock's hand when it looks for victims (second chance).  It belongs here, not to the
allocators.
"""

from libc.errno cimport EIO, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.time cimport nanosleep, timespec

from zcache_core.allocator cimport frame_next, object_blob, object_bytes, object_fill, object_header
from zcache_core.arena cimport FRAME_TAIL, FRAME_TAKEN, FRAME_ZSMALLOC, NO_FRAME, Frame, arena_wait
from zcache_core.codec cimport codec_compress, codec_decompress
from zcache_core.cold cimport ColdPage, cold_page
from zcache_core.core cimport MARK_AGE, RAN_OUT, WOULD_BLOCK, Core, arrivals_of
from zcache_core.counter_ids cimport (
    C_COMMIT_WAIT_US, C_COMMIT_WAITS, C_COMPRESS_POOR, C_CORRUPT_LOADS, C_DAMAGED_LOWER_ADDRESSES,
    C_FAILED_STORES, C_FLIP_RETRIES, C_INVALIDATES, C_LOADS, C_LOADS_EMPTY, C_LOADS_SAME_FILLED, C_LOST_PAGES,
    C_MENDED_LOADS, C_POOL_WAIT_US, C_POOL_WAITS, C_READ_RETRIES, C_RESTAMPED_STORES, C_SAME_FILLED_PAGES,
    C_SAME_FILLED_PAGES_MAX, C_SUCC_STORES, H_COMMIT_WAIT, H_GET_RAM, H_GET_SAME, H_POOL_WAIT, H_PUT,
)
from zcache_core.index cimport entry_flip, entry_load, versions_take
from zcache_core.layout cimport (
    CODEC_RAW, HEADER_BYTES, PAGE_BYTES, PAGE_SHIFT, ST_DISK, ST_EMPTY, ST_LOST, ST_RAM, ST_RAM_EPHEMERAL,
    ST_SAME, BlobHeader, Entry, codec_of, entry_is_sound, header_fill, header_is_sound, header_lower,
    header_matches, length_of, place_word, state_of, version_of, version_word, where_of,
)
from zcache_core.native cimport (
    zc_acquire_fence, zc_add64, zc_fill_words, zc_load32, zc_load64, zc_prefetch, zc_release_fence,
    zc_same_filled,
)
from zcache_core.pthread cimport lock_take, now_us, pthread_mutex_unlock
from zcache_core.slots cimport Slot, count, observe, sample, sampled, slot_is_fenced, slot_park, slot_unpark

cdef extern from "<errno.h>":
    enum: ESHUTDOWN

cdef enum:
    # Longest wait for room of one request, however many pages it has, in which nothing leaves RAM (NBD clients
    # give it 2 to 3 s at least); and in all: on a disk of 1 MB/s sixteen requests of 128 KiB take 2 s.
    ROOM_WAIT_US = 1500000
    ROOM_WAIT_MOST_US = 6000000
    # Of it: so long a write waits for the tiers to make room before it takes the pool above
    # the target that memory pressure set.  A batch of 1 MiB is on a disk in 2 to 10 ms.
    OVER_TARGET_AFTER_US = 100000
    # Cache lines fetched ahead of a page's turn; the hardware follows from there
    # (128 KiB reads of real pages: 0.73 of a bare decompression loop without, 0.86 with)
    EXPECT_LINES = 8
    FRAMES_TOGETHER = 15        # of one zspage, behind its first
    # A read that a writer overtakes this often in a row has met a bug, not a race.
    MOST_READ_TRIES = 100000


# ---- who is cold --------------------------------------------------------------------
# A byte a page, of the server's own: a hint, read and written without a lock.

cdef inline void note_read(Core *core, uint64_t page) noexcept nogil:
    if core.marks != NULL and core.marks[page] & MARK_AGE:
        core.marks[page] &= ~MARK_AGE & 0xFF


# ---- entries ------------------------------------------------------------------------

cdef bint place_is_possible(Core *core, uint64_t location) noexcept nogil:
    """Whether an object starts inside the arena, and its header stands in one frame; a raw page fills one."""
    cdef uint64_t where = where_of(location)
    cdef uint32_t least = PAGE_BYTES if length_of(location) == PAGE_BYTES else HEADER_BYTES
    return where >> PAGE_SHIFT < core.arena.total and (where & (PAGE_BYTES - 1)) + least <= PAGE_BYTES


cdef void drop_lower_copy(Core *core, Slot *slot, uint64_t page, Entry old) noexcept nogil:
    """Let go of the copy below an ephemeral page that is gone.

    Its address may just be changing (the tier moved it): under the allocator's lock,
    which the mover holds from its look at the entry to its write of the header.  A damaged
    address frees nothing, least of all what lies where it seems to point: the copy's room
    is lost until the next start counts anew.
    """
    cdef BlobHeader *header = object_header(&core.arena, where_of(old.location), length_of(old.location))
    cdef ColdPage copy
    cdef bint sound
    lock_take(&core.allocator.lock)
    copy = cold_page(page, version_of(old.version), header_lower(header), old.location)
    sound = header_is_sound(header)
    pthread_mutex_unlock(&core.allocator.lock)
    if not sound:
        count(slot, C_DAMAGED_LOWER_ADDRESSES, 1)
    elif core.lower.tiers != NULL:
        core.lower.drop(core.lower.tiers, &copy)


cdef void dispose(Core *core, Slot *slot, uint64_t page, Entry old) noexcept nogil:
    """Free what a replaced entry held.  A damaged one is left to the next rebuild."""
    cdef uint32_t state = state_of(old.version)
    cdef ColdPage copy
    if not entry_is_sound(old.location, old.version):
        return
    if in_ram(state):
        if place_is_possible(core, old.location):
            if state == ST_RAM_EPHEMERAL:
                drop_lower_copy(core, slot, page, old)
            core.allocator.release(core.allocator, where_of(old.location), object_bytes(length_of(old.location)))
    elif is_below(state):
        if core.lower.tiers != NULL:
            copy = cold_page(page, version_of(old.version), where_of(old.location), old.location)
            core.lower.drop(core.lower.tiers, &copy)
    elif state == ST_SAME:
        count(slot, C_SAME_FILLED_PAGES, <uint64_t>-1)
        zc_add64(&core.same_filled, <uint64_t>-1)
    elif state == ST_LOST:
        count(slot, C_LOST_PAGES, <uint64_t>-1)


cdef void count_same_filled(Core *core, Slot *slot) noexcept nogil:
    cdef uint64_t total = zc_add64(&core.same_filled, 1) + 1
    count(slot, C_SAME_FILLED_PAGES, 1)
    if total > slot.shard[C_SAME_FILLED_PAGES_MAX] and <int64_t>total > 0:
        slot.shard[C_SAME_FILLED_PAGES_MAX] = total


# ---- put ----------------------------------------------------------------------------

cdef inline int64_t wait_ends_us(Core *core, Slot *slot) noexcept nogil:
    """Until when this request waits for room, if nothing happens: longer while pages leave."""
    cdef int64_t moved_us = <int64_t>zc_load64(&core.lower.moved_us)
    return min(max(slot.room_since_us, moved_us) + ROOM_WAIT_US, slot.room_since_us + ROOM_WAIT_MOST_US)


cdef bint find_room(Core *core, Slot *slot, uint32_t bytes, uint64_t *where) noexcept nogil:
    """Room for an object; waits, bounded, while memory is being committed or pages leave."""
    cdef int64_t start, until
    cdef bint found = False
    cdef bint over = False
    cdef bint full = False
    cdef uint64_t waited_us
    if core.allocator.alloc(core.allocator, bytes, where):
        return True
    start = now_us()
    if slot.room_since_us == 0:
        slot.room_since_us = start
    slot_park(slot)             # the committer may be waiting for every slot to leave a frame
    until = wait_ends_us(core, slot)
    while not found and not slot_is_fenced(slot):   # who is, keeps the slot from who has taken its place
        over |= now_us() >= slot.room_since_us + OVER_TARGET_AFTER_US
        if not arena_wait(&core.arena, core.allocator.frames_at_once, until, over):
            if core.lower.tiers != NULL and core.lower.wait_room(core.lower.tiers, slot, until):
                full = True
            elif over:
                break
            else:
                over = True     # no hope below: pressure must not refuse what would have fitted
        found = core.allocator.alloc(core.allocator, bytes, where)
        until = wait_ends_us(core, slot)
    slot_unpark(slot)
    waited_us = <uint64_t>(now_us() - start)
    if full:
        count(slot, C_POOL_WAITS, 1)
        count(slot, C_POOL_WAIT_US, waited_us)
        observe(slot, H_POOL_WAIT, waited_us)
    elif found or now_us() >= until:    # else the pool was simply full, and it was said at once
        count(slot, C_COMMIT_WAITS, 1)
        count(slot, C_COMMIT_WAIT_US, waited_us)
        observe(slot, H_COMMIT_WAIT, waited_us)
    if found and slot_is_fenced(slot):
        core.allocator.release(core.allocator, where[0], bytes)
        return False
    return found


cdef int place_page(
    Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version, Entry *new
) noexcept nogil:
    """Store the page's bytes and make the entry for them; nothing points there yet.

    0, ENOSPC, or ESHUTDOWN: fenced while it waited for room.
    """
    cdef uint64_t word, where
    cdef uint32_t length, codec
    cdef const uint8_t *blob = slot.ahead
    slot.ahead = NULL
    if zc_same_filled(data, &word):
        new.location = word
        new.version = version_word(version, ST_SAME, word)
        return 0
    codec = core.codec.codec
    if blob != NULL:
        length = <uint32_t>slot.ahead_bytes
    else:
        blob = slot.blob
        length = codec_compress(slot, core.codec, data, slot.blob, core.allocator.largest_bytes - HEADER_BYTES)
    if length == 0:
        if codec != CODEC_RAW:
            count(slot, C_COMPRESS_POOR, 1)
        codec = CODEC_RAW
        length = PAGE_BYTES
        blob = data
    if not find_room(core, slot, object_bytes(length), &where):
        if slot_is_fenced(slot):
            return ESHUTDOWN
        count(slot, C_FAILED_STORES, 1)
        return ENOSPC
    object_fill(&core.arena, where, length, blob)
    header_fill(object_header(&core.arena, where, length), version, core.device, <uint32_t>page, length, codec, blob)
    new.location = place_word(where, length, codec)
    new.version = version_word(version, ST_RAM, new.location)
    return 0


cdef void restamp(Core *core, Slot *slot, uint64_t page, uint64_t version, Entry *new) noexcept nogil:
    """Give a page that is not published yet a newer version.

    Somebody else changed it since this write took its version.  The order of the flips
    is the order of the writes: what the other did may not know of this write (a change
    of 512 bytes of the old content, say), so this one must come after it, not before.
    """
    cdef uint32_t state = state_of(new.version)
    cdef uint32_t length = length_of(new.location)
    cdef uint64_t where = where_of(new.location)
    if state == ST_RAM:
        header_fill(
            object_header(&core.arena, where, length), version, core.device, <uint32_t>page, length,
            codec_of(new.location), object_blob(&core.arena, where, length, slot.blob),
        )
        zc_release_fence()
    new.version = version_word(version, state, new.location)


cdef int store_replace(
    Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version, const Entry *expected
) noexcept nogil:
    """Put, but only onto the entry `expected` (any entry when NULL).

    0, ENOSPC or ESHUTDOWN (the old content stays), or RAN_OUT when the entry was another.
    """
    cdef Entry old, new
    cdef int error = place_page(core, slot, page, data, version, &new)
    if error:
        return error
    if state_of(new.version) == ST_SAME:
        count_same_filled(core, slot)
    zc_release_fence()
    while True:
        if expected != NULL:
            old = expected[0]
        else:
            old = entry_load(&core.index, page)
            if version_of(old.version) > version and entry_is_sound(old.location, old.version):
                version = versions_take(&core.index, 1)
                restamp(core, slot, page, version, &new)
                count(slot, C_RESTAMPED_STORES, 1)
        if entry_flip(&core.index, page, old, new):
            break
        count(slot, C_FLIP_RETRIES, 1)
        if expected != NULL:
            dispose(core, slot, page, new)
            return RAN_OUT
    note_new(core, page)
    dispose(core, slot, page, old)
    count(slot, C_SUCC_STORES, 1)
    return 0


cdef int store_put(Core *core, Slot *slot, uint64_t page, const uint8_t *data, uint64_t version) noexcept nogil:
    """Store one page (4096 bytes at `data`); 0, ENOSPC or ESHUTDOWN."""
    cdef int64_t began_ns = sample(slot)
    cdef int error = store_replace(core, slot, page, data, version, NULL)
    sampled(slot, H_PUT, began_ns)
    return error


# ---- get ----------------------------------------------------------------------------

cdef bint load_blob(Core *core, Slot *slot, uint64_t page, Entry e, uint8_t *data, bint apart) noexcept nogil:
    """The page that the entry tells of; `apart`: from a copy, so that what is checked is what is read."""
    cdef uint64_t where = where_of(e.location)
    cdef uint32_t length = length_of(e.location)
    cdef const uint8_t *blob
    cdef BlobHeader header
    if not place_is_possible(core, e.location):
        return False
    header = object_header(&core.arena, where, length)[0]
    blob = object_blob(&core.arena, where, length, slot.blob)
    if blob == NULL:
        return False
    if apart and blob != slot.blob:
        memcpy(slot.blob, blob, length)
        blob = slot.blob
        zc_acquire_fence()
    if not header_matches(&header, version_of(e.version), core.device, <uint32_t>page, e.location, blob):
        return False
    return codec_decompress(slot, codec_of(e.location), blob, length, data)


cdef inline bint stayed(Core *core, uint64_t page, Entry e, Entry again, uint64_t arrivals) noexcept nogil:
    """Whether what was read in place from the entry `e` stood there all the time."""
    return (
        in_ram(state_of(again.version)) and again.location == e.location
        and arrivals_of(core, page) == arrivals
    )


cdef inline bint is_below_too(Core *core, Entry e) noexcept nogil:
    """Whether a page whose RAM copy is damaged can be had from below."""
    return (
        state_of(e.version) == ST_RAM_EPHEMERAL and entry_is_sound(e.location, e.version)
        and core.lower.tiers != NULL
    )


cdef int store_get(
    Core *core, Slot *slot, uint64_t page, uint8_t *data, Entry *seen, bint may_block
) noexcept nogil:
    """Read one page into `data`; 0, EIO, or WOULD_BLOCK when it is below and may_block is not.

    `seen` (or NULL) gets the entry that was read.
    """
    cdef Entry e, again
    cdef uint32_t state, tries
    cdef bint good
    cdef uint64_t arrivals
    cdef bint doubted = False
    cdef bint apart = False
    cdef int64_t began_ns = sample(slot)
    for tries in range(MOST_READ_TRIES):
        arrivals = arrivals_of(core, page)
        e = entry_load(&core.index, page)
        state = state_of(e.version)
        good = entry_is_sound(e.location, e.version)
        if not good:
            pass
        elif in_ram(state):
            good = load_blob(core, slot, page, e, data, apart)
        elif state == ST_SAME:
            zc_fill_words(data, e.location)
        elif state == ST_EMPTY:
            memset(data, 0, PAGE_BYTES)
        elif is_below(state) and core.lower.tiers != NULL:
            if not may_block:
                return WOULD_BLOCK
            good = core.lower.fetch(core.lower.tiers, slot, page, e, data) == 0
        else:
            good = False
        zc_acquire_fence()
        again = entry_load(&core.index, page)
        if good and version_of(again.version) == version_of(e.version):
            # The same version is the same content, wherever it is by now.
            if apart or not in_ram(state) or stayed(core, page, e, again, arrivals):
                break
            apart = True
        elif again.version == e.version and again.location == e.location:
            # A page may have left RAM and come back to the same place while its reader
            # slept in between: damage is what is there twice.
            if not in_ram(state):
                break
            if doubted:
                if not is_below_too(core, e):
                    break
                if not may_block:
                    return WOULD_BLOCK
                good = core.lower.mend(core.lower.tiers, slot, page, e, data)
                if good:
                    state = ST_DISK
                    count(slot, C_MENDED_LOADS, 1)
                again = entry_load(&core.index, page)
                if good or again.version == e.version and again.location == e.location:
                    break
            doubted = True
        else:
            doubted = False
        count(slot, C_READ_RETRIES, 1)
    else:
        good = False
    count(slot, C_LOADS, 1)
    if not good:
        if is_below(state) and entry_is_sound(e.location, e.version):
            return EIO          # counted by the tier
        if state != ST_LOST or not entry_is_sound(e.location, e.version):
            count(slot, C_CORRUPT_LOADS, 1)
        return EIO
    if seen != NULL:
        seen[0] = e
    note_read(core, page)
    if in_ram(state):
        if not core.arena.frames[where_of(e.location) >> PAGE_SHIFT].referenced:
            core.arena.frames[where_of(e.location) >> PAGE_SHIFT].referenced = 1
        sampled(slot, H_GET_RAM, began_ns)
    elif state == ST_SAME:
        count(slot, C_LOADS_SAME_FILLED, 1)
        sampled(slot, H_GET_SAME, began_ns)
    elif state == ST_EMPTY:
        count(slot, C_LOADS_EMPTY, 1)
        sampled(slot, H_GET_SAME, began_ns)
    return 0


cdef void store_expect(Core *core, uint64_t page) noexcept nogil:
    """The page will be read in a moment: have the start of its blob come to the cache."""
    cdef Entry e
    cdef const uint8_t *at
    cdef uint32_t i
    if page >= core.index.pages:
        return
    e = core.index.entries[page]        # may be torn: only a hint
    if in_ram(state_of(e.version)) and place_is_possible(core, e.location):
        at = core.arena.base + where_of(e.location)
        for i in range(EXPECT_LINES):
            zc_prefetch(at + i * 64)


# ---- invalidate, victims ----------------------------------------------------------------

cdef void store_invalidate(Core *core, Slot *slot, uint64_t page, uint64_t version) noexcept nogil:
    """Forget one page: it reads as zeros from now on."""
    cdef Entry old, new
    new.location = 0
    new.version = version_word(version, ST_EMPTY, 0)
    while True:
        old = entry_load(&core.index, page)
        if state_of(old.version) == ST_EMPTY and entry_is_sound(old.location, old.version):
            return
        if version_of(old.version) > version and entry_is_sound(old.location, old.version):
            version = versions_take(&core.index, 1)
            new.version = version_word(version, ST_EMPTY, 0)
        if entry_flip(&core.index, page, old, new):
            break
        count(slot, C_FLIP_RETRIES, 1)
    dispose(core, slot, page, old)
    count(slot, C_INVALIDATES, 1)


cdef bint was_read(Core *core, uint32_t frame) noexcept nogil:
    """Whether anything in a frame, or in a zspage that starts there, was read; forgets it."""
    cdef bint read = core.arena.frames[frame].referenced != 0
    cdef uint32_t i
    if read:
        core.arena.frames[frame].referenced = 0
    if core.arena.frames[frame].state == FRAME_ZSMALLOC:
        for i in range(FRAMES_TOGETHER):
            frame = frame_next(&core.arena, frame)      # no lock: at worst of a zspage that is gone
            if frame == NO_FRAME:
                break
            if core.arena.frames[frame].referenced:
                core.arena.frames[frame].referenced = 0
                read = True
    return read


cdef uint32_t store_victims(Core *core, uint32_t *frames, uint32_t most, bint ephemeral) noexcept nogil:
    """Up to `most` cold frames, by second chance; how many.  Two rounds at most, none twice.

    `ephemeral`: frames in which every object may be dropped; else all others.  Each
    kind has a hand of its own.  Called by one thread at a time.
    """
    cdef uint32_t n = 0
    cdef uint32_t met = 0       # the second round meets those of the first, in their order
    cdef uint64_t steps
    cdef uint32_t at = core.clock_hand[ephemeral]
    cdef Frame *f
    for steps in range(2 * <uint64_t>core.arena.total):
        if n == most:
            break
        f = &core.arena.frames[at]
        if steps >= core.arena.total and met < n and frames[met] == at:
            met += 1
        elif FRAME_TAKEN <= f.state < FRAME_TAIL and (f.ephemeral_only != 0) == ephemeral:
            if not was_read(core, at):
                frames[n] = at
                n += 1
        at += 1
        if at == core.arena.total:
            at = 0
    core.clock_hand[ephemeral] = at
    return n


cdef void store_wait_ready(Core *core) noexcept nogil:
    """Writers wait until the takeover has told the allocator what is taken; readers need not.

    Called outside of a slot: there must be slots left for readers.
    """
    cdef timespec nap
    nap.tv_sec = 0
    nap.tv_nsec = 200000
    while not zc_load32(&core.ready):
        nanosleep(&nap, NULL)
