"""The memory-file format: sizes, the index entry, the blob header, the superblock.

Everything here is on the "disk" of this project, a locked memory segment that
outlives its server, so a change of any line is a change of FORMAT_VERSION
(`docs/memory-format.md` has the pictures; t1_layout holds the golden bytes).

An index entry is two 64-bit words, changed only together:

    location   63........................16 15......4 3..0
               where (48 bits)              length-1  codec      RAM, DISK, PEER
               the repeated 8-byte word                          SAME

    version    63......................12 11......4 3..0
               version (52 bits)          check     state

`where` is a byte offset into the arena for RAM, and the tier's own address for
DISK (a byte offset, its highest bit 0) and PEER (highest bit 1, then the numbers of
the donors that hold copies; or the two highest bits 1: one donor, and the copy on the disk).
So it also says which tier it is of.  `check` is an extended Hamming code over the other 120 bits.

A blob header is three words; it stands before its blob in the frame, or, for a
page kept raw (which fills its frame), in the table of frame headers:

    identity   version (52) | check (8) | device (4)
    page and checksum       page (32)  | checksum (32)
    place      where the page also is, below (48) | length-1 (12) | codec (4)

The checksum covers the blob's bytes, version and device, the page and the length and
codec; the lower location may change without touching it.  `check` covers what the
checksum does not: place and identity together are a code word as an entry's two
words are, so that any flip of up to three bits in a lower location is found before
it is used.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zcache_core.native cimport zc_blob_checksum, zc_entry_check


cdef enum:
    FORMAT_VERSION = 4
    PAGE_BYTES = 4096
    PAGE_SHIFT = 12
    HEADER_BYTES = 24
    CHUNK_BYTES = 64            # zbud's unit; NCHUNKS of them in a frame
    NCHUNKS = 64

    MAX_DEVICES = 8             # rows in the superblock's device table
    NAME_BYTES = 64
    KEY_BYTES = 32              # of one key
    DEVICE_NAME_BYTES = 16
    DONORS = 96                 # rows in the superblock's donor table
    DONOR_ID_BYTES = 16
    DICTIONARIES = 4            # rows in the superblock's table of them
    DICTIONARY_MOST = 112 << 10 # bytes of one: with the page below 128 KiB, from where on zstd searches less
    COPIES_MOST = 3             # donors that an address has room for
    DONOR_BITS = 15             # of each in it: the row's number + 1, 0 for none
    BACKED_BITS = 39            # of the disk's part of an address with both: 512 GiB
    BACKED_DONOR = 0x7F         # the donor's part above it: the row's number + 1

    # Counters: one shard for each request slot and each background thread, so
    # that a count is a plain add; a reader sums them.  Latency histograms lie behind
    # the counters (counters.py).
    COUNTER_CELLS = 512
    COUNTER_SHARDS = 40

cdef enum State:
    ST_EMPTY = 0                # never written, or trimmed: reads as zeros
    ST_SAME = 1                 # location is the repeated word
    ST_RAM = 2                  # the only copy is in the arena (persistent)
    ST_RAM_EPHEMERAL = 3        # in the arena, and also where the header says, below
    ST_DISK = 4
    ST_PEER = 5
    ST_LOST = 6                 # the last copy is gone: reads answer EIO

cdef enum Codec:
    CODEC_RAW = 0
    CODEC_LZ4 = 1
    CODEC_ZSTD = 2
    CODEC_ZSTD_WITH = 4         # and a dictionary: the row's number is added

ctypedef struct Entry:
    uint64_t location
    uint64_t version

ctypedef struct BlobHeader:
    uint64_t identity
    uint64_t page_checksum
    uint64_t place

ctypedef struct DeviceRow:      # 32 bytes
    uint64_t pages              # 0: row unused
    uint64_t index_offset       # of its first entry; the devices' parts follow one another
    uint64_t versions_reserved  # every version below may have been used; row 0 counts for all
    uint64_t generation         # of the last attach (fences workers of older ones)

ctypedef struct DonorRow:       # 32 bytes: whom a number in the addresses of PEER means
    uint8_t id[DONOR_ID_BYTES]  # all zeros: row unused
    uint64_t epoch              # of the donor's memory; with another one our pages are gone
    uint64_t seen_us            # CLOCK_MONOTONIC when it was last known to live; 0: it is gone, or nobody knows

ctypedef struct DictionaryRow:  # 16 bytes
    uint32_t bytes              # of the dictionary; 0: row unused.  Written last
    uint32_t first_frame
    uint32_t checksum           # low half of XXH3-64
    uint32_t number             # the highest is the newest

ctypedef struct Superblock:     # the first page of the file
    char magic[8]               # "ZCACHEMF"
    uint32_t format_version
    uint32_t header_crc         # CRC-32 of the geometry words below
    # geometry, fixed for the life of the file
    uint64_t file_bytes
    uint64_t epoch              # random identity of this file's contents
    uint64_t pool_frames
    uint64_t counters_offset
    uint64_t frame_headers_offset
    uint64_t arena_offset
    uint64_t index_offset
    uint64_t device_pages
    # what changes
    uint64_t owner_pid
    uint64_t owner_start_ticks  # with the pid: which process, not which number
    uint64_t nonces_reserved    # every nonce below may have been used (crypt.pyx)
    uint64_t created_s
    char name[NAME_BYTES]
    DeviceRow devices[MAX_DEVICES]
    uint64_t unused[8]          # 0
    uint64_t write_day          # days since 1970, UTC: of what day write_day_bytes tells
    uint64_t write_day_bytes    # written to the disk on that day (writeback_limit)
    char device_names[MAX_DEVICES][DEVICE_NAME_BYTES]   # padded with zeros
    uint64_t counters_id        # of the counter table that the cells were written by
    uint64_t devices_crc        # CRC-32 of what does not change of the rows, and of the names
    DonorRow donors[DONORS]
    DictionaryRow dictionaries[DICTIONARIES]


ctypedef struct Keys:           # the second page of the file, alone there: who only reads has it not
    uint8_t disk_key[KEY_BYTES] # random since creation; this file is never dumped or swapped
    uint8_t peer_key[KEY_BYTES]


# ---- entry words --------------------------------------------------------------

cdef inline uint64_t version_word(uint64_t version, uint32_t state, uint64_t location) noexcept nogil:
    cdef uint64_t word = (version << 12) | state
    return word | (<uint64_t>zc_entry_check(location, word) << 4)

cdef inline bint entry_is_sound(uint64_t location, uint64_t word) noexcept nogil:
    return zc_entry_check(location, word) == ((word >> 4) & 0xFF)

cdef inline uint32_t state_of(uint64_t word) noexcept nogil:
    return word & 0xF

cdef inline uint64_t version_of(uint64_t word) noexcept nogil:
    return word >> 12

cdef inline uint64_t place_word(uint64_t where, uint32_t length_bytes, uint32_t codec) noexcept nogil:
    return (where << 16) | (<uint64_t>(length_bytes - 1) << 4) | codec

cdef inline uint64_t where_of(uint64_t location) noexcept nogil:
    return location >> 16

cdef inline uint32_t length_of(uint64_t location) noexcept nogil:
    return <uint32_t>((location >> 4) & 0xFFF) + 1

cdef inline uint32_t codec_of(uint64_t location) noexcept nogil:
    return location & 0xF


# ---- addresses below ------------------------------------------------------------------

cdef inline uint32_t lower_state(uint64_t where) noexcept nogil:
    """Of which tier an address is: ST_PEER or ST_DISK."""
    return ST_PEER if where >> 47 else ST_DISK

cdef inline bint is_backed(uint64_t where) noexcept nogil:
    """Whether an address is of one copy at a peer and one on the disk."""
    return where >> 46 == 3

cdef inline uint64_t disk_part(uint64_t where) noexcept nogil:
    """The disk's address of a page that is backed."""
    return where & ((<uint64_t>1 << BACKED_BITS) - 1)

