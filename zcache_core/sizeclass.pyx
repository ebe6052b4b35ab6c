"""Size classes of zsmalloc: which sizes, and how many frames a zspage of each has.

    class of 1376 bytes, 24 objects in a zspage of 8 frames (waste less than one object)
    |   frame 0      |   frame 1      |   frame 2      | ...
    |0 0 0 1 1 1 2 2 |2 3 3 3 4 4 4 5 |5 5 6 6 ...              objects go on in the next frame

An object's room is its size rounded up to a class; a zspage is the chain of 1 to
CHAIN_MOST frames that wastes least per object.  Sizes whose zspages would hold no more
objects than those of a larger class, or cost no less per object, belong to that class: fewer
classes leave fewer zspages half filled.  From the size on that no chain packs better than
one object to a frame, a page is kept raw.

Chosen by measuring: pages per frame x 1000, LZ4, on 16,384 pages of four programs / on
262,144 pages of the same sizes (no waste at all: 2,726 / 2,723):

    chain of at most      4              6              8             12
    spacing  16     2559 / 2587    2592 / 2646    2568 / 2666    2481 / 2678
             32     2559 / 2574    2605 / 2634    2595 / 2653    2556 / 2669
             64     2554 / 2562    2595 / 2615    2597 / 2632    2586 / 2650
            128     2494 / ...     2541 / ...     2544 / ...     2556 / ...

Spacing 32 also keeps each header (24 bytes) in one frame.  The smallest class is 128 bytes:
1.6 % of those pages are smaller, and half as large a table tells what is in use.
"""

import struct

from libc.stdint cimport uint32_t
from libc.string cimport memset

from zcache_core.layout cimport COUNTER_CELLS, PAGE_BYTES
from zcache_core.slots cimport SLOTS

cdef enum:
    # A longer chain must save this much per object, in 1/1000: short ones leave less half filled.
    WORTH_PER_MILLE = 5
    # A class that holds hardly more than one object a frame is not worth its headers.
    LEAST_GAIN_PERCENT = 1


cdef void best_chain(SizeClass *c) noexcept nogil:
    """Frames and objects for c.bytes: the least room per object."""
    cdef uint32_t frames, objects
    c.frames = c.objects = 1
    for frames in range(1, CHAIN_MOST + 1):
        objects = frames * PAGE_BYTES // c.bytes
        if objects > OBJECTS_MOST:
            break
        # frames / objects < c.frames / c.objects, by more than a little
        if frames == 1 or 1000 * frames * c.objects < (1000 - WORTH_PER_MILLE) * c.frames * objects:
            c.frames = frames
            c.objects = objects


cdef void mark_starts(SizeClass *c) noexcept nogil:
    cdef uint32_t i
    memset(c.starts, 0, sizeof(c.starts))
    for i in range(c.objects):
        c.starts[i * c.bytes // PAGE_BYTES] |= <uint32_t>1 << (i * c.bytes % PAGE_BYTES // (PAGE_BYTES // STARTS))


cdef void sizeclasses_make(SizeClasses *classes) noexcept nogil:
    """Fill the table, largest size first."""
    cdef SizeClass c
    cdef SizeClass *last = NULL
    cdef uint32_t size
    memset(classes, 0, sizeof(SizeClasses))
    for size in range(SIZES - 1, LEAST_BYTES // SPACING_BYTES - 1, -1):
        c.bytes = size * SPACING_BYTES
        best_chain(&c)
        if 100 * c.frames > (100 - LEAST_GAIN_PERCENT) * c.objects:
            continue            # raw is as good
        # cheaper per object than the next larger class: a class of its own
        if last == NULL or c.frames * last.objects < last.frames * c.objects:
            mark_starts(&c)
            last = &classes.row[classes.n]
            last[0] = c
            classes.n += 1
        classes.largest_bytes = max(classes.largest_bytes, c.bytes)
        classes.of_size[size] = classes.n - 1
    for size in range(LEAST_BYTES // SPACING_BYTES):
        classes.of_size[size] = classes.n - 1


def size_classes():
    """[(bytes of an object's room, frames of a zspage, objects of a zspage)], by class number."""
    cdef SizeClasses classes
    sizeclasses_make(&classes)
    return [(classes.row[i].bytes, classes.row[i].frames, classes.row[i].objects) for i in range(classes.n)]


def fragmentation(memory):
    """How full zsmalloc's zspages are, of the memory file of a live server.

    [{"bytes", "zspages", "frames", "objects", "places"}] by class, of classes that hold anything:
    bytes of an object's room; zspages and their frames; objects, and places for them.
    """
    cells = memory.counter_cells()
    first = (SLOTS * COUNTER_CELLS + CLASS_CELLS) * 8
    found = []
    for number, (room, frames, places) in enumerate(size_classes()):
        at = first + number * 16
        zspages, objects = struct.unpack_from("<QQ", cells, at)
        if zspages:
            found.append({
                "bytes": room, "zspages": zspages, "frames": zspages * frames, "objects": objects,
                "places": zspages * places,
            })
    return found
