"""What the core's tests share: small memory files and pages of every kind."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

PAGE = 4096
ROOT = Path(__file__).resolve().parent.parent


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


COUNTS_MALLOC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
static unsigned long calls, large;
unsigned long malloc_calls(void) { return __atomic_load_n(&calls, __ATOMIC_SEQ_CST); }
unsigned long malloc_large_calls(void) { return __atomic_load_n(&large, __ATOMIC_SEQ_CST); }
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
static void count(size_t n)
{
    __atomic_fetch_add(&calls, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&large, n > 256, __ATOMIC_SEQ_CST);
}
void *malloc(size_t n) { count(n); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { count(n * m); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { count(n); return __libc_realloc(p, n); }
"""


def run_counting_malloc(folder: Path, script: str, *words: str) -> None:
    """Run a script that has `malloc_calls` and `malloc_large_calls`; it must end well."""
    source, library = folder / "count.c", folder / "count.so"
    source.write_text(COUNTS_MALLOC)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT, env={"LD_PRELOAD": str(library), "PYTHONMALLOC": "pymalloc"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
