"""`zcache node`: the process that lends this machine's RAM to others.

    owners --TCP, TLS or Unix--> donor --> donation (pages, in a memory file of their own)
    control socket ------------> ping stats config health owners drain
    --metrics (HTTP) ----------> the same, for reading
    each second                  donor.tick

With a named memory file a node that is started again finds every page it held; owners dial
again and go on.  Ended in order while it holds nothing, it removes the file; while it holds
pages, the file stays for its next start.  Without a name the pages are gone with it, as if
the machine had died: owners have other copies.

Bound: what the donor and the control socket's link say.
What it is not: `cluster.node`, which belongs to a server; this one is nobody's child.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zcache_core
from cluster import laneport, peersocket, unixsock
from cluster.donor import ABANDON_S, Donor, DonorOptions, since_boot_s
from cluster.etcdurl import EtcdUrl, without_password
from cluster.link import RpcError, Server
from cluster.members import Member, Registration
from cluster.peeraddress import PeerAddress
from cluster.peerwire import Health
from zcache_core import counters
from zcache_core.donation import Donation, sizes
from zcache_core.errors import ConfigError, ZcacheError
from zcache_core.memfile import FOREIGN_DEVICE, MemoryFile, exists
from zcache_core.process import keep_heap, lock_memory

BACKLOG = 64
PAGE_BYTES = 4096
TICK_S = 1.0
# A batch is larger than what malloc takes from the kernel anew each time, and every copy of one
# would be faulted in page by page: 128 pages put in 1.9 ms without this, 0.6 ms with it.
HEAP_BYTES = 4 << 20
log = logging.getLogger("zcache.lending")


class Control:
    """What the control socket answers."""

    def __init__(self, donor: Donor, config: dict[str, Any]) -> None:
        self._donor, self._config = donor, config
        self._memory = donor.donation.memory
        self._began_s, self._started_s = time.monotonic(), int(time.time())
        self._methods: dict[str, Callable[[], Awaitable[Any]]] = {
            "ping": self.ping,
            "stats": self.stats,
            "config": self.config,
            "health": self.health,
            "owners": self.owners,
        }

    async def dispatch(self, method: str, params: list[Any]) -> Any:
        """The result of one request.  Raises RpcError."""
        if method == "drain":
            return await self.drain(params)
        call = self._methods.get(method)
        if call is None:
            known = ", ".join(sorted([*self._methods, "drain"]))
            raise RpcError("unknown_method", f"there is no method {method}; use one of {known}")
        if params:
            raise RpcError("bad_params", f"{method} takes no parameters; send an empty array")
        return await call()

    async def ping(self) -> dict[str, Any]:
        """Version, process, and for how long."""
        return {
            "version": zcache_core.__version__,
            "pid": os.getpid(),
            "uptime_seconds": int(time.monotonic() - self._began_s),
            "node_started_seconds": self._started_s,
        }

    async def look(self) -> dict[str, Any]:
        """Everything at once, by method: what the web pages are made from."""
        return {name: await call() for name, call in self._methods.items()}

    async def stats(self) -> dict[str, Any]:
        """Every counter by name, and `histograms`: as a server's."""
        draining = {"draining": int(self._donor.draining)}
        found = counters.read(self._memory) | draining
        return found | {"histograms": counters.histograms(self._memory)}

    async def config(self) -> dict[str, Any]:
        """What the node runs with; sizes in bytes."""
        return self._config

    async def health(self) -> dict[str, Any]:
        """status and reasons, as a server's."""
        reasons = {
            Health.SHORT: (
                "memory is short on this machine, so nothing new is taken",
                "let it be, or lend less",
            ),
            Health.DRAINING: (
                "it is being drained: owners are asked to take their pages back",
                "'zcache node drain --off' ends that",
            ),
        }
        if (now := self._donor.health()) is Health.OK:
            return {"status": "ok", "reasons": []}
        what, do = reasons[now]
        return {"status": "degraded", "reasons": [{"what": what, "do": do}]}

    async def owners(self) -> list[dict[str, Any]]:
        """Whose pages are here: pages, bytes they take, bytes offered now, when heard of."""
        return owners_of(self._donor)

    async def drain(self, params: list[Any]) -> dict[str, Any]:
        """drain(true) or drain(): empty it; drain(false): lend again."""
        if params not in ([], [True], [False]):
            raise RpcError("bad_params", "drain takes true, false or nothing")
        self._donor.drain(params != [False])
        now = counters.read(self._memory)
        return {
            "draining": self._donor.draining,
            "pages": now["foreign_pers_pages"],
            "frames": now["pers_pageframes"],
        }


