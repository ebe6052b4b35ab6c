"""The simulated world: donors with memories, links that fail, an owner's index, a model.

    Owner (index of pages, as the C core's) -- Overflow (the real code) -- Link -- Machine
             |                                                            faults from the seed
             `-- model: what each page is, in which version

A Machine keeps what it acknowledged until it is killed (then it comes back empty, with another
epoch) or dropped.  A Link imitates peerlink: it takes time, loses answers, hangs, breaks.
A machine that lies answers with other bytes, or with an older version's.

The bytes of a page are made of its page and version, so that everybody can tell what is right
and nobody has to remember it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Sequence

from cluster.overflow import Overflow
from cluster.peerwire import (
    SEAL_BYTES,
    Changed,
    Code,
    Donor,
    Health,
    LinkState,
    Offer,
    Page,
    PeerError,
    Recall,
    pack,
    sealed_bytes,
    unpack,
)
from cluster.replicas import Asked, Options
from cluster.seats import Copy, donor_id
from cluster.sheaf import sheaves_of
from zcache_core.ringside import rows_of_where, where_of_rows

ROWS = 96
GONE = 0  # no address: in a note, that no copy counts any more


def bytes_of(page: int, version: int, length_codec: int) -> bytes:
    """What the sealed page is."""
    word = (page << 32 ^ version * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    n = sealed_bytes(length_codec)
    return (word.to_bytes(8, "little") * (n // 8 + 1))[:n]


class Machine:
    """A donor's memory."""

    def __init__(self, name: str, capacity_bytes: int) -> None:
        self.name, self.capacity_bytes = name, capacity_bytes
        self.epoch = int.from_bytes(donor_id(name)[:6], "little")  # nobody else's
        self.held: dict[int, tuple[int, int, bytes]] = {}  # page -> version, length_codec, bytes
        self.held_bytes = 0
        self.is_up = True
        self.health = Health.OK
        self.lies = False

    def restart_empty(self) -> None:
        self.held.clear()
        self.held_bytes = 0
        self.epoch += 1

    def offer(self) -> Offer:
        room = max(0, self.capacity_bytes - self.held_bytes)
        return Offer(room if self.health is Health.OK else 0, self.held_bytes, self.health)

    def put(self, page: Page, sealed: bytes) -> Code:
        old = self.held.get(page.page)
        if old is not None and old[0] > page.version:
            return Code.OK  # a late one: nobody will ask for it
        freed = len(old[2]) if old else 0
        if self.held_bytes - freed + len(sealed) > self.capacity_bytes:
            return Code.FULL
        if self.health is not Health.OK:
            return Code.LEAVING
        self.held[page.page] = page.version, page.length_codec, sealed
        self.held_bytes += len(sealed) - freed
        return Code.OK

    def get(self, page: Page) -> bytes | None:
        old = self.held.get(page.page)
        if old is None or old[0] != page.version or old[1] != page.length_codec:
            return None
        return bytes(len(old[2])) if self.lies else old[2]

    def drop(self, page: Page) -> bool:
        old = self.held.get(page.page)
        if old is None or old[0] != page.version:
            return False
        del self.held[page.page]
        self.held_bytes -= len(old[2])
        return True

    def has(self, page: int, version: int) -> bool:
        """Whether a right copy is really there."""
        old = self.held.get(page)
        return old is not None and old[0] == version and not self.lies


