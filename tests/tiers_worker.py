"""A client of a store over a faulty disk, and what may go wrong there: for the model tests.

Each client has pages of its own and a dict of what they must hold, so that every answer
can be judged at once, whatever the others, the cooling thread and the disk are doing.
"""

from __future__ import annotations

import errno
import random
import threading
import time

from tests.core_helpers import PAGE, make_page
from tests.tiers_helpers import Cold, errno_of
from zcache_core.device import Device

THREADS = 4


class Worker(threading.Thread):
    """One client: pages number % THREADS == its own, and what they must hold."""

    def __init__(
        self, cold: Cold, device: Device, own: int, pages: int, seed: int, steps: int = 1 << 62
    ) -> None:
        super().__init__()
        self.cold, self.device, self.pages = cold, device, range(own, pages, THREADS)
        self.rng = random.Random(seed)
        self.model: dict[int, bytes] = {}
        # Whether a fault may make a read fail now, and how often that has changed.
        self.steps_left = steps
        self.may_fail = threading.Event()
        self.changes = 0
        self.stopping = threading.Event()
        self.problem = ""
        self.refused = self.unreadable = 0
        self.longest_s = 0.0
        self.excused = 0, False

    def run(self) -> None:
        try:
            while not self.stopping.is_set() and self.steps_left:
                self.steps_left -= 1
                start = time.monotonic()
                self.excused = self.changes, self.may_fail.is_set()
                self.step(self.rng.choice(self.pages))
                self.longest_s = max(self.longest_s, time.monotonic() - start)
        except BaseException as error:  # told by the test
            self.problem = repr(error)

    def step(self, page: int) -> None:
        dice = self.rng.random()
        if dice < 0.45:
            self.write(page)
        elif dice < 0.85:
            self.read(page)
        elif dice < 0.95:
            self.write_part(page)
        else:
            self.device.trim(None, PAGE, page * PAGE, 0)
            self.model.pop(page, None)

    def write(self, page: int) -> None:
        data = make_page(self.rng)
        error = errno_of(self.device.pwrite, None, data, page * PAGE, 0)
        assert error != errno.EIO, "a whole page needs nothing from below"
        self.refused += error != 0
        if not error:
            self.model[page] = data

    def write_part(self, page: int) -> None:
        start = self.rng.randrange(PAGE)
        part = self.rng.randbytes(self.rng.randrange(1, PAGE - start + 1))
        error = errno_of(self.device.pwrite, None, part, page * PAGE + start, 0)
        if error:
            self.failed(page, error)
            return
        old = self.model.get(page, bytes(PAGE))
        self.model[page] = old[:start] + part + old[start + len(part) :]

    def read(self, page: int) -> None:
        data = bytearray(PAGE)
        error = errno_of(self.device.pread, None, data, page * PAGE, 0)
        if error:
            self.failed(page, error)
        else:
            assert data == self.model.get(page, bytes(PAGE)), f"page {page} is wrong"

    def failed(self, page: int, error: int) -> None:
        if error == errno.EIO:
            self.unreadable += 1
            # From the request's start to now there was a fault, or there is a lost copy.
            excused = self.excused != (self.changes, False)
            assert excused or page in self.cold.faulty.lost().values(), (
                f"page {page} cannot be read, and nobody spoiled it"
            )
        else:
            self.refused += 1

    def expect_failures(self, now: bool) -> None:
        """Before a fault is set, and after it is gone."""
        if now:
            self.may_fail.set()
        else:
            self.may_fail.clear()
        self.changes += 1


FAULTS: tuple[dict[str, int], ...] = (
    {},
    {"put_fail": 1000, "put_errno": errno.EIO},
    {"put_fail": 1000, "put_errno": errno.ENOSPC},
    {"put_fail": 300},
    {"put_delay_us": 700_000},
    {"put_delay_us": 2_000_000},
    {"get_delay_us": 3_000},
    {"spoil": 200},
    {"get_fail": 200},
    {"lose": 5},
    {"put_fail": 100, "spoil": 50, "get_fail": 50, "lose": 1, "get_delay_us": 500},
)
