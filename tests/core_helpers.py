"""What the core's tests share: small memory files and pages of every kind."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager

from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

PAGE = 4096


def make_page(rng: random.Random) -> bytes:
    """One page: zeros, one word, text-like, half random, or incompressible."""
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(PAGE)
    if kind == 1:
        return rng.randbytes(8) * (PAGE // 8)
    if kind == 2:
        return rng.randbytes(PAGE)
    if kind == 3:  # differs from a same-filled page in one byte
        page = bytearray(rng.randbytes(8) * (PAGE // 8))
        page[rng.randrange(PAGE)] ^= 0xFF
        return bytes(page)
    noise = rng.randrange(1, PAGE)
    return rng.randbytes(noise) + bytes(PAGE - noise)


def try_put(store: Store, page: int, data: bytes) -> bool:
    """Put; False when there was no room.  Any other error is raised."""
    try:
        store.put(page, data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


@contextmanager
def opened_store(
    device_bytes: int,
    pool_bytes: int,
    name: str | None = None,
    codec: str = "lz4",
    allocator: str = "zbud",
    tidy: bool = True,
) -> Iterator[Store]:
    """A started store on a memory file of its own; both closed, and the file gone, after."""
    memory = MemoryFile.create(name, device_bytes, pool_bytes)
    store = Store(memory, allocator=allocator, codec=codec, tidy=tidy)
    store.start()
    try:
        yield store
    finally:
        store.stop()
        memory.destroy()
