"""A server that lies, to see that the lab notices: an nbdkit plugin, RAM that forgets.

    nbdkit python bad_server.py size=SIZE every=N

It stores what it gets, and answers every Nth read of a page (of SAFE_BYTES and beyond, so that the
swap header stays right) with one bit turned over.  Size in bytes.  No more than a test's tool: a
bytearray under the GIL.
"""

from __future__ import annotations

from typing import Any

API_VERSION = 2
PAGE_BYTES = 4096
SAFE_BYTES = 1 << 20

_size_bytes = 0
_every = 1
_reads = 0
_memory = bytearray()


def config(key: str, value: str) -> None:
    global _size_bytes, _every
    if key == "size":
        _size_bytes = int(value)
    elif key == "every":
        _every = int(value)
    else:
        raise RuntimeError(f"unknown key {key}")


def get_ready() -> None:
    global _memory
    _memory = bytearray(_size_bytes)


def open(readonly: bool) -> int:
    return 1


def get_size(h: int) -> int:
    return _size_bytes


def pread(h: int, buf: Any, offset: int, flags: int) -> None:
    global _reads
    buf[:] = _memory[offset : offset + len(buf)]
    if offset >= SAFE_BYTES:
        _reads += 1
        if _reads % _every == 0:
            buf[17] ^= 1


def pwrite(h: int, buf: Any, offset: int, flags: int) -> None:
    _memory[offset : offset + len(buf)] = buf
