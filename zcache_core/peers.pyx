"""The peer tier: pages in the RAM of other machines, through the node process.

    put   seal -> the ring -> the node sends copies to donors -> every one acknowledged -> where
    get   the ring -> the node asks a donor -> open the seal, or have the next copy asked for
    drop  the ring -> the node tells the donors, in time

A `where` is the numbers of the donors that hold a copy, up to three:

    47  46 45  44 .......... 30  29 .......... 15  14 ........... 0
    1   0      third copy        second copy       first copy         row + 1 in the donor table

With backup=disk a page has one donor and a copy on the disk, both in its address (peerwhere.pyx,
backup.pyx); here only the donor's counts.

The table, in the memory file, says who a number is, so a restarted server or node finds all
again.  When copies move to another donor, the node says so and each entry is told (peernotes.pyx).

A page is sealed before it enters the ring and opened after it came back: epoch of the memory file,
device, page, version and length are bound to it, so neither a donor nor the node can
change, exchange or replay one unnoticed.  A wrong copy is counted and the next one asked.

Bounds: a put waits PUT_BOUND_US, a get GET_BOUND_US (long enough for a node process to be
started again), a drop for nothing: what finds no room in its ring is counted and found
by the node when it compares (reconciles).  Memory: sizeof(Ring), 3 MiB.
"""

from libc.errno cimport EILSEQ, EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close, ftruncate

from zcache_core.cold cimport HOLDS, HOLDS_MAYBE, HOLDS_NOT, ColdPage, ColdTier
from zcache_core.counter_ids cimport (
    C_HEDGED_REMOTE_GETS, C_LIVE_PEERS, C_MISSED_REMOTE_FLUSHES, C_REMOTE_CORRUPT_PAGES, C_REMOTE_FAILED_PUTS,
    C_REMOTE_PAGE_FLUSHES,
    C_REMOTE_PERS_PAGES_SUCC_GET, C_REMOTE_PERS_PAGES_SUCC_PUT, C_REMOTE_PERS_PAGES_UNSUCC_GET,
    C_REMOTE_ROOM_BYTES, C_REMOTE_SHORT_PAGES, H_REMOTE_GET, H_REMOTE_PUT,
)
from zcache_core.crypt cimport FOR_PEER, SEAL_BYTES, Associated, crypt_open, crypt_seal
from zcache_core.layout cimport COPIES_MOST, DONORS, ST_PEER, Superblock, donor_at, length_of, lower_state
from zcache_core.native cimport (
    zc_acquire_fence, zc_add64, zc_cas32, zc_load32, zc_load64, zc_release_fence, zc_store32, zc_store64,
)
from zcache_core.peernotes cimport count_page, hear_notes, tell_dropped
from zcache_core.peerwhere cimport where_is_possible
from zcache_core.pthread cimport lock_init, now_us, sched_yield
from zcache_core.ring cimport (
    PUT_ROOM, RING_ANSWERED, RING_ASKED, RING_CELLS, RING_FILLING, RING_MAGIC, RING_STATE, RING_VERSION,
    ROW_GONE, ROW_LIVE, ROW_SUSPECT, ROW_UNKNOWN, GetCell, PutRow, Ring,
    RingHead, zc_futex_wait, zc_is_locked, zc_kick, zc_memory_fd,
)
from zcache_core.slots cimport observe_shared

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE
cdef extern from "<sys/eventfd.h>" nogil:
    enum: EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int initial, int flags)
cdef extern from "<errno.h>":
    enum: EHOSTUNREACH, ENODATA

cdef enum:
    # A node process that died is started after 0.1 s, and answers within a second or two
    GET_BOUND_US = 8000000
    PUT_BOUND_US = 4000000
    FILL_US = 20000             # who fills a cell copies a page; it may have to wait for a CPU
    CELL_FREE = 0
    CELL_BUSY = 1
    CELL_LEFT = 2               # its asker has gone, an answer was still being written
    STEP_US = 10000             # how soon a put notices that the node died
    # Nobody says of a donor whether it lives (a node or server has just begun): it is believed to,
    # for as long as a get waits for that
    TRUST_US = GET_BOUND_US
    BEAT_LATE_US = 1000000      # a node that did not show itself for so long takes nothing new
    CIPHER_AT = 7               # of a seal: the highest byte of its counter, which none reaches


