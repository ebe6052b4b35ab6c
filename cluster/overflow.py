"""The owner's side of the peers, put together: seats, replicas and renewal over one ledger.

    ring or simulation --put, get, drop--> Overflow --> Donor objects
                                              `-- look, every LOOK_S: who is there, what to do

What it is not: what reads the ring (peerring.py), or what has sockets (peerlink.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import Callable, Iterable, Sequence

from cluster.peerwire import Donor, LinkState, Page, unpack
from cluster.renewal import Renewal
from cluster.replicas import Asked, Got, Options, Replicas, Stored
from cluster.seats import LIES_MOST, Identity, Ledger, Seats
from cluster.sheaf import Sheaf, sheaves_of

LOOK_S = 0.1
COMPARE_S = 600.0  # what donors lost, or hold for nobody, is found within that time


class Overflow:
    """Everything that one owner does with its donors.  Made inside a running event loop."""

    def __init__(
        self,
        ledger: Ledger,
        donors: Iterable[Donor],
        rng: random.Random,
        options: Options,
        identity: Identity = lambda donor: donor.name,
    ) -> None:
        self._ledger, self.options = ledger, options
        self.donors = list(donors)
        loop = asyncio.get_running_loop()
        self.seats = Seats(ledger, self.donors, loop.time(), identity)
        self.replicas = Replicas(ledger, self.seats, rng, options, self._drop, self._doubt)
        self.renewal = Renewal(ledger, self.seats, self.replicas, options)
        self.on_rows: Callable[[], None] = lambda: None  # some `rows_met` are others now
        self._were_up: set[int] = set()
        self._next_compare_s = loop.time() + COMPARE_S
        for donor in self.donors:
            self._hear(donor)
        self._task: asyncio.Task[None] | None = None

    def _hear(self, donor: Donor) -> None:
        donor.on_state = self._on_state
        donor.on_recall = self._on_recall

    def add(self, donor: Donor) -> None:
        """One donor more, found while we run."""
        self._hear(donor)
        self.donors.append(donor)
        self.seats.add(donor)

    def remove(self, donor: Donor) -> None:
        """A donor that has nothing of ours, and is gone."""
        self.donors.remove(donor)
        self.seats.remove(donor)

    def copies(self) -> Sequence[int]:
        """How many copies the owner counts on, by row."""
        return self._ledger.copies()

    def start(self) -> None:
        """Begin to look after donors."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.replicas.close()

    async def _run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Who is there now, and what is to be done about it."""
        now_s = asyncio.get_running_loop().time()
        self.seats.refresh(now_s)
        up = {seat.row for seat in self.seats.all() if seat.is_up}
        self.renewal.to_compare |= up - self._were_up
        if now_s >= self._next_compare_s:
            self._next_compare_s = now_s + COMPARE_S
            self.compare_all()
        self._were_up = up
        self.renewal.look(now_s)

    # ---- what the owner asks ---------------------------------------------------------------

    async def put(self, sheaves: Sequence[Sheaf], copies: int = 0) -> list[Stored]:
        """Store sealed pages; the rows that have each, or an errno.

        Not those that are being renewed: when the owner hears where they went, and that it was too
        late, it drops them there, and this copy could be the one that is dropped.
        """
        busy = self.renewal.renewing
        if not busy or all(busy.isdisjoint(sheaf.keys) for sheaf in sheaves):
            return await self.replicas.put(sheaves, copies)
        parts = [part for sheaf in sheaves for part in sheaf]
        free = [part for part in parts if (part[0], part[1]) not in busy]
        places = {(part[0], part[1]) for part in free}
        stored = iter(await self.replicas.put(sheaves_of(free), copies) if free else ())
        later = Stored((), errno.EIO)
        return [next(stored) if (part[0], part[1]) in places else later for part in parts]

    def forget(self, sheaves: Sequence[Sheaf], stored: Sequence[Stored]) -> None:
        """Nobody took note of what was stored: drop it."""
        pages = [page for sheaf in sheaves for page in sheaf.pages()]
        for page, where in zip(pages, stored, strict=True):
            for row in where.rows:
                self._drop(row, page)

    async def get(self, asked: Sequence[Asked]) -> list[Got]:
        """Pages with the same rows and the same wrong copies."""
        return await self.replicas.get(asked)

    def drop(self, copies: Iterable[tuple[int, bytes]]) -> None:
        """Copies that the owner does not need any more: (row, records) each."""
        for row, records in copies:
            self.renewal.drop_all(row, records)

    def compare_all(self) -> None:
        """Drops went missing on the way to us: look at all donors for what nobody needs."""
        self.renewal.to_compare |= {seat.row for seat in self.seats.all()}

    @property
    def room_bytes(self) -> int:
        return self.replicas.room_bytes

    def rows_met(self) -> dict[int, bool | None]:
        """Row -> whether its donor answers, with what it had; of those met since the start.

        None: an answer is overdue.  Many donors lose their power together: until it is known,
        nothing leaves the server's RAM for their copies, nor are these given up (but a process
        that begins anew meanwhile may give them up, where RAM has the page).
        """
        return {
            seat.row: None
            if seat.lies < LIES_MOST and seat.is_suspect
            else seat.is_up and seat.lies < LIES_MOST
            for seat in self.seats.all()
            if seat.is_up or seat.empty or seat.link is not None
        }

    # ---- what donors tell ------------------------------------------------------------------

    def _drop(self, row: int, page: Page) -> None:
        self.renewal.drop(row, page)

    def _doubt(self, asked: Asked, row: int) -> None:
        self.renewal.doubt(asked, row)

    def _on_state(self, donor: Donor) -> None:
        self.seats.refresh(asyncio.get_running_loop().time())
        if donor.state is LinkState.UP:
            seat = self.seats.of(donor)
            if seat is not None:
                self.renewal.to_compare.add(seat.row)
        self.replicas.note_change()
        self.on_rows()

    def _on_recall(self, donor: Donor, records: bytes, seconds: float) -> None:
        self.renewal.recall(donor, unpack(records))
