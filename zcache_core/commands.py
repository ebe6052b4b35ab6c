"""Commands to a running server: 16 bytes each, through a pipe that its steward reads.

    byte 0         8            16
    +--------------+-------------+
    | command u64  | value u64   |   the machine's byte order: both ends are this machine
    +--------------+-------------+

A write of so few bytes to a pipe is atomic (pipe(7), PIPE_BUF), so commands are read
whole.  There is no answer: who sent one reads the counters (draining, high_percent,
low_percent, pool_set_frames, writeback_limit_bytes, allocator, recompress_level,
recompress_age_s), which the server sets when it has obeyed, or sees refused_commands grow.
No Python runs there for it.
"""

from __future__ import annotations

import struct

from zcache_core import PAGES_PER_FRAME

COMMAND = struct.Struct("=QQ")
DRAIN = 1  # value 1: move everything below, 0: no longer
WATERMARKS = 2  # value: high << 32 | low, both in percent of the pool; both at once
POOL = 3  # value: frames of 4096 bytes
WRITEBACK_LIMIT = 4  # value: bytes a day, 0: no limit
ALLOCATOR = 5  # value: its number in ALLOCATORS
RECOMPRESS = 6  # value: zstd's level (0: none) << 32 | age in seconds; both at once


def drain(on: bool) -> bytes:
    """The command that switches draining on or off."""
    return COMMAND.pack(DRAIN, on)


def watermarks(high: int, low: int) -> bytes:
    """The command that sets both watermarks; 0 < low <= high <= 100."""
    assert 0 < low <= high <= 100
    return COMMAND.pack(WATERMARKS, high << 32 | low)


def pool(frames: int) -> bytes:
    """The command that gives the pool another limit."""
    assert 0 < frames < 1 << 32
    return COMMAND.pack(POOL, frames)


def writeback_limit(day_bytes: int) -> bytes:
    """The command that lets so much be written to the disk in a day; 0: no limit."""
    assert 0 <= day_bytes < 1 << 63
    return COMMAND.pack(WRITEBACK_LIMIT, day_bytes)


def allocator(number: int) -> bytes:
    """The command that sends new pages to another allocator, and old ones after them."""
    assert 0 <= number < len(PAGES_PER_FRAME)
    return COMMAND.pack(ALLOCATOR, number)


def recompress(level: int, age_s: int) -> bytes:
    """The command that has pages cold for so long recompressed by zstd; level 0: no more."""
    assert 0 <= level <= 19
    assert 0 < age_s < 1 << 32
    return COMMAND.pack(RECOMPRESS, level << 32 | age_s)
