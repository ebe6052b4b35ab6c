"""C face of the index: page -> entry, and the version counter."""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.layout cimport DeviceRow, Entry
from zcache_core.native cimport zc_cas16, zc_load64
from zcache_core.pthread cimport pthread_mutex_t

ctypedef struct Index:
    Entry *entries
    uint64_t pages
    DeviceRow *row              # in the memory file
    uint64_t next_version       # atomic; this process's place in the reserved range
    uint64_t reserved           # atomic copy of row.versions_reserved
    pthread_mutex_t lock        # guards reserving

cdef void index_init(Index *index, Entry *entries, uint64_t pages, DeviceRow *row) noexcept nogil
cdef void versions_start_at(Index *index, uint64_t above) noexcept nogil
cdef uint64_t versions_take(Index *index, uint64_t n) noexcept nogil


cdef inline Entry entry_load(Index *index, uint64_t page) noexcept nogil:
    """Both words of an entry.

    The version word is read twice around the location.  It may still be a mix when
    the page left RAM and came back in between; a mix fails its check bits or the
    comparison after use, and a compare-and-swap from it fails: never trusted alone.
    """
    cdef Entry e
    cdef Entry *at = index.entries + page
    e.version = zc_load64(&at.version)
    while True:
        e.location = zc_load64(&at.location)
        if zc_load64(&at.version) == e.version:
            return e
        e.version = zc_load64(&at.version)


cdef inline bint entry_flip(Index *index, uint64_t page, Entry old, Entry new) noexcept nogil:
    """The only way an entry changes.  False: somebody was faster."""
    return zc_cas16(index.entries + page, old.location, old.version, new.location, new.version)
