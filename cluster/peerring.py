"""The node's side of overflow: the server's ring on one end, links to donors on the other.

    server's peer tier <==ring==> RingPump --> Overflow --> PeerLink --TLS or plain--> donors
                          ring <-> Courier ---- gets ---------------^
    memory file, read-only ------> RingLedger ---^

Pages that are read come back through the courier, without Python; the pump gets what it cannot do.

Pages pass as they are, sealed: this process has no key and sees none in the clear.  It keeps
nothing that a successor would need: what is where stands in the server's index.

Bound: as many gets as the ring has cells, one batch; the ring is emptied every LOOK_S even when
nobody wakes us.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import farewell, peersocket
from cluster.courier import WHY_LATE, Courier
from cluster.etcdurl import EtcdUrl
from cluster.members import Member
from cluster.overflow import LOOK_S, Overflow
from cluster.peeraddress import PeerAddress
from cluster.peerlink import PeerLink, first_turn
from cluster.peerwire import NAME_BYTES, Donor, Hello, LinkState
from cluster.rack import Rack
from cluster.replicas import Asked, Options
from cluster.seats import Copy
from cluster.sheaf import Sheaf
from zcache_core import ringside
from zcache_core.errors import MemoryFileError
from zcache_core.memfile import MemoryFile
from zcache_core.ringside import (
    Batch,
    RingSide,
    Wanted,
    is_backed,
    rows_of_where,
)

DROPS_AT_ONCE = 8192
ATTACH_S = 10.0  # a predecessor that is killed lets go of the ring when it is reaped


class RingLedger:
    """What the memory file and the ring say, as `seats.Ledger` wants it."""

    def __init__(self, ring: RingSide, memory: MemoryFile) -> None:
        self._ring, self._memory = ring, memory
        self.device_pages = memory.device_bytes // 4096

    @property
    def ticks(self) -> int:
        return self._ring.ticks

    def rows(self) -> dict[int, tuple[bytes, int]]:
        return ringside.donors(self._memory)

    def copies(self) -> Sequence[int]:
        return self._ring.copies()

    def name_row(self, row: int, donor_id: bytes, epoch: int) -> bool:
        return self._ring.donor(row, donor_id, epoch)

    @property
    def disk_fails(self) -> bool:
        return self._ring.disk_fails

    @property
    def unsafe(self) -> bool:
        return self._ring.alone > 0 or (self._ring.disk_fails and self._ring.backed > 0)

    def gone(self, copy: Copy) -> bool:
        page, version, where, length_codec = copy
        return self._ring.gone(page, version, length_codec, where)

    def in_ram(self, copy: Copy) -> bool:
        return ringside.is_in_ram_too(self._memory, copy[0], copy[1])

    def moved(self, copy: Copy, new: int) -> bool:
        page, version, where, length_codec = copy
        return self._ring.moved(page, version, length_codec, where, new)

    def pages(self, first: int, n: int, most: int) -> tuple[list[Copy], int]:
        return ringside.pages_on_peers(self._memory, first, n, most)

    def counts_on(self, page: int, version: int, row: int) -> bool:
        return ringside.is_counted_on(self._memory, page, version, row)


class RingPump:
    """Moves what is asked from the ring to the Overflow, and answers back."""

    def __init__(self, ring: RingSide, overflow: Overflow, courier: Courier | None = None) -> None:
        self._ring, self._overflow, self._courier = ring, overflow, courier
        self._wake_fd = ring.wake_fd if courier is None else courier.tell_fd
        self._missed = ring.drops_missed
        self._putting = False
        self._routed: set[int] = set()
        self._task: asyncio.Task[None] | None = None
        self._spawn = overflow.replicas.spawn
        overflow.on_rows = self._tell_rows

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._wake_fd, self._woken)
        self._task = loop.create_task(self._beat())
        self.pump()
        if self._courier is not None:
            self._courier.start()

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._wake_fd)
        self._overflow.on_rows = lambda: None  # we end, not the donors
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _woken(self) -> None:
        try:
            os.read(self._wake_fd, 8)
        except BlockingIOError:
            return
        self.pump()

    async def _beat(self) -> None:
        while True:
            self._ring.beat()
            self._publish()
            self._route()
            self.pump()
            await asyncio.sleep(LOOK_S)

    def _publish(self) -> None:
        self._tell_rows()
        replicas, room = self._overflow.replicas, self._overflow.room_bytes
        numbers = replicas.numbers
        self._ring.publish(
            room > 0,
            room,
            replicas.live,
            numbers.short_pages,
            numbers.wrong_copies,
            numbers.hedged_gets,
            replicas.room_for(1),
        )

    def _tell_rows(self) -> None:
        """Which donors live: what they have may leave the server's RAM."""
        for row, live in self._overflow.rows_met().items():
            self._ring.tell_row(row, live)

    def _route(self) -> None:
        """Tell the courier which donors to ask, and how patiently."""
        if self._courier is None:
            return
        replicas = self._overflow.replicas
        routed = set()
        for seat in self._overflow.seats.all():
            lane = seat.donor.lane if isinstance(seat.donor, PeerLink) else None
            if lane is not None and replicas.is_trusted(seat) and seat.donor is not None:
                patience_us = int(1e6 * replicas.patience_s(seat))
                self._courier.route(seat.row, lane, int(seat.donor.latency_us), patience_us)
                routed.add(seat.row)
        for row in self._routed - routed:
            self._courier.route(row, None)
        self._routed = routed

    def _fallen(self) -> list[Wanted]:
        """What the courier could not do."""
        if self._courier is None:
            return self._ring.gets()
        found, late = [], False
        for (
            cell,
            turn,
            page,
            version,
            where,
            length_codec,
            wrong,
            why,
            row,
        ) in self._courier.fallen():
            found.append(Wanted(cell, turn, page, version, where, length_codec, wrong))
            if why == WHY_LATE:
                late = True
                self._overflow.replicas.was_late(row, 1)
        if late:
            self._route()
        return found

    def pump(self) -> None:
        """Take out everything there is."""
        groups: dict[tuple[tuple[int, ...], bool, int], list[Wanted]] = {}
        for wanted in self._fallen():
            alike = rows_of_where(wanted.where), is_backed(wanted.where), wanted.wrong
            groups.setdefault(alike, []).append(wanted)
        for group in groups.values():
            self._spawn(self._get(group))
        # One batch after the other: who gave up on one asks for the same pages again, and what is
        # forgotten of the first must not be a copy of the second.  It is taken before the drops:
        # what was dropped before it was asked for must not be dropped after it is put.
        batch = self._ring.batch() if not self._putting else None
        while (drops := self._ring.drops(DROPS_AT_ONCE)) is not None:
            self._overflow.drop(drops)
        if batch is not None:
            self._putting = True
            self._spawn(self._put(batch))
        if self._ring.drops_missed != self._missed:
            self._missed = self._ring.drops_missed
            self._overflow.compare_all()

    async def _get(self, group: list[Wanted]) -> None:
        rows = rows_of_where(group[0].where)
        backed = is_backed(group[0].where)
        asked = [
            Asked(w.page, w.version, w.length_codec, rows, w.wrong, w.where if backed else 0)
            for w in group
        ]
        for wanted, got in zip(group, await self._overflow.get(asked), strict=True):
            self._ring.answer_get(wanted, got.error, got.sealed, got.copy)

    async def _put(self, batch: Batch) -> None:
        sheaves = [Sheaf(records, payload) for records, payload in batch.pages]
        try:
            stored = await self._overflow.put(sheaves, batch.copies)
        finally:
            self._putting = False
        self._tell_rows()  # before pages are counted on there
        if not self._ring.answer_batch(batch.turn, stored):
            self._overflow.forget(sheaves, stored)
            self.pump()