cdef inline uint64_t backed_where(uint32_t donor, uint64_t disk_where) noexcept nogil:
    """The address of a page with a copy at a donor (number + 1) and one on the disk."""
    return (<uint64_t>3 << 46) | (<uint64_t>donor << BACKED_BITS) | disk_where

cdef inline uint32_t donor_at(uint64_t where, uint32_t copy) noexcept nogil:
    """Number + 1 of the donor that has this copy (0 .. COPIES_MOST - 1); 0: there is none."""
    if is_backed(where):
        return <uint32_t>(where >> BACKED_BITS) & BACKED_DONOR if copy == 0 else 0
    return <uint32_t>(where >> (DONOR_BITS * copy)) & ((1 << DONOR_BITS) - 1)


# ---- blob headers ---------------------------------------------------------------

cdef enum:
    HEADER_CHECK = 0xFF0        # bits of the identity word: where an entry has them too

cdef inline uint64_t identity_word(uint64_t version, uint32_t device) noexcept nogil:
    """The identity without its check bits: what the checksum covers."""
    return (version << 12) | device

cdef inline void header_set_lower(BlobHeader *header, uint64_t where) noexcept nogil:
    """Write the lower location, and the check bits that belong to it."""
    cdef uint64_t identity = header.identity & ~<uint64_t>HEADER_CHECK
    header.place = (where << 16) | (header.place & 0xFFFF)
    header.identity = identity | (<uint64_t>zc_entry_check(header.place, identity) << 4)

