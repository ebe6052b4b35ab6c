"""A donor: what it answers its owners, and what it asks of them.

    owner's connection --hello--> a row of the Donation --put get drop reconcile--> pages
    each second: heard of whom? memory short? draining? -> offers told, pages recalled

    room    = min(quota, what the target leaves)    0 while memory is short or it drains
    recall  = cold pages above the target, or all of them in a drain; more as they are dropped,
              and each second again.  An owner that is away or slow keeps its pages: only it
              may end them, its next epoch, or `abandon_s` without a word.

Pages are never looked into, never mixed with local ones (a memory file of their own), never
passed on.

Bound: CONNECTIONS connections, OWNERS rows; RECALL_PAGES asked for at a time.
What it is not: listening (`lending`), copying (`zcache_core.donation`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster import peerwire
from cluster.donorlane import DonorLane, Lending
from cluster.generosity import Generosity
from cluster.link import RpcError
from cluster.peerchannel import Channel, ChannelOptions
from cluster.peerwire import PROTOCOL, RECORDS_MOST, Code, Health, Hello, Offer, Welcome
from zcache_core import counters
from zcache_core.donation import Donation

CONNECTIONS = 128
COMMIT_WAIT_US = 10_000  # a put while frames are being committed; nobody else is answered then
RECALL_PAGES = RECORDS_MOST  # asked for at once: 16 MiB of swap
RECALL_MS = 10_000
SWEEP_PLACES = 1 << 16  # 1 ms
ABANDON_S = 24 * 3600
ENDED_KEPT = 256  # epochs that are over, of all owners
HELLO_S = 10.0  # a connection that has not said hello by then is closed
log = logging.getLogger("zcache.donor")


def since_boot_s() -> float:
    """A clock that nobody sets, the same for a node that is started again; as old as the pages."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class DonorOptions:
    """What a person may choose.  Sizes in bytes, times in seconds."""

    name: str
    quota_bytes: int | None = None  # of one owner; None: all
    abandon_s: int = ABANDON_S
    hello_s: float = HELLO_S
    channel: ChannelOptions = field(default=ChannelOptions())


