"""How fast pages go to peers, against a copy of the same bytes to nbdkit's RAM disk over TCP.

    image --nbdcopy--> nbdkit memory, TCP                                        one copy, as it is
    image --nbdcopy--> zcache, Unix --compressed, sealed, TCP--> two zcache nodes   two copies

The pool is an eighth of the image, so seven eighths must be at the peers when nbdcopy's last write
is answered.  Logical MB/s: of the image.  Both in turn in every round, all over loopback, ours
with TLS between the nodes too; a page leaves its owner encrypted in any case.

renewing    three nodes, two copies; one is killed: how long until every page has two again, from
            the first one moved.  The owner limits itself to 64 MB/s of sealed bytes.

What it is not: how long a page takes to come back (`remote`).
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.remote import Lender, lending
from bench.report import Goal, Section, figure
from bench.servers import Recipe, Server, zcache
from bench.setup import Setup
from cluster import certificates
from cluster.link import BlockingClient
from zcache_core.errors import ControlError

PAGE_BYTES = 4096
MIB = 1 << 20
IMAGE_BYTES = 512 * MIB
RENEW_BYTES = 1024 * MIB
ROUNDS_MOST = 5
POOL_SHARE = 8
LIMIT_S = 120.0


def make_image(path: Path, pages: memoryview, size_bytes: int) -> None:
    """The corpus, again and again."""
    with open(path, "wb") as file:
        for at in range(0, size_bytes, len(pages)):
            file.write(pages[: min(len(pages), size_bytes - at)])


def copy_s(image: Path, uri: str) -> float:
    """Seconds of an nbdcopy of the image."""
    start_s = time.perf_counter()
    command = ["nbdcopy", "--flush", str(image), uri]
    subprocess.run(command, check=True, timeout=LIMIT_S, capture_output=True)
    return time.perf_counter() - start_s


@contextmanager
def ram_disk(size_bytes: int) -> Iterator[str]:
    """nbdkit memory on a free port of loopback; its URI."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    words = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "memory", f"size={size_bytes}"]
    uri = f"nbd://127.0.0.1:{port}"
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
        try:
            await_(
                "nbdkit",
                lambda: not subprocess.run(["nbdinfo", uri], capture_output=True).returncode,
            )
            yield uri
        finally:
            process.terminate()


