"""The node's end of the ring: what is asked taken out, answers put in.

    RingSide.attach -> [woken by wake_fd] -> gets, batch, drops -> answer_get, answer_batch, moved

Called by one thread, the node's event loop; nothing here waits.  A node that attaches takes
everything over that the last one left unanswered: gets are asked anew, a batch under way
is answered as failed.

A page is (page, version, where, length_codec); `where` as peers.pyx has it.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.fcntl cimport O_RDWR, open
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from zcache_core.cold cimport COLD_BATCH
from zcache_core.crypt cimport SEAL_BYTES
from zcache_core.layout cimport (
    COPIES_MOST, DONOR_BITS, DONOR_ID_BYTES, DONORS, ST_PEER, ST_RAM_EPHEMERAL, Entry, donor_at, entry_is_sound,
    is_backed as where_is_backed, length_of, lower_state, state_of, version_of, where_of,
)
from zcache_core.memfile cimport MemoryFile
from zcache_core.native cimport zc_acquire_fence, zc_cas32, zc_load32, zc_load64, zc_release_fence, zc_store32, zc_store64
from zcache_core.pthread cimport now_us
from zcache_core.ring cimport (
    DROPS, NOTE_DONOR, NOTE_GONE, NOTE_MOVED, NOTES, PUT_ROOM, RING_ANSWERED, RING_ASKED, RING_CELLS, RING_FILLING, RING_MAGIC,
    RING_STATE, RING_TAKEN, RING_VERSION, ROW_GONE, ROW_LIVE, ROW_SUSPECT, ROW_UNKNOWN, SEALED_MOST, Drop, GetCell, Note, PutRow, Ring, cell_answer, cell_begin, cell_end, zc_is_locked, zc_lock_it,
    zc_futex_wake,
)

import os
from typing import NamedTuple

from zcache_core.errors import MemoryFileError

cdef enum:
    RECORD_BYTES = 16
    PAGES_AT_ONCE = 128         # peerwire.BATCH_PAGES

AT_ONCE = PAGES_AT_ONCE
ROWS = DONORS
COPIES = COPIES_MOST


class Wanted(NamedTuple):
    """A page that is asked for; `turn` and `cell` go back with the answer."""

    cell: int
    turn: int
    page: int
    version: int
    where: int
    length_codec: int
    wrong: int


class Batch(NamedTuple):
    """Pages to be put, with so many copies: (records, payload) of up to AT_ONCE pages each.

    records: version u64, page u32, length_codec u16, 0 u16 of each page, little-endian; payload:
    the sealed bytes of all, behind one another.  0 copies: as many as there are to be without a
    disk beside.
    """

    turn: int
    pages: list[tuple[bytes, bytes]]
    copies: int = 0


def where_of_rows(rows):
    """The address of a page whose copies are with the donors of these rows (1 to COPIES)."""
    cdef uint64_t where = <uint64_t>1 << 47
    cdef uint32_t i
    if not 0 < len(rows) <= COPIES_MOST or len(set(rows)) != len(rows):
        raise ValueError(f"copies are with 1 to {COPIES_MOST} different donors")
    for i, row in enumerate(rows):
        if not 0 <= row < DONORS:
            raise ValueError(f"there is no row {row}")
        where |= (<uint64_t>row + 1) << (DONOR_BITS * i)
    return where


def rows_of_where(uint64_t where):
    """The donors' rows in an address, in its order."""
    cdef uint32_t i
    return tuple([donor_at(where, i) - 1 for i in range(COPIES_MOST) if donor_at(where, i)])


def is_backed(uint64_t where):
    """Whether the page has a copy on the disk beside that of its one donor."""
    return bool(where_is_backed(where))


cdef inline void write_record(uint8_t *to, uint64_t version, uint32_t page, uint32_t length_codec) noexcept nogil:
    """A page as donors are told of it (peerwire)."""
    cdef uint16_t length = <uint16_t>length_codec
    memcpy(to, &version, 8)
    memcpy(to + 8, &page, 4)
    memcpy(to + 12, &length, 2)
    to[14] = to[15] = 0         # pages are numbered through all devices


cdef inline uint32_t donor_in(uint64_t where, uint32_t copy) noexcept nogil:
    """As donor_at; 0 too when there is no such row."""
    cdef uint32_t donor = donor_at(where, copy)
    return donor if donor <= DONORS else 0


