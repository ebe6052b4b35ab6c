"""A rack: an owner and donors in namespaces of their own, TLS, and everything that can go wrong.

Four donors, two copies.  One after the other, in an order from the seed: late frames, lost frames,
both, a cable that is cut, kill -9 with the pages gone or kept, SIGSTOP, a drain, a donor that lies.
No read fails or is wrong, page by page against a model, while it lasts and after.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lender_helpers import Model, live, stats
from tests.plugin_helpers import WAIT_S, Server, remove_memory, wait_for
from tests.rack_helpers import Rack
from tests.swaplab import fitness

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"),
    reason="; ".join(fitness.missing()) or "needs root for its networks",
)
DONORS = 4
LIAR = "tests.lying_lender"
LENDING = "cluster.lending"


class Life:
    """An owner's server in a rack, and what its pages are."""

    def __init__(self, rack: Rack, server: Server, rng: random.Random) -> None:
        self.rack, self.server, self.rng = rack, server, rng
        self.model = Model(server, rng)

    def whole(self) -> None:
        """Every donor answers, and no copy is missing."""
        wait_for("all donors", lambda: live(self.server) == len(self.rack.lenders))
        wait_for("no copy is missing", lambda: not stats(self.server)["remote_short_pages"])

    def hurt(self, n: int, fault: Fault, churn: int) -> None:
        """One donor's fault, work meanwhile, its end, and all is well again."""
        print(f"{time.monotonic():.1f} {fault.__name__} {self.rack.lenders[n].address}", flush=True)
        heal = fault(self, n)
        self.model.churn(churn)
        self.model.check(50)
        heal()
        self.model.churn(20)
        self.whole()

    def expose(self, liar: int) -> None:
        """Nobody's copies are with a liar any more; until it is known, it is one failure enough."""
        for n in range(len(self.rack.lenders)):
            self.rack.cable(n, delay_ms=0 if n == liar else 5)  # so that it is asked first
        address = self.rack.lenders[liar].address

        def is_known() -> bool:
            self.model.check(50)
            return bool(self.peer(address)["wrong_copies"] >= 3)

        wait_for("three lies", is_known)
        for n in range(len(self.rack.lenders)):
            self.rack.cable(n)
        wait_for("its copies are renewed", lambda: not self.peer(address)["copies"])
        self.whole()

    def peer(self, address: str) -> dict[str, Any]:
        """What the owner says of this donor."""
        peers = self.server.rpc("peers")
        return next(peer for peer in peers if peer["address"] == address)

    def check(self) -> None:
        """Every page, and nothing was lost, refused or served from the wrong place."""
        self.model.check()
        now = stats(self.server)
        assert now["lost_pages"] == now["failed_requests"] == 0
        assert now["remote_pers_pages_unsucc_get"] == 0


Fault = Callable[[Life, int], Callable[[], None]]


def late(life: Life, n: int) -> Callable[[], None]:
    life.rack.cable(n, delay_ms=life.rng.choice([5, 60, 400]))
    return lambda: life.rack.cable(n)


def lossy(life: Life, n: int) -> Callable[[], None]:
    life.rack.cable(n, loss_percent=life.rng.choice([2, 10, 30]))
    return lambda: life.rack.cable(n)


def late_and_lossy(life: Life, n: int) -> Callable[[], None]:
    life.rack.cable(n, delay_ms=30, loss_percent=10)
    return lambda: life.rack.cable(n)


def cut(life: Life, n: int) -> Callable[[], None]:
    life.rack.cable(n, cut=True)
    return lambda: life.rack.cable(n)


def killed(life: Life, n: int) -> Callable[[], None]:
    """With its pages, or (those without a memory file) without."""
    life.rack.lenders[n].kill()
    return life.rack.lenders[n].start


def stopped(life: Life, n: int) -> Callable[[], None]:
    life.rack.lenders[n].signal(signal.SIGSTOP)
    return lambda: life.rack.lenders[n].signal(signal.SIGCONT)


def drained(life: Life, n: int) -> Callable[[], None]:
    lender = life.rack.lenders[n]
    lender.rpc("drain", True)
    wait_for("it is empty", lambda: lender.rpc("stats")["foreign_pers_pages"] == 0)
    return lambda: lender.rpc("drain", False)


FAULTS: list[Fault] = [late, lossy, late_and_lossy, cut, killed, killed, stopped, drained]


def live_on(
    folder: Path, modules: list[str], rng: random.Random, faults: list[Fault], churn: int
) -> None:
    seed = rng.getrandbits(32)
    memory = f"rackowner{os.getpid()}x{seed}"
    try:
        with Rack(folder, modules, seed) as rack:
            words = rack.words(f"memory={memory}")
            with Server(folder, *words, network=rack.owner) as server:
                wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
                life = Life(rack, server, rng)
                life.whole()
                life.model.fill()
                assert stats(server)["pers_pages_remoted"] > 1000
                if LIAR in modules:
                    life.expose(modules.index(LIAR))
                for turn, fault in enumerate(faults):
                    life.hurt((turn + seed) % len(modules), fault, churn)
                life.check()
                if LIAR in modules:
                    assert stats(server)["remote_corrupt_pages"] > 0
                server.disconnect()
                server.process.kill()
                server.process.wait(WAIT_S)
                server.socket.unlink()
                with Server(folder, *words, network=rack.owner) as successor:
                    life.server = life.model.server = successor
                    life.model.handle = successor.connect()
                    life.check()
                    assert stats(successor)["pers_pages_remoted"] > 1000
                    life.model.handle.trim(16 << 20, 0)
                    wait_for(
                        "everything is dropped at the donors",
                        lambda: sum(peer["held_bytes"] for peer in successor.rpc("peers")) == 0,
                    )
                remove_memory(memory)
    finally:
        remove_memory(memory)


@pytest.mark.timeout(300)
def test_no_page_is_lost_or_wrong(tmp_path: Path, rng: random.Random) -> None:
    faults = rng.sample(FAULTS, len(FAULTS))
    live_on(tmp_path, [LENDING] * DONORS, rng, faults, churn=1000)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("donors", [3, 4, 5])
def test_for_long(tmp_path: Path, rng: random.Random, donors: int) -> None:
    faults = [rng.choice(FAULTS) for _ in range(60)]
    modules = [LENDING] * (donors - 1) + [LIAR if donors > 3 else LENDING]
    live_on(tmp_path, modules, rng, faults, churn=600)