class Link:
    """What an owner has of one machine: imitates peerlink's states and failures."""

    def __init__(self, machine: Machine, rng: random.Random, latency_s: float) -> None:
        self.machine, self._rng, self._latency_s = machine, rng, latency_s
        self.name = f"address of {machine.name}"
        self.state = LinkState.CONNECTING
        self.epoch = 0
        self.is_listed = True
        self.offer = Offer(0, 0, Health.SHORT)
        self.latency_us = 0.0
        self.on_recall: Recall | None = None
        self.on_state: Changed | None = None
        self.on_offer: Changed | None = None
        self.is_cut = False  # the network between
        self.hangs = False
        self.loss = 0.0  # chance that an answer is lost, after the deed
        self.calls = 0

    def _become(self, state: LinkState) -> None:
        if state is not self.state:
            self.state = state
            if self.on_state is not None:
                self.on_state(self)

    async def keep(self) -> None:
        """Dial and measure, for ever."""
        while True:
            if self.is_cut or not self.machine.is_up:
                self._become(LinkState.DOWN)
            elif self.state is not LinkState.UP and not self.hangs:
                await asyncio.sleep(self._latency_s * 3)
                if not (self.is_cut or self.hangs) and self.machine.is_up:
                    self.name, self.epoch = self.machine.name, self.machine.epoch
                    self.offer = self.machine.offer()
                    self.latency_us = self._latency_s * 1e6
                    self._become(LinkState.UP)
            elif self.state is LinkState.UP:
                if self.machine.epoch != self.epoch:
                    self._become(LinkState.DOWN)
                self.offer = self.machine.offer()
                self._recall()
            await asyncio.sleep(0.1)

    def _recall(self) -> None:
        """A machine that is drained asks for its pages to be taken back, again and again."""
        if self.machine.health is Health.DRAINING and self.on_recall is not None:
            held = self.machine.held
            pages = [Page(0, p, held[p][0], held[p][1]) for p in sorted(held)[:64]]
            if pages:
                self.on_recall(self, pack(pages), 10.0)

    async def _exchange(self) -> None:
        """The way there: raises when it does not get there."""
        self.calls += 1
        if self.state not in (LinkState.UP, LinkState.SUSPECT):
            raise PeerError(self.name, "away")
        await asyncio.sleep(self._latency_s * self._rng.uniform(0.5, 2.0))
        waited = 0.0
        while self.hangs and waited < 5:
            if waited > 0.3:
                self._become(LinkState.SUSPECT)
            await asyncio.sleep(0.1)
            waited += 0.1
        if self.is_cut or self.hangs or not self.machine.is_up or self.machine.epoch != self.epoch:
            self._become(LinkState.DOWN)
            raise PeerError(self.name, "broken")
        if self.state is LinkState.SUSPECT:
            self._become(LinkState.UP)

    def _way_back(self) -> None:
        if self._rng.random() < self.loss:
            self._become(LinkState.DOWN)
            raise PeerError(self.name, "the answer was lost")
        self.offer = self.machine.offer()

    async def put(self, records: bytes, payload: bytes) -> bytes:
        await self._exchange()
        codes, at = [], 0
        for page in unpack(records):
            n = sealed_bytes(page.length_codec)
            codes.append(self.machine.put(page, payload[at : at + n]))
            at += n
        assert at == len(payload)
        self._way_back()
        return bytes(codes)

    async def get(self, records: bytes) -> tuple[bytes, bytes]:
        await self._exchange()
        found = [self.machine.get(page) for page in unpack(records)]
        self._way_back()
        codes = bytes(Code.OK if data is not None else Code.ABSENT for data in found)
        return codes, b"".join(data for data in found if data is not None)

    async def drop(self, records: bytes) -> int:
        await self._exchange()
        dropped = sum(self.machine.drop(page) for page in unpack(records))
        self._way_back()
        return dropped

    async def reconcile(self, cursor: int) -> tuple[int | None, bytes]:
        await self._exchange()
        pages = sorted(self.machine.held)[cursor : cursor + 256]
        held = [Page(0, p, self.machine.held[p][0], self.machine.held[p][1]) for p in pages]
        self._way_back()
        return (cursor + 256 if len(pages) == 256 else None), pack(held)

    async def ping(self) -> None:
        await self._exchange()
        self._way_back()


