"""The peer tier over its ring, with a node in a thread: sealed, checked, bounded, found again."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.peerwire import Page, sealed_bytes, unpack
from cluster.sheaf import Sheaf
from tests.cold_helpers import DISK_BYTES, make_object, refused
from tests.core_helpers import PAGE
from tests.peer_helpers import FakeNode, wait_until
from tests.tiers_helpers import open_file
from zcache_core import counters
from zcache_core.coldprobe import BATCH_MOST, ColdProbe
from zcache_core.crypt import CIPHER_NAMES, Sealer
from zcache_core.errors import MemoryFileError
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.ringside import (
    AT_ONCE,
    Batch,
    RingSide,
    Wanted,
    rows_of_where,
    where_of_rows,
)


@pytest.fixture
def memory() -> Iterator[MemoryFile]:
    memory = MemoryFile.create(None, 64 * PAGE, 16 * PAGE)
    yield memory
    memory.close()


@pytest.fixture
def tier(memory: MemoryFile) -> PeerTier:
    return PeerTier(memory)


@pytest.fixture
def probe(memory: MemoryFile, tier: PeerTier, tmp_path: Path) -> Iterator[ColdProbe]:
    fd = open_file(tmp_path / "unused", DISK_BYTES)
    probe = ColdProbe(memory, fd, DISK_BYTES)
    probe.wrap(lambda _: tier)
    yield probe
    os.close(fd)


@pytest.fixture
def node(memory: MemoryFile, tier: PeerTier, probe: ColdProbe) -> Iterator[FakeNode]:
    node = FakeNode(tier, memory)
    probe.tick()  # the donor table
    yield node
    node.die()


def test_addresses() -> None:
    assert where_of_rows([0]) == 1 << 47 | 1
    assert where_of_rows([2, 0, 95]) == 1 << 47 | 96 << 30 | 1 << 15 | 3
    assert rows_of_where(where_of_rows([2, 0, 95])) == (2, 0, 95)
    for rows in ([], [1, 1], [96], [0, 1, 2, 3]):
        with pytest.raises(ValueError):  # noqa: PT011
            where_of_rows(rows)


def test_against_a_model(
    probe: ColdProbe, node: FakeNode, memory: MemoryFile, rng: random.Random
) -> None:
    alive = {}
    version = 1
    for _ in range(60):
        batch = [make_object(rng, rng.randrange(60), version + i) for i in range(rng.randrange(40))]
        version += len(batch)
        for thing, (where, error) in zip(batch, probe.put(batch), strict=True):
            assert error == 0
            assert len(rows_of_where(where)) == 2
            alive[thing[1]] = thing, where
        for thing, where in rng.sample(list(alive.values()), min(5, len(alive))):
            assert probe.get(thing[0], thing[1], where, thing[2]) == thing[3]
        for v in rng.sample(sorted(alive), len(alive) // 4):
            thing, where = alive.pop(v)
            probe.drop(where, len(thing[3]), thing[0], thing[1])
        probe.tick()
        now = counters.read(memory)
        assert now["pers_pages_remoted"] == len(alive)
        assert now["remote_bytes"] == sum(2 * (len(t[3]) + 24) for t, _ in alive.values())
    wait_until(lambda: len(node.held) == 2 * len(alive), "nothing leaks at the donors")
    for thing, where in alive.values():
        assert probe.get(thing[0], thing[1], where, thing[2]) == thing[3]
        assert thing[3] not in node.held.values(), "nothing plain leaves"
    probe.put([make_object(rng, i % 64, version + i, PAGE) for i in range(BATCH_MOST)])


def test_a_wrong_copy_is_found_and_the_other_one_used(
    probe: ColdProbe, node: FakeNode, memory: MemoryFile, rng: random.Random
) -> None:
    things = [make_object(rng, i, i + 1) for i in range(30)]
    where = [w for w, _ in probe.put(things)]
    node.spoil = {0}
    for thing, at in zip(things, where, strict=True):
        assert probe.get(thing[0], thing[1], at, thing[2]) == thing[3]
    found = counters.read(memory)["remote_corrupt_pages"]
    assert found == node.wrong_seen == sum(rows_of_where(at)[0] == 0 for at in where)
    node.spoil = {0, 1, 2}
    assert refused(probe, 0, 1, where[0], things[0][2]) == errno.EILSEQ


def test_exchanged_and_replayed_pages_are_refused(
    probe: ColdProbe, node: FakeNode, rng: random.Random
) -> None:
    """Whoever answers with another page, or an older version, is found out."""
    old, new, other = (make_object(rng, p, v, 100) for p, v in ((1, 1), (1, 2), (2, 3)))
    new, other = (new[0], new[1], old[2], new[3]), (other[0], other[1], old[2], other[3])
    (where, _), *_ = probe.put([new])
    probe.put([old, other])
    for liar in ((1, 1), (2, 3)):
        with node.lock:
            [sealed, *_] = [s for (_, p, v), s in node.held.items() if (p, v) == liar]
            for row in range(3):
                node.held[row, 1, 2] = sealed
        assert refused(probe, 1, 2, where, new[2]) == errno.EILSEQ


@pytest.mark.parametrize("cipher", sorted(CIPHER_NAMES))
def test_a_copy_says_which_cipher_sealed_it(
    probe: ColdProbe, node: FakeNode, memory: MemoryFile, rng: random.Random, cipher: int
) -> None:
    """Its server may have had another one than the server that opens it."""
    thing = make_object(rng, 1, 2, 100)
    [(where, _)] = probe.put([thing])
    about = {"epoch": memory.epoch, "version": 2, "page": 1, "length_codec": thing[2] & 0xFFFF}
    about |= {"device": 0, "purpose": 2}
    with node.lock:
        for sealed in node.held.values():
            assert sealed[7] == Sealer(memory, for_peers=True).cipher
        other = Sealer(memory, cipher, for_peers=True).seal(thing[3], **about)
        assert other[7] == 0, "no counter comes so far"
        for key in node.held:
            node.held[key] = other[:7] + bytes([cipher]) + other[8:]
    assert probe.get(1, 2, where, thing[2]) == thing[3]
    for wrong in (0, 3 - cipher, 3, 255):
        with node.lock:
            for key in node.held:
                node.held[key] = other[:7] + bytes([wrong]) + other[8:]
        assert refused(probe, 1, 2, where, thing[2]) == errno.EILSEQ


def test_impossible_addresses(probe: ColdProbe, node: FakeNode) -> None:
    for where in (
        0,
        8,
        1 << 47,
        1 << 47 | 5,
        1 << 47 | 1 << 15,
        1 << 47 | 1 << 15 | 1,
        1 << 46 | 1,
    ):
        assert refused(probe, 1, 1, where, 0xFFF0) == errno.EILSEQ
        assert not probe.adopt(where, PAGE)
    assert refused(probe, 1, 1, where_of_rows([0, 1]), 0xFFF0) == errno.ENODATA


def test_nobody_answers_within_the_bounds(
    probe: ColdProbe, tier: PeerTier, node: FakeNode, rng: random.Random
) -> None:
    thing = make_object(rng, 1, 1)
    [(where, _)] = probe.put([thing])
    node.silent = True
    tier.set_bounds(50_000, 50_000)
    assert refused(probe, 1, 1, where, thing[2]) == errno.EIO
    assert probe.put([make_object(rng, 2, 2)])[0][1] == errno.EIO
    node.silent = False
    tier.set_bounds(10_000_000, 10_000_000)
    assert probe.get(1, 1, where, thing[2]) == thing[3], "a late answer is nobody's"
    assert probe.put([make_object(rng, 3, 3)])[0][1] == 0


def test_a_dead_node_takes_nothing_and_the_next_one_answers(
    probe: ColdProbe, tier: PeerTier, memory: MemoryFile, rng: random.Random
) -> None:
    node = FakeNode(tier, memory)
    probe.tick()
    thing = make_object(rng, 1, 1)
    [(where, error)] = probe.put([thing])
    assert error == 0
    node.silent = True
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(probe.get(1, 1, where, thing[2])))
    reader.start()
    node.ring.gets()  # taken, never answered
    node.die()
    assert not probe.takes()
    assert probe.put([make_object(rng, 2, 2)])[0][1] == errno.EIO, "at once"
    again = FakeNode(tier, memory, held=node.held)
    reader.join(20)
    assert got == [thing[3]]
    assert probe.put([make_object(rng, 3, 3)])[0][1] == 0
    with pytest.raises(MemoryFileError, match="another node"):
        RingSide(tier.fd, tier.wake_fd)
    again.die()


class Asker:
    """A thread that asks for one page."""

    def __init__(self, probe: ColdProbe, thing: tuple[int, int, int, bytes], where: int) -> None:
        self.said: list[bytes | int] = []
        self.thread = threading.Thread(target=self._ask, args=(probe, thing, where))
        self.thread.start()

    def _ask(self, probe: ColdProbe, thing: tuple[int, int, int, bytes], where: int) -> None:
        try:
            self.said.append(probe.get(thing[0], thing[1], where, thing[2]))
        except OSError as error:
            self.said.append(error.errno or 0)

    def end(self) -> bytes | int:
        self.thread.join(20)
        return self.said[0]


def taken(node: FakeNode) -> Wanted:
    """The one page that is asked for, taken by the node."""
    found: list[Wanted] = []

    def look() -> bool:
        found.extend(node.ring.gets())
        return bool(found)

    wait_until(look, "it is asked for")
    return found[0]


def test_an_answer_that_is_still_written_is_not_the_next_askers(
    probe: ColdProbe, tier: PeerTier, node: FakeNode, rng: random.Random
) -> None:
    """Who answers may lose its CPU in the middle: its cell is used again when it has ended."""
    things = [make_object(rng, page, 1) for page in (1, 2, 3)]
    wheres = [where for where, _ in probe.put(things)]
    node.silent = True
    tier.set_bounds(50_000, 50_000)
    first = Asker(probe, things[0], wheres[0])
    old = taken(node)
    assert node.ring.begin_get(old)
    assert first.end() == errno.EIO
    tier.set_bounds(60_000_000, 50_000)
    cells = []
    for thing, where in zip(things[1:], wheres[1:], strict=True):
        asker = Asker(probe, thing, where)
        wanted = taken(node)
        cells.append(wanted.cell)
        if thing is things[1]:
            assert node.ring.end_get(old, errno.ENODATA), "the old answer, late"
        sealed = next(data for key, data in node.held.items() if key[1] == thing[0])
        assert node.ring.answer_get(wanted, 0, sealed)
        assert asker.end() == thing[3]
    assert cells[0] != old.cell
    assert cells[1] == old.cell, "it is used again"


def test_a_node_killed_before_it_woke_the_asker(
    probe: ColdProbe, tier: PeerTier, memory: MemoryFile, rng: random.Random
) -> None:
    node = FakeNode(tier, memory)
    probe.tick()
    [(where, _)] = probe.put([thing := make_object(rng, 1, 1)])
    node.silent = True
    tier.set_bounds(60_000_000, 50_000)
    asker = Asker(probe, thing, where)
    wanted = taken(node)
    assert node.ring.begin_get(wanted)
    assert node.ring.end_get(wanted, errno.ENODATA, wake=False)
    node.die()
    again = FakeNode(tier, memory, held=node.held)
    assert asker.end() == errno.ENODATA
    again.die()


def test_a_put_under_way_fails_when_the_node_dies(
    probe: ColdProbe, tier: PeerTier, memory: MemoryFile, rng: random.Random
) -> None:
    node = FakeNode(tier, memory)
    probe.tick()
    node.silent = True
    tier.set_bounds(60_000_000, 60_000_000)
    answers: list[int] = []
    things = [make_object(rng, 1, 1)]
    putter = threading.Thread(target=lambda: answers.extend(e for _, e in probe.put(things)))
    putter.start()
    wait_until(lambda: node.ring.batch() is not None, "the batch is there")
    node.die()
    putter.join(20)
    assert answers == [errno.EIO]


def test_drops_are_told_by_donor(probe: ColdProbe, tier: PeerTier, rng: random.Random) -> None:
    """Each donor's records, in the order in which they were told; a model beside it."""
    ring = RingSide(tier.fd, tier.wake_fd)
    assert ring.drops(10) is None
    told: list[tuple[int, Page]] = []
    for turn in range(4):
        made: list[list[tuple[int, Page]]] = []
        for _ in range(n := rng.randrange(1, 300)):
            rows = rng.sample(range(96), rng.randrange(1, 4))
            page = Page(0, rng.randrange(64), rng.randrange(1 << 52), (rng.randrange(4096)) << 4)
            probe.drop(where_of_rows(rows), sealed_bytes(page.length_codec) - 24, *page[1:3])
            made.append([(row, page) for row in rows])
        most = rng.choice([n, n + 1, n // 2 + 1])
        found = []
        while (some := ring.drops(most)) is not None:
            found += [(row, page) for row, records in some for page in unpack(records)]
        told = [one for group in made for one in group]
        assert sorted(found) == sorted(told), turn
        for row in range(96):
            assert [p for at, p in found if at == row] == [p for at, p in told if at == row]
    ring.close()


def patient_ring(probe: ColdProbe, tier: PeerTier) -> RingSide:
    """A node's end with two donors that take everything; the server waits a minute for it."""
    ring = RingSide(tier.fd, tier.wake_fd)
    for row in range(2):
        assert ring.donor(row, bytes([row + 1] * 16), 7)
    ring.publish(True, 1 << 40, 2, 0, 0, 0)
    probe.tick()
    ring.beat()
    tier.set_bounds(60_000_000, 60_000_000)
    return ring


def test_a_large_batch_is_taken_in_sheaves(
    probe: ColdProbe, tier: PeerTier, rng: random.Random
) -> None:
    """Every page once, in its order; an answer of each kind reaches its page."""
    ring = patient_ring(probe, tier)
    things = [make_object(rng, page, 1 + page) for page in range(2 * AT_ONCE + 1)]
    answers: list[tuple[int, int]] = []
    putter = threading.Thread(target=lambda: answers.extend(probe.put(things)))
    putter.start()
    batches: list[Batch] = []

    def has_come() -> bool:
        batches.extend(filter(None, [ring.batch()]))
        return bool(batches)

    wait_until(has_come, "the batch is there")
    sheaves = [Sheaf(*part) for part in batches[0].pages]
    assert [len(sheaf) for sheaf in sheaves] == [AT_ONCE, AT_ONCE, 1]
    parts = [part for sheaf in sheaves for part in sheaf]
    assert [part[:3] for part in parts] == [thing[:3] for thing in things]
    assert all(
        len(part[3]) == len(thing[3]) + 24 for part, thing in zip(parts, things, strict=True)
    )
    kinds = [((0, 1), 0), ((1, 0), 0), ((), errno.ENOSPC)]
    said = [rng.choice(kinds) for _ in things]
    assert ring.answer_batch(batches[0].turn, said)
    putter.join(20)
    assert [(rows_of_where(w) if not e else (), e) for w, e in answers] == said
    ring.close()


def test_a_put_half_answered_fails_with_the_next_node(
    probe: ColdProbe, tier: PeerTier, memory: MemoryFile, rng: random.Random
) -> None:
    """What a node has written of its answer when it is killed is no answer."""
    ring = patient_ring(probe, tier)
    answers: list[int] = []
    things = [make_object(rng, page, 1) for page in (1, 2)]
    putter = threading.Thread(target=lambda: answers.extend(e for _, e in probe.put(things)))
    putter.start()
    batches: list[Batch] = []

    def has_come() -> bool:
        batches.extend(filter(None, [ring.batch()]))
        return bool(batches)

    wait_until(has_come, "the batch is there")

    def half() -> Iterator[tuple[list[int], int]]:
        yield [0, 1], 0
        raise InterruptedError

    with pytest.raises(InterruptedError):
        ring.answer_batch(batches[0].turn, half())
    ring.close()
    again = RingSide(tier.fd, tier.wake_fd)
    putter.join(20)
    assert answers == [errno.EIO, errno.EIO]
    again.close()
