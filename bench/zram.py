"""The kernel's zram, as the measure: pages written to /dev/zram0, and what they cost there.

    mem_used_total   of mm_stat: all pages of zram's own pool (zsmalloc)
    table            its table of pages, 16 bytes for each page of the device, which
                     mem_used_total leaves out

The device is taken for the time of a measurement (an exclusive lock on /dev/zram0), must not
be in use, and is empty afterwards.  Needs root.
Source: Documentation/admin-guide/blockdev/zram.rst.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEVICE = Path("/dev/zram0")
FOLDER = Path("/sys/block/zram0")
TABLE_BYTES = 16
PAGE_BYTES = 4096
PIECE_BYTES = 1 << 20


def algorithms() -> list[str]:
    """Compressors that this kernel's zram has; none where there is no zram to be used."""
    try:
        if not os.access(FOLDER / "reset", os.W_OK) or int((FOLDER / "disksize").read_text()):
            return []
        return (FOLDER / "comp_algorithm").read_text().replace("[", "").replace("]", "").split()
    except OSError:
        return []


@contextmanager
def _taken() -> Iterator[int]:
    fd = os.open(DEVICE, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if int((FOLDER / "disksize").read_text()):
            raise OSError(f"{DEVICE} is in use")
        yield fd
    finally:
        os.close(fd)
        (FOLDER / "reset").write_text("1")


def cost(pages: mmap.mmap, algorithm: str) -> dict[str, int]:
    """Bytes of RAM that zram needs for these pages.  Raises OSError when it cannot be used."""
    with _taken():
        (FOLDER / "comp_algorithm").write_text(algorithm)
        (FOLDER / "disksize").write_text(str(len(pages)))
        fd = os.open(DEVICE, os.O_WRONLY | os.O_DIRECT)
        try:
            view = memoryview(pages)
            for at in range(0, len(pages), PIECE_BYTES):
                os.pwrite(fd, view[at : at + PIECE_BYTES], at)
            os.fsync(fd)
            view.release()
        finally:
            os.close(fd)
        words = (FOLDER / "mm_stat").read_text().split()
        names = ("orig_data_size", "compr_data_size", "mem_used_total", "mem_limit", "mem_used_max",
                 "same_pages", "pages_compacted", "huge_pages")  # fmt: skip
        found = dict(zip(names, map(int, words), strict=False))
        table = len(pages) // PAGE_BYTES * TABLE_BYTES
        return found | {"table": table, "ram_bytes": found["mem_used_total"] + table}
