"""An owner without a store: its peer tier here, its node process, and pages that lie at two nodes.

time_gets --ring--> node process --socket--> zcache node, of two that have a copy
(sealed pages are opened, and checked, before a get is over)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.servers import ROOT
from cluster.peeraddress import PeerAddress
from zcache_core.coldprobe import ColdProbe
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier

PAGE_BYTES = 4096
PUT_PAGES = 64
START_S = 20.0
DISK_BYTES = 16 << 20  # of a disk tier that is made and not used
NODE = """
import asyncio, sys
from cluster.lending import HEAP_BYTES
from cluster.peerring import PeerOptions, PeerSide
from zcache_core.memfile import MemoryFile
from zcache_core.process import keep_heap

async def main():
    fd, wake_fd, shmid = map(int, sys.argv[1:4])
    options = PeerOptions(tuple(sys.argv[5:]), 2, sys.argv[4] or None)
    side = PeerSide(fd, wake_fd, MemoryFile.attach(shmid), options)
    await side.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await side.stop()

keep_heap(HEAP_BYTES)
asyncio.run(main())
"""


class Reading:
    """Pages of these lengths, out at the nodes."""

    def __init__(self, probe: ColdProbe, lengths: Sequence[int]) -> None:
        self._probe = probe
        self._wanted: list[tuple[int, int, int, int]] = []
        for first in range(0, len(lengths), PUT_PAGES):
            batch = [
                (page, page + 1, (length - 1) << 4, os.urandom(length))
                for page, length in enumerate(lengths[first : first + PUT_PAGES], first)
            ]
            for thing, (where, error) in zip(batch, self._put(batch), strict=True):
                assert error == 0, os.strerror(error)
                self._wanted.append((thing[0], thing[1], where, thing[2]))

    def _put(self, batch: list[tuple[int, int, int, bytes]]) -> list[tuple[int, int]]:
        """Again while the nodes are being dialled."""
        deadline = time.monotonic() + START_S
        while True:
            self._probe.tick()
            stored = self._probe.put(batch)
            if not stored[0][1] or time.monotonic() > deadline:
                return stored
            time.sleep(0.02)

    def gets(self, first: int, n: int, seconds: float) -> dict[str, float]:
        """p50_us and p99_us of fetching n pages together."""
        until_us = int((time.monotonic() + seconds) * 1e6)
        took = sorted(self._probe.time_gets(self._wanted[first : first + n], until_us))
        return {
            "requests": len(took),
            "p50_us": took[len(took) // 2] / 1000,
            "p99_us": took[len(took) - 1 - len(took) // 100] / 1000,
        }


@contextmanager
def reading(
    folder: Path, addresses: Sequence[PeerAddress], tls: Path | None, lengths: Sequence[int]
) -> Iterator[Reading]:
    """The owner, with its pages at the nodes; its node process has the certificate in `tls`."""
    memory = MemoryFile.create(None, len(lengths) * PAGE_BYTES, 16 * PAGE_BYTES)
    with open(folder / f"disk-{memory.shmid}", "w+b") as disk:
        disk.truncate(DISK_BYTES)
        probe = ColdProbe(memory, disk.fileno(), DISK_BYTES)
        tier = probe.wrap(lambda _: PeerTier(memory))
        command = [sys.executable, "-c", NODE, str(tier.fd), str(tier.wake_fd), str(memory.shmid)]
        command += [str(tls) if tls else "", *map(str, addresses)]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=(tier.fd, tier.wake_fd)
        ) as process:
            try:
                yield Reading(probe, lengths)
            finally:
                assert process.stdin
                process.stdin.close()
                process.wait(START_S)
    memory.close()