def owners_of(donor: Donor) -> list[dict[str, Any]]:
    """Whose pages are here: pages, the room they take, what is offered, since when it is silent."""
    now_s = int(since_boot_s())
    return [
        {
            "name": name,
            "pages": pages,
            "bytes": held,
            "offered_bytes": donor.offer(row).room_bytes,
            "heard_seconds": max(0, now_s - heard_s),
        }
        for row, name, _, heard_s, pages, held, _ in donor.donation.owners()
    ]


def open_memory(name: str | None, donate_bytes: int) -> MemoryFile:
    """The memory file: a new one, or that of this name.  Raises ZcacheError."""
    device_bytes, pool_bytes = sizes(donate_bytes)
    if name is None or not exists(name):
        return MemoryFile.create(name, device_bytes, pool_bytes, [(FOREIGN_DEVICE, device_bytes)])
    memory = MemoryFile.open(name)
    if memory.pool_bytes != pool_bytes and memory.devices()[0][0] == FOREIGN_DEVICE:
        there = memory.size_bytes
        memory.close()
        raise ConfigError(
            f"the memory file {name} is of another size ({there} bytes): lend as much as when it "
            f"was made and drain it, or remove it with 'zcache check --remove-leftovers {name}'"
        )
    return memory


@dataclass(frozen=True)
class LendOptions:
    """What a person chose.  Sizes in bytes, times in seconds."""

    listen: PeerAddress
    donate: int
    name: str
    memory: str | None  # None: the pages are gone with the process
    tls: str | None = None
    quota: int | None = None
    abandon: int = ABANDON_S
    etcd: str | None = None
    keep: bool = True  # at an orderly end, the memory file of that name with the pages in it


class Lender:
    """All of lending in a process that has a loop: pages, their listener, a tick each second."""

    def __init__(self, options: LendOptions) -> None:
        self._options = options
        self._etcd = EtcdUrl.read(options.etcd) if options.etcd is not None else None
        self._keep = True
        self.bound = ""
        self._donation: Donation | None = None
        self._memory: MemoryFile | None = None
        self.donor: Donor | None = None
        self._listening: laneport.Listening | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._registration: Registration | None = None

    async def start(self) -> None:
        """Find the pages again, and listen.  Raises ZcacheError; `stop` in any case."""
        chosen = self._options
        # (finding again takes a while, and the loop has others to answer)
        await asyncio.to_thread(self._open)
        assert self._donation is not None
        made = self.donor = Donor(
            self._donation, DonorOptions(chosen.name, chosen.quota, chosen.abandon)
        )
        tls = peersocket.rules(chosen.tls, server=True) if chosen.tls else None
        self._listening, self.bound = await laneport.serve(
            chosen.listen, "listen", made.connection, tls
        )
        self._ticking = asyncio.get_running_loop().create_task(_tick(made))
        if self._etcd is not None:
            address = reachable(PeerAddress.read("listen", self.bound))
            epoch = self._donation.memory.epoch
            # Nodes without certificates may have one name, but not one address.
            name = chosen.name if chosen.tls else f"{chosen.name}@{address}".replace("/", "_")
            member = Member(name, str(address), chosen.donate, epoch)
            self._registration = Registration(self._etcd, chosen.tls, member)
            self._registration.start()

    def _open(self) -> None:
        self._memory = open_memory(self._options.memory, self._options.donate)
        self._keep = not self._memory.fresh  # until it is known what is there
        self._donation = Donation(self._memory)
        self._donation.start()
        self._keep = False

    def close(self) -> None:
        """Speak to nobody any more; in the loop."""
        if self._ticking is not None:
            self._ticking.cancel()
        if self._registration is not None:
            self._registration.stop()
            self._registration = None
        if self._listening is not None:
            self._listening.close()
            if self._options.listen.path:
                Path(self._options.listen.path).unlink(missing_ok=True)
            self._listening = None
        if self.donor is not None:
            self.donor.close()

    def stop(self) -> int:
        """After `close`; how many pages were held.  Their file stays if it is to be kept."""
        held = 0
        if self._donation is not None:
            held = sum(pages for _, _, _, _, pages, *_ in self._donation.owners())
            self._donation.stop()
        if self._memory is not None:
            if (held and self._options.keep) or self._keep:
                self._memory.close()
            else:
                self._memory.destroy()
            self._memory = None
        return held

    def config(self) -> dict[str, Any]:
        """What it lends with; sizes in bytes."""
        chosen = self._options
        return {
            "name": chosen.name,
            "listen": self.bound,
            "donate": chosen.donate,
            "quota": chosen.quota,
            "abandon_seconds": chosen.abandon,
            "memory": chosen.memory,
            "tls": chosen.tls,
            "etcd": without_password(chosen.etcd) if chosen.etcd else None,
        }


