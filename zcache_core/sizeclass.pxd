"""C face of the size classes."""

from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    SPACING_BYTES = 32          # between sizes; every object starts at a multiple of it
    LEAST_BYTES = 128           # smallest class: at most one object starts in 128 bytes
    CHAIN_MOST = 8              # frames of a zspage
    OBJECTS_MOST = 64           # objects of a zspage
    SIZES = 4096 // SPACING_BYTES
    # Counter cells of the allocators' shard, two for each class: zspages, objects.  They are
    # where zsmalloc keeps these numbers, so that anyone can read them (fragmentation).
    CLASS_CELLS = 256
    STARTS = 32                 # 128-byte pieces of a frame, in one of which an object starts

ctypedef struct SizeClass:
    uint32_t bytes              # room of each object
    uint32_t frames             # of a zspage
    uint32_t objects            # of a zspage
    uint32_t starts[CHAIN_MOST]     # by frame: bit b says that an object starts in bytes 128 b to 128 b + 127

ctypedef struct SizeClasses:
    uint32_t n
    uint32_t largest_bytes      # larger objects are not worth a class: raw pages
    SizeClass row[SIZES]        # from large to small
    uint8_t of_size[SIZES + 1]  # class number by (bytes + SPACING_BYTES - 1) // SPACING_BYTES

cdef void sizeclasses_make(SizeClasses *classes) noexcept nogil

cdef inline uint32_t class_for(const SizeClasses *classes, uint32_t bytes) noexcept nogil:
    return classes.of_size[(bytes + SPACING_BYTES - 1) // SPACING_BYTES]
