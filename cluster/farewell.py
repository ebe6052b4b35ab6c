"""A word to donors when a memory file is removed: nobody will ask for its pages any more.

    node of a private memory file ends  --bye on the links it has-->        donors drop them
    `zcache stop` has removed the file  --dials, hello of its epoch, bye--> donors drop them

Only when the file is gone, or sure to go with its server: a page that is dropped is lost.  A donor
that does not answer, or does not know the word, keeps the pages until its `--abandon`.

Bound: BYE_S for all of them together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from cluster import peersocket
from cluster.peeraddress import PeerAddress
from cluster.peerlink import PeerLink, first_turn
from cluster.peerwire import Hello, LinkState, PeerError
from zcache_core.errors import ZcacheError

BYE_S = 1.0
LOOK_S = 0.01


class Leaver(NamedTuple):
    """Whose pages they were: as `owner_name` says, and the epoch of the file that is gone."""

    owner: str
    epoch: int


async def say(links: Iterable[PeerLink]) -> int:
    """Over links that are up, or soon are; how many donors have dropped the pages."""
    tasks = [asyncio.ensure_future(_one(link)) for link in links]
    if not tasks:
        return 0
    done, late = await asyncio.wait(tasks, timeout=BYE_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return sum(task.result() for task in done)


async def _one(link: PeerLink) -> bool:
    while link.state is LinkState.CONNECTING:
        await asyncio.sleep(LOOK_S)
    try:
        await link.bye()
    except PeerError:
        return False
    return True


def say_from_outside(leaver: Leaver, addresses: Iterable[str], tls: str | None) -> int:
    """Dial these donors and say it; how many have dropped the pages.  Never raises for a donor."""
    return asyncio.run(_from_outside(leaver, list(addresses), tls))


async def _from_outside(leaver: Leaver, addresses: list[str], tls: str | None) -> int:
    links: list[PeerLink] = []
    with contextlib.suppress(ZcacheError, OSError):  # certificates that are gone, say
        rules = peersocket.rules(tls, server=False) if tls else None
        for address in addresses:
            hello = Hello(leaver.owner, leaver.epoch, turn=first_turn())
            links.append(PeerLink(PeerAddress.read("peers", address), hello, rules))
    for link in links:
        link.start()
    try:
        return await say(links)
    finally:
        await asyncio.gather(*(link.stop() for link in links))
