"""An object on the disk: a compressed page behind its header, plain or encrypted.

    plain       | header 24                           | blob n       | pad to 8 |
    encrypted   | header 24 | counter 8 | tag 16      | ciphertext n | pad to 8 |

The header is the arena's, with the epoch of the memory file (48 bits) where that one has
the lower location, and its check bits accordingly; an encrypted object has the number
of its cipher in place of the checksum, because the tag says more.  So every bit of a
header is known beforehand by who reads the object for its entry, and is compared.

An address (`where`) is the object's offset with the number of its cipher in the low three
bits: it tells how much room the object takes, and disks with objects of both kinds are
ordinary, after encrypt= was changed.

Bound: an object is at most 24 + 24 + 4096 bytes.  No state, no allocation.
"""

from libc.errno cimport EILSEQ
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from zcache_core.crypt cimport CIPHER_NONE, CIPHERS, FOR_DISK, SEAL_BYTES, Associated, crypt_open, crypt_seal
from zcache_core.layout cimport (
    HEADER_BYTES, BlobHeader, header_fill, header_is_sound, header_length, header_lower, header_matches,
    header_page, header_set_lower, header_version, identity_word, length_of,
)

cdef enum:
    EPOCH_BITS = 48


cdef inline uint64_t epoch_tag(const Whose *whose) noexcept nogil:
    return whose.epoch & ((<uint64_t>1 << EPOCH_BITS) - 1)


cdef inline Associated bound_to(const Whose *whose, const ColdPage *page) noexcept nogil:
    cdef Associated about
    about.epoch, about.version, about.page = whose.epoch, page.version, page.page
    about.length_codec = <uint16_t>page.length_codec
    about.device, about.purpose = <uint8_t>whose.device, FOR_DISK
    return about


cdef BlobHeader sealed_header(const Whose *whose, const ColdPage *page, uint32_t cipher) noexcept nogil:
    """The only header that an encrypted object of this page can have."""
    cdef BlobHeader header
    header.identity = identity_word(page.version, whose.device)
    header.page_checksum = (<uint64_t>page.page << 32) | cipher
    header.place = page.length_codec & 0xFFFF
    header_set_lower(&header, epoch_tag(whose))
    return header


cdef inline bint is_sealed(const BlobHeader *at, const BlobHeader *wanted) noexcept nogil:
    return at.identity == wanted.identity and at.page_checksum == wanted.page_checksum and at.place == wanted.place


cdef bint object_write(const Whose *whose, uint8_t *at, const ColdPage *page) noexcept nogil:
    """Make the object of page and blob at `at`, its padding too; False when it cannot be encrypted."""
    cdef uint32_t length = length_of(page.length_codec)
    cdef uint32_t head = head_bytes(whose.cipher)
    cdef Associated about
    if whose.cipher == CIPHER_NONE:
        memcpy(at + HEADER_BYTES, page.blob, length)
        header_fill(
            <BlobHeader *>at, page.version, whose.device, page.page, length, page.length_codec & 0xF, at + HEADER_BYTES
        )
        header_set_lower(<BlobHeader *>at, epoch_tag(whose))
    else:
        about = bound_to(whose, page)
        (<BlobHeader *>at)[0] = sealed_header(whose, page, whose.cipher)
        if not crypt_seal(whose.crypt, &about, page.blob, length, at + HEADER_BYTES):
            return False
    memset(at + head + length, 0, object_room(whose.cipher, length) - head - length)
    return True


cdef int object_read(const Whose *whose, uint8_t *at, const ColdPage *page) noexcept nogil:
    """Check the object at `at` against page, version, where and length; its blob to page.blob.

    0, or EILSEQ when it is not exactly that one.
    """
    cdef uint32_t cipher = cipher_of(page.where)
    cdef uint32_t length = length_of(page.length_codec)
    cdef BlobHeader *header = <BlobHeader *>at
    cdef BlobHeader wanted
    cdef Associated about
    if cipher == CIPHER_NONE:
        if header_lower(header) != epoch_tag(whose) or not header_is_sound(header) or not header_matches(
            header, page.version, whose.device, page.page, page.length_codec, at + HEADER_BYTES
        ):
            return EILSEQ
        memcpy(page.blob, at + HEADER_BYTES, length)
        return 0
    wanted = sealed_header(whose, page, cipher)
    if whose.crypt == NULL or not is_sealed(header, &wanted):
        return EILSEQ
    about = bound_to(whose, page)
    return 0 if crypt_open(whose.crypt, cipher, &about, at + HEADER_BYTES, length, page.blob) else EILSEQ


cdef bint object_found(const Whose *whose, uint8_t *at, uint32_t room_bytes, uint64_t offset, ColdPage *page) noexcept nogil:
    """Whether a whole object of ours begins at `at` (with room_bytes behind it, `offset` on the disk).

    Then `page` is told, its blob lying where the object's was, decrypted there.
    """
    cdef BlobHeader *header = <BlobHeader *>at
    cdef uint32_t length, cipher
    if room_bytes < HEADER_BYTES or header_lower(header) != epoch_tag(whose) or not header_is_sound(header):
        return False
    length = header_length(header)
    page.version, page.page = header_version(header), header_page(header)
    page.length_codec = header.place & 0xFFFF
    page.where = offset
    page.blob = at + HEADER_BYTES
    if object_room(CIPHER_NONE, length) <= room_bytes and header_matches(
        header, page.version, whose.device, page.page, page.length_codec, page.blob
    ):
        return True
    cipher = <uint32_t>header.page_checksum
    if cipher == CIPHER_NONE or cipher >= CIPHERS or object_room(cipher, length) > room_bytes:
        return False
    page.where = offset | cipher
    page.blob = at + head_bytes(cipher)
    return object_read(whose, at, page) == 0
