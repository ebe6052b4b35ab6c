"""zcache's compiled core: memory file, index, allocators, codecs, store, device.

It knows no sockets, no nbdkit and no event loop.  Floors and locks are told in
`docs/architecture.md`; the memory format in `docs/memory-format.md`.
"""

__version__ = "0.1.0"
