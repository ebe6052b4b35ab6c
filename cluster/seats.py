"""Who is behind the numbers in the addresses: donors and the rows they sit on.

    peers= -> Donor objects --hello--> name and epoch --note--> row of the donor table
    row -> LIVE (answers), AWAY (does not, yet), LOST (came back empty, lies, or away too long)

A row is a donor and the epoch of its memory.  The same donor with another epoch is another
row: what stood at the old one is gone.  A row is given to somebody else only when no address
counts on it.  A donor that is away is waited for GIVE_UP_S, then its copies are renewed
elsewhere; should it come back, what is still counted on there is used again.

Two machines with one certificate, or two addresses of one machine, would be one donor that is
empty each time the other is asked, or one that has both copies.  The second of them is a twin:
not used, and said so.

What it is not: what moves pages (replicas.py, renewal.py).  No clock of its own: time comes in.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cluster.keyset import KeySet
from cluster.peerwire import Donor, Health, LinkState
from cluster.placement import Candidate

ID_BYTES = 16
ASK_S = 1.0  # for a row, again: the server hears notes ten times a second
LIES_MOST = 3  # wrong copies, then a donor is believed in nothing
Copy = tuple[int, int, int, int]  # page, version, where, length_codec


Identity = Callable[[Donor], str]  # what tells donors apart, also after a restart of either


class Ledger(Protocol):
    """What the server and its memory file know: the donor table and which copies count."""

    device_pages: int

    @property
    def ticks(self) -> int:
        """Grows when all that was answered and told before its last value is in the index."""

    def rows(self) -> dict[int, tuple[bytes, int]]:
        """The donor table: row -> (id, epoch)."""

    def copies(self) -> Sequence[int]:
        """How many copies the index counts on, by row."""

    def name_row(self, row: int, donor_id: bytes, epoch: int) -> bool:
        """Ask for a row to be this donor; it is when `rows` says so."""

    @property
    def disk_fails(self) -> bool:
        """Whether the copy on a disk that some pages have beside one here may not be had now."""

    @property
    def unsafe(self) -> bool:
        """Whether there may be pages with one copy, here or (the disk fails) in all."""

    def moved(self, copy: Copy, new: int) -> bool:
        """The page's copies are at address `new` from now on.  False: no room, tell it later."""

    def gone(self, copy: Copy) -> bool:
        """Of a page in RAM or on the disk too: no copy here counts.  False: tell it later."""

    def in_ram(self, copy: Copy) -> bool:
        """Whether the page is in RAM too."""

    def pages(self, first: int, n: int, most: int) -> tuple[list[Copy], int]:
        """Copies counted on among pages first .. first + n - 1, and where to go on."""

    def counts_on(self, page: int, version: int, row: int) -> bool:
        """Whether the index counts on this copy, or may do."""


class Standing(enum.Enum):
    """Of a row."""

    LIVE = enum.auto()
    AWAY = enum.auto()
    LOST = enum.auto()


@dataclass
class Seat:
    """One donor as long as it has one epoch."""

    row: int
    donor: Donor | None  # None: nobody of that name has been met since the start
    since_s: float  # when it was last seen, or we started
    who: tuple[bytes, int] = (b"", 0)  # id and epoch, as the donor table has them
    lies: int = 0
    empty: bool = False  # the donor of that name has another epoch now
    slow_until_s: float = 0.0  # it kept somebody waiting: not chosen until then if others can be
    reserved_bytes: int = 0  # of what is on its way there
    dropping: KeySet = field(default_factory=KeySet)  # pages in a version, not yet told
    link: Donor | None = None  # where it was met last, whoever answers there now
    # Of CALLS_MOST calls of a connection; one each is left for drops, comparing and pings.
    puts: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))
    gets: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(9))

    @property
    def is_up(self) -> bool:
        return (
            self.donor is not None
            and not self.empty
            and self.donor.state in (LinkState.UP, LinkState.SUSPECT)
        )

    @property
    def is_suspect(self) -> bool:
        """It is up as far as is known, but an answer is overdue."""
        return self.is_up and self.donor is not None and self.donor.state is LinkState.SUSPECT

    def standing(self, now_s: float, give_up_s: float) -> Standing:
        if self.empty or self.lies >= LIES_MOST:
            return Standing.LOST
        if self.is_up:
            return Standing.LIVE
        return Standing.LOST if now_s - self.since_s > give_up_s else Standing.AWAY

    def candidate(self) -> Candidate | None:
        """What it may be given, or None."""
        donor = self.donor
        if donor is None or self.empty or self.lies >= LIES_MOST or not donor.is_listed:
            return None
        if donor.state is not LinkState.UP or donor.offer.health is not Health.OK:
            return None
        free = max(0, donor.offer.room_bytes - self.reserved_bytes)
        total = donor.offer.room_bytes + donor.offer.held_bytes
        return Candidate(self.row, free, total, donor.latency_us)


