"""Addresses of pages at peers: which donors have a copy.

    47  46 45  44 .......... 30  29 .......... 15  14 ........... 0
    1   0      third copy        second copy       first copy         row + 1 in the donor table

A donor is the number of its row in the memory file's table, + 1; copies follow one another
without a gap, and no donor has two of a page.  With a copy on the disk beside it there is one:

    47  46  45 ..... 39  38 .................................. 0
    1   1   its copy     address on the disk
"""

from libc.stdint cimport uint32_t, uint64_t

from zcache_core.layout cimport (
    COPIES_MOST, DONOR_BITS, DONOR_ID_BYTES, DONORS, ST_PEER, DonorRow, Superblock, donor_at, is_backed,
    lower_state,
)


cdef bint where_is_possible(const Superblock *super, uint64_t where) noexcept nogil:
    """Whether an address of peers names one donor or more, all of the table, none twice."""
    cdef uint32_t i, j, donor
    cdef bint ended = False
    if lower_state(where) != ST_PEER or donor_at(where, 0) == 0:
        return False
    if not is_backed(where) and (where >> (DONOR_BITS * COPIES_MOST)) != 4:
        return False
    for i in range(COPIES_MOST):
        donor = donor_at(where, i)
        if donor == 0:
            ended = True
            continue
        if ended or donor > DONORS or not row_is_used(&super.donors[donor - 1]):
            return False
        for j in range(i):
            if donor_at(where, j) == donor:
                return False
    return True


cdef bint row_is_used(const DonorRow *row) noexcept nogil:
    cdef uint32_t i
    for i in range(DONOR_ID_BYTES):
        if row.id[i]:
            return True
    return False


cdef uint64_t where_without(uint64_t where, uint64_t other) noexcept nogil:
    """The donors of `where` that `other` has not; 0: none."""
    cdef uint64_t left = 0
    cdef uint32_t n = 0
    cdef uint32_t i, j
    cdef bint common
    for i in range(COPIES_MOST):
        common = donor_at(where, i) == 0
        for j in range(COPIES_MOST):
            common = common or donor_at(where, i) == donor_at(other, j)
        if not common:
            left |= <uint64_t>donor_at(where, i) << (DONOR_BITS * n)
            n += 1
    return left | (<uint64_t>1 << 47) if n else 0
