"""Bad cables between network namespaces: frames late, lost, or none at all, as told.

    tap in one namespace --frames--> this process --frames--> tap in the other
                                      | "0 delay_ms loss_percent cut" on standard input
                                      '-> for cable 0, both ways, from now on

What `tc netem` does, where the kernel has no netem: real TCP on both sides, and every frame in our
hands.  Run as `python -m tests.cable SEED A B [A B ...]` with a pair of tap descriptors for each
cable; ends with its standard input.

Bound: MOST_FRAMES under way; more are lost, as in any switch.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000
FRAME_BYTES = 2048
MOST_FRAMES = 4096


def open_tap(name: str) -> int:
    """A new tap device in the caller's network namespace; it goes with the descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


@dataclass
class State:
    """How a cable is."""

    delay_s: float = 0.0
    loss: float = 0.0
    cut: bool = False


def main(argv: list[str]) -> int:
    rng = random.Random(int(argv[0]))
    fds = [int(word) for word in argv[1:]]
    other = {fd: fds[n ^ 1] for n, fd in enumerate(fds)}
    states = [State() for _ in fds[::2]]
    state_of = {fd: states[n // 2] for n, fd in enumerate(fds)}
    late: list[tuple[float, int, int, bytes]] = []  # when, in what order, to whom, what
    number = 0
    while True:
        wait_s = max(0.0, late[0][0] - time.monotonic()) if late else None
        for fd in select.select([0, *fds], [], [], wait_s)[0]:
            if fd == 0:
                line = sys.stdin.readline()
                if not line:
                    return 0
                at, delay_ms, loss_percent, cut = (int(word) for word in line.split())
                states[at].delay_s, states[at].loss = delay_ms / 1e3, loss_percent / 100
                states[at].cut = bool(cut)
                continue
            with suppress(OSError):
                frame = os.read(fd, FRAME_BYTES)
                state = state_of[fd]
                if state.cut or rng.random() < state.loss or len(late) >= MOST_FRAMES:
                    continue
                number += 1
                heapq.heappush(late, (time.monotonic() + state.delay_s, number, other[fd], frame))
        now = time.monotonic()
        while late and late[0][0] <= now:
            _, _, to, frame = heapq.heappop(late)
            with suppress(OSError):
                os.write(to, frame)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