async def serve(args: argparse.Namespace, lender: Lender) -> None:
    """Lend until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    control_sock = unixsock.listen(args.control, "the control socket", "--control PATH", BACKLOG)
    inode = os.stat(args.control).st_ino
    try:
        await lender.start()
        assert lender.donor is not None
        config = lender.config() | {"control": args.control, "metrics": None}
        answers = Control(lender.donor, config)
        control = Server(answers.dispatch)
        await control.start(control_sock)
        web = loop.create_task(serve_web(answers, config, args.metrics)) if args.metrics else None
        print(f"zcache node: {args.name} lends {args.donate} bytes on {lender.bound}", flush=True)
        await ended.wait()
        if web is not None:
            web.cancel()
            await asyncio.gather(web, return_exceptions=True)
        await control.stop()
    finally:
        unixsock.remove(args.control, inode)
        lender.close()


async def serve_web(answers: Control, config: dict[str, Any], address: str) -> None:
    """Metrics and web page at HOST:PORT until cancelled; `config` says where."""
    from cluster import webpages  # 4 MiB that a node without it does not need

    await webpages.serve(address, answers.look, lambda bound: config.update(metrics=bound))


async def _tick(donor: Donor) -> None:
    """Each second; a tick that fails costs itself only."""
    loop = asyncio.get_running_loop()
    before = loop.time()
    while True:
        await asyncio.sleep(TICK_S)
        now = loop.time()
        try:
            donor.tick(now - before)
        except Exception:
            log.exception("a tick failed")
        before = now


def lend(args: argparse.Namespace) -> None:
    """Everything from the memory file to its end.  Raises ZcacheError."""
    options = LendOptions(
        *(args.listen, args.donate, args.name, args.memory, args.tls, args.quota, args.abandon),
        args.etcd,
    )
    lender, held = Lender(options), 0
    try:
        asyncio.run(serve(args, lender))
    finally:
        held = lender.stop()
    if held and args.memory is None:
        log.warning("%d pages of others are gone with this node; --memory NAME keeps them", held)


def reachable(bound: PeerAddress) -> PeerAddress:
    """The address that others are told: of one that is every network's, this machine's name."""
    if bound.path or bound.host not in ("0.0.0.0", "::"):
        return bound
    return PeerAddress("", socket.gethostname(), bound.port)


def node_name(tls: str | None) -> str:
    """Who a donor says it is: its certificate's name, or the machine's."""
    if tls is None:
        return socket.gethostname()[:48]
    from cluster.certificates import name_in  # 10 MiB that a plain node does not need

    return name_in(Path(tls))


def parser() -> argparse.ArgumentParser:
    """The words of this program: as `zcache node` has made them, sizes in bytes."""
    made = argparse.ArgumentParser(prog="zcache-lending", description=__doc__.split("\n", 1)[0])
    made.add_argument("--control", required=True)
    made.add_argument("--listen", required=True, type=lambda w: PeerAddress.read("listen", w))
    made.add_argument("--donate", required=True, type=int)
    made.add_argument("--name", default=node_name(None))
    made.add_argument("--memory")
    made.add_argument("--tls")
    made.add_argument("--etcd")
    made.add_argument("--metrics")
    made.add_argument("--quota", type=int)
    made.add_argument("--abandon", type=int, default=ABANDON_S)
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after a signal; a ZcacheError's own otherwise."""
    logging.basicConfig(format="zcache node: %(message)s", level=logging.WARNING)
    try:
        args = parser().parse_args(argv)
        keep_heap(HEAP_BYTES)
        # Two machines may swap, and lend to one another: a page of ours must not lie with the one
        # that waits for us.  (The pages that are lent are locked as a server's are.)
        lock_memory(on_fault=True)
        args.listen.require_safe("listen", args.tls)
        if args.etcd:
            EtcdUrl.read(args.etcd).require_safe(args.tls)
        if args.tls:
            args.name = node_name(args.tls)
        with contextlib.suppress(KeyboardInterrupt):
            lend(args)
    except ZcacheError as error:
        print(f"zcache node: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