cdef inline bint header_is_sound(const BlobHeader *header) noexcept nogil:
    """Whether the lower location (and version, device, length, codec) may be believed."""
    return zc_entry_check(header.place, header.identity) == ((header.identity >> 4) & 0xFF)

cdef inline void header_fill(
    BlobHeader *header, uint64_t version, uint32_t device, uint32_t page,
    uint32_t length_bytes, uint32_t codec, const uint8_t *blob,
) noexcept nogil:
    """All of a header but the lower location, which is 0."""
    cdef uint64_t identity = identity_word(version, device)
    cdef uint64_t place = place_word(0, length_bytes, codec)
    cdef uint32_t checksum = zc_blob_checksum(blob, length_bytes, identity, (<uint64_t>page << 16) | place)
    header.identity = identity
    header.page_checksum = (<uint64_t>page << 32) | checksum
    header.place = place
    header_set_lower(header, 0)

cdef inline uint32_t header_page(const BlobHeader *header) noexcept nogil:
    return <uint32_t>(header.page_checksum >> 32)

cdef inline uint64_t header_version(const BlobHeader *header) noexcept nogil:
    return header.identity >> 12

cdef inline uint32_t header_length(const BlobHeader *header) noexcept nogil:
    return length_of(header.place)

cdef inline uint64_t header_lower(const BlobHeader *header) noexcept nogil:
    return header.place >> 16

cdef inline bint header_matches(
    const BlobHeader *header, uint64_t version, uint32_t device, uint32_t page,
    uint64_t location, const uint8_t *blob,
) noexcept nogil:
    """Whether header and blob are the ones that the entry (version, location) means.

    The check bits are not looked at: they may be changing with the lower location.
    """
    cdef uint64_t identity = identity_word(version, device)
    cdef uint64_t length_codec = location & 0xFFFF
    if (header.identity & ~<uint64_t>HEADER_CHECK) != identity or header_page(header) != page:
        return False
    if (header.place & 0xFFFF) != length_codec:
        return False
    return <uint32_t>header.page_checksum == zc_blob_checksum(
        blob, length_of(location), identity, (<uint64_t>page << 16) | length_codec
    )
