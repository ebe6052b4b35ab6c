"""A gate: memory at which whoever touches it first stands still until the test lets it go on.

    gate = Gate(2)                                  two pages that are not there yet
    thread: device.pread(None, gate.memory, 0)      stops inside of the decompression
    gate.wait_for(0)                                until it has
    ... what a race would need luck for ...
    gate.open(0)                                    the page is there; the thread goes on

So a request is held at a known place in compiled code that knows nothing of it: a read
where it writes what it has decompressed, a write where it looks at what it was given.
A page let go of with bytes of its own (`open(0, data)`) is what a writer then reads.

The kernel does it: userfaultfd(2), of faults in user mode only, which needs no right.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import select
import struct
from types import TracebackType
from typing import Self

import pytest

PAGE = 4096
WAIT_S = 30.0
NUMBER = {"x86_64": 323, "aarch64": 282}  # of the system call
USER_MODE_ONLY = 1
API, FEATURES_NONE, MISSING = 0xAA, 0, 1
IOCTL_API, IOCTL_REGISTER, IOCTL_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
MESSAGE = struct.Struct("<B7xQQ8x")  # struct uffd_msg of a page fault: event, flags, address
PAGEFAULT = 0x12


def _userfaultfd() -> int:
    call = ctypes.CDLL(None, use_errno=True).syscall
    fd = call(NUMBER.get(platform.machine(), -1), os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY)
    if fd < 0:
        pytest.skip(f"userfaultfd is refused here ({os.strerror(ctypes.get_errno())})")
    return int(fd)


class Gate:
    """`memory`: a writable view of `pages` pages, each closed until `open`."""

    def __init__(self, pages: int) -> None:
        self._fd = _userfaultfd()
        self._map = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._closed = set(range(pages))
        fcntl.ioctl(self._fd, IOCTL_API, struct.pack("<3Q", API, FEATURES_NONE, 0))
        area = struct.pack("<4Q", self._address, pages * PAGE, MISSING, 0)
        fcntl.ioctl(self._fd, IOCTL_REGISTER, area)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for page in sorted(self._closed):  # nobody stays behind, whatever went wrong
            self.open(page)
        os.close(self._fd)

    def wait_for(self, page: int) -> None:
        """Return when somebody stands at this page."""
        assert select.select([self._fd], [], [], WAIT_S)[0], "nobody came to the gate"
        event, _, address = MESSAGE.unpack(os.read(self._fd, MESSAGE.size))
        assert event == PAGEFAULT
        assert (address - self._address) // PAGE == page

    def reached(self, seconds: float) -> bool:
        """Whether somebody touches a closed page within this time."""
        return bool(select.select([self._fd], [], [], seconds)[0])

    def open(self, page: int, data: bytes = bytes(PAGE)) -> None:
        """Put these 4096 bytes there, and let everybody go on."""
        assert len(data) == PAGE
        source = ctypes.create_string_buffer(data, PAGE)
        where = self._address + page * PAGE
        fcntl.ioctl(
            self._fd, IOCTL_COPY, struct.pack("<5Q", where, ctypes.addressof(source), PAGE, 0, 0)
        )
        self._closed.discard(page)
