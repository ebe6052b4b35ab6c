"""What goes on behind puts and gets: drops told, copies renewed, leaks found.

    dropped by the owner ----> a queue for each donor ----> told in batches
    donor LOST, copy wrong --> the pages that count on it, from the index --> a copy elsewhere
    donor back after a gap --> what it holds, compared with the index --> what is too much is
                               dropped, what is missing renewed

Renewing reads a page from a good copy, puts it at another donor, and has the owner told
(`moved`): the entry is changed there by one compare-and-swap, so that an overwrite in between
wins.  It never goes faster than `renew_bytes_per_s`, and counts what is left to do.

A page none of whose donors has it any more is lost, unless the owner has it in RAM still: the owner
is told that no copy counts, and keeps it there.

A page that has one copy here and one on the owner's disk is not for us to read where its donor is
lost: the owner is told that the copy is gone, and makes one from the disk.  One whose donor only
wants to be rid of it is moved, as others are.  While the disk fails, and when a page has lost its
copy there, it gets as many here as others have.

Comparing must not take a page for dead whose put or move is just on its way into the index.
So nothing is dropped that is being put or renewed, and the index is asked only after
the owner said twice (`ticks`) that all that was answered is in it.

Bound: DROPS_KEPT drops a donor; more are forgotten, and found by comparing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.peerwire import RECORD_BYTES, RECORDS_MOST, Donor, Page, PeerError, pack, unpack
from cluster.replicas import DEVICE, Asked, Options, Replicas
from cluster.seats import Copy, Ledger, Seat, Seats, Standing
from cluster.sheaf import Sheaf
from zcache_core.ringside import is_backed, rows_of_where, where_of_rows

DROPS_KEPT = 65536
LOOK_PAGES = 1 << 18  # of the index at a time: 1 ms
RENEW_PAGES = 32
DOUBTED_MOST = 4096
RETRY_S = 1.0  # what could not be renewed is tried again


class Renewal:
    """The background work of one owner."""

    def __init__(self, ledger: Ledger, seats: Seats, replicas: Replicas, options: Options) -> None:
        self._ledger, self._seats, self._replicas = ledger, seats, replicas
        self._options = options
        self._drops: dict[int, bytearray] = {}  # records
        self._unsure: dict[tuple[int, int], tuple[Copy, set[int]]] = {}  # recalled, or absent
        self._telling: set[int] = set()
        self.to_compare: set[int] = set()  # rows whose donor may hold what nobody needs
        self._comparing: set[int] = set()
        self._doubted: dict[tuple[int, int], tuple[Copy, set[int]]] = {}
        self.renewing: set[tuple[int, int]] = set()
        self._unheard: list[tuple[int, set[tuple[int, int]]]] = []
        self._next_look_s = 0.0
        self._working = False
        self._spent_until_s = 0.0

    # ---- drops ---------------------------------------------------------------------------

    def drop(self, row: int, page: Page) -> None:
        """This copy at that donor is not needed any more."""
        self.drop_all(row, pack([page]))

    def drop_all(self, row: int, records: bytes) -> None:
        """The same of many copies (records, peerwire)."""
        seat = self._seats.get(row)
        if seat is None or seat.empty:
            return
        queue = self._drops.setdefault(row, bytearray())
        room = DROPS_KEPT * RECORD_BYTES - len(queue)
        if len(records) > room:
            self.to_compare.add(row)
            records = records[:room]
        seat.dropping.add(records)
        queue += records

    async def _tell_drops(self, seat: Seat) -> None:
        """All that are queued for one donor; what it does not hear is found by comparing."""
        queue = self._drops[seat.row]
        try:
            while queue and seat.is_up and seat.donor is not None:
                batch = bytes(queue[: RECORDS_MOST * RECORD_BYTES])
                del queue[: len(batch)]
                try:
                    async with asyncio.timeout(self._options.call_s):
                        await seat.donor.drop(batch)
                except (PeerError, TimeoutError):
                    self.to_compare.add(seat.row)
                finally:
                    seat.dropping.remove(batch)
        finally:
            self._telling.discard(seat.row)

    # ---- doubts --------------------------------------------------------------------------

    def doubt(self, asked: Asked, row: int) -> None:
        """The copy at `row` is wrong or not there: it is to be renewed."""
        key = asked.page, asked.version
        doubted = self._doubted if asked.wrong >> asked.rows.index(row) & 1 else self._unsure
        if len(doubted) < DOUBTED_MOST or key in doubted:
            where = asked.where or where_of_rows(asked.rows)
            copy = (asked.page, asked.version, where, asked.length_codec)
            doubted.setdefault(key, (copy, set()))[1].add(row)

    def recall(self, donor: Donor, pages: Sequence[Page]) -> None:
        """A donor asks to be rid of pages: their copies there go elsewhere."""
        seat = self._seats.of(donor)
        if seat is None:
            return
        for page in pages:
            found, _ = self._ledger.pages(page.page, 1, 1)
            if found and found[0][1] == page.version and len(self._unsure) < DOUBTED_MOST:
                key = page.page, page.version
                self._unsure.setdefault(key, (found[0], set()))[1].add(seat.row)

    # ---- the round -------------------------------------------------------------------------

    def look(self, now_s: float) -> None:
        """Start what is to be done now; called every 0.1 s or so."""
        for row, queue in list(self._drops.items()):
            seat = self._seats.get(row)
            if seat is None or seat.empty:
                if seat is not None:
                    seat.dropping.remove(bytes(queue))  # the row's next one has none of them
                del self._drops[row]
            elif queue and seat.is_up and row not in self._telling:
                self._telling.add(row)
                self._replicas.spawn(self._tell_drops(seat))
        for row in list(self.to_compare):
            seat = self._seats.get(row)
            if seat is None or seat.empty:
                self.to_compare.discard(row)
            elif seat.is_up and row not in self._comparing and not self._drops.get(row):
                self.to_compare.discard(row)
                self._comparing.add(row)
                self._replicas.spawn(self._compare(seat))
        ticks = self._ledger.ticks
        while self._unheard and self._unheard[0][0] + 1 < ticks:
            self.renewing -= self._unheard.pop(0)[1]
        copies = self._ledger.copies()
        lost = [s.row for s in self._seats.all() if self._is_lost(s) and copies[s.row]]
        self._replicas.numbers.short_pages = sum(
            copies[s.row]
            for s in self._seats.all()
            if self._replicas.standing(s) is not Standing.LIVE
        )
        due = lost or self._doubted or self._unsure or self._is_unsafe()
        if not self._working and now_s >= self._next_look_s and due:
            self._working = True
            self._replicas.spawn(self._renew(set(lost)))

    def _is_lost(self, seat: Seat) -> bool:
        return self._replicas.standing(seat) is Standing.LOST

    # ---- renewing --------------------------------------------------------------------------

    async def _renew(self, lost: set[int]) -> None:
        loop = asyncio.get_running_loop()
        try:
            doubted, self._doubted = list(self._doubted.values()), {}
            for first in range(0, len(doubted), RENEW_PAGES):
                for copy, rows in doubted[first : first + RENEW_PAGES]:
                    await self._renew_pages([copy], rows)
            unsure, self._unsure = list(self._unsure.values()), {}
            for copy, rows in unsure:
                await self._renew_pages([copy], rows, unsure=True)
            at = 0
            unsafe = self._is_unsafe()
            while (lost or unsafe) and at < self._ledger.device_pages:
                n = min(LOOK_PAGES, self._ledger.device_pages - at)
                found, at = self._ledger.pages(at, n, 512)
                hit = [
                    copy
                    for copy in found
                    if lost & set(rows_of_where(copy[2]))
                    or (unsafe and len(rows_of_where(copy[2])) < self._wanted(copy[2]))
                ]
                for first in range(0, len(hit), RENEW_PAGES):
                    piece = hit[first : first + RENEW_PAGES]
                    alike: dict[tuple[tuple[int, ...], bool], list[Copy]] = {}
                    for copy in piece:
                        key = rows_of_where(copy[2]), is_backed(copy[2])
                        alike.setdefault(key, []).append(copy)
                    for group in alike.values():
                        await self._renew_pages(group, lost)
                await asyncio.sleep(0)
        finally:
            again = lost or self._doubted or self._unsure or self._is_unsafe()
            self._next_look_s = loop.time() + (RETRY_S if again else 0.2)
            self._working = False

    def _is_unsafe(self) -> bool:
        """Whether pages may have one copy in all, and there are donors for another."""
        return self._ledger.unsafe and self._replicas.room_bytes > 0

    def _wanted(self, where: int) -> int:
        """How many copies here a page at this address is to have."""
        beside = is_backed(where) and not self._ledger.disk_fails
        return 1 if beside else self._options.copies

    async def _renew_pages(
        self, group: Sequence[Copy], bad: set[int], unsure: bool = False
    ) -> None:
        """New copies in place of those at `bad` rows, of pages with the same kind of address.

        unsure: what is at `bad` was never seen to be wrong: it was recalled, or was not there, but
        has perhaps been put there since.  Then both copies are read, and the page stays as it is if
        they differ: one of them is a lie, and only the owner can tell which.
        """
        rows, where = rows_of_where(group[0][2]), group[0][2]
        good = [row for row in rows if row not in bad]
        if len(good) >= self._wanted(where):
            return
        if not (good or is_backed(where)):
            self._keep(group)
            return
        group = [c for c in group if not self._is_busy(c) and self._is_current(c)]
        keys = {(copy[0], copy[1]) for copy in group}
        self.renewing |= keys
        try:
            await self._pace(sum((copy[3] >> 4) + 25 for copy in group))
            if not good:
                keys -= await self._leave(group, rows)
                return
            wrong = sum(1 << n for n, row in enumerate(rows) if row in bad)
            parts = await self._read(group, rows, wrong)
            if parts and unsure:
                every = (1 << len(rows)) - 1
                theirs = dict(await self._read(group, rows, every ^ wrong))
                parts = [(copy, data) for copy, data in parts if theirs.get(copy, data) == data]
            if parts:
                keys -= await self._replace(parts, rows, good)
        finally:
            self.renewing -= keys  # the others are in it until the owner has heard

    def _keep(self, group: Sequence[Copy]) -> None:
        """No donor has these any more: those that are in RAM too stay there."""
        for copy in group:
            if not self._is_busy(copy) and self._ledger.in_ram(copy):
                self._ledger.gone(copy)  # (no room for the note: the next round finds it again)

    async def _leave(self, group: Sequence[Copy], rows: tuple[int, ...]) -> set[tuple[int, int]]:
        """Pages on the owner's disk leave their donor: moved if it has them, else told gone."""
        seat = self._seats.get(rows[0])
        told: set[tuple[int, int]] = set()
        if seat is not None and seat.is_up and not seat.lies:
            parts = await self._read(group, rows, 0)
            if parts:
                told = await self._replace(parts, rows, [])
        gone = {
            (copy[0], copy[1])
            for copy in group
            if (copy[0], copy[1]) not in told and self._ledger.gone(copy)
        }
        if gone:
            self._unheard.append((self._ledger.ticks, gone))
        return told | gone

    def _is_busy(self, copy: Copy) -> bool:
        """Whether it is just being renewed or put."""
        key = copy[0], copy[1]
        return key in self.renewing or self._replicas.is_being_put(key)

    def _is_current(self, copy: Copy) -> bool:
        """Whether the index still has this copy at this address."""
        return self._ledger.pages(copy[0], 1, 1)[0] == [copy]

    async def _read(
        self, group: Sequence[Copy], rows: tuple[int, ...], wrong: int
    ) -> list[tuple[Copy, bytes]]:
        """The pages that a good copy could be read of."""
        parts: dict[int, bytes] = {}
        for place, row in enumerate(rows):
            missing = [i for i in range(len(group)) if i not in parts]
            if wrong >> place & 1 or not missing:
                continue
            answers = await self._replicas.get_at(row, [asked_of(group[i], rows) for i in missing])
            found = zip(missing, answers or [], strict=False)
            parts |= {i: sealed for i, sealed in found if sealed is not None}
        return [(group[i], sealed) for i, sealed in parts.items()]

    async def _replace(
        self, parts: list[tuple[Copy, bytes]], rows: tuple[int, ...], good: list[int]
    ) -> set[tuple[int, int]]:
        """Put the pages at new donors and tell the owner; those that are told."""
        told: set[tuple[int, int]] = set()
        flat = Sheaf.of([(c[0], c[1], c[3], sealed) for c, sealed in parts])
        need = self._wanted(parts[0][0][2]) - len(good)
        again = [row for row in rows if row not in good and self._may_have_again(row, flat)]
        again = again if good else []  # (it is to be rid of them)
        new = again[:need]
        new += self._replicas.choose_for(flat, need - len(new), rows) if need > len(new) else []
        have: list[list[int]] = [list(good) for _ in parts]
        for row in new:
            for i in await self._replicas.put_at(row, flat):
                have[i].append(row)
        for (copy, _), now in zip(parts, have, strict=True):
            if len(now) == len(good):
                continue
            self._replicas.numbers.renewed_pages += 1
            if set(now) == set(rows):
                continue  # where the index says
            if self._ledger.moved(copy, where_of_rows(now)):
                told.add((copy[0], copy[1]))
            else:
                for row in now[len(good) :]:
                    if row not in rows:
                        self.drop(row, Page(DEVICE, copy[0], copy[1], copy[3]))
        if told:
            self._unheard.append((self._ledger.ticks, told))
        return told

    def _may_have_again(self, row: int, flat: Sheaf) -> bool:
        """Whether a donor that has lost pages, and answers, is given them once more."""
        seat = self._seats.get(row)
        if seat is None or seat.lies or seat.candidate() is None:
            return False
        return not seat.dropping.meets(flat.records)

    async def _pace(self, n_bytes: int) -> None:
        """Wait until so many bytes more are within the limit."""
        now_s = asyncio.get_running_loop().time()
        self._spent_until_s = max(self._spent_until_s, now_s)
        wait_s = self._spent_until_s - now_s
        self._spent_until_s += n_bytes / self._options.renew_bytes_per_s
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    # ---- comparing -------------------------------------------------------------------------

    async def _compare(self, seat: Seat) -> None:
        """Drop what the donor holds and the index does not count on."""
        donor = seat.donor
        held_pages = bytearray(self._ledger.device_pages // 8 + 1)
        try:
            cursor: int | None = 0
            while cursor is not None and donor is not None and seat.is_up:
                async with asyncio.timeout(self._options.call_s):
                    cursor, records = await donor.reconcile(cursor)
                held = unpack(records)
                for page in held:
                    if page.page < self._ledger.device_pages:
                        held_pages[page.page >> 3] |= 1 << (page.page & 7)
                suspects = [page for page in held if not self._is_needed(seat, page)]
                if suspects and await self._settled():
                    for page in suspects:
                        if not self._is_needed(seat, page):
                            self.drop(seat.row, page)
                            self._replicas.numbers.reconciled_drops += 1
            await self._find_missing(seat, held_pages)
        except (PeerError, TimeoutError):
            self.to_compare.add(seat.row)
        finally:
            self._comparing.discard(seat.row)

    async def _find_missing(self, seat: Seat, held_pages: bytearray) -> None:
        """Doubt the copies that the index counts on and the donor, asked again, has not."""
        at = 0
        while at < self._ledger.device_pages and seat.is_up:
            n = min(LOOK_PAGES, self._ledger.device_pages - at)
            found, at = self._ledger.pages(at, n, 512)
            missing = [
                asked_of(copy, rows_of_where(copy[2]))
                for copy in found
                if not held_pages[copy[0] >> 3] >> (copy[0] & 7) & 1
                and seat.row in rows_of_where(copy[2])
            ]
            for first in range(0, len(missing), RENEW_PAGES):
                piece = missing[first : first + RENEW_PAGES]
                answers = await self._replicas.get_at(seat.row, piece)
                for asked, sealed in zip(piece, answers or [], strict=False):
                    if sealed is None:
                        self.doubt(asked, seat.row)
            await asyncio.sleep(0)

    def _is_needed(self, seat: Seat, page: Page) -> bool:
        key = page.page, page.version
        if key in seat.dropping or key in self.renewing or self._replicas.is_on_its_way(key):
            return True
        return self._ledger.counts_on(page.page, page.version, seat.row)

    async def _settled(self) -> bool:
        """Wait until all that was answered before now is in the index; False: not in time."""
        start = self._ledger.ticks
        for _ in range(100):
            if self._ledger.ticks >= start + 2:
                return True
            await asyncio.sleep(0.1)
        return False


def asked_of(copy: Copy, rows: tuple[int, ...]) -> Asked:
    """A copy as it is asked for."""
    return Asked(copy[0], copy[1], copy[3], rows, 0, copy[2] if is_backed(copy[2]) else 0)