def await_(what: str, condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def asked(server: Server, method: str) -> Any:
    try:
        with BlockingClient(server.control) as client:
            return client.call(method)
    except ControlError:
        return None


def certified(folder: Path, nodes: int) -> dict[str, Path]:
    """Folders for tls=, of an owner and so many nodes: nodes are told apart by their names."""
    certificates.init(folder)
    names = ["owner", *(f"node{n}" for n in range(nodes))]
    return {name: certificates.add(folder, name).parent for name in names}


class Owner:
    """A server with `nodes` lenders; `uri` for nbdcopy."""

    def __init__(
        self, stack: ExitStack, setup: Setup, image_bytes: int, nodes: int, tls: bool
    ) -> None:
        folder = setup.folder / f"overflow-{nodes}{'-tls' if tls else ''}"
        named = certified(folder / "ca", nodes) if tls else {}
        lent = 2 * image_bytes // nodes + 64 * MIB
        self.lenders: list[Lender] = [
            stack.enter_context(lending(folder / f"node{n}", named.get(f"node{n}"), lent))
            for n in range(nodes)
        ]
        peers = ",".join(str(lender.address) for lender in self.lenders)
        words = [f"peers={peers}", *([f"tls={named['owner']}"] if tls else [])]
        pool = max(image_bytes // POOL_SHARE, 16 * MIB)
        recipe: Recipe = zcache(str(image_bytes), str(pool), *words, name=folder.name)
        self.server = stack.enter_context(Server(recipe, setup.folder))
        self.uri = f"nbd+unix:///?socket={self.server.socket}"
        await_("peers", lambda: self.stat("live_peers") == nodes and self.stat("remote_room_bytes"))

    def stat(self, name: str) -> int:
        found = asked(self.server, "stats")
        return int(found[name]) if found else 0

    def copies(self) -> list[int]:
        found = asked(self.server, "peers")
        return [row["copies"] for row in found] if found else []


def rounds(setup: Setup, image: Path, image_bytes: int) -> dict[str, Any]:
    """MB/s of each side in each round, and how many pages were at peers after ours."""
    raw: dict[str, Any] = {"memory": [], "plain": [], "TLS": [], "remoted": {}}
    with ExitStack() as stack:
        uri = stack.enter_context(ram_disk(image_bytes))
        owners = {
            name: Owner(stack, setup, image_bytes, 2, name == "TLS") for name in ("plain", "TLS")
        }
        for _ in range(min(setup.plan.rounds, ROUNDS_MOST)):
            raw["memory"].append(image_bytes / copy_s(image, uri) / 1e6)
            for name, owner in owners.items():
                raw[name].append(image_bytes / copy_s(image, owner.uri) / 1e6)
                raw["remoted"][name] = owner.stat("pers_pages_remoted")
    return raw


def renewing(setup: Setup, image: Path, image_bytes: int) -> dict[str, float]:
    """From the first page that has its second copy again to the last."""
    with ExitStack() as stack:
        owner = Owner(stack, setup, image_bytes, 3, False)
        copy_s(image, owner.uri)
        pages, sealed = owner.copies()[0], owner.stat("remote_bytes") / 3
        owner.lenders[0].process.kill()
        killed_s = time.perf_counter()
        await_("the first", lambda: owner.stat("remote_moved_pages"))
        first_s = time.perf_counter()
        await_("all copies", lambda: owner.copies()[0] == 0)
        return {
            "pages": pages,
            "sealed_bytes": sealed,
            "noticed_s": first_s - killed_s,
            "seconds": time.perf_counter() - first_s,
        }


def measure(setup: Setup) -> Section:
    small = setup.plan.rounds == 1
    image_bytes, renew_bytes = (32 * MIB, 64 * MIB) if small else (IMAGE_BYTES, RENEW_BYTES)
    head = ["", "measured", "of nbdcopy to memory"]
    section = Section("overflow", "Pages to other nodes' RAM, over loopback", head)
    image = setup.folder / "overflow.image"
    make_image(image, setup.pages, renew_bytes)
    with open(image, "r+b") as file:
        file.truncate(image_bytes)
    section.raw = rounds(setup, image, image_bytes)
    section.rows.append(["nbdcopy to nbdkit memory, TCP", _speed(section.raw["memory"]), "1.00"])
    for name in ("plain", "TLS"):
        ratio = statistics.median(
            own / other for own, other in zip(section.raw[name], section.raw["memory"], strict=True)
        )
        what = f"to two nodes, {name}"
        section.rows.append([what, _speed(section.raw[name]), f"{ratio:.2f}"])
        text = "logical MB/s, of nbdcopy's to nbdkit memory"
        section.goals.append(Goal(f"overflow: {what}", ratio, 1.0, False, text))
    make_image(image, setup.pages, renew_bytes)
    section.raw["renewing"] = found = renewing(setup, image, renew_bytes)
    image.unlink()
    megabytes, logical = found["sealed_bytes"] / 1e6, found["pages"] * PAGE_BYTES / 1e6
    what = (
        f"renewing {renew_bytes // MIB} MiB less one of three nodes: {figure(megabytes)} MB sealed"
    )
    speeds = f"{megabytes / found['seconds']:.0f} MB/s, {logical / found['seconds']:.0f} logical"
    section.rows.append([what, f"{figure(found['seconds'])} s, {speeds}", "-"])
    section.rows.append(["  begun after the kill", f"{figure(found['noticed_s'])} s", "-"])
    remoted = section.raw["remoted"]["plain"] * PAGE_BYTES / image_bytes
    section.notes.append(f"{100 * remoted:.0f} % of the image at the peers after its last round")
    return section


def _speed(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):.0f} MB/s"
