"""Who lends, by etcd: donors say it there under a lease, owners read it.

    donor   lease, TTL_S --> PREFIX/donors/NAME = {"address", "capacity_bytes", "epoch"}
            refreshed every TTL_S / 3; revoked at an orderly end
    owner   read --> watch, until something changes or POLL_S --> read the changes (roll.py) ...

etcd says where to look and no more: a donor's epoch and room are what it says itself (hello).
So an etcd that is gone, or wrong, costs no page: after TTL_S nobody is given new ones (rack.py),
who is known goes on.

The client is etcd3gw, which waits for its answers, so each of the two runs on a thread of its
own, and tells the loop.  The watch is a hint: what ends silently is noticed at the next poll.

Bounds: CALL_S for each call, POLL_S for a watch, one read a second at most, STOP_S for the end,
ROWS_MOST rows, LINKS_MOST chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.etcdurl import EtcdUrl
from cluster.peeraddress import NODE, PeerAddress
from cluster.roll import Roll
from zcache_core.errors import ConfigError, ZcacheError

TTL_S = 10
# A quiet round is 8 s; one whose watch is never answered ends, with another host, within 11.5 s:
# before the 12 s after which nobody is given new pages (rack.py).
POLL_S = 7.0
CALL_S = 3.0
SETTLE_S = 1.0  # between two reads: a thousand donors that start are not a thousand reads
RETRY_FIRST_S, RETRY_MOST_S = 0.5, 8.0
STOP_S = 0.5  # a lease is given back in milliseconds; who ends a process waits 2 s for all of it
LINKS_MOST = 64  # of the 96 rows of the donor table; the others are for those of yesterday
log = logging.getLogger("zcache.members")


@dataclass(frozen=True)
class Member:
    """A donor as it is registered."""

    name: str
    address: str
    capacity_bytes: int
    epoch: int

    def value(self) -> bytes:
        """What stands in etcd."""
        return json.dumps(
            {"address": self.address, "capacity_bytes": self.capacity_bytes, "epoch": self.epoch}
        ).encode()

    @classmethod
    def read(cls, name: str, value: bytes) -> Member | None:
        """None for what is no donor: others can write there."""
        try:
            found = json.loads(value)
            if not isinstance(found["address"], str):
                return None
            address = str(PeerAddress.read("etcd", found["address"]))
            return cls(name, address, int(found["capacity_bytes"]), int(found["epoch"]))
        except (ValueError, KeyError, TypeError, ConfigError, ArithmeticError, RecursionError):
            return None


def chosen(owner: str, members: Mapping[str, Member], most: int = LINKS_MOST) -> list[Member]:
    """So many of them, evenly spread over all owners, and few others when one comes or goes.

    Rendezvous hashing (Thaler, Ravishankar 1998): the highest of a hash of owner and donor.
    """

    def weight(member: Member) -> bytes:
        words = f"{owner}\0{member.name}".encode()
        return hashlib.blake2b(words, digest_size=8).digest()

    return sorted(members.values(), key=weight, reverse=True)[:most]


def library() -> tuple[Any, Any]:
    """requests, and etcd3gw's client; what these import when they are used is there, too."""
    # Only here: a node without etcd is 20 MiB smaller.
    import requests
    from etcd3gw.client import Etcd3Client

    for name in ("concurrent.futures.thread", "encodings.idna"):
        importlib.import_module(name)
    return requests, Etcd3Client