cdef class RingSide:
    """The ring of the descriptors `fd` and `wake_fd`, which the server gave us.

    Raises MemoryFileError when it is none, or when another living node has it.
    """

    def __cinit__(self, int fd, int wake_fd):
        cdef bytes path = f"/proc/self/fd/{fd}".encode()
        self.ring = NULL
        self.wake_fd = wake_fd
        # A description of our own: the lock goes with us, not with who inherits the descriptor.
        self.lock_fd = open(path, O_RDWR | os.O_CLOEXEC)
        if self.lock_fd < 0 or os.fstat(self.lock_fd).st_size != sizeof(Ring):
            raise MemoryFileError(f"descriptor {fd} is no ring of this version; restart the server")
        if not zc_lock_it(self.lock_fd):
            raise MemoryFileError("another node process has the ring; wait for its end")
        self.ring = <Ring *>mmap(NULL, sizeof(Ring), PROT_READ | PROT_WRITE, MAP_SHARED, self.lock_fd, 0)
        if <void *>self.ring == MAP_FAILED:
            self.ring = NULL
            raise MemoryFileError("no memory for the ring; restart the server")
        if self.ring.head.magic != RING_MAGIC or self.ring.head.ring_version != RING_VERSION:
            raise MemoryFileError(f"descriptor {fd} is no ring of this version; restart the server")
        self._take_over()

    cdef object _take_over(self):
        """What a predecessor had taken is to be done."""
        cdef uint32_t i, word
        self.ring.head.ready = 0
        self.ring.head.room_bytes = 0
        self.ring.head.room_one_bytes = 0
        self.ring.head.attached += 1
        for i in range(DONORS):     # whom it knew to live, we have not met yet
            zc_cas32(&self.ring.head.row_state[i], ROW_LIVE, ROW_UNKNOWN)
            zc_cas32(&self.ring.head.row_state[i], ROW_SUSPECT, ROW_UNKNOWN)
        for i in range(RING_CELLS):
            word = zc_load32(&self.ring.cell[i].word)
            if word & RING_STATE == RING_TAKEN or word & RING_STATE == RING_FILLING:
                zc_cas32(&self.ring.cell[i].word, word, (word & ~<uint32_t>RING_STATE) + RING_ASKED)
            elif word & RING_STATE == RING_ANSWERED:    # it may have been killed before it woke the asker
                zc_futex_wake(&self.ring.cell[i].word)
        word = zc_load32(&self.ring.head.put_word)
        if word & RING_STATE == RING_TAKEN:
            for i in range(COLD_BATCH):     # it may have been killed while it wrote these
                self.ring.row[i].error = EIO
            zc_release_fence()
            zc_cas32(&self.ring.head.put_word, word, word - RING_TAKEN + RING_ANSWERED)
            zc_futex_wake(&self.ring.head.put_word)
        self.beat()

    def close(self):
        """Let go of the ring: the server sees it at once."""
        if self.ring != NULL:
            munmap(self.ring, sizeof(Ring))
            self.ring = NULL
        if self.lock_fd >= 0:
            close(self.lock_fd)
            self.lock_fd = -1

    def __dealloc__(self):
        self.close()

    # ---- what is asked -----------------------------------------------------------------

    def gets(self):
        """The pages that are asked for since the last call, as a list of Wanted."""
        cdef uint32_t i, word
        cdef GetCell *cell
        found = []
        for i in range(RING_CELLS):
            cell = &self.ring.cell[i]
            word = zc_load32(&cell.word)
            if word & RING_STATE != RING_ASKED:
                continue
            zc_acquire_fence()
            wanted = Wanted(i, word >> 4, cell.page, cell.version, cell.where, cell.length_codec, cell.wrong)
            if zc_cas32(&cell.word, word, word - RING_ASKED + RING_TAKEN):
                found.append(wanted)
        return found

    def answer_get(self, wanted, int error, bytes sealed=b"", uint32_t copy=0):
        """Answer one; False when nobody waits for it any more."""
        cdef const uint8_t *data = sealed
        cdef uint32_t length = len(sealed)
        assert length <= SEALED_MOST
        return bool(cell_answer(&self.ring.cell[wanted.cell], wanted.turn, error, data, length, copy))

    def begin_get(self, wanted):
        """For tests: as answer_get, which gets no further than to take the cell."""
        return bool(cell_begin(&self.ring.cell[wanted.cell], wanted.turn))

    def end_get(self, wanted, int error, bytes sealed=b"", wake=True):
        """For tests: the rest of it."""
        cdef GetCell *cell = &self.ring.cell[wanted.cell]
        cdef const uint8_t *data = sealed
        if wake:
            return bool(cell_end(cell, wanted.turn, error, data, len(sealed), 0))
        cell.error = error
        zc_release_fence()
        return bool(zc_cas32(&cell.word, (wanted.turn << 4) + RING_FILLING, (wanted.turn << 4) + RING_ANSWERED))

    def batch(self):
        """The batch that is to be put, or None."""
        cdef uint32_t word = zc_load32(&self.ring.head.put_word)
        cdef uint32_t first, rows, copies
        if word & RING_STATE != RING_ASKED:
            return None
        zc_acquire_fence()
        pages = []
        copies = self.ring.head.put_copies
        rows = min(self.ring.head.put_rows, <uint32_t>COLD_BATCH)
        for first in range(0, rows, PAGES_AT_ONCE):
            part = self._put_part(first, min(rows - first, <uint32_t>PAGES_AT_ONCE))
            if part is None:
                break
            pages.append(part)
        if not zc_cas32(&self.ring.head.put_word, word, word - RING_ASKED + RING_TAKEN):
            return None
        return Batch(word >> 4, pages, copies)

    cdef object _put_part(self, uint32_t first, uint32_t n):
        """(records, payload) of n rows; None where a row is none."""
        cdef uint64_t total = 0
        cdef uint32_t lengths[PAGES_AT_ONCE]
        cdef PutRow rows[PAGES_AT_ONCE]         # looked at once: another process may write there
        cdef uint32_t i
        cdef uint8_t *record
        cdef uint8_t *at
        memcpy(rows, &self.ring.row[first], n * sizeof(PutRow))
        for i in range(n):
            lengths[i] = length_of(rows[i].length_codec) + SEAL_BYTES
            if rows[i].offset + <uint64_t>lengths[i] > PUT_ROOM:
                return None
            total += lengths[i]
        records = PyBytes_FromStringAndSize(NULL, n * RECORD_BYTES)
        payload = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
        record, at = <uint8_t *>PyBytes_AS_STRING(records), <uint8_t *>PyBytes_AS_STRING(payload)
        for i in range(n):
            write_record(record + i * RECORD_BYTES, rows[i].version, rows[i].page, rows[i].length_codec)
            memcpy(at, self.ring.put_bytes + rows[i].offset, lengths[i])
            at += lengths[i]
        return records, payload

    def answer_batch(self, turn, answers):
        """(rows, errno) of each page; False when nobody waits any more: then nothing was put."""
        cdef uint32_t word = (<uint32_t>turn << 4) + RING_TAKEN
        cdef uint64_t where = 0
        cdef int error = 0
        cdef uint32_t i = 0
        if zc_load32(&self.ring.head.put_word) != word:
            return False
        last = None
        for answer in answers:
            assert i < COLD_BATCH
            if answer is not last:      # nearly always it is, for a hundred pages
                rows, error = answer
                last, where = answer, where_of_rows(rows) if error == 0 else 0
            self.ring.row[i].where = where
            self.ring.row[i].error = error
            i += 1
        zc_release_fence()
        if not zc_cas32(&self.ring.head.put_word, word, word - RING_TAKEN + RING_ANSWERED):
            return False
        zc_futex_wake(&self.ring.head.put_word)
        return True

    def drops(self, uint32_t most):
        """Up to `most` pages' copies not needed any more: (row, records as in Batch) by donor; None without any."""
        cdef uint64_t begin = self.ring.head.drops_begin
        cdef uint64_t at, end = zc_load64(&self.ring.head.drops_end)
        cdef uint32_t n[DONORS + 1]
        cdef uint8_t *to[DONORS + 1]
        cdef uint32_t i, donor
        cdef Drop *drop
        if begin == end:
            return None
        zc_acquire_fence()
        end = min(end, begin + most)
        memset(n, 0, sizeof(n))
        memset(to, 0, sizeof(to))
        found = []
        for at in range(begin, end):
            for i in range(COPIES_MOST):
                n[donor_in(self.ring.drop[at % DROPS].where, i)] += 1
        for donor in range(1, DONORS + 1):
            if n[donor]:
                records = bytearray(n[donor] * RECORD_BYTES)
                to[donor] = <uint8_t *>PyByteArray_AS_STRING(records)
                found.append((donor - 1, records))
        for at in range(begin, end):
            drop = &self.ring.drop[at % DROPS]
            for i in range(COPIES_MOST):
                donor = donor_in(drop.where, i)
                if donor and n[donor]:      # (who changes it meanwhile gets no further than that)
                    n[donor] -= 1
                    write_record(to[donor], drop.version, drop.page, drop.length_codec)
                    to[donor] += RECORD_BYTES
        zc_store64(&self.ring.head.drops_begin, end)
        return [(row, bytes(records)) for row, records in found]

    @property
    def drops_waiting(self):
        """How many wait in the ring."""
        return zc_load64(&self.ring.head.drops_end) - self.ring.head.drops_begin

    @property
    def drops_missed(self):
        """How many drops found no room in the ring so far."""
        return self.ring.head.drops_missed

    # ---- what we tell ------------------------------------------------------------------

    cdef Note *_note(self):
        """Room for a note; NULL: the server has not heard the last ones yet."""
        if self.ring.head.notes_end - zc_load64(&self.ring.head.notes_begin) >= NOTES:
            return NULL
        cdef Note *note = &self.ring.note[self.ring.head.notes_end % NOTES]
        memset(note, 0, sizeof(Note))
        return note

    cdef object _send(self):
        zc_store64(&self.ring.head.notes_end, self.ring.head.notes_end + 1)

    def moved(self, uint32_t page, uint64_t version, uint32_t length_codec, uint64_t old, uint64_t new):
        """The page's copies are at `new`, not `old`, from now on.  False: no room, tell it later."""
        cdef Note *note = self._note()
        if note == NULL:
            return False
        note.kind, note.page, note.version, note.length_codec = NOTE_MOVED, page, version, length_codec
        note.old, note.new = old, new
        self._send()
        return True

    def gone(self, uint32_t page, uint64_t version, uint32_t length_codec, uint64_t old):
        """Of a page in RAM or on the disk too: no copy at the donors of `old` counts any more.  False: no room."""
        cdef Note *note = self._note()
        if note == NULL:
            return False
        note.kind, note.page, note.version, note.length_codec, note.old = NOTE_GONE, page, version, length_codec, old
        self._send()
        return True

    def donor(self, uint32_t row, bytes name not None, uint64_t epoch):
        """Row `row` of the donor table should be this donor.  It is when `donors` says so."""
        cdef Note *note = self._note()
        assert len(name) == DONOR_ID_BYTES and row < DONORS
        if note == NULL:
            return False
        note.kind, note.page, note.new = NOTE_DONOR, row, epoch
        memcpy(note.id, <const char *>name, DONOR_ID_BYTES)
        self._send()
        return True

    def heard(self):
        """Whether the server has heard all notes."""
        return self.ring.head.notes_end == zc_load64(&self.ring.head.notes_begin)

    @property
    def ticks(self):
        """Grows when all that was answered and told before its last value is in the index."""
        return zc_load64(&self.ring.head.ticks)

    def beat(self):
        """We are not stuck."""
        zc_store64(<uint64_t *>&self.ring.head.beat_us, <uint64_t>now_us())

    def publish(
        self, bint ready, uint64_t room_bytes, uint64_t live_peers, uint64_t short_pages, uint64_t wrong_copies,
        uint64_t hedged_gets, uint64_t room_one_bytes=0,
    ):
        """How it is: what decides whether pages come to us, and what the counters say."""
        self.ring.head.room_bytes = room_bytes
        self.ring.head.room_one_bytes = room_one_bytes
        self.ring.head.live_peers = live_peers
        self.ring.head.short_pages = short_pages
        self.ring.head.wrong_copies = wrong_copies
        self.ring.head.hedged_gets = hedged_gets
        zc_store32(&self.ring.head.ready, ready)

    def tell_row(self, uint32_t row, live):
        """Whether the donor of that row answers, with the pages that we count on; None: that is in doubt."""
        assert row < DONORS
        zc_store32(&self.ring.head.row_state[row], ROW_SUSPECT if live is None else ROW_LIVE if live else ROW_GONE)

    @property
    def disk_fails(self):
        """Whether the copies on the disk beside are not to be trusted now."""
        return zc_load32(&self.ring.head.disk_fails) != 0

    @property
    def is_over(self):
        """Whether the memory file goes with the server: its pages are nobody's then."""
        return zc_load32(&self.ring.head.over) != 0

    @property
    def backed(self):
        """How many pages have a copy at one donor and one on the disk."""
        return zc_load64(&self.ring.head.backed)

    @property
    def alone(self):
        """How many pages have one copy only."""
        return zc_load64(&self.ring.head.alone)

    def copies(self):
        """How many copies the index counts on, by the donors' rows."""
        cdef uint32_t i
        return [zc_load64(&self.ring.head.copies[i]) for i in range(DONORS)]


