"""Rules of the owner's side, one by one: what may be believed, chosen, dropped, given up."""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from cluster.peerwire import Code, Donor, Health, LinkState, Offer, Page, PeerError
from cluster.renewal import Renewal
from cluster.replicas import Asked, Options, Replicas
from cluster.seats import Seat, Seats, donor_id
from cluster.sheaf import Sheaf, sheaves_of
from tests.sim.loop import run
from tests.sim.world import Owner, bytes_of

PAGE, VERSION, LENGTH = 3, 9, 63 << 4 | 1
PART = (PAGE, VERSION, LENGTH, bytes_of(PAGE, VERSION, LENGTH))
SHEAF = Sheaf.of([PART])
OPTIONS = Options(copies=2, away_s=1.0, give_up_s=5.0, put_s=0.4)


@dataclass
class Machine:
    """A donor that does as the test says."""

    name: str
    epoch: int = field(default_factory=itertools.count(1).__next__)
    state: LinkState = LinkState.UP
    offer: Offer = field(default=Offer(1 << 30, 0, Health.OK))
    latency_us: float = 100.0
    is_listed: bool = True
    puts: int = 0
    before_answer: Callable[[], None] = lambda: None
    silent_s: float = 0.0
    fails: bool = False
    on_recall: Any = None
    on_state: Any = None
    on_offer: Any = None
    held: dict[tuple[int, int], bytes] = field(default_factory=dict)

    async def put(self, records: bytes, payload: bytes) -> bytes:
        self.puts += 1
        await asyncio.sleep(self.silent_s)
        if self.fails:
            raise PeerError(self.name, "broken")
        self.before_answer()
        return bytes([Code.OK]) * (len(records) // 16)

    async def get(self, records: bytes) -> tuple[bytes, bytes]:
        await asyncio.sleep(0.001)
        self.before_answer()
        return bytes([Code.OK]), PART[3]


class Side:
    """Replicas over these machines, one seat each; what is dropped and doubted is remembered."""

    def __init__(self, machines: list[Machine]) -> None:
        self.owner = Owner(64)
        for row, machine in enumerate(machines):
            self.owner.table[row] = donor_id(machine.name), machine.epoch
        self.dropped: list[tuple[int, Page]] = []
        self.doubted: list[int] = []
        donors = cast("list[Donor]", machines)
        self.seats = Seats(self.owner, donors, 0.0, lambda donor: donor.name)
        self.replicas = Replicas(
            self.owner, self.seats, random.Random(1), OPTIONS,
            lambda row, page: self.dropped.append((row, page)),
            lambda asked, row: self.doubted.append(row),
        )  # fmt: skip
        self.renewal = Renewal(self.owner, self.seats, self.replicas, OPTIONS)

    def seat(self, row: int) -> Seat:
        found = self.seats.get(row)
        assert found is not None
        return found


def test_an_answer_of_a_new_epoch_is_none() -> None:
    """It came back empty while it was asked: what it says is not about the copies counted on."""

    async def work() -> None:
        machine = Machine("a")
        side = Side([machine])
        machine.before_answer = lambda: setattr(side.seat(0), "empty", True)
        asked = [Asked(PAGE, VERSION, LENGTH, (0,))]
        assert await side.replicas.get_at(0, asked) is None
        side.seat(0).empty = False
        assert await side.replicas.put_at(0, SHEAF) == []
        machine.before_answer = lambda: None
        side.seat(0).empty = False
        assert await side.replicas.get_at(0, asked) == [PART[3]]
        assert await side.replicas.put_at(0, SHEAF) == [0]

    run(work())


def test_what_is_being_dropped_there_is_not_put_there() -> None:
    """The drop could come after the put, and would be of the same page and version."""

    async def work() -> None:
        side = Side([Machine("a"), Machine("b"), Machine("c")])
        side.seat(1).dropping.add(SHEAF.records)
        for _ in range(50):
            assert 1 not in side.replicas.choose_for(SHEAF, 2, ())
        assert side.replicas.choose_for(SHEAF, 3, ()) == []
        other = (PAGE, VERSION + 1, LENGTH, PART[3])
        assert sorted(side.replicas.choose_for(Sheaf.of([other]), 3, ())) == [0, 1, 2]
        assert not side.renewal._may_have_again(1, SHEAF)
        assert side.renewal._may_have_again(1, Sheaf.of([other]))
        assert side.renewal._may_have_again(0, SHEAF)

    run(work())


def test_a_copy_more_than_is_counted_on_is_dropped() -> None:
    """Of two pages one donor took one, two more took both: the first has a copy to be dropped."""

    async def work() -> None:
        machines = [Machine(name) for name in "abcd"]
        side = Side(machines)
        asked: list[Machine] = []

        def answering(machine: Machine) -> Callable[[bytes, bytes], Any]:
            async def put(records: bytes, payload: bytes) -> bytes:
                asked.append(machine)
                return [b"\0\1", b"\1\1", b"\0\0", b"\0\0"][len(asked) - 1]

            return put

        for machine in machines:
            machine.put = answering(machine)  # type: ignore[assignment,method-assign]
        other = (PAGE + 1, VERSION, LENGTH, PART[3])
        first, second = await side.replicas.put(sheaves_of([PART, other]))
        assert len(asked) == 4
        assert not first.error
        assert not second.error
        has = {
            PAGE: {machines.index(m) for m in [asked[0], *asked[2:]]},
            PAGE + 1: {machines.index(m) for m in asked[2:]},
        }
        for page, stored in ((PAGE, first), (PAGE + 1, second)):
            dropped = {row for row, gone in side.dropped if gone.page == page}
            assert set(stored.rows) | dropped == has[page]
            assert not set(stored.rows) & dropped

    run(work())


@pytest.mark.parametrize("how", ["late", "broken"])
def test_what_may_have_been_put_is_dropped(how: str) -> None:
    """Nobody knows whether it is there: without a drop it would stay until the next comparing."""

    async def work() -> None:
        bad = Machine("bad", silent_s=9.0 if how == "late" else 0.0, fails=True)
        side = Side([bad, Machine("good")])
        assert await side.replicas.put_at(0, SHEAF) == []
        assert side.dropped == [(0, Page(0, PAGE, VERSION, LENGTH))]
        assert await side.replicas.put_at(1, SHEAF) == [0]
        assert len(side.dropped) == 1

    run(work())


@pytest.mark.parametrize("seen", [True, False])
def test_who_is_away_is_not_gone(seen: bool) -> None:
    """A page whose donors are all away is an error for now, and not lost: they may come back."""

    async def work() -> None:
        machines = [Machine("a"), Machine("b")]
        side = Side(machines if seen else [])
        if not seen:
            side.owner.table = {row: (donor_id(m.name), m.epoch) for row, m in enumerate(machines)}
            side.seats.refresh(0.0)
        for machine in machines:
            machine.state = LinkState.DOWN
        asked = [Asked(PAGE, VERSION, LENGTH, (0, 1))]
        [got] = await side.replicas.get(asked)
        assert got.error == errno.EIO
        await asyncio.sleep(60.0)  # however long
        [got] = await side.replicas.get(asked)
        assert got.error == errno.EIO
        assert side.doubted == []
        # A row that is not in the table is nobody's who said so.
        [got] = await side.replicas.get([Asked(PAGE, VERSION, LENGTH, (5, 6))])
        assert got.error == errno.EIO
        for row in (0, 1):
            side.seat(row).empty = True
        [got] = await side.replicas.get(asked)
        assert got.error == errno.ENODATA, "both came back empty"

    run(work())


# ---- two machines that are one, one machine that is two -------------------------------------


def twins_of(side: Side, donors: list[Machine], now_s: float) -> list[Any]:
    side.seats._donors = cast("list[Donor]", donors)
    side.seats.refresh(now_s)
    return list(side.seats.twins)


def test_two_machines_with_one_certificate() -> None:
    """The one that has pages goes on; the other is not used, and makes none of them look lost."""

    async def work() -> None:
        first, second = Machine("node", 11), Machine("node", 12)
        side = Side([first])
        side.owner.copies_of[0] = 5
        assert side.seat(0).is_up
        for donors in ([first, second], [second, first]):
            assert twins_of(side, donors, 1.0) == [(second, first, False)]
            assert side.seat(0).is_up
            assert cast(Any, side.seat(0).donor) is first
            assert not side.owner.wanted_rows, "the other gets no row"
        first.state = LinkState.DOWN
        assert twins_of(side, [first, second], 2.0) == [(second, first, False)]
        assert not side.seat(0).empty, "it is away, whatever its twin says"
        assert not side.seat(0).is_up
        first.state = LinkState.UP
        assert twins_of(side, [second, first], 3.0) == [(second, first, False)]
        assert side.seat(0).is_up
        # When nothing is counted on any more, the other may have the name.
        first.state, side.owner.copies_of[0] = LinkState.DOWN, 0
        assert twins_of(side, [first, second], 4.0) == []
        assert side.owner.wanted_rows == [(1, donor_id("node"), 12)]

    run(work())


def test_of_two_new_machines_with_one_certificate_one_is_used() -> None:
    async def work() -> None:
        side = Side([])
        first, second = Machine("node", 11), Machine("node", 12)
        for _ in range(3):
            assert twins_of(side, [first, second], 1.0) == [(second, first, False)]
        assert side.owner.wanted_rows == [(0, donor_id("node"), 11)]

    run(work())


def test_one_machine_that_comes_back_empty_is_no_twin() -> None:
    async def work() -> None:
        machine = Machine("node", 11)
        side = Side([machine])
        side.owner.copies_of[0] = 5
        side.seats.refresh(1.0)
        machine.epoch = 12
        assert twins_of(side, [machine], 2.0) == []
        assert side.seat(0).empty

    run(work())


def test_one_machine_at_two_addresses() -> None:
    """Both copies of a page would be there."""

    async def work() -> None:
        first, second = Machine("a@1", 11), Machine("a@2", 11)
        side = Side([first])
        assert twins_of(side, [second, first], 1.0) == [(second, first, True)]
        assert side.replicas.choose_for(SHEAF, 2, ()) == []
        assert not side.owner.wanted_rows

    run(work())