class Twin(NamedTuple):
    """`donor` is not used: it has the certificate of `other`, or (`same`) is that very one."""

    donor: Donor
    other: Donor
    same: bool


def donor_id(name: str) -> bytes:
    """A donor's name as the donor table has it."""
    return hashlib.blake2b(name.encode(), digest_size=ID_BYTES).digest()


class Seats:
    """All rows, and the donors that were met."""

    def __init__(
        self, ledger: Ledger, donors: Iterable[Donor], now_s: float, identity: Identity
    ) -> None:
        self._identity = identity
        self._ledger, self._donors, self._started_s = ledger, list(donors), now_s
        self._seats: dict[int, Seat] = {}
        self._asked: dict[tuple[bytes, int], float] = {}
        self.twins: list[Twin] = []
        self.refresh(now_s)

    def all(self) -> list[Seat]:
        return list(self._seats.values())

    def get(self, row: int) -> Seat | None:
        return self._seats.get(row)

    def of(self, donor: Donor) -> Seat | None:
        """The seat of a donor that is known under its present epoch."""
        for seat in self._seats.values():
            if seat.donor is donor and not seat.empty:
                return seat
        return None

    def add(self, donor: Donor) -> None:
        """One that was found; it has a seat when it has said who it is."""
        self._donors.append(donor)

    def remove(self, donor: Donor) -> None:
        """Its seat, if it has one, is nobody's until one of that name is met again."""
        self._donors.remove(donor)
        for seat in self._seats.values():
            if seat.donor is donor:
                seat.donor = None

    def refresh(self, now_s: float) -> None:
        """Look again who sits where; ask for rows for those who have none."""
        table = self._ledger.rows()
        met = self._meet()
        for row in [row for row in self._seats if row not in table]:
            del self._seats[row]
        for row, (name, epoch) in table.items():
            seat = self._seats.get(row)
            if seat is None:
                seat = self._seats[row] = Seat(row, None, self._started_s, (name, epoch))
            elif seat.who != (name, epoch):  # the row is another's; drops may still wait for it
                seat = self._seats[row] = Seat(
                    row, None, now_s, (name, epoch), dropping=seat.dropping
                )
            self._asked.pop((name, epoch), None)
            donor_met = met.get(name)
            if donor_met is not None and donor_met.epoch == epoch:
                seat.donor, seat.since_s, seat.empty = donor_met, now_s, False
                seat.link = donor_met
            elif donor_met is not None:
                seat.empty = True
                seat.donor = None
        known = set(table.values())
        for name, donor in met.items():
            if (name, donor.epoch) not in known:
                self._ask_for_row(name, donor.epoch, table, now_s)

    def _meet(self) -> dict[bytes, Donor]:
        """Who is there, by id; `twins` are who is not to be used."""
        self.twins = []
        links = {seat.who[0]: seat for seat in self._seats.values() if self._is_met(seat)}
        met: dict[bytes, Donor] = {}
        epochs: dict[int, Donor] = {}
        there = [
            d for d in self._donors if d.epoch and d.state in (LinkState.UP, LinkState.SUSPECT)
        ]
        # Who sits already first: it must not lose its seat to the other one.
        sitting = {id(seat.donor) for seat in self._seats.values() if not seat.empty}
        for donor in sorted(there, key=lambda donor: id(donor) not in sitting):
            name = donor_id(self._identity(donor))
            seat = links.get(name)
            if (first := epochs.setdefault(donor.epoch, donor)) is not donor:
                self.twins.append(Twin(donor, first, True))
            elif (other := met.get(name)) is not None:
                self.twins.append(Twin(donor, other, False))
            elif seat is not None and seat.link is not donor and seat.who[1] != donor.epoch:
                assert seat.link is not None
                self.twins.append(Twin(donor, seat.link, False))
            else:
                met[name] = donor
        return met

    def _is_met(self, seat: Seat) -> bool:
        """Whether pages are counted on at a donor whose place in peers= is known."""
        return seat.link is not None and not seat.empty and self._ledger.copies()[seat.row] > 0

    def _ask_for_row(
        self, name: bytes, epoch: int, table: dict[int, tuple[bytes, int]], now_s: float
    ) -> None:
        # (who was not heard is not waited for, and keeps no row from the others)
        self._asked = {who: s for who, s in self._asked.items() if now_s - s < ASK_S}
        if (name, epoch) in self._asked:
            return
        copies = self._ledger.copies()
        pending = len(self._asked)
        free = [row for row in range(len(copies)) if row not in table]
        free += [
            row
            for row, seat in self._seats.items()
            if copies[row] == 0 and not seat.is_up and not seat.reserved_bytes
        ]
        if pending < len(free) and self._ledger.name_row(free[pending], name, epoch):
            self._asked[name, epoch] = now_s
