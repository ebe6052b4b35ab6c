"""The codec alone: what a compiled loop over the same pages takes, with nothing around it.

The other side of every goal that speaks of "the codec's own time".  On a machine whose two cores
are two threads of one, two loops at once are not twice as fast as one, so `together` runs as many
loops as there are cores and adds up what they get done.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from zcache_core.codec import Codec

PAGE_BYTES = 4096
PIECE_PAGES = 32
PIECES_TIMED = 128
TOGETHER_PAGES = 1024
TOGETHER_COMPRESS_ROUNDS = 8
TOGETHER_DECOMPRESS_ROUNDS = 40
"""Long enough (some 40 ms) that the loops' own preparations, one after the other, hardly count."""


@dataclass(frozen=True)
class CodecTimes:
    """us per page: mean, and of the piece of 32 pages in the middle; pages/s of all cores."""

    compress_us: float
    decompress_us: float
    compress_p50_us: float
    decompress_p50_us: float
    compress_together_per_s: float
    decompress_together_per_s: float


class BareLoops:
    """Bare loops over `pages` (whole 4 KiB pages)."""

    def __init__(self, pages: memoryview, text: str = "lz4") -> None:
        self.cores = len(os.sched_getaffinity(0))
        self._pages = pages
        self._codecs = [Codec(text) for _ in range(self.cores)]

    def measure(self) -> CodecTimes:
        one = self._codecs[0]
        count = len(self._pages) // PAGE_BYTES
        return CodecTimes(
            compress_us=1e6 * one.time_compress(self._pages) / count,
            decompress_us=1e6 * one.time_decompress(self._pages) / count,
            compress_p50_us=self._middle(one.time_compress),
            decompress_p50_us=self._middle(one.time_decompress),
            compress_together_per_s=self._together(
                [codec.time_compress for codec in self._codecs], TOGETHER_COMPRESS_ROUNDS
            ),
            decompress_together_per_s=self._together(
                [codec.time_decompress for codec in self._codecs], TOGETHER_DECOMPRESS_ROUNDS
            ),
        )

    def _middle(self, timed: Callable[[memoryview], float]) -> float:
        piece_bytes = PIECE_PAGES * PAGE_BYTES
        pieces = len(self._pages) // piece_bytes
        step = max(1, pieces // PIECES_TIMED)
        spent: list[float] = [
            timed(self._pages[n * piece_bytes : (n + 1) * piece_bytes])
            for n in range(0, pieces, step)
        ]
        return statistics.median(spent) * 1e6 / PIECE_PAGES

    def _together(self, loops: list[Callable[[memoryview, int], float]], rounds: int) -> float:
        pages = min(TOGETHER_PAGES, len(self._pages) // PAGE_BYTES)
        part = self._pages[: pages * PAGE_BYTES]
        with ThreadPoolExecutor(len(loops)) as threads:
            spent = list(threads.map(lambda loop: loop(part, rounds), loops))
        return sum((pages * rounds / seconds for seconds in spent), 0.0)