class Owner:
    """The owner's index and model: page -> version, and None (in RAM) or an address."""

    def __init__(self, pages: int) -> None:
        self.device_pages = pages
        self.index: dict[int, tuple[int, int | None, int]] = {}  # version, where, length_codec
        self.table: dict[int, tuple[bytes, int]] = {}
        self.copies_of = [0] * ROWS
        self.notes: list[tuple[Copy, int]] = []
        self.wanted_rows: list[tuple[int, bytes, int]] = []
        self.ticks = 0
        self.disk_fails = self.unsafe = False
        self.next_version = 1
        self.overflow: Overflow | None = None
        self.dropped: list[Copy] = []
        self.keeps_ram = False  # what has left keeps its RAM copy, until `drop_ram`
        self.ram: set[int] = set()  # pages that are below, and in RAM too
        self.rescued = 0
        self.is_cooling = False  # a batch is on its way, or answered and not yet in the index

    # ---- the Ledger -------------------------------------------------------------------

    def rows(self) -> dict[int, tuple[bytes, int]]:
        return dict(self.table)

    def copies(self) -> Sequence[int]:
        return list(self.copies_of)

    def name_row(self, row: int, name: bytes, epoch: int) -> bool:
        self.wanted_rows.append((row, name, epoch))
        return True

    def moved(self, copy: Copy, new: int) -> bool:
        if len(self.notes) >= 4096:
            return False
        self.notes.append((copy, new))
        return True

    def gone(self, copy: Copy) -> bool:
        assert self.in_ram(copy), "no page of this owner is on a disk"
        return self.moved(copy, GONE)

    def in_ram(self, copy: Copy) -> bool:
        entry = self.index.get(copy[0])
        return entry is not None and entry[0] == copy[1] and copy[0] in self.ram

    def pages(self, first: int, n: int, most: int) -> tuple[list[Copy], int]:
        found: list[Copy] = []
        page = first
        while page < first + n and len(found) < most:
            entry = self.index.get(page)
            if entry is not None and entry[1] is not None:
                found.append((page, entry[0], entry[1], entry[2]))
            page += 1
        return found, page

    def counts_on(self, page: int, version: int, row: int) -> bool:
        entry = self.index.get(page)
        if entry is None or entry[0] != version or entry[1] is None:
            return False
        return row in rows_of_where(entry[1])

    # ---- what the core does -------------------------------------------------------------

    def count(self, where: int, sign: int) -> None:
        for row in rows_of_where(where):
            self.copies_of[row] += sign
            assert self.copies_of[row] >= 0

    def write(self, page: int, length_codec: int) -> None:
        """A new version, in RAM."""
        self.leave(page)
        self.index[page] = self.next_version, None, length_codec
        self.next_version += 1

    def leave(self, page: int) -> None:
        """The page's content is another from now on: what is below is dropped."""
        entry = self.index.pop(page, None)
        self.ram.discard(page)
        if entry is not None and entry[1] is not None:
            self.count(entry[1], -1)
            self.dropped.append((page, entry[0], entry[1], entry[2]))

    def tick(self) -> None:
        """Hear what the node told, as peers.pyx does; tell it what was dropped."""
        notes, self.notes = self.notes, []
        for (page, version, old, length_codec), new in notes:
            entry = self.index.get(page)
            if new == GONE:
                if entry is not None and entry[:2] == (version, old):
                    self.rescue(page)
            elif entry is not None and entry[0] == version and entry[1] == old:
                self.index[page] = version, new, length_codec
                self.count(old, -1)
                self.count(new, 1)
                self._tell_dropped(page, version, length_codec, old, rows_of_where(new))
            else:
                but = set(rows_of_where(old))
                if entry is not None and entry[0] == version and entry[1] is not None:
                    but |= set(rows_of_where(entry[1]))  # another note was first
                self._tell_dropped(page, version, length_codec, new, but)
        rows, self.wanted_rows = self.wanted_rows, []
        for row, name, epoch in rows:
            if self.copies_of[row] == 0:
                self.table[row] = name, epoch
        self.ticks += not self.is_cooling

    def _tell_dropped(
        self, page: int, version: int, length_codec: int, where: int, but: Collection[int]
    ) -> None:
        rows = [row for row in rows_of_where(where) if row not in but]
        if rows:
            self.dropped.append((page, version, where_of_rows(rows), length_codec))

    def rescue(self, page: int) -> None:
        """No copy below is to be counted on: in RAM alone from now on, if it is there still."""
        version, where, length_codec = self.index[page]
        assert where is not None
        if page in self.ram:
            self.ram.discard(page)
            self.index[page] = version, None, length_codec
            self.count(where, -1)
            self.dropped.append((page, version, where, length_codec))
            self.rescued += 1

    def drop_ram(self, page: int) -> bool:
        """Room is needed: the RAM copy goes, if a donor that lives has the page."""
        assert self.overflow is not None
        where = self.index[page][1]
        assert where is not None
        met = self.overflow.rows_met()
        states = [met.get(row, False) for row in rows_of_where(where)]
        if any(states):
            self.ram.discard(page)
            return True
        if None in states:  # soon it will be known
            return False
        self.rescue(page)
        return False

    def tell(self) -> None:
        """The ring of drops is emptied by the node."""
        dropped, self.dropped = self.dropped, []
        assert self.overflow is not None
        self.overflow.drop(
            (row, pack([Page(0, page, version, length_codec)]))
            for page, version, where, length_codec in dropped
            for row in rows_of_where(where)
        )

    async def cool(self, pages: Sequence[int], gap_s: float = 0.0) -> int:
        """Put pages of RAM to peers; how many left.  `gap_s`: until the index knows."""
        assert self.overflow is not None
        batch = []
        for page in pages:
            version, where, length_codec = self.index[page]
            assert where is None
            batch.append((page, version, length_codec, bytes_of(page, version, length_codec)))
        self.is_cooling = True
        stored = await self.overflow.put(sheaves_of(batch))
        await asyncio.sleep(gap_s)
        self.is_cooling = False
        left = 0
        for (page, version, length_codec, _), one in zip(batch, stored, strict=True):
            if one.error:
                continue
            new = where_of_rows(one.rows)
            entry = self.index.get(page)
            if entry is not None and entry[:2] == (version, None):
                self.index[page] = version, new, length_codec
                self.count(new, 1)
                left += 1
                if self.keeps_ram:
                    self.ram.add(page)
            else:
                self.dropped.append((page, version, new, length_codec))
        return left

    async def read(self, page: int) -> tuple[int, bool]:
        """(errno, whether the entry is still what was read); 0 only with the right bytes."""
        assert self.overflow is not None
        version, where, length_codec = self.index[page]
        assert where is not None
        rows, wrong = rows_of_where(where), 0
        while True:
            [got] = await self.overflow.get([Asked(page, version, length_codec, rows, wrong)])
            same = self.index.get(page) == (version, where, length_codec)
            if got.error or got.sealed == bytes_of(page, version, length_codec):
                return got.error, same
            wrong |= 1 << got.copy
            if wrong + 1 >= 1 << len(rows):
                return 84, same


