"""zcache's compiled core: memory file, index, allocators, codecs, store, device.

It knows no sockets, no nbdkit and no event loop.  Floors and locks are told in
`docs/architecture.md`; the memory format in `docs/memory-format.md`.
"""

__version__ = "0.1.0"

# Most pages that each allocator puts into a frame, however well they compress.
PAGES_PER_FRAME = {"zbud": 2, "z3fold": 3, "zsmalloc": 32}