def donors(MemoryFile memory not None):
    """{row: (id, epoch)} of the donor table."""
    cdef uint32_t i
    found = {}
    for i in range(DONORS):
        name = (<char *>memory.super.donors[i].id)[:DONOR_ID_BYTES]
        if name.strip(b"\0"):
            found[i] = (name, memory.super.donors[i].epoch)
    return found


cdef bint copy_of(MemoryFile memory, uint64_t page, uint64_t *version, uint64_t *where, uint32_t *length_codec) noexcept nogil:
    """Whether the page has copies on peers, and which."""
    cdef Entry e = memory.index[page]
    if not entry_is_sound(e.location, e.version):
        return False            # torn, most likely: looked at again the next time
    version[0] = version_of(e.version)
    length_codec[0] = e.location & 0xFFFF
    where[0] = where_of(e.location)
    if state_of(e.version) == ST_PEER:
        return True
    if state_of(e.version) != ST_RAM_EPHEMERAL:
        return False
    return memory.lower_of(page, e, where) and lower_state(where[0]) == ST_PEER


def pages_on_peers(MemoryFile memory not None, uint64_t first, uint64_t n, uint32_t most):
    """(pages, where to go on): copies that the index counts on among pages first .. first + n - 1.

    At most `most` of them, (page, version, where, length_codec) each.  To be called again from
    where it says, until that is first + n or the device's end.
    """
    cdef uint64_t page = first
    cdef uint64_t end = min(first + n, memory.super.device_pages)
    cdef uint64_t version = 0
    cdef uint64_t where = 0
    cdef uint32_t length_codec = 0
    found = []
    while page < end and len(found) < most:
        if copy_of(memory, page, &version, &where, &length_codec):
            found.append((page, version, where, length_codec))
        page += 1
    return found, page


