"""Pages out to donors and back: as many copies as there must be, from whoever has one.

    put   sheaves of pages -> donors by placement -> every copy acknowledged, or none counts
    get   the fastest donor -> none answered in time? the next one too -> the first good copy

Put: a copy that a donor does not take is tried at another one, once; a page that still has too
few keeps none, stays in the owner's RAM and is refused.  What was stored of it is dropped.

Get: a page whose donors are all away is waited for, bounded; one that all its donors say they
have not, or whose donors came back empty, is lost (ENODATA).  A copy that the owner found wrong
(`wrong`) is not asked for again, and renewed (renewal.py).

This is all of it: sockets are behind the Donor protocol, the owner's index behind Ledger, the
clock is the event loop's.  tests/sim runs this code on a simulated clock and network.

Bound: one batch of PUT_GROUPS groups under way, as many gets as the ring has cells; every wait has
an end.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cluster.keyset import KeySet
from cluster.peerwire import BATCH_PAGES, Code, Donor, Page, PeerError, pack, pieces
from cluster.placement import Candidate, choose, room_bytes
from cluster.seats import LIES_MOST, Ledger, Seat, Seats, Standing
from cluster.sheaf import Sheaf

DEVICE = 0  # pages are numbered through all devices of a memory file
PUT_GROUPS = 8


@dataclass(frozen=True)
class Options:
    """How patient one is.  Seconds, bytes a second."""

    copies: int = 2
    hedge_least_s: float = 0.003  # a LAN's answer takes 0.3 ms; a batch's ten times that
    hedge_most_s: float = 0.25
    away_s: float = 3.0  # a get waits so long for a donor to come back
    call_s: float = 2.0  # a call that takes longer has failed
    put_s: float = 0.4  # a put: another donor can have it, and a write may be waiting
    slow_s: float = 1.0  # who was late is asked last for so long
    give_up_s: float = 10.0  # an absent donor's copies are renewed after that
    renew_bytes_per_s: float = 64e6


class Asked(NamedTuple):
    """A page that is asked for; `rows` have copies, those in the bits of `wrong` wrong ones.

    `where`: its address, if it is not only that of the rows (a copy on the owner's disk).
    """

    page: int
    version: int
    length_codec: int
    rows: tuple[int, ...]
    wrong: int = 0
    where: int = 0


class Got(NamedTuple):
    """What became of it: errno 0 and the sealed bytes, from rows[copy]."""

    error: int
    sealed: bytes = b""
    copy: int = 0


class Stored(NamedTuple):
    """What became of a page that was put: the rows that have it, or why none has."""

    rows: tuple[int, ...]
    error: int


class Numbers:
    """Counted since the start."""

    def __init__(self) -> None:
        self.hedged_gets = 0
        self.wrong_copies = 0
        self.absent_copies = 0
        self.renewed_pages = 0
        self.reconciled_drops = 0
        self.short_pages = 0


class Replicas:
    """Puts and gets over the donors of one owner.

    `doubt(page, version, rows, row)` is called when the copy at `row` is not what it should be.
    """

    def __init__(
        self,
        ledger: Ledger,
        seats: Seats,
        rng: random.Random,
        options: Options,
        drop: Callable[[int, Page], None],
        doubt: Callable[[Asked, int], None],
    ) -> None:
        self._ledger, self.seats, self._rng, self.options = ledger, seats, rng, options
        self._drop, self._doubt = drop, doubt
        self.numbers = Numbers()
        self.putting: list[KeySet] = []  # pages in a version on their way out now
        self._answered: list[tuple[int, KeySet]] = []  # and not surely in the index
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()

    # ---- what the owner must know ------------------------------------------------------

    @property
    def room_bytes(self) -> int:
        """What all the copies of new pages find room for; 0 when there are too few donors."""
        return self.room_for(self.options.copies)

    def room_for(self, copies: int) -> int:
        """The same for pages with so many copies."""
        candidates = [seat.candidate() for seat in self.seats.all()]
        return room_bytes([c.free_bytes for c in candidates if c], copies)

    @property
    def live(self) -> int:
        return sum(seat.is_up for seat in self.seats.all())

    def standing(self, seat: Seat) -> Standing:
        return seat.standing(asyncio.get_running_loop().time(), self.options.give_up_s)

    def note_change(self) -> None:
        """A donor came or went: whoever waits for one looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run beside; kept until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End what still runs."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- put ---------------------------------------------------------------------------

    async def put(self, sheaves: Sequence[Sheaf], copies: int = 0) -> list[Stored]:
        """Store these pages, on as many donors as there must be; of each what became of it.

        `copies`: so many instead, because there is another copy on the disk.
        """
        keys = KeySet(b"".join([sheaf.records for sheaf in sheaves]))
        self.putting.append(keys)
        gate = asyncio.Semaphore(PUT_GROUPS)

        async def one(sheaf: Sheaf) -> list[Stored]:
            async with gate:
                return await self._put_group(sheaf, copies or self.options.copies)

        try:
            answers = await asyncio.gather(*(one(sheaf) for sheaf in sheaves))
        finally:
            self.putting.remove(keys)
            self._answered = [one for one in self._answered if not self._is_heard(one[0])]
            self._answered.append((self._ledger.ticks, keys))
        return list(itertools.chain.from_iterable(answers))

    def _is_heard(self, ticks: int) -> bool:
        """Whether what was answered when the owner was at `ticks` is in the index."""
        return self._ledger.ticks >= ticks + 2

    def is_on_its_way(self, key: tuple[int, int]) -> bool:
        """Whether this (page, version) is being put, or was and the index may not know it yet."""
        return self.is_being_put(key) or any(
            key in keys and not self._is_heard(ticks) for ticks, keys in self._answered
        )

    def is_being_put(self, key: tuple[int, int]) -> bool:
        """Whether this (page, version) is on its way out now."""
        return any(key in keys for keys in self.putting)

    async def _put_group(self, group: Sheaf, wanted: int) -> list[Stored]:
        chosen = self.choose_for(group, wanted, ())
        if not chosen:
            return [Stored((), errno.ENOSPC)] * len(group)
        results = await asyncio.gather(*(self.put_at(row, group) for row in chosen))
        if all(len(good) == len(group) for good in results):
            return [Stored(tuple(chosen), 0)] * len(group)  # as nearly always
        return await self._put_rest(group, wanted, chosen, results)

    async def _put_rest(
        self, group: Sheaf, wanted: int, chosen: list[int], results: list[list[int]]
    ) -> list[Stored]:
        """What was refused is tried at others, once; `results`: what the `chosen` took."""
        rows: list[list[int]] = [[] for _ in range(len(group))]
        for row, good in zip(chosen, results, strict=True):
            for i in good:
                rows[i].append(row)
        error = errno.EIO
        missing = [i for i in range(len(group)) if len(rows[i]) < wanted]
        # Pages that have some of their copies need fewer, at donors not tried for any.
        need = wanted - min(len(rows[i]) for i in missing)
        parts = group.some(missing)
        chosen = self.choose_for(parts, need, chosen)
        if not chosen:
            error = errno.ENOSPC
        results = await asyncio.gather(*(self.put_at(row, parts) for row in chosen))
        pages = group.pages()
        for row, good in zip(chosen, results, strict=True):
            for i in good:
                if len(rows[missing[i]]) < wanted:
                    rows[missing[i]].append(row)
                else:
                    self._drop(row, pages[missing[i]])
        answers = []
        for page, have in zip(pages, rows, strict=True):
            if len(have) == wanted:
                answers.append(Stored(tuple(have), 0))
                continue
            for row in have:
                self._drop(row, page)
            answers.append(Stored((), error))
        return answers

    def choose_for(self, sheaf: Sheaf, copies: int, without: Iterable[int]) -> list[int]:
        """Donors for so many new copies of these pages, none of `without`; [] without enough."""
        refused = set(without)
        candidates: list[Candidate] = []
        slow: list[Candidate] = []
        for seat in self.seats.all():
            # A drop that is under way must not meet the same version, put there again.
            if seat.row in refused or seat.dropping.meets(sheaf.records):
                continue
            if (candidate := seat.candidate()) is not None:
                (slow if self._is_slow(seat) else candidates).append(candidate)
        need_bytes = len(sheaf.payload)
        return choose(candidates, copies, need_bytes, self._rng) or choose(
            candidates + slow, copies, need_bytes, self._rng
        )

    def _is_slow(self, seat: Seat) -> bool:
        return seat.slow_until_s > asyncio.get_running_loop().time()

    def is_trusted(self, seat: Seat) -> bool:
        """Whether there is nothing against asking it first."""
        return seat.is_up and seat.lies < LIES_MOST and not self._is_slow(seat)

    def patience_s(self, seat: Seat) -> float:
        """So long it may take to answer before another is asked as well: four usual exchanges."""
        usual_us = seat.donor.latency_us if seat.donor is not None else 0.0
        return min(self.options.hedge_most_s, max(self.options.hedge_least_s, 4e-6 * usual_us))

    def was_late(self, row: int, pages: int) -> None:
        """A get that was asked there by somebody else (courier) took too long: others are asked."""
        self.numbers.hedged_gets += pages
        if (seat := self.seats.get(row)) is not None:
            self._note_slow(seat)

    def _note_slow(self, seat: Seat) -> None:
        seat.slow_until_s = asyncio.get_running_loop().time() + self.options.slow_s

    async def put_at(self, row: int, sheaf: Sheaf) -> list[int]:
        """Which of the pages are at that donor now, by their places; a failure is none."""
        seat = self.seats.get(row)
        if seat is None or seat.donor is None:
            return []
        size = len(sheaf.payload)
        seat.reserved_bytes += size
        try:
            async with seat.puts, asyncio.timeout(self.options.put_s):
                codes = await seat.donor.put(sheaf.records, sheaf.payload)
        except (PeerError, TimeoutError):
            self._note_slow(seat)
            # Nothing is known about them: they may be there.
            for page in sheaf.pages():
                self._drop(row, page)
            return []
        finally:
            seat.reserved_bytes -= size
        if seat.empty:
            return []
        if not any(codes):
            return list(range(len(codes)))
        return [i for i, code in enumerate(codes) if code == Code.OK]

    # ---- get ---------------------------------------------------------------------------

    async def get(self, asked: Sequence[Asked]) -> list[Got]:
        """Pages that have the same rows and the same wrong ones; what became of each."""
        rows, wrong = asked[0].rows, asked[0].wrong
        assert all(a.rows == rows and a.wrong == wrong for a in asked)
        self._note_wrong(asked)
        found: dict[int, Got] = {}
        absent: dict[int, set[int]] = {i: set() for i in range(len(asked))}
        until = asyncio.get_running_loop().time() + self.options.away_s
        while True:
            await self._ask_round(asked, found, absent)
            missing = [i for i in range(len(asked)) if i not in found]
            if not missing:
                break
            for i in missing:
                if all(self._has_not(row, n, wrong, absent[i]) for n, row in enumerate(rows)):
                    # ENODATA only when no copy can ever be had: then the page is lost, unless it
                    # changed meanwhile, and they were dropped for that.  The server sees which.
                    found[i] = Got(errno.EIO if wrong else errno.ENODATA)
            left = until - asyncio.get_running_loop().time()
            if len(found) == len(asked) or left <= 0 or asked[0].where:
                break  # (what is on the disk too is not waited for)
            try:
                async with asyncio.timeout(min(left, 0.1)):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return [found.get(i, Got(errno.EIO)) for i in range(len(asked))]

    def _has_not(self, row: int, place: int, wrong: int, absent: set[int]) -> bool:
        """Whether the copy at that row is gone for good (a wrong one counts as gone)."""
        seat = self.seats.get(row)
        # (A row that nobody is known for is somebody's who may come back: never lost.)
        return bool(wrong >> place & 1) or row in absent or (seat is not None and seat.empty)

    def _note_wrong(self, asked: Sequence[Asked]) -> None:
        for one in asked:
            for place, row in enumerate(one.rows):
                if one.wrong >> place & 1:
                    self.numbers.wrong_copies += 1
                    if (seat := self.seats.get(row)) is not None:
                        seat.lies += 1
                    self._doubt(one, row)

    async def _ask_round(
        self, asked: Sequence[Asked], found: dict[int, Got], absent: dict[int, set[int]]
    ) -> None:
        """Ask each live donor of them in turn, the next one when the last is late or has it not."""
        rows, wrong = asked[0].rows, asked[0].wrong
        order = self._order([row for n, row in enumerate(rows) if not wrong >> n & 1])
        running: dict[asyncio.Task[list[bytes | None] | None], tuple[int, list[int]]] = {}
        while True:
            missing = [i for i in range(len(asked)) if i not in found]
            if not missing:
                break
            if order and not running:
                self._start(order.pop(0), missing, asked, running)
            if not running:
                break
            wait_s = self._hedge_s(running) if order else None
            done, _ = await asyncio.wait(
                running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                self.numbers.hedged_gets += len(missing)
                for row, _ in running.values():
                    if (late := self.seats.get(row)) is not None:
                        self._note_slow(late)
                self._start(order.pop(0), missing, asked, running)
            for task in [task for task in running if task in done]:  # in the order they began
                row, places = running.pop(task)
                sealed = task.result()
                for n, i in enumerate(places):
                    data = sealed[n] if sealed is not None else None
                    if data is not None and i not in found:
                        found[i] = Got(0, data, rows.index(row))
                    elif sealed is not None and data is None:
                        self.numbers.absent_copies += 1
                        absent[i].add(row)
                        self._doubt(asked[i], row)

    def _start(
        self,
        row: int,
        places: list[int],
        asked: Sequence[Asked],
        running: dict[asyncio.Task[list[bytes | None] | None], tuple[int, list[int]]],
    ) -> None:
        task = self.spawn(self.get_at(row, [asked[i] for i in places]))
        running[task] = (row, places)

    def _order(self, rows: Iterable[int]) -> list[int]:
        """The rows that answer: believed and fast ones first.

        Who was wrong once is asked as before: the next lies show what it is.
        """
        live = [seat for row in rows if (seat := self.seats.get(row)) is not None and seat.is_up]
        live.sort(
            key=lambda seat: (
                seat.lies >= LIES_MOST,
                self._is_slow(seat),
                seat.donor.latency_us if seat.donor else 0.0,
            )
        )
        return [seat.row for seat in live]

    def _hedge_s(self, running: dict[Any, tuple[int, list[int]]]) -> float:
        """So long the slowest that was asked may take: four of its usual exchanges."""
        found = [self.seats.get(row) for row, _ in running.values()]
        patience = [self.patience_s(seat) for seat in found if seat is not None]
        return max(patience, default=self.options.hedge_least_s)

    async def get_at(self, row: int, asked: Sequence[Asked]) -> list[bytes | None] | None:
        """Sealed bytes of each page, None where the donor has it not; None: it did not answer."""
        seat = self.seats.get(row)
        if seat is None or seat.donor is None:
            return None
        answers: list[bytes | None] = []
        try:
            async with asyncio.timeout(self.options.call_s):
                for first in range(0, len(asked), BATCH_PAGES):
                    records = pack(
                        Page(DEVICE, a.page, a.version, a.length_codec)
                        for a in asked[first : first + BATCH_PAGES]
                    )
                    async with seat.gets:
                        codes, payload = await seat.donor.get(records)
                    answers += pieces(records, codes, payload)
        except (PeerError, TimeoutError):
            return None
        return None if seat.empty else answers


__all__ = ["Asked", "Donor", "Got", "Options", "Replicas", "Stored"]
