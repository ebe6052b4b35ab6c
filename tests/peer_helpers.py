"""A node process in a thread, over the ring, with donors that are dicts and do as they are told."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Iterable
from typing import Any

from cluster.peerwire import unpack
from cluster.sheaf import Part, Sheaf
from zcache_core import ringside
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.ringside import Batch, RingSide, Wanted, is_backed, rows_of_where, where_of_rows

Key = tuple[int, int, int]  # row, page, version


def parts_of(batch: Batch) -> list[Part]:
    """Its pages."""
    return [part for records, payload in batch.pages for part in Sheaf(records, payload)]


class FakeNode:
    """Attached until `die`; its donors outlive it: give `held` to the next one."""

    def __init__(
        self,
        tier: PeerTier,
        memory: MemoryFile,
        donors: int = 3,
        held: dict[Key, bytes] | None = None,
        absent: Iterable[int] = (),
    ) -> None:
        self.ring = RingSide(tier.fd, tier.wake_fd)
        self.memory, self.donors = memory, donors
        self.held = {} if held is None else held
        self.room_bytes = 1 << 40
        self.copies = 2
        self.lock = threading.Lock()
        self.put_error = 0  # all puts fail with it
        self.spoil: set[int] = set()  # rows that answer with other bytes
        self.absent = set(absent)  # rows that answer nothing
        self.suspect: set[int] = set()  # rows whose answers are overdue
        self.rows = list(range(donors))  # of the donors as they are now
        self.silent = False  # takes and never answers
        self.wrong_seen = 0
        self.turn = 0
        self.dead = False
        known = ringside.donors(memory)
        for row in range(donors):
            if row not in known:
                assert self.ring.donor(row, bytes([row + 1] * 16), 7)
        self.ring.publish(True, self.room_bytes, donors, 0, 0, 0, self.room_bytes)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.dead:
            if select.select([self.ring.wake_fd], [], [], 0.02)[0]:
                os.read(self.ring.wake_fd, 8)
            self.ring.beat()
            if self.silent:
                continue
            with self.lock:
                self._tell_rows()
                self._serve()
        self.ring.close()

    def _tell_rows(self) -> None:
        for row in self.rows:
            self.ring.tell_row(row, None if row in self.suspect else row not in self.absent)

    def _serve(self) -> None:
        for wanted in self.ring.gets():
            self._answer(wanted)
        batch = self.ring.batch()  # before the drops, as cluster/peerring.py says
        for row, records in self.ring.drops(1 << 20) or ():
            for gone in unpack(records):
                self.held.pop((row, gone.page, gone.version), None)
        if batch is not None:
            answers: list[tuple[tuple[int, ...], int]] = []
            known = ringside.donors(self.memory)
            for page, version, _, sealed in parts_of(batch):
                self.turn += 1
                if self.put_error:
                    answers.append(((), self.put_error))
                    continue
                alive = [row for row in self.rows if row not in self.absent and row in known]
                n = batch.copies or self.copies
                if len(alive) < n:
                    answers.append(((), errno.ENOSPC))
                    continue
                rows = [alive[(self.turn + i) % len(alive)] for i in range(n)]
                for row in rows:
                    self.held[row, page, version] = sealed
                answers.append((tuple(rows), 0))
            self._tell_rows()  # before pages are counted on there, as cluster/peerring.py does
            self.ring.answer_batch(batch.turn, answers)

    def _answer(self, wanted: Wanted) -> None:
        self.wrong_seen += wanted.wrong.bit_count()
        for place, row in enumerate(rows_of_where(wanted.where)):
            sealed = self.held.get((row, wanted.page, wanted.version))
            if wanted.wrong >> place & 1 or row in self.absent or sealed is None:
                continue
            if row in self.spoil:
                sealed = bytes([sealed[0] ^ 1]) + sealed[1:]
            self.ring.answer_get(wanted, 0, sealed, place)
            return
        self.ring.answer_get(wanted, errno.EIO if wanted.wrong else errno.ENODATA)

    def publish(self, ready: bool = True) -> None:
        self.ring.publish(ready, self.room_bytes, self.donors, 0, 0, 0, self.room_bytes)

    def lose(self, row: int) -> None:
        """A donor is gone for good; the owner is told, as renewal does."""
        with self.lock:
            self.absent.add(row)
            for key in [key for key in self.held if key[0] == row]:
                del self.held[key]
        pages = self.memory.device_bytes // 4096
        while self.ring.copies()[row]:
            with self.lock:
                found, _ = ringside.pages_on_peers(self.memory, 0, pages, pages)
                for page, version, where, length_codec in found:
                    rows = rows_of_where(where)
                    if row not in rows:
                        continue
                    if is_backed(where):
                        self.ring.gone(page, version, length_codec, where)
                        continue
                    [good] = [r for r in rows if r != row]
                    [new] = [r for r in range(self.donors) if r not in rows]
                    self.held[new, page, version] = self.held[good, page, version]
                    self.ring.moved(page, version, length_codec, where, where_of_rows([good, new]))
            wait_until(self.ring.heard, "it is heard")

    def restart_donors_empty(self) -> None:
        """All at once, with other epochs: who they are from now on is in other rows."""
        with self.lock:
            old, self.rows = self.rows, [row + self.donors for row in self.rows]
            for row in old:
                self.ring.tell_row(row, False)
            for row in self.rows:
                assert self.ring.donor(row, bytes([row % self.donors + 1] * 16), 7 + row)
            self.held.clear()

    def tell_gone(self) -> None:
        """As renewal does: of pages in RAM that no donor has."""
        pages = self.memory.device_bytes // 4096
        with self.lock:
            found, _ = ringside.pages_on_peers(self.memory, 0, pages, pages)
            for page, version, where, length_codec in found:
                if not set(rows_of_where(where)) & set(self.rows):
                    self.ring.gone(page, version, length_codec, where)

    def die(self) -> None:
        """As a killed process: what it had taken stays taken."""
        self.dead = True
        self._thread.join()


def wait_until(condition: Any, what: str, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited in vain until {what}"
        time.sleep(0.002)
