"""All donors of a page may come back empty: as long as RAM has it too, it is not lost.

Each seed is one life of an owner whose pages keep their RAM copies when they have left, until
room is needed.  Any number of donors is emptied, away or cut off at once, again and again.  Asked
at each drop of a RAM copy: was there a right copy at a donor, or had they all been emptied just
now, so that nobody could know?  At the end: is every other page still to be had, and does no entry
count on donors that have nothing?
"""

from __future__ import annotations

import asyncio
import random

from cluster.peerwire import LinkState
from cluster.replicas import Options
from tests.sim.loop import run
from tests.sim.t2_overflow import seeds
from tests.sim.world import PAGE_COST, World, random_length

PAGES = 60
LEARN_S = 0.35  # a link notices each 0.1 s, and so does the owner's look
OPTIONS = Options(copies=2, give_up_s=3.0, away_s=1.0, call_s=1.0)


class Life:
    """One seed's life."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.n = self.rng.choice([2, 2, 3, 4])
        self.world = World(self.rng, self.n, PAGES * 4 * PAGE_COST, PAGES, OPTIONS)
        self.owner = self.world.owner
        self.owner.keeps_ram = True
        self.emptied_s = [-1.0] * self.n
        self.unlucky: set[tuple[int, int]] = set()  # dropped before anybody could know
        self.kept = 0

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def live(self, rounds: int) -> None:
        await self.world.start()
        try:
            for _ in range(rounds):
                await self.go_on()
                await self.fail()
            await self.settle()
            self.check()
        finally:
            await self.world.stop()

    async def go_on(self) -> None:
        """Write, cool, make room; for a moment."""
        for _ in range(self.rng.randrange(2, 8)):
            for _ in range(self.rng.randrange(1, 20)):
                self.owner.write(self.rng.randrange(PAGES), random_length(self.rng))
            in_ram = [p for p, e in self.owner.index.items() if e[1] is None]
            await self.owner.cool(in_ram)
            self.make_room()
            await asyncio.sleep(self.rng.choice([0.01, 0.2, 1.0]))
            self.make_room()

    def make_room(self) -> None:
        there = sorted(self.owner.ram)
        for page in self.rng.sample(there, len(there) // 4):
            right = self.world.right_copies(page)
            if not self.owner.drop_ram(page):
                self.kept += 1
                continue
            just_now = self.now_s() - max(self.emptied_s) < LEARN_S
            assert right or just_now, f"page {page} was dropped, and no donor has it"
            if not right:
                self.unlucky.add((page, self.owner.index[page][0]))

    async def fail(self) -> None:
        """Any number of donors at once."""
        chosen = self.rng.sample(range(self.n), self.rng.randrange(1, self.n + 1))
        for at in chosen:
            machine, link = self.world.machines[at], self.world.links[at]
            kind = self.rng.choice(["emptied", "killed", "killed", "down", "cut"])
            machine.is_up = kind in ("emptied", "cut")
            link.is_cut = kind == "cut"
            if kind in ("emptied", "killed"):
                lone = self.lone(at)
                machine.restart_empty()
                self.emptied_s[at] = self.now_s()
                self.unlucky |= {key for key in lone if self.is_lost(*key)}
        await asyncio.sleep(self.rng.choice([0.0, 0.2]))
        self.make_room()
        await asyncio.sleep(self.rng.choice([0.1, 1.0, 5.0]))
        self.make_room()
        for machine, link in zip(self.world.machines, self.world.links, strict=True):
            machine.is_up, link.is_cut = True, False
        await asyncio.sleep(self.rng.choice([0.1, 1.0]))

    def lone(self, at: int) -> set[tuple[int, int]]:
        """Pages that are not in RAM, and with this donor."""
        held = self.world.machines[at].held
        return {
            (page, entry[0])
            for page, entry in self.owner.index.items()
            if entry[1] is not None and page not in self.owner.ram and page in held
        }

    def is_lost(self, page: int, version: int) -> bool:
        """Whether no donor has it: as it must be, when all are emptied and RAM has it not."""
        return not any(machine.has(page, version) for machine in self.world.machines)

    async def settle(self) -> None:
        """Until no page of RAM counts on donors that have it not."""
        for _ in range(200):
            await asyncio.sleep(0.3)
            if all(self.world.right_copies(page) for page in self.owner.ram):
                return
        raise AssertionError("entries count on donors that have nothing")

    def check(self) -> None:
        for page, (version, where, _) in self.owner.index.items():
            assert (
                where is None
                or page in self.owner.ram
                or not self.is_lost(page, version)
                or (page, version) in self.unlucky
            ), f"page {page} is lost"


def test_a_page_in_ram_outlives_all_of_its_donors(rng: random.Random) -> None:
    kept = told = 0

    async def work(seed: int) -> Life:
        life = Life(seed)
        await life.live(4)
        return life

    for seed in seeds(rng, 60):
        try:
            life = run(work(seed))
        except BaseException:
            print(f"repeat with ZCACHE_SIM_SEED={seed}")
            raise
        kept += life.kept
        told += life.owner.rescued - life.kept
    assert kept > 0
    assert told > 0


def test_nothing_is_dropped_for_donors_under_suspicion(rng: random.Random) -> None:
    """Nor given up: what answers again is as it was, what does not is rescued."""

    async def work() -> None:
        life = Life(rng.getrandbits(32))
        owner, links = life.owner, life.world.links
        await life.world.start()
        try:
            for page in range(20):
                owner.write(page, random_length(rng))
            await owner.cool(list(range(20)))
            there = sorted(page for page in owner.ram if owner.index[page][1] is not None)
            assert len(there) > 10
            half = len(there) // 2
            for link in links:
                link.hangs = True
                link._become(LinkState.SUSPECT)
            assert owner.overflow is not None
            assert set(owner.overflow.rows_met().values()) == {None}
            assert not any(owner.drop_ram(page) for page in there)
            assert set(there) <= owner.ram
            assert owner.rescued == 0
            for link in links:
                link.hangs = False
                link._become(LinkState.UP)
            assert all(owner.drop_ram(page) for page in there[:half])
            for link in links:
                link.is_cut = True
                link._become(LinkState.DOWN)
            assert not any(owner.drop_ram(page) for page in there[half:])
            assert owner.rescued == len(there) - half
        finally:
            await life.world.stop()

    run(work())