@dataclass(frozen=True)
class PeerOptions:
    """What a person chose."""

    peers: tuple[str, ...]
    replicas: int
    tls: str | None
    etcd: str | None = None
    own: str | None = None  # where we lend ourselves: not to be overflowed to
    noted: Path | None = None  # what etcd said last


class PeerSide:
    """All of it, for the node process: made, started, asked, stopped.

    Made, it has read every file that it needs: it may be started where none can be read any more.
    """

    def __init__(self, fd: int, wake_fd: int, memory: MemoryFile, options: PeerOptions) -> None:
        self._fd, self._wake_fd, self._memory, self._options = fd, wake_fd, memory, options
        self._tls = peersocket.rules(options.tls, server=False) if options.tls else None
        self._owner = owner_name(options.tls, memory)
        self._etcd = EtcdUrl.read(options.etcd) if options.etcd is not None else None
        self._links: list[PeerLink] = []
        self._ring: RingSide | None = None
        self._overflow: Overflow | None = None
        self._pump: RingPump | None = None
        self._courier: Courier | None = None
        self._rack: Rack | None = None
        self.own_epoch = 0  # of what this process lends, once it does

    async def start(self) -> None:
        """Take the ring, dial the donors.  Raises ZcacheError."""
        self._ring = await self._attach()
        tls = self._tls
        hello = Hello(self._owner, self._memory.epoch, turn=first_turn())
        self._courier = courier = Courier(self._ring)
        self._links = [
            PeerLink(PeerAddress.read("peers", text), hello, tls, courier=courier)
            for text in self._options.peers
        ]
        ledger = RingLedger(self._ring, self._memory)
        options = Options(copies=self._options.replicas)
        # A certificate's name is one node's; without, two donors may have the same name.
        self._overflow = Overflow(
            ledger,
            list(self._links),
            random.Random(),
            options,
            lambda donor: donor.name if tls else f"{donor.name}@{address_of(donor)}",
        )
        self._pump = RingPump(self._ring, self._overflow, self._courier)
        for link in self._links:
            link.start()
        if self._etcd is not None:
            assert self._options.noted is not None
            self._rack = Rack(
                *(
                    self._etcd,
                    self._options.tls,
                    self._owner,
                    self._is_own,
                ),
                # a later turn than any link before had with the same donor
                lambda text: PeerLink(
                    PeerAddress.read("etcd", text),
                    replace(hello, turn=first_turn()),
                    tls,
                    courier=courier,
                ),
                *(self._overflow, self._options.noted),
            )
            self._rack.start()
        self._overflow.start()
        self._pump.start()

    def _is_own(self, member: Member) -> bool:
        """Whether it is what this process lends: nothing is freed by sending pages there."""
        return member.epoch == self.own_epoch or member.address == self._options.own

    async def _attach(self) -> RingSide:
        loop = asyncio.get_running_loop()
        until = loop.time() + ATTACH_S
        while True:
            try:
                return RingSide(self._fd, self._wake_fd)
            except MemoryFileError:
                if loop.time() > until:
                    raise
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        links = [*self._links, *(self._rack.links.values() if self._rack is not None else ())]
        for part in (self._pump, self._overflow):
            if part is not None:
                await part.stop()
        if self._ring is not None and self._ring.is_over:
            await farewell.say(link for link in links if link.state is LinkState.UP)
        if self._rack is not None:
            await self._rack.stop()
        for link in self._links:
            await link.stop()
        if self._courier is not None:
            self._courier.stop()
        if self._ring is not None:
            self._ring.close()
        if self._options.noted is not None and self._memory.name is None:
            self._options.noted.unlink(missing_ok=True)  # no node comes after us

    def twins(self) -> list[str]:
        """A sentence for each donor that is not used because it is, or calls itself, another."""
        found = []
        for twin in self._overflow.seats.twins if self._overflow is not None else ():
            first, second = (self._address(donor) for donor in (twin.other, twin.donor))
            found.append(
                f"The peers {first} and {second} are the same donor; the second is not used."
                if twin.same
                else f"The peers {first} and {second} both show the certificate of "
                f"{twin.donor.name}; the second is not used."
            )
        return found

    @property
    def etcd_silent_s(self) -> int:
        """Seconds that etcd has been silent for, once that is too long; else 0."""
        return self._rack.silent_s if self._rack is not None else 0

    def _address(self, donor: Donor) -> str:
        return address_of(donor) if isinstance(donor, PeerLink) else donor.name

    def peers(self) -> list[dict[str, Any]]:
        """What the method `peers` answers: every donor, how it is, what it has of ours."""
        if self._overflow is None or self._ring is None:
            return []
        copies = self._ring.copies()
        found = []
        links = [*self._links, *(self._rack.links.values() if self._rack is not None else ())]
        for link in links:
            seat = self._overflow.seats.of(link)
            found.append(
                {
                    "address": str(link.address),
                    "name": link.name if link.epoch else "",
                    "state": link.state.name.lower(),
                    "listed": link.is_listed,
                    "why_down": link.why_down,
                    "latency_us": round(link.latency_us),
                    "room_bytes": link.offer.room_bytes,
                    "held_bytes": link.offer.held_bytes,
                    "health": link.offer.health.name.lower(),
                    "copies": copies[seat.row] if seat is not None else 0,
                    "wrong_copies": seat.lies if seat is not None else 0,
                }
            )
        return found


def name_of_certificate(folder: Path) -> str:
    """The name in the folder's node.pem, read by a child: it takes 10 MiB that we do not need."""
    ours, its = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            from cluster.certificates import name_in

            os.write(its, name_in(folder).encode())
        finally:
            os._exit(0)
    os.close(its)
    with open(ours, encoding="utf-8") as file:
        name = file.read()
    os.waitpid(pid, 0)
    return name


def address_of(donor: Donor) -> str:
    """Where a donor is that was made from an address."""
    assert isinstance(donor, PeerLink)
    return str(donor.address)


def owner_name(tls: str | None, memory: MemoryFile) -> str:
    """Who we are to donors: the certificate's name (or the machine's), then the memory file's.

    A private memory file has its epoch for a name: two servers of one machine must not
    end each other's epochs.
    """
    machine = socket.gethostname()
    if tls:
        machine = name_of_certificate(Path(tls))
    instance = memory.name or f"{memory.epoch:016x}"
    name = f"{machine}/{instance}"
    if len(name.encode()) > NAME_BYTES:
        name = f"{machine}/{memory.epoch:016x}"
    return name.encode()[:NAME_BYTES].decode(errors="ignore")
