"""What cannot be run here: a thousand nodes.  Load spread, renewing a donor's pages, membership.

The real placement, choice of donors, renewal and etcd threads, on donors, a network, a clock and
an etcd that are imitated.  Each test prints what it has found (`pytest -s`).
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.etcdurl import EtcdUrl
from cluster.members import LINKS_MOST, POLL_S, TTL_S, Member, Registration, Watching, chosen
from cluster.placement import Candidate, choose
from cluster.replicas import Options
from tests.sim.loop import run
from tests.sim.world import World

NODES = 1000
GROUPS = 40  # of pages that a donor has room for
MEMBERS = {
    f"node{n:04}": Member(f"node{n:04}", f"10.0.{n >> 8}.{n & 255}:7900", 64 << 30, (1 << 60) + n)
    for n in range(NODES)
}


def test_load_at_80_percent(rng: random.Random) -> None:
    """Each of a thousand owners knows LINKS_MOST donors; most loaded to mean: 1.15 at most."""
    numbers = {name: n for n, name in enumerate(MEMBERS)}
    latency = [rng.choice([200.0, 500.0, 2000.0]) for _ in MEMBERS]
    held, links = [0] * NODES, [0] * NODES
    known = []
    for owner in MEMBERS:
        others = {name: one for name, one in MEMBERS.items() if name != owner}
        known.append([numbers[one.name] for one in chosen(owner, others)])
        for n in known[-1]:
            links[n] += 1
    for turn in range(int(0.8 * NODES * GROUPS / 2)):
        donors = [Candidate(n, GROUPS - held[n], GROUPS, latency[n]) for n in known[turn % NODES]]
        for row in choose(donors, 2, 1, rng):
            held[row] += 1
    ratio = max(held) / (sum(held) / NODES)
    print(
        f"\n{NODES} nodes, 80 % full: most loaded {ratio:.3f} of the mean; "
        f"a donor has {min(links)} to {max(links)} owners, an owner {LINKS_MOST} donors"
    )
    assert sum(held) == int(0.8 * NODES * GROUPS)
    assert ratio <= 1.15
    assert max(links) < 128, "connections that a donor takes"


def test_a_donor_is_renewed_in_time(rng: random.Random) -> None:
    """One of an owner's 64 donors comes back empty: so long until every page has two copies."""
    pages, sealed = 4096, 2048

    async def work() -> tuple[float, int, int]:
        world = World(rng, LINKS_MOST, pages * sealed, pages, Options())
        await world.start()
        try:
            loop = asyncio.get_running_loop()
            for page in range(pages):
                world.owner.write(page, (sealed - 25) << 4 | 1)
            assert await world.owner.cool(range(pages)) == pages
            lost = max(world.machines, key=lambda machine: len(machine.held))
            mine = len(lost.held)
            lost.restart_empty()
            began_s = loop.time()
            before = sum(link.calls for link in world.links)
            while any(world.right_copies(page) < 2 for page in range(pages)):
                await asyncio.sleep(0.01)
                assert loop.time() - began_s < 60
            return loop.time() - began_s, mine, sum(link.calls for link in world.links) - before
        finally:
            await world.stop()

    seconds, mine, calls = run(work())
    rate = mine * sealed / seconds / 1e6
    print(
        f"\n{mine} pages of a donor that came back empty, {mine * sealed >> 10} KiB of one owner: "
        f"two copies again after {seconds:.2f} s, {rate:.2f} MB/s, {calls} calls"
    )
    assert seconds < 5


class Clock:
    """Seconds that pass when somebody waits; waits for nothing, and ends at `until_s`."""

    def __init__(self, until_s: float) -> None:
        self.now_s, self.until_s = 0.0, until_s

    def wait(self, seconds: float | None = None) -> bool:
        self.now_s += seconds or 0.0
        return self.is_set()

    def is_set(self) -> bool:
        return self.now_s >= self.until_s

    def set(self) -> None:
        self.until_s = 0.0