cdef Associated about(Peers *p, const ColdPage *page) noexcept nogil:
    cdef Associated bound
    memset(&bound, 0, sizeof(bound))
    bound.epoch = p.super.epoch
    bound.version = page.version
    bound.page = page.page
    bound.length_codec = page.length_codec & 0xFFFF
    bound.device = <uint8_t>p.device
    bound.purpose = FOR_PEER
    return bound


# ---- reading -----------------------------------------------------------------------------------

cdef GetCell *cell_take(Peers *p) noexcept nogil:
    """A cell of ours; NULL when all are taken."""
    cdef uint32_t i
    for i in range(RING_CELLS):
        if zc_load32(&p.busy[i]) == CELL_LEFT and zc_cas32(&p.busy[i], CELL_LEFT, CELL_BUSY):
            cell_release(p, &p.ring.cell[i])
        if zc_load32(&p.busy[i]) == CELL_FREE and zc_cas32(&p.busy[i], CELL_FREE, CELL_BUSY):
            return &p.ring.cell[i]
    return NULL


cdef void cell_release(Peers *p, GetCell *cell) noexcept nogil:
    """Free, unless somebody still writes to it: an old answer must not be the next asker's."""
    cdef uint32_t *busy = &p.busy[cell - &p.ring.cell[0]]
    cdef uint32_t seen = zc_load32(&cell.word)
    if seen & RING_STATE != RING_FILLING and zc_cas32(
        &cell.word, seen, (seen & ~<uint32_t>RING_STATE) + RING_STATE + 1
    ):
        zc_store32(busy, CELL_FREE)
    else:
        zc_store32(busy, CELL_LEFT)


cdef void ask(GetCell *cell, const ColdPage *page, uint32_t wrong) noexcept nogil:
    """It is asked for; the node looks when it is kicked."""
    cell.page = page.page
    cell.version = page.version
    cell.where = page.where
    cell.wrong = wrong
    cell.length_codec = page.length_codec & 0xFFFF
    zc_release_fence()
    zc_store32(&cell.word, (zc_load32(&cell.word) & ~<uint32_t>RING_STATE) + RING_STATE + 1 + RING_ASKED)


cdef bint answered(uint32_t *word, int64_t until_us) noexcept nogil:
    """Wait for the answer; False when it is too late: none can come any more, or is being written."""
    cdef uint32_t seen
    cdef int64_t left_us
    while True:
        seen = zc_load32(word)
        if seen & RING_STATE == RING_ANSWERED:
            zc_acquire_fence()
            return True
        left_us = until_us - now_us()
        if seen & RING_STATE == RING_FILLING:
            left_us += FILL_US
        if left_us > 0:
            zc_futex_wait(word, seen, left_us)
        elif seen & RING_STATE == RING_FILLING:
            return False
        elif zc_cas32(word, seen, (seen & ~<uint32_t>RING_STATE) + RING_STATE + 1):
            return False


cdef inline bint open_sealed(
    Peers *p, const Associated *bound, uint8_t *sealed, uint32_t length, uint8_t *blob
) noexcept nogil:
    """Open what came back, with the cipher that sealed it, whichever seals now."""
    cdef uint32_t cipher = sealed[CIPHER_AT]
    sealed[CIPHER_AT] = 0
    return crypt_open(p.crypt, cipher, bound, sealed, length, blob)


cdef int finish_get(Peers *p, GetCell *cell, ColdPage *page, int64_t began_us, int64_t until_us) noexcept nogil:
    """The blob of the page that was asked for at `began_us`, from whichever copy is right."""
    cdef Associated bound = about(p, page)
    cdef uint32_t length = length_of(page.length_codec)
    cdef uint32_t wrong = 0
    cdef uint32_t copies = 0
    cdef int error
    while donor_at(page.where, copies) and copies < COPIES_MOST:
        copies += 1
    while True:
        if not answered(&cell.word, until_us):
            error = EIO
            break
        error = cell.error
        if error:
            error = EILSEQ if wrong + 1 >= <uint32_t>(1 << copies) else ENODATA if error == ENODATA and wrong == 0 else EIO
            break
        if cell.length_bytes == length + SEAL_BYTES and open_sealed(p, &bound, cell.sealed, length, page.blob):
            break
        zc_add64(&p.cells[C_REMOTE_CORRUPT_PAGES], 1)
        error = EILSEQ
        wrong |= 1 << (cell.copy % COPIES_MOST)
        ask(cell, page, wrong)          # (of the last one too: the node must hear who lies)
        zc_kick(p.wake_fd)
    zc_add64(&p.cells[C_REMOTE_PERS_PAGES_UNSUCC_GET if error else C_REMOTE_PERS_PAGES_SUCC_GET], 1)
    observe_shared(p.cells, H_REMOTE_GET, <uint64_t>(now_us() - began_us))
    cell_release(p, cell)
    return error


