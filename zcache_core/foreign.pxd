"""C face of the pages that this machine holds for others: the table over their memory file.

    memory file   superblock | counters | owners 8 KiB | places 32 B ... | seals 24 B a frame | arena
                                        '-- the index, of a store of our own pages --'

The memory file's format is the store's own; what is an index entry for each page of a
device there is read as owners and places here.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from zcache_core.allocator cimport Allocator
from zcache_core.arena cimport Arena
from zcache_core.layout cimport HEADER_BYTES, PAGE_BYTES, PAGE_SHIFT, Entry, length_of, version_of
from zcache_core.native cimport zc_blob_checksum
from zcache_core.pthread cimport pthread_mutex_t

cdef enum:
    OWNERS = 64                 # rows
    OWNER_BYTES = 128
    OWNER_NAME_BYTES = 48
    PLACE_BYTES = 32
    NO_PLACE = 0xFFFFFFFF
    ROW_BITS = 8                # of the word `whose`: row, device, and 48 bits of the epoch
    EPOCH_SHIFT = 16
    SEAL_BYTES = HEADER_BYTES   # crypt.pxd's; it stands in a header's room

ctypedef struct OwnerRow:       # 128 bytes
    uint64_t epoch              # 0: the row is free.  Written last, so that a row is whole or free
    uint64_t heard_s            # since the boot
    char name[OWNER_NAME_BYTES]
    uint64_t user               # of this machine, and 1; 0: its certificate says who it is
    uint8_t padding[56]

ctypedef struct Place:          # 32 bytes; an index entry, and whose page it is
    Entry entry                 # ST_RAM with where, length, codec and version; or ST_EMPTY
    uint64_t page_checksum      # page (32) | checksum (32) of seal, blob and identity
    uint64_t whose              # epoch (48) | device (8) | row (8)

ctypedef struct Record:         # 16 bytes, as it comes over the wire (cluster/peerwire.py)
    uint64_t version
    uint32_t page
    uint16_t length_codec
    uint8_t device
    uint8_t zero

ctypedef struct Held:           # of one row's present epoch
    uint64_t pages
    uint64_t bytes              # room in frames that they take
    uint64_t quota_bytes        # most of that

cdef enum PageCode:             # cluster/peerwire.py: Code
    PAGE_OK = 0
    PAGE_ABSENT = 1
    PAGE_FULL = 2
    PAGE_DAMAGED = 3
    PAGE_OVER = 255             # never on the wire: the epoch is over

ctypedef struct Foreign:
    Arena arena
    Allocator *allocator
    OwnerRow *owners            # in the memory file
    Place *places               # in the memory file
    uint64_t *cells             # counter shard, written under `lock`
    uint32_t total              # places
    # guarded by `lock`, which is taken before the allocator's
    pthread_mutex_t lock
    Held held[OWNERS]
    uint64_t stale              # places of epochs that are over, not swept yet
    uint32_t used               # places below this have been in use
    uint32_t free_head          # list of free ones among them, by `next`
    uint32_t *heads             # hash of identity -> first place of its chain
    uint32_t *next
    uint32_t mask               # of the hash; a power of two less one
    uint32_t *at_bud            # 2 for each frame: the place of the bud in front and of the one behind
    uint32_t clock_hand         # frame where the search for cold ones goes on
    uint32_t sweep_hand

cdef int foreign_make(Foreign *f) noexcept nogil
cdef void foreign_free(Foreign *f) noexcept nogil
cdef uint32_t foreign_put(
    Foreign *f, uint32_t row, uint64_t epoch, const Record *records, uint32_t n, const uint8_t *payload, uint8_t *codes,
    int64_t wait_us
) noexcept nogil
cdef uint64_t foreign_get(
    Foreign *f, uint32_t row, uint64_t epoch, const Record *records, uint32_t n, uint8_t *payload, uint8_t *codes
) noexcept nogil
cdef uint32_t foreign_drop(Foreign *f, uint32_t row, const Record *records, uint32_t n) noexcept nogil
cdef uint64_t foreign_room(Foreign *f, uint32_t row) noexcept nogil
cdef uint32_t foreign_list(
    Foreign *f, uint32_t row, uint64_t *cursor, Record *records, uint32_t most
) noexcept nogil
cdef uint32_t foreign_coldest(Foreign *f, Record *records, uint8_t *rows, uint32_t most) noexcept nogil
cdef uint32_t foreign_sweep(Foreign *f, uint32_t most) noexcept nogil
cdef void foreign_set_epoch(Foreign *f, uint32_t row, uint64_t epoch) noexcept nogil

# for finding them again; lock held
cdef uint32_t find(Foreign *f, uint64_t whose, uint32_t page, uint64_t version) noexcept nogil
cdef void link_place(Foreign *f, uint32_t at) noexcept nogil


cdef inline uint32_t row_of(uint64_t whose) noexcept nogil:
    return whose & 0xFF

cdef inline bint is_current(Foreign *f, uint64_t whose) noexcept nogil:
    """Whether the epoch that this place was put in is still its owner's."""
    cdef uint32_t row = row_of(whose)
    return row < OWNERS and f.owners[row].epoch != 0 and whose >> EPOCH_SHIFT == f.owners[row].epoch << EPOCH_SHIFT >> EPOCH_SHIFT

cdef inline uint32_t room_for(Foreign *f, uint32_t length) noexcept nogil:
    """Bytes of the arena: blob and seal together, or a whole frame when they fill one."""
    cdef uint32_t bytes = length + SEAL_BYTES
    return bytes if bytes <= f.allocator.largest_bytes else PAGE_BYTES

cdef inline uint64_t bud_at(uint64_t where) noexcept nogil:
    return (where >> PAGE_SHIFT << 1) + ((where & (PAGE_BYTES - 1)) != 0)

cdef inline uint32_t sum_of(const Place *p, const uint64_t *seal, const uint8_t *blob) noexcept nogil:
    """Of everything that makes the page: the seal's words, the blob, and whose it is."""
    cdef uint64_t identity = p.whose ^ (seal[0] * <uint64_t>0x9E3779B97F4A7C15) ^ (seal[1] << 1 | seal[1] >> 63)
    cdef uint64_t place = (p.page_checksum >> 32 << 16 | (p.entry.location & 0xFFFF)) ^ seal[2] ^ (version_of(p.entry.version) << 8)
    return zc_blob_checksum(blob, length_of(p.entry.location), identity, place)