class World:
    """One owner and its donors."""

    def __init__(
        self, rng: random.Random, n: int, capacity_bytes: int, pages: int, options: Options
    ) -> None:
        self.rng = rng
        self.machines = [Machine(f"m{i}", capacity_bytes) for i in range(n)]
        self.links = [Link(m, rng, rng.choice([0.0002, 0.001, 0.005])) for m in self.machines]
        self.owner = Owner(pages)
        donors: list[Donor] = list(self.links)
        self.overflow = Overflow(self.owner, donors, rng, options)
        self.owner.overflow = self.overflow
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(link.keep()) for link in self.links]
        self._tasks.append(loop.create_task(self._tick()))
        self.overflow.start()
        while self.overflow.replicas.live < len(self.machines):
            await asyncio.sleep(0.1)

    async def _tick(self) -> None:
        while True:
            self.owner.tick()
            self.owner.tell()
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        await self.overflow.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def right_copies(self, page: int) -> int:
        """How many right copies of the page there really are where its entry points."""
        version, where, _ = self.owner.index[page]
        assert where is not None
        named = [self.owner.table[row] for row in rows_of_where(where)]
        return sum(
            machine.has(page, version)
            for machine in self.machines
            if (donor_id(machine.name), machine.epoch) in named
        )

    def leaks(self) -> list[tuple[str, int, int]]:
        """Copies that machines hold and the index does not count on."""
        rows = {who: row for row, who in self.owner.table.items()}
        return [
            (machine.name, page, version)
            for machine in self.machines
            for page, (version, _, _) in machine.held.items()
            if not self.owner.counts_on(
                page, version, rows.get((donor_id(machine.name), machine.epoch), -1)
            )
        ]


def random_length(rng: random.Random) -> int:
    """Length and codec of a page, small: it is the number of pages that matters."""
    return (rng.randrange(1, 65) - 1) << 4 | 1


PAGE_COST = 64 + SEAL_BYTES