def is_in_ram_too(MemoryFile memory not None, uint64_t page, uint64_t wanted):
    """Whether that version of a page is below, and has its RAM copy still."""
    if page >= memory.super.device_pages:
        return False
    cdef Entry e = memory.index[page]
    return version_of(e.version) == wanted and state_of(e.version) == ST_RAM_EPHEMERAL


def is_counted_on(MemoryFile memory not None, uint64_t page, uint64_t wanted, uint32_t row):
    """Whether the index counts on version `wanted` of a page at the donor of `row`, or may do.

    An entry or header that is just changing, or damaged, may.
    """
    cdef uint64_t version = 0
    cdef uint64_t where = 0
    cdef uint32_t length_codec = 0
    cdef uint32_t i
    cdef Entry e
    if page >= memory.super.device_pages:
        return False
    e = memory.index[page]
    if not entry_is_sound(e.location, e.version):
        return True
    if version_of(e.version) != wanted or state_of(e.version) not in (ST_PEER, ST_RAM_EPHEMERAL):
        return False
    if not copy_of(memory, page, &version, &where, &length_codec):
        return state_of(e.version) == ST_RAM_EPHEMERAL and lower_state(where) == ST_PEER
    if version != wanted:
        return True
    for i in range(COPIES_MOST):
        if donor_at(where, i) == row + 1:
            return True
    return False
