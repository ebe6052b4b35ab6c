"""A word to donors when a memory file is gone: it ends that epoch, and nothing else."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from cluster import farewell, peerwire
from cluster.link import RpcError
from cluster.peersocket import rules
from cluster.peerwire import Hello, PeerError, pack
from tests.donor_helpers import (
    ask,
    linked,
    listening,
    make_cluster,
    make_pages,
    opened_donation,
)
from tests.t5_donor import held, put, run


def test_a_bye_ends_an_epoch_and_no_other(rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with (
                listening(donation) as (_, address),
                linked(address, "one", 1) as one,
                linked(address, "two", 1) as two,
            ):
                pages = make_pages(rng, 30)
                await put(one, pages, rng)
                theirs = await put(two, pages, rng)
                assert await one.bye() == 30
                assert [name for _, name, *_ in donation.owners()] == ["two"]
                with pytest.raises(PeerError):
                    await one.get(pack(pages))
                with pytest.raises(RpcError, match="another epoch by now"):
                    await ask(address, "hello", *Hello("one", 1).params())
                assert (await two.get(pack(pages)))[1] == b"".join(theirs)
                async with linked(address, "one", 2) as again:
                    assert await held(again) == []
                    assert await farewell.say([again, two]) == 2
                assert donation.owners() == []
                assert donation.check() == 0

    run(test)


def test_a_bye_that_nobody_answers_is_soon_over(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A donor that does not know the word, one that stands still, one that is not there."""
    known = tuple(name for name in peerwire.METHODS if name != "bye")
    monkeypatch.setattr(peerwire, "METHODS", known)

    async def test() -> None:
        with opened_donation() as donation:
            silent = socket.create_server(("127.0.0.1", 0))
            async with (
                listening(donation) as (_, address),
                linked(address, "one", 1) as one,
            ):
                pages = make_pages(rng, 30)
                theirs = await put(one, pages, rng)
                gone = socket.create_server(("127.0.0.1", 0))
                addresses = [f"127.0.0.1:{end.getsockname()[1]}" for end in (silent, gone)]
                gone.close()
                leaver = farewell.Leaver("one", 1)
                said = farewell._from_outside(leaver, [str(address), *addresses], None)
                assert await said == 0
                async with linked(address, "one", 1) as again:
                    assert (await again.get(pack(pages)))[1] == b"".join(theirs)
            silent.close()

    run(test)


def test_a_bye_from_outside_shows_its_certificate(rng: random.Random, tmp_path: Path) -> None:
    ca = make_cluster(tmp_path / "cluster")

    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation, tls=rules(ca / "lender", server=True)) as (_, address):
                async with linked(
                    address, "owner/x", 7, tls=rules(ca / "owner", server=False)
                ) as one:
                    await put(one, make_pages(rng, 30), rng)
                leaver = farewell.Leaver("owner/x", 7)
                for folder, heard in ((tmp_path, 0), (ca / "lender", 0), (ca / "owner", 1)):
                    assert len(donation.owners()) == 1
                    addresses = ["a..b:1", str(address)]  # the first one is no host's name
                    said = farewell._from_outside(leaver, addresses, str(folder))
                    assert await said == heard, folder
                assert donation.owners() == []

    run(test)


def test_a_late_bye_ends_no_other_epoch(rng: random.Random) -> None:
    """Of an epoch that this donor never met, or met before it was started again."""

    async def test() -> None:
        with opened_donation() as donation:
            for late in (1, 3):
                async with listening(donation) as (_, address), linked(address, "one", 2) as one:
                    pages = make_pages(rng, 30)
                    theirs = await put(one, pages, rng)
                    before = donation.owners()
                    for leaver in (("one", late), ("two", 2), ("two", late)):
                        said = farewell._from_outside(
                            farewell.Leaver(*leaver), [str(address)], None
                        )
                        assert await said == 1
                        assert await ask(address, "bye", *leaver) == [[0, 0, 0], 0]
                    assert donation.owners() == before, "no row of another epoch, and none made"
                    assert (await one.get(pack(pages)))[1] == b"".join(theirs)
                    assert await put(one, make_pages(rng, 5, first=50), rng)
                    await one.drop(pack(pages))

    run(test)


def test_one_bad_address_silences_no_other(rng: random.Random) -> None:
    async def test() -> None:
        with opened_donation() as donation:
            async with listening(donation) as (_, address), linked(address, "one", 1) as one:
                await put(one, make_pages(rng, 30), rng)
                bad = ["nowhere", "10.0.0.1:7900", f"{'a' * 70}.localhost:1", "127.0.0.1:99999"]
                leaver = farewell.Leaver("one", 1)
                assert await farewell._from_outside(leaver, [*bad, str(address)], None) == 1
                assert donation.owners() == []

    run(test)
