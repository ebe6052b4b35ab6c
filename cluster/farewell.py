"""A word to donors when a memory file is removed: nobody will ask for its pages any more.

    node of a private memory file ends  --bye on the links it has--> donors drop them
    `zcache stop` has removed the file  --dials, bye, no hello-->    donors drop them

Only when the file is gone, or sure to go with its server: a page that is dropped is lost.  A bye
names the epoch that is over, and ends no other: said late, when a new server of that name has its
pages there, it changes nothing.  A donor that does not answer, or does not know the word, keeps
the pages until its `--abandon`.

Bound: BYE_S for all of them together, and what the resolver takes beyond that for a host's name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import NamedTuple

from cluster import laneport, peersocket, peerwire
from cluster.peeraddress import PeerAddress
from cluster.peerchannel import Channel
from cluster.peerlink import PeerLink
from cluster.peerwire import PeerError
from cluster.tls import TlsRules
from zcache_core.errors import ZcacheError

BYE_S = 1.0


class Leaver(NamedTuple):
    """Whose pages they were: as `owner_name` says, and the epoch of the file that is gone."""

    owner: str
    epoch: int


async def say(links: Iterable[PeerLink]) -> int:
    """Over links that are up; how many donors have heard it."""
    return await _heard([_over_link(link) for link in links])


def say_from_outside(leaver: Leaver, addresses: Iterable[str], tls: str | None) -> int:
    """Dial these donors and say it; how many have heard it.  Never raises for a donor."""
    return asyncio.run(_from_outside(leaver, addresses, tls))


async def _from_outside(leaver: Leaver, addresses: Iterable[str], tls: str | None) -> int:
    try:
        rules = peersocket.rules(tls, server=False) if tls else None
    except (ZcacheError, OSError):  # certificates that are gone, say
        return 0
    return await _heard([_dialled(leaver, text, rules) for text in dict.fromkeys(addresses)])


async def _heard(words: list[Awaitable[bool]]) -> int:
    tasks = [asyncio.ensure_future(word) for word in words]
    if not tasks:
        return 0
    done, late = await asyncio.wait(tasks, timeout=BYE_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return sum(task.result() for task in done)


async def _over_link(link: PeerLink) -> bool:
    try:
        await link.bye()
    except PeerError:
        return False
    return True


async def _dialled(leaver: Leaver, text: str, rules: TlsRules | None) -> bool:
    channel = Channel()
    try:
        address = PeerAddress.read("peers", text)
        if rules is None:
            address.require_safe("peers", None)
        await laneport.connect(address, channel, rules)
        peerwire.bye_answer(await channel.call("bye", *leaver, deadline_s=BYE_S))
    except (ZcacheError, OSError, ValueError):  # ValueError: a host that is no name
        return False
    finally:
        channel.close("it has said it")
    return True
