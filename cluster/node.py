"""The node process: answers the control and statistics RPC beside the server.

    server process (nbdkit + plugin)          node process (this, asyncio)
      memory file: counters  <-- read-only --   stats, health
      steward (a thread)     <-- commands ---   set, drain: 16 bytes through a pipe
      starts the node, waits  <-- pidfd ------   ends itself when the server ends
                                                 control socket, mode 0600
                                                 metrics=: HTTP, for whoever may see it

The server never answers a question: whoever polls costs the node's time, not a
page's.  Counters are read straight from the shared memory file, so a node that is
killed loses nothing and the next one goes on.  Commands (`steering.py`) are obeyed by
the server's compiled steward.

Bound: the link's (connections, calls in flight, deadlines, message size).

With peers= it is also what talks to donors (`peerring.py`), with listen= it is one (`lending.py`):
pages of others, in a memory file of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zcache_core
from cluster import expiry, lifeline, unixsock
from cluster.etcdurl import without_password
from cluster.health import health
from cluster.link import RpcError, Server
from cluster.logrelay import LogRelay
from cluster.peeraddress import PeerAddress
from cluster.steering import Steering
from zcache_core import counters
from zcache_core.errors import ConfigError, ZcacheError
from zcache_core.memfile import MemoryFile
from zcache_core.process import keep_heap, lock_memory

BACKLOG = 64
STDERR = 2
PAGE_BYTES = 4096
PEER_HEAP_BYTES = 4 << 20
LEND_RETRY_S = 0.1
NAME_MOST = 50  # of a memory file's name, and what is put behind it
LEND_RETRY_MAX_S = 60.0
LOOKS = ("ping", "stats", "config", "health", "peers", "owners")
log = logging.getLogger("zcache.node")


class Node:
    """The methods, over one attached memory file and the server's configuration."""

    def __init__(
        self,
        memory: MemoryFile,
        config: dict[str, Any],
        server_pid: int,
        command_fd: int | None = None,
    ) -> None:
        self._memory, self._config, self._server_pid = memory, config, server_pid
        self._started_s = server_start_s(server_pid)
        self._booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        self._node_started_s = server_start_s(os.getpid())
        # Of the device that is attached under this server's own name, if it has one.
        control = config.get("control")
        self._lifeline = Path(control).with_suffix(".attach") if control else None
        self.metrics: str | None = None  # HOST:PORT once it is listened on
        self.peer_side: Any = None  # peerring.PeerSide, with peers=
        # Of those that are in use: a new file is for the next node.
        self._certificate_end_s = expiry.first_end_s(tls) if (tls := config.get("tls")) else None
        self.lender: Any = None  # lending.Lender, with listen=, once it listens
        self._steering = Steering(command_fd, lambda: counters.read(memory), config)
        self._methods: dict[str, Callable[[], Awaitable[Any]]] = {
            "ping": self.ping,
            "stats": self.stats,
            "config": self.config,
            "health": self.health,
            "devices": self.devices,
            "peers": self.peers,
            "owners": self.owners,
        }
        self._methods_with_params: dict[str, Callable[[list[Any]], Awaitable[Any]]] = {
            "set": self._steering.set,
            "drain": self._steering.drain,
            "drain_lent": self.drain_lent,
        }

    async def dispatch(self, method: str, params: list[Any]) -> Any:
        """The result of one request.  Raises RpcError."""
        if (call_with := self._methods_with_params.get(method)) is not None:
            return await call_with(params)
        call = self._methods.get(method)
        if call is None:
            known = ", ".join(sorted([*self._methods, *self._methods_with_params]))
            raise RpcError("unknown_method", f"there is no method {method}; use one of {known}")
        if params:
            raise RpcError("bad_params", f"{method} takes no parameters; send an empty array")
        return await call()

    async def ping(self) -> dict[str, Any]:
        """Version, process numbers, and since when server and node run (seconds since 1970)."""
        return {
            "version": zcache_core.__version__,
            "pid": os.getpid(),
            "server_pid": self._server_pid,
            "uptime_seconds": int(time.clock_gettime(time.CLOCK_BOOTTIME) - self._started_s),
            "server_started_seconds": int(self._booted + self._started_s),
            "node_started_seconds": int(self._booted + self._node_started_s),
        }

    async def stats(self) -> dict[str, Any]:
        """Every counter by name, and `histograms` by name."""
        found = counters.read(self._memory)
        if self.lender is not None:  # what it lends is counted in a memory file of its own
            lent = counters.read(self.lender.donor.donation.memory)
            found |= {name: lent[name] for name in found if name.startswith("foreign_")}
        return found | {"histograms": counters.histograms(self._memory)}

    async def devices(self) -> list[dict[str, Any]]:
        """Each device; its pages are counted in the index now, about 3 ms a million."""
        return [
            {
                "name": name,
                "size_bytes": size_bytes,
                "generation": generation,
                "stored_pages": self._memory.stored_pages(first, size_bytes // PAGE_BYTES),
            }
            for name, size_bytes, generation, first in self._memory.devices()
        ]

    async def peers(self) -> list[dict[str, Any]]:
        """Each donor of ours: how it is, and how many copies of our pages it has."""
        return self.peer_side.peers() if self.peer_side is not None else []

    async def owners(self) -> list[dict[str, Any]]:
        """With listen=, whose pages are here: pages, bytes, bytes offered now, when heard of."""
        if self.lender is None:
            return []
        from cluster.lending import owners_of

        return owners_of(self.lender.donor)

    async def drain_lent(self, params: list[Any]) -> dict[str, Any]:
        """drain_lent(true) or (): have others take their pages back; (false): lend again."""
        if params not in ([], [True], [False]):
            raise RpcError("bad_params", "drain_lent takes true, false or nothing")
        if self.lender is None:
            raise RpcError("not_lending", "this server lends nothing; start it with listen=")
        self.lender.donor.drain(params != [False])
        return {"draining": self.lender.donor.draining, "owners": await self.owners()}

    async def config(self) -> dict[str, Any]:
        """What the server runs with now, under the names of the keys; sizes in bytes."""
        listening = {"metrics": self.metrics} if "metrics" in self._config else {}
        if self.lender is not None:
            listening["listen"] = self.lender.bound
        if self._config.get("etcd"):
            listening["etcd"] = without_password(self._config["etcd"])
        return self._config | listening | self._steering.effective()

    async def health(self) -> dict[str, Any]:
        """status: ok, degraded or critical; reasons: what is the matter and what to do."""
        now: dict[str, Any] = {}
        if self._lifeline is not None:
            now["unmended"] = lifeline.unmended(self._lifeline)
        if (side := self.peer_side) is not None:
            now |= {"twin_peers": side.twins(), "etcd_silent_s": side.etcd_silent_s}
        if self._certificate_end_s is not None:
            now["certificate_days"] = expiry.days_left(self._certificate_end_s)
        return health(counters.read(self._memory), await self.config() | now)

    async def look(self) -> dict[str, Any]:
        """Everything at once, by method: what the web pages are made from."""
        return {name: await self._methods[name]() for name in LOOKS}


def server_start_s(pid: int) -> float:
    """Seconds from boot to the start of process `pid` (proc(5), stat field 22)."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")


def watch_server(pid: int) -> int:
    """A pidfd of our parent `pid`; it becomes readable when the server is gone.

    Raises ConfigError when the server has ended already.  That our parent still has
    this number after the pidfd is open proves that the pidfd is of the right process.
    """
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        if os.getppid() == pid and not select.select([fd], [], [], 0)[0]:
            return fd
        os.close(fd)
    raise ConfigError(
        f"process {pid} is not the server that started this node; let zcache start it"
    )


def become_ordinary(may_be_killed: bool = True) -> None:
    """Shed what a child of the server inherits: real-time priority, the OOM exemption.

    Not the exemption of who alone can bring this machine's pages back.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if not may_be_killed:
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")


def locked_page() -> mmap.mmap:
    """Memory to read the log into that can never be swapped out.

    A pipe's reader copies to its buffer under the pipe's mutex, which a writer takes even if it
    does not block: a reader that faults there, on a page that only the server can bring back,
    stops the server at its next line.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[0] = 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE))
    return page


def relay_log(fd: int) -> Callable[[], None]:
    """Pass the server's log on to ours from now on; returns what to call at the end."""
    relay = LogRelay()
    os.set_blocking(fd, False)
    loop = asyncio.get_running_loop()
    page = locked_page()

    def pass_on() -> bool:
        with contextlib.suppress(OSError):  # nothing to read now, or nobody reads our log
            if count := os.readv(fd, [page]):
                os.write(STDERR, relay.feed(page[:count], loop.time()))
                return True
            loop.remove_reader(fd)
        return False

    def finish() -> None:
        while pass_on():
            pass
        with contextlib.suppress(OSError):
            os.write(STDERR, relay.close())

    loop.add_reader(fd, pass_on)
    return finish


async def serve_web(node: Node, address: str) -> None:
    """Metrics and web page at HOST:PORT until cancelled."""
    # Only here: a node without metrics is 4 MiB smaller, which a small guest needs.
    from cluster import webpages

    def bound(where: str) -> None:
        node.metrics = where

    await webpages.serve(address, node.look, bound)


async def serve_lending(node: Node, options: Any) -> None:
    """Lend until cancelled.

    The last node of this server may still end: what it has is waited for.
    """
    from cluster.lending import Lender

    wait_s = LEND_RETRY_S
    while True:
        lender = Lender(options)
        try:
            await lender.start()
            break
        except (ZcacheError, OSError) as error:
            lender.close()
            lender.stop()
            log.warning("listen=: %s; it is tried again in %.1f s", error, wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LEND_RETRY_MAX_S)
    node.lender = lender
    if node.peer_side is not None and lender.donor is not None:
        node.peer_side.own_epoch = lender.donor.donation.memory.epoch
    try:
        await asyncio.Event().wait()
    finally:
        node.lender = None
        lender.close()
        lender.stop()


async def serve(
    node: Node,
    control: str,
    pidfd: int,
    log_fd: int | None,
    metrics: str | None = None,
    take: bool = False,
    lending: Any = None,
) -> None:
    """Answer until the server ends or SIGTERM or SIGINT comes.

    `take`: the path is ours even if somebody still listens there.  That is the node of a
    killed server of this name, which may be swapped out to the very device that waits
    for our server, and so cannot end before it serves.
    """
    loop = asyncio.get_running_loop()
    finish_log = relay_log(log_fd) if log_fd is not None else None
    finished = asyncio.Event()
    loop.add_reader(pidfd, finished.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, finished.set)
    if take:
        Path(control).unlink(missing_ok=True)
    sock = unixsock.listen(control, "the control socket", "control=PATH", BACKLOG)
    inode = os.stat(control).st_ino
    server = Server(node.dispatch)
    beside = [loop.create_task(serve_web(node, metrics))] if metrics else []
    if lending is not None:
        beside.append(loop.create_task(serve_lending(node, lending)))
    try:
        await server.start(sock)
        if node.peer_side is not None:
            await node.peer_side.start()
        await finished.wait()
    finally:
        unixsock.remove(control, inode)
        if node.peer_side is not None:
            await node.peer_side.stop()
        await server.stop()
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        loop.remove_reader(pidfd)
        if finish_log is not None:
            finish_log()


def peer_side(args: argparse.Namespace, memory: MemoryFile) -> Any:
    """What overflows to peers, over the descriptors that the server gave us."""
    # Only here: a node without peers is smaller.
    from cluster.peerring import PeerOptions, PeerSide

    options = PeerOptions(
        tuple(args.config["peers"]),
        args.config["replicas"],
        args.config.get("tls"),
        args.config.get("etcd"),
        args.config.get("listen"),
        Path(f"{args.control}.members"),
    )
    return PeerSide(args.ring_fd, args.wake_fd, memory, options)


def fit_for_pages() -> None:
    """What a node needs through which pages come: ours from peers, or others' from us."""
    # A page may come back through us alone: what we need must not be swapped out there.
    # On fault: the memory file is mapped here too, and its holes must stay holes.
    lock_memory(on_fault=True)
    # A batch is larger than what malloc takes from the kernel anew each time, and each copy of
    # one would be faulted in: 128 pages put in 1.9 ms without this, in 0.6 ms with it.
    keep_heap(PEER_HEAP_BYTES)


def load(args: argparse.Namespace) -> None:
    """Import what is imported only when it is used: an understudy may find no memory for it."""
    if args.config.get("listen"):
        import cluster.lending
    if args.config.get("etcd"):
        from cluster.members import library

        library()
    if args.metrics:
        import cluster.webpages
        import cluster.webserver  # noqa: F401


def lend_options(args: argparse.Namespace) -> Any:
    """What the server's listen= and donate= ask for; None without them.

    The pages lie in a file of their own, for a node that is started again.  It stays at the end
    only where the server's own does.
    """
    if not args.config.get("listen"):
        return None
    from cluster.lending import LendOptions, node_name

    tls, memory = args.config.get("tls"), args.config.get("memory")
    return LendOptions(
        PeerAddress.read("listen", args.config["listen"]),
        args.config["donate"],
        node_name(tls),
        f"{memory[:NAME_MOST]}.lent" if memory else f"lent.{args.server_pid}",
        tls,
        etcd=args.config.get("etcd"),
        keep=memory is not None,
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after the server's end or a signal; a ZcacheError's own otherwise."""
    parser = argparse.ArgumentParser(prog="zcache-node", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--control", required=True, help="path of the control socket")
    parser.add_argument("--shmid", required=True, type=int, help="segment of the memory file")
    parser.add_argument("--server-pid", required=True, type=int, help="the server, our parent")
    parser.add_argument("--config", required=True, type=json.loads, help="what `config` answers")
    parser.add_argument("--command-fd", type=int, help="pipe to the server's steward")
    parser.add_argument(
        "--take-control", action="store_true", help="the path is ours, whoever listens"
    )
    parser.add_argument("--log-fd", type=int, help="pipe with the server's log, to pass on")
    parser.add_argument("--ring-fd", type=int, help="shared memory with the server's peer tier")
    parser.add_argument("--wake-fd", type=int, help="eventfd that says there is something in it")
    parser.add_argument("--metrics", help="HOST:PORT for metrics and the web page")
    parser.add_argument(
        "--understudy", action="store_true", help="have another process ready to go on at once"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="zcache node: %(message)s", level=logging.WARNING)
    become_ordinary(may_be_killed=not args.understudy)
    try:
        pidfd = watch_server(args.server_pid)
        memory = MemoryFile.attach(args.shmid)
        try:
            if args.config.get("listen") or args.ring_fd is not None:
                fit_for_pages()
            peers = peer_side(args, memory) if args.ring_fd is not None else None
            lending = lend_options(args)
            if not args.understudy:
                return run(args, memory, pidfd, peers, lending)
            from cluster.understudy import act

            load(args)
            realtime = args.config["realtime"] == "yes"
            return act(lambda: run(args, memory, pidfd, peers, lending), pidfd, realtime)
        finally:
            memory.close()
    except ZcacheError as error:
        print(f"zcache node: {error}", file=sys.stderr)
        return error.exit_code


def run(
    args: argparse.Namespace, memory: MemoryFile, pidfd: int, peers: Any, lending: Any = None
) -> int:
    """The node process itself, to its end; its exit code."""
    node = Node(memory, args.config, args.server_pid, args.command_fd)
    node.peer_side = peers
    try:
        asyncio.run(
            serve(
                *(node, args.control, pidfd, args.log_fd, args.metrics, args.take_control),
                lending,
            )
        )
    except ZcacheError as error:
        print(f"zcache node: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
