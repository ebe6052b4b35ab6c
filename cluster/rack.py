"""An owner's donors, as etcd names them: links made for new ones, nothing lost with etcd.

    members (a thread, members.py) --heard--> chosen of them --> links, seats
    etcd silent for TTL_S --> nobody is given new pages; who has pages goes on
    what was heard last   --> a file beside the control socket, for a node that is started again

A donor that is not registered any more, or not among the chosen, is given nothing new; its link
stays as long as pages of ours count on it.

Bound: LINKS_MOST links to those that are chosen, and one for each that still has pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from cluster.etcdurl import EtcdUrl
from cluster.members import TTL_S, Member, Watching, chosen
from cluster.overflow import Overflow
from cluster.peerlink import PeerLink
from zcache_core.errors import ConfigError

LOOK_S = 1.0
SILENT_S = TTL_S + 2 * LOOK_S
log = logging.getLogger("zcache.rack")


class Rack:
    """`make(address)` gives a link that is not started yet; `is_own` knows our own donor."""

    def __init__(
        self,
        url: EtcdUrl,
        tls: str | None,
        owner: str,
        is_own: Callable[[Member], bool],
        make: Callable[[str], PeerLink],
        overflow: Overflow,
        noted: Path,
    ) -> None:
        self._owner, self._is_own, self._make, self._overflow = owner, is_own, make, overflow
        self._noted = noted
        self.links: dict[str, PeerLink] = {}
        self._chosen: set[str] = set()
        self._refused: set[str] = set()
        self._heard_s = -2.0 * TTL_S
        self._began_s = asyncio.get_running_loop().time()
        self._watching = Watching(url, tls, asyncio.get_running_loop(), self.heard)
        self._task: asyncio.Task[None] | None = None

    @property
    def is_current(self) -> bool:
        """Whether etcd was heard of lately."""
        return asyncio.get_running_loop().time() - self._heard_s <= SILENT_S

    @property
    def silent_s(self) -> int:
        """Seconds that etcd has been silent for, once that is too long; else 0."""
        since_s = asyncio.get_running_loop().time() - max(self._heard_s, self._began_s)
        return int(since_s) if since_s > SILENT_S else 0

    def start(self) -> None:
        for address in self._remembered():
            self._add(address)
        self._watching.start()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._watching.stop)
        for link in self.links.values():
            await link.stop()

    def heard(self, members: dict[str, Member]) -> None:
        """What is registered now."""
        self._heard_s = asyncio.get_running_loop().time()
        others = {name: one for name, one in members.items() if not self._is_own(one)}
        self._chosen = {one.address for one in chosen(self._owner, others)}
        for address in sorted(self._chosen - self.links.keys()):
            self._add(address)
        self.look()
        self._remember()

    def look(self) -> None:
        """Who may be given pages now; who is not needed any more."""
        copies = self._overflow.copies()
        met = {seat.row for seat in self._overflow.seats.all() if seat.donor is not None}
        # After a start: some have pages of ours, and have not said yet who they are.
        strangers = any(n and row not in met for row, n in enumerate(copies))
        for address, link in list(self.links.items()):
            link.is_listed = self.is_current and address in self._chosen
            seat = self._overflow.seats.of(link)
            counted = copies[seat.row] if seat is not None else strangers
            if self.is_current and not link.is_listed and not counted:
                del self.links[address]
                self._overflow.remove(link)
                self._overflow.replicas.spawn(link.stop())

    async def _run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def _add(self, address: str) -> None:
        try:
            link = self._make(address)
        except ConfigError as error:  # an address of a network, and no certificates
            if address not in self._refused:
                self._refused.add(address)
                log.warning("a donor that etcd names is not used: %s", error)
            return
        self.links[address] = link
        link.is_listed = False
        self._overflow.add(link)
        link.start()

    def _remembered(self) -> list[str]:
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = json.loads(self._noted.read_text())
            return [str(address) for address in found]
        return []

    def _remember(self) -> None:
        """For the next node of this server, should etcd be gone then."""
        with contextlib.suppress(OSError):
            new = self._noted.with_name(self._noted.name + ".new")
            new.write_text(json.dumps(sorted(self.links)))
            os.replace(new, self._noted)