class Donor:
    """Owners' connections over one Donation.  `tick` once a second."""

    def __init__(
        self,
        donation: Donation,
        options: DonorOptions,
        generosity: Generosity | None = None,
        clock: Callable[[], float] = since_boot_s,
    ) -> None:
        self.donation, self.options = donation, options
        self.draining = False
        self.refused_connections = 0
        self._generosity = generosity or Generosity()
        self._clock = clock
        self._connections: set[OwnerEnd] = set()
        self.lending = Lending(donation)
        self._epoch = donation.memory.epoch
        self._target = donation.total_frames()
        # An epoch never comes back, but a late hello of one may: it must not end the new one.
        # Not kept over a restart, so nobody says hello for an epoch that is over: bye needs none.
        self._ended: deque[tuple[str, int | None, int]] = deque(maxlen=ENDED_KEPT)
        self._turns: dict[int, tuple[int, int]] = {}  # row -> epoch, and its latest turn

    # ---- connections -------------------------------------------------------------------

    def connection(self) -> OwnerEnd:
        """What asyncio makes for each owner that dials."""
        return OwnerEnd(self)

    def joined(self, end: OwnerEnd) -> bool:
        """Whether there is room for one connection more."""
        if len(self._connections) >= CONNECTIONS:
            self.refused_connections += 1
            return False
        self._connections.add(end)
        return True

    def left(self, end: OwnerEnd) -> None:
        self._connections.discard(end)

    def close(self) -> None:
        """Every connection."""
        for end in list(self._connections):
            end.close("the donor ends")

    # ---- what owners ask ------------------------------------------------------------------

    def hello(self, end: OwnerEnd, params: list[Any]) -> Any:
        """Who it is; its row.  The name must be that of its certificate, if it has one."""
        if (protocol := peerwire.hello_protocol(params)) != PROTOCOL:
            raise RpcError(
                "version", f"this donor speaks version {PROTOCOL}, not {protocol}; upgrade one side"
            )
        said = peerwire.hello(params)
        user = self._user_of(end, said.owner)
        if (said.owner, user, said.epoch) in self._ended:
            raise RpcError(
                "epoch_over", f"{said.owner} is in another epoch by now; end the old one"
            )
        known = {(name, whose): (row, epoch) for row, name, epoch, *_, whose in self._owners()}
        before_row, before = known.get((said.owner, user), (-1, 0))
        latest = self._turns.get(before_row, (0, 0))
        if latest[0] == said.epoch and said.turn and said.turn < latest[1]:
            raise RpcError(
                "turn_over", f"{said.owner} has a later connection by now; end the old one"
            )
        row = self.donation.owner(said.owner, said.epoch, int(self._clock()), user)
        if row is None:
            raise RpcError("full", "this donor has as many owners as it can; name another donor")
        if before not in (0, said.epoch):
            self._ended.append((said.owner, user, before))
        if self.options.quota_bytes is not None:
            self.donation.set_quota(row, self.options.quota_bytes)
        end.welcome(row, said)
        self._silence_others(end)
        return Welcome(self.options.name, self._epoch, self.offer(row)).result()

    def _owners(self) -> list[tuple[Any, ...]]:
        return self.donation.owners()

    def _user_of(self, end: OwnerEnd, owner: str) -> int | None:
        """Whose process it is, on this machine; None with a certificate, which says who it is.

        A name alone proves nothing: any user of this machine may dial a plain port.
        """
        if end.peer_name:
            if owner.partition("/")[0] != end.peer_name:
                raise RpcError(
                    "not_you",
                    f"the certificate is {end.peer_name}'s, so {owner} cannot be its name",
                )
            return None
        if (user := end.peer_user()) is None:
            raise RpcError(
                "not_you",
                "it cannot be told which user of this machine asks; use certificates (tls=)",
            )
        return user

    def _silence_others(self, end: OwnerEnd) -> None:
        """Nothing that was sent on this owner's earlier connections counts any more.

        A drop that was on its way there when its sender died would end the same page, put again.
        """
        if end.turn:
            self._turns[end.row] = end.epoch, end.turn
        for other in list(self._connections):
            if other.row == end.row and (other.epoch != end.epoch or other.turn < end.turn):
                other.close(f"{end.owner} has a later connection")

    def put(self, end: OwnerEnd, params: list[Any]) -> Any:
        records, payload = peerwire.put(params)
        n = len(records) // peerwire.RECORD_BYTES
        if self.health() is not Health.OK:
            return [self.offer(end.row), bytes([Code.LEAVING]) * n]
        codes = self.donation.put(end.row, records, payload, COMMIT_WAIT_US)
        return [self.offer(end.row), codes]

    def get(self, end: OwnerEnd, params: list[Any]) -> Any:
        codes, payload = self.donation.get(end.row, peerwire.get(params))
        return [self.offer(end.row), codes, payload]

    def drop(self, end: OwnerEnd, params: list[Any]) -> Any:
        dropped = self.donation.drop(end.row, peerwire.drop(params))
        end.recalled = max(0, end.recalled - dropped)
        if self._above and end.recalled < RECALL_PAGES // 2:
            self._recall()  # it obeys: go on without waiting for the next second
        return [self.offer(end.row), dropped]

    def reconcile(self, end: OwnerEnd, params: list[Any]) -> Any:
        cursor, records = self.donation.listing(end.row, peerwire.reconcile(params), RECORDS_MOST)
        return [self.offer(end.row), cursor, records]

    def bye(self, end: OwnerEnd, params: list[Any]) -> Any:
        """Nobody will ask for a page of that epoch any more; it never comes back.

        It may come late, from somebody who has not said hello, which would begin an epoch.  So
        it ends what it names, if that is what the owner has here, and changes nothing else.
        """
        owner, epoch = peerwire.bye(params)
        user, dropped = self._user_of(end, owner), 0
        for row, name, its, *_, whose in self._owners():
            if (name, whose, its) == (owner, user, epoch):
                self._ended.append((owner, user, epoch))
                dropped = self.donation.end(row)
        return [Offer(0, 0, self.health()), dropped]

    def stats(self, end: OwnerEnd, params: list[Any]) -> Any:
        found = counters.read(self.donation.memory)
        names = [name for name in found if name.startswith("foreign_")]
        return [self.offer(end.row), {name: found[name] for name in names}]

    def ping(self, end: OwnerEnd, params: list[Any]) -> Any:
        return [self.offer(end.row)]

    # ---- how it is -----------------------------------------------------------------------

    def health(self) -> Health:
        if self.draining:
            return Health.DRAINING
        return Health.SHORT if self._generosity.is_short else Health.OK

    def offer(self, row: int) -> Offer:
        """For the owner of this row, now."""
        health = self.health()
        room = self.donation.room(row) if health is Health.OK else 0
        return Offer(room, self.donation.held(row), health)

    def drain(self, on: bool) -> None:
        """Take nothing more and ask for everything back; or be a donor again."""
        self.draining = on
        self.lending.health = self.health()
        self._tell_offers()

    # ---- each second ------------------------------------------------------------------------

    def tick(self, seconds: float = 1.0) -> None:
        """Listen to the machine, ask for pages back, forget who is gone."""
        now_s, before = int(self._clock()), self.health()
        self._generosity.look(seconds)
        self.lending.health = self.health()
        target = self.donation.total_frames() * self._generosity.permille // 1000
        short = self._generosity.is_short or self.draining
        self.donation.squeeze(0 if self.draining else target, short)
        for end in self._connections:
            if end.is_owner:
                self.donation.heard(end.row, now_s)
        self._abandon(now_s)
        self.donation.sweep(SWEEP_PLACES)
        if self.health() is not before:
            self._tell_offers()
        self._target = 0 if self.draining else target
        for end in self._connections:
            end.recalled = 0
        self._recall()

    @property
    def _above(self) -> int:
        """Frames in use that should not be."""
        return max(0, self.donation.used_frames() - self._target)

    def _recall(self) -> None:
        """Ask for cold pages, of everybody, as many as are above the target and fit a message."""
        owners = {end.row: end for end in self._connections if end.is_owner}
        most = min(2 * self._above, RECALL_PAGES)
        for row, records in self.donation.coldest(most).items() if most and owners else ():
            if row in owners and owners[row].notify("recall", records, RECALL_MS):
                owners[row].recalled += len(records) // peerwire.RECORD_BYTES

    def _abandon(self, now_s: int) -> None:
        for row, name, _, heard_s, pages, _, _ in self.donation.owners():
            if now_s - heard_s > self.options.abandon_s:
                log.warning(
                    "%s was not heard of for %d s; its %d pages are dropped",
                    name, now_s - heard_s, pages,
                )  # fmt: skip
                self.donation.abandon(row)

    def _tell_offers(self) -> None:
        for end in self._connections:
            if end.is_owner:
                end.notify("offer", self.offer(end.row))


