"""The store of pages that this machine holds for others, as Python sees it.

    memory file -> arena, allocator, committer (the store's own) -> foreign.pyx -> Donation

One object for a node.  Owners are rows: a name, the epoch of the owner's memory file, when it
was heard of last; they stand in the memory file with the pages, so a node that is started
again knows what it holds for whom.  A batch is two byte strings (cluster/peerwire.py),
already checked there; pages are copied without the GIL.

Bound: `donate_bytes` in all: frames, places, headers, tables and counters.
What it is not: policy.  When to recall, whom to abandon: cluster/donor.py.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from zcache_core.arena cimport HELD_UNKNOWN, Frame, arena_init, arena_set_goal, arena_squeeze, arena_tell
from zcache_core.backing cimport back_range
from zcache_core.committer cimport arena_commit_now, arena_free, arena_start
from zcache_core.counter_ids cimport (
    C_FOREIGN_ABANDONED_PAGES, C_FOREIGN_OWNERS, C_FOREIGN_RECALLED_PAGES, C_PRIVATE_TABLE_BYTES,
)
from zcache_core.foreign cimport (
    OWNER_BYTES, OWNER_NAME_BYTES, OWNERS, PLACE_BYTES, SEAL_BYTES, Foreign, OwnerRow, Place, Record, foreign_coldest,
    foreign_drop, foreign_free, foreign_get, foreign_list, foreign_make, foreign_put, foreign_room, foreign_set_epoch,
    foreign_sweep,
)
from zcache_core.foreignfound cimport foreign_check, foreign_take_over
from zcache_core.layout cimport COUNTER_CELLS, COUNTER_SHARDS, HEADER_BYTES, PAGE_BYTES
from zcache_core.memfile cimport MemoryFile
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock
from zcache_core.several cimport several_make, several_tell
from zcache_core.slots cimport SLOTS

from zcache_core.counters import STORED
from zcache_core.errors import MemoryFileError
from zcache_core.memfile import FOREIGN_DEVICE

cdef enum:
    RECORD_BYTES = 16
    PLACES_A_FRAME = 2          # as many as zbud's buds
    PRIVATE_A_FRAME = 40        # the arena's table 16; hash, chain and buds 24 (hash: up to twice that 8)
    FIXED_BYTES = 1 << 20       # superblock, counters, owners, the allocator
    ENTRY_BYTES = 16
    ZBUD = 0                    # of ALLOCATORS: two places a frame know their objects

DEVICE = FOREIGN_DEVICE
LEAST_BYTES = 16 << 20
OWNERS_MOST = OWNERS


def sizes(donate_bytes):
    """(device_bytes, pool_bytes) of a memory file that costs `donate_bytes` with everything."""
    if donate_bytes < LEAST_BYTES:
        raise MemoryFileError(f"lending {donate_bytes} bytes is not worth a connection; lend {LEAST_BYTES} or more")
    a_frame = PAGE_BYTES + HEADER_BYTES + PLACES_A_FRAME * PLACE_BYTES + PRIVATE_A_FRAME
    frames = (donate_bytes - FIXED_BYTES) // a_frame
    entries = (OWNERS * OWNER_BYTES + frames * PLACES_A_FRAME * PLACE_BYTES) // ENTRY_BYTES
    return entries * PAGE_BYTES, frames * PAGE_BYTES


cdef void quiesce(void *argument) noexcept nogil:
    """Nobody looks at a frame without the lock, so who has it knows that nobody does."""
    cdef Foreign *f = <Foreign *>argument
    lock_take(&f.lock)
    pthread_mutex_unlock(&f.lock)


@cython.no_gc_clear         # its thread uses the memory file until it is stopped
cdef class Donation:
    """Foreign pages in one memory file, new or taken over; start() before anything else.

    Raises MemoryFileError when the file is another kind's, or without memory.
    """

    def __cinit__(self, MemoryFile memory not None):
        cdef Foreign *f = &self.f
        cdef uint32_t row
        memset(f, 0, sizeof(Foreign))
        if memory.base == NULL or not memory.writable:
            raise MemoryFileError("a donation needs a memory file that is open for writing")
        if memory.devices()[0][0] != DEVICE:
            raise MemoryFileError(f"the memory file {memory.name} holds a server's own pages; name another")
        self.memory = memory
        f.cells = memory.counters
        for shard in range(COUNTER_SHARDS):
            for cell, counter in enumerate(STORED):
                if counter.kind == "gauge":
                    memory.counters[shard * COUNTER_CELLS + cell] = 0
        f.owners = <OwnerRow *>memory.index
        f.places = <Place *>(<uint8_t *>memory.index + OWNERS * OWNER_BYTES)
        f.total = <uint32_t>((memory.super.device_pages * ENTRY_BYTES - OWNERS * OWNER_BYTES) // PLACE_BYTES)
        if arena_init(
            &f.arena, memory.arena, memory.frame_headers, memory.frame_map, <uint32_t>memory.super.pool_frames,
            memory.counters + (SLOTS + 1) * COUNTER_CELLS,
        ):
            raise MemoryFileError("no memory for the frame table; lend less")
        f.arena.quiesce, f.arena.quiesce_argument = quiesce, f
        f.allocator = several_make(&f.arena, memory.counters + SLOTS * COUNTER_CELLS, ZBUD)
        if f.allocator == NULL or foreign_make(f):
            raise MemoryFileError("no memory for the tables; lend less")
        arena_tell(&f.arena)
        several_tell(f.allocator)
        for row in range(OWNERS):
            f.held[row].quota_bytes = <uint64_t>-1
        f.cells[C_PRIVATE_TABLE_BYTES] = f.arena.total * <uint64_t>sizeof(Frame) + 8 * <uint64_t>f.arena.total + 4 * (
            <uint64_t>f.total + f.mask + 1
        ) + f.allocator.table_bytes
        self.open = True

    def start(self):
        """Find what is there again, and commit what is needed; raises MemoryFileError."""
        cdef Foreign *f = &self.f
        cdef int error
        self._require_open()
        with nogil:
            error = back_range(<uint8_t *>self.memory.base, self.memory.super.frame_headers_offset)
        if error:
            raise MemoryFileError("there is not enough memory for the tables; lend less")
        if self.memory.fresh:
            if arena_commit_now(&f.arena, f.arena.reserve):
                raise MemoryFileError("there is not enough memory for the reserve; lend less")
        else:
            f.arena.held = HELD_UNKNOWN
            with nogil:
                foreign_take_over(f)
        if arena_start(&f.arena):
            raise MemoryFileError("no thread could be started; raise the limit of processes")
        self.memory.fresh = False
        self._count_owners()

    def stop(self):
        """Stop the thread; the pages stay in the memory file."""
        if self.open:
            self.open = False
            with nogil:
                arena_free(&self.f.arena)
            if self.f.allocator != NULL:
                self.f.allocator.discard(self.f.allocator)
            foreign_free(&self.f)

    def __dealloc__(self):
        self.stop()

    cdef object _require_open(self):
        if not self.open:
            raise MemoryFileError("the donation is stopped; make a new one")

    cdef object _require_row(self, uint32_t row):
        self._require_open()
        if row >= OWNERS or self.f.owners[row].epoch == 0:
            raise KeyError(row)

    # ---- owners ------------------------------------------------------------------------

    def owner(self, str name, uint64_t epoch, uint64_t now_s, user=None):
        """The row of an owner, a new one if it has none; None when all rows are taken.

        `user`: whose process it is, on this machine; another user's of that name is another
        owner.  What it had put in another epoch is over.
        """
        cdef Foreign *f = &self.f
        cdef uint32_t row
        cdef int64_t mine = -1
        cdef int64_t spare = -1
        cdef uint64_t whose = 0 if user is None else <uint64_t>user + 1
        self._require_open()
        encoded = name.encode()
        if not epoch or not 0 < len(encoded) <= OWNER_NAME_BYTES:
            raise ValueError("an owner has a name of 1 to 48 bytes and an epoch")
        for row in range(OWNERS):
            if f.owners[row].epoch == 0:
                spare = row if spare < 0 else spare
            elif f.owners[row].user == whose and self._name(row) == name:
                mine = row
        if mine >= 0:
            if f.owners[mine].epoch != epoch:
                self._sweep_all()       # an epoch that comes back would find its old pages again
                foreign_set_epoch(f, <uint32_t>mine, epoch)
        elif spare >= 0:
            mine = spare
            self._sweep_all()
            memset(f.owners[mine].name, 0, OWNER_NAME_BYTES)
            memcpy(f.owners[mine].name, <const char *>encoded, len(encoded))
            f.owners[mine].user = whose
            f.held[mine].quota_bytes = <uint64_t>-1
            foreign_set_epoch(f, <uint32_t>mine, epoch)
        else:
            return None
        f.owners[mine].heard_s = now_s
        self._count_owners()
        return mine

    def end(self, uint32_t row):
        """Everything of this owner is over, and its row free; how many pages that were."""
        self._require_row(row)
        pages = self.f.held[row].pages
        foreign_set_epoch(&self.f, row, 0)
        self._count_owners()
        return pages

    def abandon(self, uint32_t row):
        """As `end`, because nobody has heard of the owner for too long; counted."""
        pages = self.end(row)
        self.f.cells[C_FOREIGN_ABANDONED_PAGES] += pages
        return pages

    def heard(self, uint32_t row, uint64_t now_s):
        """The owner is alive."""
        self._require_row(row)
        self.f.owners[row].heard_s = now_s

    def set_quota(self, uint32_t row, uint64_t quota_bytes):
        """Most room that this owner's pages may take."""
        self._require_row(row)
        self.f.held[row].quota_bytes = quota_bytes

    def owners(self):
        """[(row, name, epoch, heard_s, pages, bytes, user)]; bytes is the room they take."""
        cdef uint32_t row
        self._require_open()
        return [
            (row, self._name(row), self.f.owners[row].epoch, self.f.owners[row].heard_s, self.f.held[row].pages,
             self.f.held[row].bytes, self.f.owners[row].user - 1 if self.f.owners[row].user else None)
            for row in range(OWNERS) if self.f.owners[row].epoch
        ]

    def epoch(self, uint32_t row):
        """The owner's present epoch; 0: the row is free."""
        return self.f.owners[row].epoch if row < OWNERS else 0

    cdef object _name(self, uint32_t row):
        return self.f.owners[row].name[:OWNER_NAME_BYTES].rstrip(b"\0").decode(errors="replace")

    cdef object _count_owners(self):
        cdef uint32_t row
        cdef uint64_t n = 0
        for row in range(OWNERS):
            n += self.f.owners[row].epoch != 0
        self.f.cells[C_FOREIGN_OWNERS] = n

    # ---- pages -------------------------------------------------------------------------

    def put(self, uint32_t row, bytes records not None, bytes payload not None, int64_t wait_us=0):
        """Keep a batch; a code for each page.  Waits up to wait_us while memory is committed."""
        cdef uint32_t n = <uint32_t>(len(records) // RECORD_BYTES)
        cdef const Record *first = <const Record *>PyBytes_AS_STRING(records)
        cdef const uint8_t *sealed = <const uint8_t *>PyBytes_AS_STRING(payload)
        cdef uint64_t bytes_in_all = 0
        cdef uint32_t i
        self._require_row(row)
        for i in range(n):
            bytes_in_all += SEAL_BYTES + (first[i].length_codec >> 4) + 1
        if bytes_in_all != <uint64_t>len(payload):
            raise ValueError("the payload is not as long as the records say")
        codes = PyBytes_FromStringAndSize(NULL, n)
        cdef uint8_t *code = <uint8_t *>PyBytes_AS_STRING(codes)
        with nogil:
            foreign_put(&self.f, row, self.f.owners[row].epoch, first, n, sealed, code, wait_us)
        return codes

    def get(self, uint32_t row, bytes records not None):
        """(a code for each page, the sealed bytes of those with code 0 behind one another)."""
        cdef uint32_t n = <uint32_t>(len(records) // RECORD_BYTES)
        cdef const Record *first = <const Record *>PyBytes_AS_STRING(records)
        cdef uint64_t most = 0
        cdef uint64_t got
        cdef uint32_t i
        self._require_row(row)
        for i in range(n):
            most += SEAL_BYTES + (first[i].length_codec >> 4) + 1
        codes = PyBytes_FromStringAndSize(NULL, n)
        payload = PyBytes_FromStringAndSize(NULL, most)
        cdef uint8_t *code = <uint8_t *>PyBytes_AS_STRING(codes)
        cdef uint8_t *sealed = <uint8_t *>PyBytes_AS_STRING(payload)
        with nogil:
            got = foreign_get(&self.f, row, self.f.owners[row].epoch, first, n, sealed, code)
        return codes, (payload if got == most else payload[:got])

    def drop(self, uint32_t row, bytes records not None):
        """Forget these pages; how many were there."""
        cdef uint32_t n = <uint32_t>(len(records) // RECORD_BYTES)
        cdef const Record *first = <const Record *>PyBytes_AS_STRING(records)
        cdef uint32_t gone
        self._require_row(row)
        with nogil:
            gone = foreign_drop(&self.f, row, first, n)
        return gone

    def listing(self, uint32_t row, uint64_t cursor, uint32_t most):
        """(next cursor or None, records): what is held for an owner, in pieces; begin with 0."""
        cdef uint32_t n
        self._require_row(row)
        records = PyBytes_FromStringAndSize(NULL, most * RECORD_BYTES)
        cdef Record *first = <Record *>PyBytes_AS_STRING(records)
        with nogil:
            n = foreign_list(&self.f, row, &cursor, first, most)
        return (None if cursor >= self.f.total else cursor), records[: n * RECORD_BYTES]

    def coldest(self, uint32_t most):
        """{row: records}: up to `most` pages of cold frames; counted as recalled."""
        cdef uint32_t n, i
        self._require_open()
        records = PyBytes_FromStringAndSize(NULL, most * RECORD_BYTES)
        rows = PyBytes_FromStringAndSize(NULL, most)
        cdef Record *first = <Record *>PyBytes_AS_STRING(records)
        cdef uint8_t *row = <uint8_t *>PyBytes_AS_STRING(rows)
        with nogil:
            n = foreign_coldest(&self.f, first, row, most)
        found = {}
        for i in range(n):
            found.setdefault(rows[i], []).append(records[i * RECORD_BYTES : (i + 1) * RECORD_BYTES])
        self.f.cells[C_FOREIGN_RECALLED_PAGES] += n
        return {whose: b"".join(parts) for whose, parts in found.items()}

    # ---- room ---------------------------------------------------------------------------

    def room(self, uint32_t row):
        """Bytes that this owner could put now, as frames and its quota allow: an estimate."""
        self._require_row(row)
        return foreign_room(&self.f, row)

    def held(self, uint32_t row):
        """Bytes of room that this owner's pages take."""
        self._require_row(row)
        return self.f.held[row].bytes

    def used_frames(self):
        """Frames that hold pages now."""
        self._require_open()
        lock_take(&self.f.arena.lock)
        used = self.f.arena.committed - self.f.arena.free_count - self.f.arena.moving
        pthread_mutex_unlock(&self.f.arena.lock)
        return used

    def total_frames(self):
        """Frames in all."""
        return self.f.arena.total

    def squeeze(self, uint32_t target_frames, bint squeezed):
        """Take nothing above this many frames, and give back what is free; or as before."""
        self._require_open()
        arena_squeeze(&self.f.arena, target_frames, squeezed)

    def sweep(self, uint32_t places):
        """Free what is over, looking at so many places; how many pages are left of that."""
        cdef uint32_t left
        self._require_open()
        with nogil:
            left = foreign_sweep(&self.f, places)
        return left

    cdef object _sweep_all(self):
        self.sweep(self.f.total)

    def check(self):
        """Broken invariants (0 when all is well), for tests."""
        self._require_open()
        return foreign_check(&self.f)