cdef int peers_get(ColdTier *tier, ColdPage *page, uint8_t *io) noexcept nogil:
    return peers_get_within(<Peers *>tier, page, (<Peers *>tier).get_bound_us)


cdef int peers_get_within(Peers *p, ColdPage *page, int64_t most_us) noexcept nogil:
    cdef int64_t began_us = now_us()
    cdef int64_t until_us = began_us + min(most_us, p.get_bound_us)
    cdef GetCell *cell
    if not where_is_possible(p.super, page.where):
        return EILSEQ
    cell = cell_take(p)
    while cell == NULL and now_us() < until_us:
        sched_yield()
        cell = cell_take(p)
    if cell == NULL:
        return EIO
    ask(cell, page, 0)
    zc_kick(p.wake_fd)
    return finish_get(p, cell, page, began_us, until_us)


cdef void peers_get_many(ColdTier *tier, ColdPage *pages, uint32_t n, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    """All are asked for before the first is waited for; those without a cell come after them."""
    cdef Peers *p = <Peers *>tier
    cdef int64_t began_us
    cdef GetCell *cell[RING_CELLS]
    cdef uint32_t first = 0
    cdef uint32_t end, i
    while first < n:
        began_us = now_us()
        end = min(n, first + <uint32_t>RING_CELLS // 3)
        for i in range(first, end):
            cell[i - first] = cell_take(p) if where_is_possible(p.super, pages[i].where) else NULL
            if cell[i - first] != NULL:
                ask(cell[i - first], &pages[i], 0)
        zc_kick(p.wake_fd)
        for i in range(first, end):
            if cell[i - first] != NULL:
                pages[i].error = finish_get(p, cell[i - first], &pages[i], began_us, began_us + p.get_bound_us)
            else:
                pages[i].error = peers_get(tier, &pages[i], room)
        first = end


# ---- putting -----------------------------------------------------------------------------------

cdef bint node_lives(Peers *p) noexcept nogil:
    return zc_is_locked(p.fd)


cdef bint peers_takes(ColdTier *tier) noexcept nogil:
    """Whether a node is there, is not stuck, and has enough donors."""
    cdef Peers *p = <Peers *>tier
    cdef RingHead *head = &p.ring.head
    cdef bint ready = zc_load64(&head.room_one_bytes) != 0 if p.copies == 1 else zc_load32(&head.ready) != 0
    return (
        ready and now_us() - <int64_t>zc_load64(<uint64_t *>&head.beat_us) < BEAT_LATE_US
        and node_lives(p)
    )


cdef uint32_t fill(Peers *p, const ColdPage *pages, uint32_t n) noexcept nogil:
    """Seal pages into the put area, as many as fit; how many."""
    cdef Associated bound
    cdef PutRow *row
    cdef uint32_t i, length
    cdef uint32_t at = 0
    for i in range(n):
        length = length_of(pages[i].length_codec)
        if at + length + SEAL_BYTES > PUT_ROOM:
            return i
        row = &p.ring.row[i]
        bound = about(p, &pages[i])
        if not crypt_seal(p.crypt, &bound, pages[i].blob, length, p.ring.put_bytes + at):
            return i
        p.ring.put_bytes[at + CIPHER_AT] = <uint8_t>p.crypt.cipher
        row.version = pages[i].version
        row.page = pages[i].page
        row.where = 0
        row.offset = at
        row.length_codec = pages[i].length_codec & 0xFFFF
        row.error = EIO
        at += length + SEAL_BYTES
    return n


cdef bint put_answered(Peers *p) noexcept nogil:
    """Wait for the node's answer; False when it is dead or too late.  Its notes are heard meanwhile."""
    cdef RingHead *head = &p.ring.head
    cdef int64_t until_us = now_us() + p.put_bound_us
    cdef int64_t step_us
    cdef uint32_t seen
    while True:
        step_us = now_us() + STEP_US
        seen = zc_load32(&head.put_word)
        if seen & RING_STATE == RING_ANSWERED:
            zc_acquire_fence()
            return True
        if (step_us > until_us or not node_lives(p)) and zc_cas32(
            &head.put_word, seen, (seen & ~<uint32_t>RING_STATE) + RING_STATE + 1
        ):
            return False
        zc_futex_wait(&head.put_word, seen, STEP_US)
        hear_notes(p)


cdef uint32_t put_piece(Peers *p, ColdPage *pages, uint32_t n) noexcept nogil:
    """One answer for the first pages; how many were asked for, 0 when nobody answered."""
    cdef RingHead *head = &p.ring.head
    cdef uint32_t filled = fill(p, pages, n)
    cdef uint32_t i
    cdef PutRow *row
    if filled == 0:
        return 0
    head.put_rows = filled
    head.put_copies = p.copies
    zc_release_fence()
    zc_store32(&head.put_word, (zc_load32(&head.put_word) & ~<uint32_t>RING_STATE) + RING_STATE + 1 + RING_ASKED)
    zc_kick(p.wake_fd)
    if not put_answered(p):
        return 0
    for i in range(filled):
        row = &p.ring.row[i]
        pages[i].error = row.error
        pages[i].where = row.where
        if pages[i].error == 0 and not where_is_possible(p.super, pages[i].where):
            pages[i].error = EIO
    zc_store32(&head.put_word, (zc_load32(&head.put_word) & ~<uint32_t>RING_STATE) + RING_STATE + 1)
    return filled


cdef uint32_t peers_put(ColdTier *tier, ColdPage *pages, uint32_t n) noexcept nogil:
    cdef Peers *p = <Peers *>tier
    cdef uint32_t done = 0
    cdef uint32_t good = 0
    cdef uint32_t asked = 1
    cdef uint32_t i
    cdef int64_t began_us = now_us()
    if not peers_takes(tier):
        asked = 0
    while done < n and asked:
        asked = put_piece(p, pages + done, n - done)
        done += asked
    for i in range(done, n):
        pages[i].error = EIO
    for i in range(done):
        if pages[i].error == 0:
            count_page(p, pages[i].where, length_of(pages[i].length_codec), 1)
            good += 1
    if done:
        observe_shared(p.cells, H_REMOTE_PUT, <uint64_t>(now_us() - began_us))
    zc_add64(&p.cells[C_REMOTE_PERS_PAGES_SUCC_PUT], good)
    zc_add64(&p.cells[C_REMOTE_FAILED_PUTS], n - good)
    return good


# ---- dropping ----------------------------------------------------------------------------------

cdef void peers_drop(ColdTier *tier, const ColdPage *page) noexcept nogil:
    cdef Peers *p = <Peers *>tier
    if lower_state(page.where) == ST_PEER:
        count_page(p, page.where, length_of(page.length_codec), -1)
        zc_add64(&p.cells[C_REMOTE_PAGE_FLUSHES], 1)
        tell_dropped(p, page, page.where)


cdef void peers_tick(ColdTier *tier) noexcept nogil:
    cdef Peers *p = <Peers *>tier
    cdef RingHead *head = &p.ring.head
    cdef bint lives = node_lives(p)
    hear_notes(p)
    if lives:
        see_rows(p)
    p.cells[C_LIVE_PEERS] = zc_load64(&head.live_peers) if lives else 0
    p.cells[C_REMOTE_ROOM_BYTES] = 0
    if lives:
        p.cells[C_REMOTE_ROOM_BYTES] = zc_load64(&head.room_one_bytes) if p.backup else zc_load64(&head.room_bytes)
    p.cells[C_REMOTE_SHORT_PAGES] = zc_load64(&head.short_pages)
    p.cells[C_HEDGED_REMOTE_GETS] = zc_load64(&head.hedged_gets)
    p.cells[C_MISSED_REMOTE_FLUSHES] = head.drops_missed
    zc_store64(&head.ticks, head.ticks + 1)


# ---- the rest of the face -------------------------------------------------------------------------

cdef bint peers_adopt(ColdTier *tier, uint64_t where, uint32_t length_bytes) noexcept nogil:
    cdef Peers *p = <Peers *>tier
    if not where_is_possible(p.super, where):
        return False
    count_page(p, where, length_bytes, 1)
    return True


cdef int row_holds(Peers *p, uint32_t row) noexcept nogil:
    """Whether a donor lives and has what it had: as the node says, or said a short while ago."""
    cdef RingHead *head = &p.ring.head
    cdef uint32_t state = zc_load32(&head.row_state[row])
    cdef int64_t now = now_us()
    cdef int64_t silent_us = now - <int64_t>zc_load64(<uint64_t *>&head.beat_us)
    if state == ROW_SUSPECT:
        return HOLDS_MAYBE if silent_us < TRUST_US else HOLDS_NOT
    if state == ROW_LIVE and silent_us < BEAT_LATE_US:
        return HOLDS
    if state != ROW_GONE and now - <int64_t>zc_load64(&p.super.donors[row].seen_us) < TRUST_US:
        return HOLDS
    return HOLDS_NOT


cdef int peers_holds(ColdTier *tier, uint64_t where) noexcept nogil:
    """Whether one donor of it is there: while the others are not, their copies are being renewed.

    Of those under suspicion it is not known: their link ends soon, or they answer.
    """
    cdef Peers *p = <Peers *>tier
    cdef int found = HOLDS_NOT
    cdef int one
    cdef uint32_t i, donor
    for i in range(COPIES_MOST):
        donor = donor_at(where, i)
        if donor and donor <= DONORS:
            one = row_holds(p, donor - 1)
            if one == HOLDS:
                return HOLDS
            if one == HOLDS_MAYBE:
                found = HOLDS_MAYBE
    return found


cdef void see_rows(Peers *p) noexcept nogil:
    """Who lives, noted where the next node, or the next server, finds it."""
    cdef RingHead *head = &p.ring.head
    cdef int64_t now = now_us()
    cdef uint32_t row, state
    if now - <int64_t>zc_load64(<uint64_t *>&head.beat_us) >= BEAT_LATE_US:
        return
    for row in range(DONORS):
        state = zc_load32(&head.row_state[row])
        if state != ROW_UNKNOWN:
            zc_store64(&p.super.donors[row].seen_us, <uint64_t>now if state == ROW_LIVE else 0)


cdef void peers_adopted(ColdTier *tier) noexcept nogil:
    pass


cdef bint peers_has_room(ColdTier *tier, uint64_t bytes) noexcept nogil:
    cdef Peers *p = <Peers *>tier
    return (zc_load64(&p.ring.head.room_one_bytes) if p.copies == 1 else zc_load64(&p.ring.head.room_bytes)) >= bytes


cdef uint32_t peers_resort(ColdTier *tier, ColdPage *pages, uint32_t most, uint8_t *room, uint64_t room_bytes) noexcept nogil:
    return 0                    # donors tidy up by themselves


cdef void peers_resorted(ColdTier *tier) noexcept nogil:
    pass


cdef int peers_reason(ColdTier *tier) noexcept nogil:
    return 0 if peers_takes(tier) else EHOSTUNREACH


# ---- made and discarded -----------------------------------------------------------------------------

cdef void peers_discard(Peers *p) noexcept nogil:
    if p.ring != NULL and <void *>p.ring != MAP_FAILED:
        munmap(p.ring, sizeof(Ring))
    if p.fd >= 0:
        close(p.fd)
    if p.wake_fd >= 0:
        close(p.wake_fd)
    p.ring = NULL
    p.fd = p.wake_fd = -1


cdef bint peers_make(Peers *p, Superblock *super, uint32_t device, uint64_t *cells) noexcept nogil:
    """False: no memory, or no descriptors."""
    p.super, p.device, p.cells = super, device, cells
    p.get_bound_us, p.put_bound_us = GET_BOUND_US, PUT_BOUND_US
    lock_init(&p.lock)
    p.fd = zc_memory_fd()
    p.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if p.fd < 0 or p.wake_fd < 0 or ftruncate(p.fd, sizeof(Ring)):
        return False
    p.ring = <Ring *>mmap(NULL, sizeof(Ring), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, p.fd, 0)
    if <void *>p.ring == MAP_FAILED:
        return False
    p.ring.head.magic, p.ring.head.ring_version = RING_MAGIC, RING_VERSION
    p.face.name = b"peers"
    p.face.put = peers_put
    p.face.get = peers_get
    p.face.get_many = peers_get_many
    p.face.drop = peers_drop
    p.face.adopt = peers_adopt
    p.face.adopted = peers_adopted
    p.face.holds = peers_holds
    p.face.takes = peers_takes
    p.face.has_room = peers_has_room
    p.face.resort = peers_resort
    p.face.resorted = peers_resorted
    p.face.tick = peers_tick
    p.face.reason = peers_reason
    return True


cdef uint64_t peers_memory_bytes() noexcept nogil:
    return sizeof(Ring)
