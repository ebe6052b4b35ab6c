"""The shared memory between the server's peer tier and its node process.

    server (peers.pyx)                                        node (ringside.pyx)
      get cells     one page each, asked and answered in place     many at a time
      the put area  one batch of sealed pages, and where they went one at a time
      drops         a ring: copies not needed any more             server -> node
      notes         a ring: copies that moved, donors' numbers     node -> server
      head          how the node is, how much room there is

    +------+-----------+----------+---------------+-------+-------+
    | head | get cells | put rows | put bytes     | drops | notes |
    +------+-----------+----------+---------------+-------+-------+

A memfd, locked in the server's memory.  It holds nothing that must outlive the server.
Each get cell and the put area has a word: a turn and a state, changed by compare-and-swap.

    FREE -> ASKED -> TAKEN (-> FILLING) -> ANSWERED        (a turn is over with FREE)

Whoever is late finds another turn there, and changes nothing.  A get that several may answer
is answered by the one that makes it FILLING.  The server sleeps on a word
as a futex; the node is woken through an eventfd.  That the node lives is told by a lock
on the memfd, of an open file description that only the node has: the kernel takes it off
when the node dies, however.

What stands here comes from another process and is believed like what comes from a network:
addresses are checked before use, and bytes are what they are only if their seal opens.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zcache_core.cold cimport COLD_BATCH
from zcache_core.crypt cimport SEAL_BYTES
from zcache_core.layout cimport DONOR_ID_BYTES, DONORS, PAGE_BYTES
from zcache_core.native cimport zc_cas32, zc_release_fence

cdef enum:
    RING_MAGIC = 0x5A435252
    RING_VERSION = 5
    RING_CELLS = 96             # every request slot, and two batches of those read ahead
    SEALED_MOST = PAGE_BYTES + SEAL_BYTES
    PUT_ROOM = (1 << 21) + COLD_BATCH * SEAL_BYTES     # as much as leaves RAM at once, sealed
    DROPS = 1 << 14             # powers of two
    NOTES = 1 << 12

cdef enum RingState:
    RING_FREE = 0
    RING_ASKED = 1
    RING_TAKEN = 2
    RING_ANSWERED = 3
    RING_FILLING = 4
    RING_STATE = 0xF            # the rest of a word is the turn

cdef enum RowState:             # of a donor, as the node knows it
    ROW_UNKNOWN = 0             # not met since the node began
    ROW_LIVE = 1
    ROW_GONE = 2                # away, empty, or not to be believed
    ROW_SUSPECT = 3             # an answer is overdue

cdef enum NoteKind:
    NOTE_MOVED = 1              # the copies at `old` are at `new` from now on
    NOTE_GONE = 3               # no copy at the donors of `old` is to be counted on: the page is in RAM or on the disk too
    NOTE_DONOR = 2              # row `page` of the donor table is the donor `id` of epoch `new`

ctypedef struct GetCell:
    uint32_t word
    uint32_t page
    uint64_t version
    uint64_t where
    uint32_t wrong              # bits: copies that were answered, and were not what was put
    uint32_t length_codec       # of the blob, as in an entry
    int32_t error               # of the answer: 0, EIO, ENODATA: no copy is left
    uint32_t copy               # which one was answered
    uint32_t length_bytes       # of what was answered, sealed
    uint8_t sealed[SEALED_MOST]

ctypedef struct PutRow:
    uint64_t version
    uint64_t where              # of the answer
    uint32_t page
    uint32_t offset             # in the put bytes
    uint32_t length_codec
    int32_t error               # of the answer

ctypedef struct Drop:
    uint64_t version
    uint64_t where
    uint32_t page
    uint32_t length_codec

ctypedef struct Note:
    uint64_t version
    uint64_t old
    uint64_t new
    uint32_t kind
    uint32_t page
    uint32_t length_codec
    uint8_t id[DONOR_ID_BYTES]

ctypedef struct RingHead:
    uint32_t magic
    uint32_t ring_version
    # the server writes
    uint32_t put_word
    uint32_t put_rows
    uint32_t put_copies         # that each page of it is to have; 0: as many as `replicas` says
    uint32_t disk_fails         # 1: what has one copy beside that on the disk needs another
    uint64_t backed             # pages that have one
    uint64_t alone              # pages with one copy, and none on the disk: they need another
    uint64_t drops_end          # numbers of records: place is number modulo DROPS
    uint64_t drops_missed       # for want of room in the ring
    uint64_t notes_begin
    uint64_t ticks              # each time all that was put and told before is in the index
    uint32_t over               # 1: the memory file goes with the server, nobody asks for its pages again
    uint64_t copies[DONORS]     # that the index counts on, by the donors' rows
    # the node writes
    uint32_t attached           # grows with every node that takes the ring
    uint32_t ready              # 1: enough donors for a put
    int64_t beat_us             # monotonic clock, often: the node is not stuck
    uint64_t room_bytes         # that donors have for us, all copies needed counted
    uint64_t room_one_bytes     # the same for pages with one copy
    uint64_t drops_begin
    uint64_t notes_end
    uint64_t live_peers         # for the counters, as the next ones
    uint64_t short_pages        # with fewer copies than there should be
    uint64_t wrong_copies       # found by the node
    uint64_t hedged_gets
    uint32_t row_state[DONORS]  # atomics: RowState of each

ctypedef struct Ring:
    RingHead head
    GetCell cell[RING_CELLS]
    PutRow row[COLD_BATCH]
    uint8_t put_bytes[PUT_ROOM]
    Drop drop[DROPS]
    Note note[NOTES]

cdef extern from *:
    """
    #ifndef ZC_RING_CALLS
    #define ZC_RING_CALLS
    #include <fcntl.h>
    #include <linux/futex.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    /* struct flock's F_OFD_* with the numbers the kernel gives them (fcntl(2)). */
    enum { ZC_OFD_GETLK = 36, ZC_OFD_SETLK = 37 };

    static inline void zc_futex_wait(uint32_t *word, uint32_t seen, int64_t most_us)
    {
        struct timespec most = {most_us / 1000000, most_us % 1000000 * 1000};
        syscall(SYS_futex, word, FUTEX_WAIT, seen, &most, NULL, 0);
    }
    static inline void zc_futex_wake(uint32_t *word)
    {
        syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
    static inline int zc_is_locked(int fd)
    {
        struct flock about;
        memset(&about, 0, sizeof about);
        about.l_type = F_WRLCK;
        return fcntl(fd, ZC_OFD_GETLK, &about) == 0 && about.l_type != F_UNLCK;
    }
    static inline int zc_lock_it(int fd)
    {
        struct flock about;
        memset(&about, 0, sizeof about);
        about.l_type = F_WRLCK;
        return fcntl(fd, ZC_OFD_SETLK, &about) == 0;
    }
    static inline void zc_kick(int fd)
    {
        uint64_t one = 1;
        ssize_t done = write(fd, &one, sizeof one);
        (void)done;     /* it does not block; at its most the counter has woken the node already */
    }
    static inline int zc_memory_fd(void)
    {
        return (int)syscall(SYS_memfd_create, "zcache-ring", 1u /* MFD_CLOEXEC */);
    }
    #endif
    """
    void zc_futex_wait(uint32_t *word, uint32_t seen, int64_t most_us) nogil
    void zc_futex_wake(uint32_t *word) nogil
    bint zc_is_locked(int fd) nogil
    bint zc_lock_it(int fd) nogil
    void zc_kick(int fd) nogil
    int zc_memory_fd() nogil


cdef inline bint cell_begin(GetCell *cell, uint32_t turn) noexcept nogil:
    """From here on the cell is the answerer's alone."""
    return zc_cas32(&cell.word, (turn << 4) + RING_TAKEN, (turn << 4) + RING_FILLING)


cdef inline bint cell_end(
    GetCell *cell, uint32_t turn, int error, const uint8_t *sealed, uint32_t n, uint32_t copy
) noexcept nogil:
    cell.error, cell.copy, cell.length_bytes = error, copy, n
    memcpy(cell.sealed, sealed, n)
    zc_release_fence()
    if not zc_cas32(&cell.word, (turn << 4) + RING_FILLING, (turn << 4) + RING_ANSWERED):
        return False
    zc_futex_wake(&cell.word)
    return True


cdef inline bint cell_answer(
    GetCell *cell, uint32_t turn, int error, const uint8_t *sealed, uint32_t n, uint32_t copy
) noexcept nogil:
    """Answer what was taken in that turn; False when somebody else has, or nobody waits any more."""
    return n <= SEALED_MOST and cell_begin(cell, turn) and cell_end(cell, turn, error, sealed, n, copy)