class Etcd:
    """A client of an etcd with all members in it, which counts what goes over the wire.

    Sizes are those of the gateway's JSON, keys and values in base64.  Each `every_s` seconds a
    member goes, or the one that went last comes back.
    """

    def __init__(self, clock: Clock, every_s: float) -> None:
        self.clock, self.every_s = clock, every_s
        self.calls = self.read_bytes = self.sent_bytes = 0
        self.written = dict.fromkeys(MEMBERS, 1)  # at which revision
        self.changes = 0

    def row(self, name: str) -> dict[str, str]:
        return {
            "key": base64.b64encode(b"/zcache/donors/" + name.encode()).decode(),
            "create_revision": "12345",
            "mod_revision": str(self.written[name]),
            "version": "1",
            "value": base64.b64encode(MEMBERS[name].value()).decode(),
            "lease": "7587866379182375684",
        }

    def go_on(self) -> None:
        """All changes until now."""
        while (self.changes + 1) * self.every_s <= self.clock.now_s:
            self.changes += 1
            name = f"node{(self.changes - 1) // 2 % NODES:04}"
            if self.changes % 2:
                del self.written[name]
            else:
                self.written[name] = 1 + self.changes

    def _call(self, sent: Any, answered: Any) -> None:
        self.calls += 1
        self.sent_bytes += len(json.dumps(sent)) + 200  # of headers, about
        self.read_bytes += len(json.dumps(answered)) + 150

    def lease(self, ttl: int) -> Etcd:
        self._call({"TTL": ttl, "ID": 0}, {"ID": "7587866379182375684", "TTL": str(ttl)})
        return self

    def refresh(self) -> int:
        self._call({"ID": 7587866379182375684}, {"result": {"ID": "7587866379182375684"}})
        return TTL_S

    def put(self, key: str, value: bytes, lease: Any) -> None:
        self._call({"key": key, "value": base64.b64encode(value).decode()}, {"header": {}})

    def get_url(self, path: str) -> str:
        return path

    def post(self, url: str, json: dict[str, Any]) -> dict[str, Any]:
        assert url == "/kv/range"
        self.go_on()
        least = json.get("min_mod_revision", 0)
        rows = [self.row(name) for name, revision in self.written.items() if revision >= least]
        header = {"cluster_id": "14841639068965178418", "revision": str(1 + self.changes)}
        answer = {"header": header, "kvs": rows, "count": str(len(self.written))}
        self._call(json, answer)
        return answer

    def watch_prefix(self, prefix: str) -> tuple[Iterator[Any], Callable[[], None]]:
        self._call({"create_request": {"key": prefix, "range_end": prefix}}, {"result": {}})

        def events() -> Iterator[Any]:
            self.go_on()
            before = set(self.written)
            left_s = self.every_s - self.clock.now_s % self.every_s
            self.clock.wait(min(left_s, POLL_S))
            self.go_on()
            if left_s <= POLL_S:
                self._call({}, {"result": {"events": [{"kv": "x" * 200}]}})
                gone = [f"/zcache/donors/{name}".encode() for name in before - set(self.written)]
                yield {"type": "DELETE", "kv": {"key": gone[0]}} if gone else {}

        return events(), lambda: None


@pytest.mark.parametrize(("every_s", "span_s"), [(36000.0, 600.0), (60.0, 600.0), (1.0, 60.0)])
def test_membership(every_s: float, span_s: float) -> None:
    """What a donor and an owner exchange with etcd, with a donor that comes or goes so often."""
    url = EtcdUrl.read("http://127.0.0.1:2379")
    found: list[dict[str, Member]] = []
    donor_clock, owner_clock = Clock(span_s), Clock(span_s)
    donor, owner = Etcd(donor_clock, every_s), Etcd(owner_clock, every_s)
    registration = Registration(url, None, MEMBERS["node0000"])
    registration._stopping = donor_clock  # type: ignore[assignment]
    registration.talk(donor)
    watching = Watching(url, None, None, found.append)  # type: ignore[arg-type]
    watching._stopping = owner_clock  # type: ignore[assignment]

    def say(members: dict[str, Member]) -> None:
        assert members.keys() == owner.written.keys()
        found.append(members)

    watching._say = say  # type: ignore[method-assign]
    watching.talk(owner)
    assert len(found) > span_s / 10
    donor_rate = (donor.read_bytes + donor.sent_bytes) / span_s
    owner_rate = (owner.read_bytes + owner.sent_bytes) / span_s
    print(
        f"\na change each {every_s:.0f} s: a donor {donor.calls / span_s:.2f} calls/s and "
        f"{donor_rate:.0f} B/s, an owner {owner.calls / span_s:.2f} calls/s and "
        f"{owner_rate / 1e3:.1f} kB/s ({watching.roll.wholes} of {len(found)} reads were of all); "
        f"etcd, with {NODES} of each, "
        f"{(donor_rate + owner_rate) * NODES / 1e6:.1f} MB/s"
    )
    assert donor_rate < 300
    assert owner.calls <= 3.1 * span_s, "at most one read a second, its watch, and an event"
    assert owner_rate < (100e3 if every_s < POLL_S else 3e3)