class OwnerEnd(Channel):
    """The donor's end of one owner's connection."""

    pauses_reading = True

    def __init__(self, donor: Donor) -> None:
        super().__init__(donor.options.channel)
        self._donor = donor
        self.row, self.epoch, self.owner, self.turn = -1, 0, "", 0
        self.recalled = 0  # pages asked for in this second, and not dropped yet
        self._methods: dict[str, Callable[[OwnerEnd, list[Any]], Any]] = {
            name: getattr(donor, name) for name in peerwire.METHODS
        }

    def make_lane(self) -> DonorLane:
        """Gets and puts need no Python (donorlane)."""
        return DonorLane(self._donor.lending)

    def welcome(self, row: int, said: Hello) -> None:
        """It has said who it is."""
        self.row, self.epoch, self.owner, self.turn = row, said.epoch, said.owner, said.turn
        if isinstance(self._lane, DonorLane):
            self._lane.welcome(row, said.epoch)

    @property
    def is_owner(self) -> bool:
        """Whether it has said hello, and its epoch is still the one that counts."""
        return self.row >= 0 and self._donor.donation.epoch(self.row) == self.epoch

    def opened(self) -> None:
        loop = asyncio.get_running_loop()
        self._greeting = loop.call_later(self._donor.options.hello_s, self._look_for_hello)
        if not self._donor.joined(self):
            self.close("there are too many connections")

    def _look_for_hello(self) -> None:
        if self.row < 0:
            self.close("it has said no hello")

    def lost(self, why: str) -> None:
        self._greeting.cancel()
        self._donor.left(self)

    def request(self, method: str, params: list[Any]) -> Any:
        call = self._methods.get(method)
        if call is None:
            known = ", ".join(peerwire.METHODS)
            raise RpcError("unknown_method", f"there is no method {method}; use one of {known}")
        if method not in ("hello", "bye") and not self.is_owner:
            if self.row < 0:
                raise RpcError("no_hello", "say hello first")
            raise RpcError("epoch_over", f"{self.owner} is in another epoch by now; say hello")
        return call(self, params)