class _Talker(threading.Thread):
    """A thread that talks to etcd until `stop`; when a call fails, anew and to the next host."""

    def __init__(self, url: EtcdUrl, tls: str | None, what: str) -> None:
        super().__init__(name=what, daemon=True)
        self._url, self._tls = url, tls
        self._stopping = threading.Event()
        self._host = 0
        self._wait_s = RETRY_FIRST_S  # before the next try; short again after an answer

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.talk(self._client())
            except Exception as error:  # whatever a library raises for a network's answers
                self._host += 1
                log.info("etcd: %s", error)
                self._stopping.wait(self._wait_s)
                self._wait_s = min(2 * self._wait_s, RETRY_MOST_S)
        self.leave()

    def talk(self, client: Any) -> None:
        """Until something fails, or `stop`."""
        raise NotImplementedError

    def leave(self) -> None:
        """At the end, bounded."""

    def stop(self, wait_s: float = STOP_S) -> None:
        """End; who waits for etcd is not waited for longer than that."""
        self._stopping.set()
        if self.is_alive():
            self.join(wait_s)

    def _client(self) -> Any:
        requests, make = library()
        host, port = self._url.hosts[self._host % len(self._url.hosts)]
        session = requests.Session()
        session.trust_env = False  # no proxies
        # The library gives its own calls a timeout, but not the watch.
        session.post = functools.partial(session.post, timeout=POLL_S)
        if self._url.protocol == "https" and self._tls is not None:
            # One file: our key and certificate, and the cluster's CA.
            session.cert = session.verify = str(Path(self._tls) / NODE)
        client = make(host, port, self._url.protocol, timeout=CALL_S, session=session)
        if self._url.user:
            asked = {"name": self._url.user, "password": self._url.password}
            token = client.post(client.get_url("/auth/authenticate"), json=asked)["token"]
            session.headers["Authorization"] = token
        return client


class Registration(_Talker):
    """A donor's place in etcd, kept while this runs."""

    def __init__(self, url: EtcdUrl, tls: str | None, member: Member) -> None:
        super().__init__(url, tls, "zc-register")
        self._member = member
        self._lease: Any = None

    def talk(self, client: Any) -> None:
        self._lease = client.lease(ttl=TTL_S)
        client.put(self._url.donors + self._member.name, self._member.value(), lease=self._lease)
        while not self._stopping.wait(TTL_S / 3):
            if self._lease.refresh() < 0:
                raise ZcacheError("the lease has expired")
            self._wait_s = RETRY_FIRST_S

    def leave(self) -> None:
        try:
            if self._lease is not None:
                self._lease.revoke()
        except Exception as error:
            log.info("etcd: %s", error)


class Watching(_Talker):
    """What is registered, told to the loop: `tell(members)` each time it was read."""

    def __init__(
        self,
        url: EtcdUrl,
        tls: str | None,
        loop: asyncio.AbstractEventLoop,
        tell: Callable[[dict[str, Member]], None],
    ) -> None:
        super().__init__(url, tls, "zc-members")
        self._loop, self._tell = loop, tell
        self._cancel: Callable[[], None] = lambda: None
        self.roll = Roll(url.donors)

    def talk(self, client: Any) -> None:
        self.roll.doubt()  # another host, or one that was started again, perhaps with another store
        while not self._stopping.is_set():
            self._say(self._read(client))
            self._wait_s = RETRY_FIRST_S
            self._stopping.wait(SETTLE_S)
            self._wait_for_change(client)

    def _wait_for_change(self, client: Any) -> None:
        """Until something is written there, or POLL_S."""
        events, cancel = client.watch_prefix(self._url.donors)
        self._cancel = cancel
        timer = threading.Timer(POLL_S, cancel)
        timer.daemon = True
        timer.start()
        try:
            if not self._stopping.is_set():
                event = next(events, None)
                if event is not None and event.get("type") == "DELETE":
                    self.roll.forget(event["kv"]["key"])
        finally:
            timer.cancel()
            cancel()

    def stop(self, wait_s: float = STOP_S) -> None:
        self._stopping.set()
        self._cancel()
        super().stop(wait_s)

    def _read(self, client: Any) -> dict[str, Member]:
        members = {}
        for key, value in self.roll.ask(functools.partial(self._range, client)).items():
            name = key.decode(errors="replace").removeprefix(self._url.donors)
            member = Member.read(name, value)
            if member is not None:
                members[name] = member
        return members

    @staticmethod
    def _range(client: Any, asked: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = client.post(client.get_url("/kv/range"), json=asked)
        return answer

    def _say(self, members: dict[str, Member]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._tell, members)
