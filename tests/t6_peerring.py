"""The pump between ring and donors: one batch after the other, and what nobody waited for."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from cluster.overflow import Overflow
from cluster.peerring import RingPump
from cluster.peerwire import Page, pack
from cluster.replicas import Stored
from cluster.sheaf import Sheaf
from tests.plugin_helpers import wait_for
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.ringside import Batch, RingSide


class SlowOverflow:
    """Puts take until they are let go; what is forgotten is remembered."""

    room_bytes = 0

    def __init__(self) -> None:
        self.replicas = self
        self.go = asyncio.Event()
        self.running = 0
        self.most_running = 0
        self.forgotten: list[int] = []
        self.tasks: list[asyncio.Task[Any]] = []

    def spawn(self, work: Any) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    async def put(self, sheaves: list[Sheaf], copies: int = 0) -> list[Stored]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.go.wait()
        self.running -= 1
        return [Stored((0, 1), 0) for sheaf in sheaves for _ in sheaf]

    def forget(self, sheaves: list[Sheaf], stored: list[Stored]) -> None:
        assert self.running == 0, "a copy of the next batch could be dropped"
        self.forgotten += [page.page for sheaf in sheaves for page in sheaf.pages()]

    def drop(self, copies: Any) -> None:
        pass

    def rows_met(self) -> dict[int, bool | None]:
        return {}


class Ring:
    """As much of a RingSide as the pump needs, with batches that nobody waits for."""

    wake_fd = -1
    drops_missed = 0

    def __init__(self) -> None:
        self.batches = [
            Batch(turn, [(pack([Page(0, turn, turn, 0)]), bytes(25))]) for turn in range(3)
        ]
        self.taken = 0

    def gets(self) -> list[Any]:
        return []

    def drops(self, most: int) -> list[Any] | None:
        return None

    def batch(self) -> Batch | None:
        if self.taken == len(self.batches):
            return None
        self.taken += 1
        return self.batches[self.taken - 1]

    def answer_batch(self, turn: int, answers: Any) -> bool:
        return turn == 2


def test_one_batch_after_the_other() -> None:
    """Who gave up on a batch asks again: it has its turn when the first is over and forgotten."""

    async def work() -> SlowOverflow:
        overflow = SlowOverflow()
        ring = Ring()
        pump = RingPump(cast(RingSide, ring), cast(Overflow, overflow))
        for _ in range(3):
            pump.pump()
            await asyncio.sleep(0)
        assert ring.taken == 1
        overflow.go.set()
        for _ in range(20):
            pump.pump()
            await asyncio.sleep(0)
        assert ring.taken == 3
        return overflow

    overflow = asyncio.run(work())
    assert overflow.most_running == 1
    assert overflow.forgotten == [0, 1]


class LateRing(Ring):
    """A drop is told, and then a batch asked for, while the ring is being emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False
        self.told: list[Any] = []

    def drops(self, most: int) -> list[Any] | None:
        told, self.told = self.told, []
        if not self.asked:
            self.asked, self.told = True, [(0, pack([Page(0, 0, 0, 1)]))]
        return told or None

    def batch(self) -> Batch | None:
        return super().batch() if self.asked else None


class Log(SlowOverflow):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    async def put(self, sheaves: list[Sheaf], copies: int = 0) -> list[Stored]:
        self.log.append("put")
        return await super().put(sheaves, copies)

    def drop(self, copies: Any) -> None:
        self.log.append("drop")


def test_what_was_dropped_before_a_put_is_not_dropped_after_it() -> None:
    """A page that was moved up and is put again has the version it had: the drop is older."""

    async def work() -> list[str]:
        overflow = Log()
        pump = RingPump(cast(RingSide, LateRing()), cast(Overflow, overflow))
        for _ in range(3):
            pump.pump()
            await asyncio.sleep(0)
        overflow.go.set()
        return overflow.log

    assert asyncio.run(work()) == ["drop", "put"]


def test_a_ring_is_one_nodes(tmp_path: object) -> None:
    """Its lock goes with the node, however that ends."""
    memory = MemoryFile.create(None, 4096, 4096)
    tier = PeerTier(memory)
    first = RingSide(tier.fd, tier.wake_fd)
    first.close()
    again = wait_for("the ring", lambda: RingSide(tier.fd, tier.wake_fd))
    again.close()
    memory.close()
