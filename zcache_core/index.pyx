"""The index: one 16-byte entry for each page of the device, and the version counter.

The index is the truth.  What no entry points to does not exist: a frame without
an entry is free, a blob without one is rubbish, and a server that takes over
needs nothing else.  An entry changes only by one 16-byte compare-and-swap, from
exactly the entry that the change was decided on, so that a racing overwrite, trim
or eviction is neither lost nor mistaken for another.

What makes that enough is that no two states of a page look alike: each write and
each trim has a version of its own, never used again.  Versions are handed out
from ranges that are written down in the memory file (row.versions_reserved)
before the first of them is used; a successor starts above the last range.

    row.versions_reserved  ...............................v
    used and maybe used    ################..............|
    next_version                           ^

Bound: 2^52 versions, 142 years of a million writes a second.
"""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.layout cimport (
    DeviceRow, Entry, codec_of, entry_is_sound, length_of, place_word, state_of, version_of,
    version_word, where_of,
)
from zcache_core.native cimport zc_add64, zc_cas16, zc_load64, zc_store64
from zcache_core.pthread cimport lock_init, lock_take, pthread_mutex_unlock

cdef enum:
    RANGE_STEP = 1 << 20        # versions reserved at a time: one store each million pages
    VERSION_BITS = 51           # no file has used so many; a number above is damage


cdef void index_init(Index *index, Entry *entries, uint64_t pages, DeviceRow *row) noexcept nogil:
    """`pages` entries, of all devices; versions are counted in `row`, the first one's."""
    index.entries = entries
    index.pages = pages
    index.row = row
    if row.versions_reserved >> VERSION_BITS:
        zc_store64(&row.versions_reserved, 1)   # the takeover finds the highest there is
    index.next_version = row.versions_reserved
    index.reserved = row.versions_reserved
    lock_init(&index.lock)


cdef uint64_t versions_take(Index *index, uint64_t n) noexcept nogil:
    """The first of `n` consecutive versions that nobody had or will have."""
    cdef uint64_t first = zc_add64(&index.next_version, n)
    if first + n > zc_load64(&index.reserved):
        lock_take(&index.lock)
        if first + n > index.row.versions_reserved:
            zc_store64(&index.row.versions_reserved, first + n + RANGE_STEP)
            zc_store64(&index.reserved, index.row.versions_reserved)
        pthread_mutex_unlock(&index.lock)
    return first


cdef void versions_start_at(Index *index, uint64_t above) noexcept nogil:
    """At `above` at least; before anybody writes.  Changes nothing in a file that is whole."""
    lock_take(&index.lock)
    if above > index.next_version:
        zc_store64(&index.row.versions_reserved, above + RANGE_STEP)
        zc_store64(&index.reserved, index.row.versions_reserved)
        zc_store64(&index.next_version, above)
    pthread_mutex_unlock(&index.lock)


# ---- for tests and tools: the words as Python sees them -----------------------------

def pack_entry(int state, uint64_t version, uint64_t location):
    """(location word, version word) of an entry, check bits included."""
    return location, version_word(version, state, location)


def unpack_entry(uint64_t location, uint64_t word):
    """Dict of state, version, sound, and (for placed states) where, length, codec."""
    return {
        "state": state_of(word), "version": version_of(word), "sound": entry_is_sound(location, word),
        "where": where_of(location), "length": length_of(location), "codec": codec_of(location),
    }


def pack_place(uint64_t where, uint32_t length_bytes, uint32_t codec):
    """Location word of a RAM, disk or peer entry."""
    return place_word(where, length_bytes, codec)
