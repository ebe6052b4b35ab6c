"""Real donors and a real owner for tests of peers: started, hurt, checked page by page."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.link import BlockingClient
from tests.plugin_helpers import WAIT_S, Server, environment, remove_memory, wait_for
from tests.swaplab.network import Network

PAGE = 4096
PAGES = 3000
LENT = 24 << 20


class Lender:
    """One `zcache node`, on a Unix socket of its own unless `listen` says where.

    Killed, it comes back empty, or with its pages if it has a `memory` file.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        module: str = "cluster.lending",
        lent: int = LENT,
        listen: str | None = None,
        tls: Path | None = None,
        memory: str | None = None,
        network: Network | None = None,
        more: tuple[str, ...] = (),
    ) -> None:
        self.module, self.network, self.memory = module, network, memory
        self.folder = folder / name
        self.folder.mkdir()
        self.control = self.folder / "ctl"
        self.address = listen or str(self.folder / "peer")
        self._words = ["--listen", self.address, "--donate", str(lent), "--name", name]
        self._words += ["--control", str(self.control)]
        self._words += [*more]
        self._words += ["--tls", str(tls)] if tls is not None else []
        self._words += ["--memory", memory] if memory is not None else []
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", self.module, *self._words]
        inside = self.network
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                inside.inside(command) if inside is not None else command,
                pass_fds=(inside.fd,) if inside is not None else (),
                env=environment(self.folder) | {"PYTHONPATH": os.getcwd()},
                stdout=log,
                stderr=log,
            )
        wait_for("the donor", self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(Exception):
            return bool(self.rpc("ping")["pid"] == self.process.pid)
        return False

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def rpc(self, method: str, *params: Any) -> Any:
        with BlockingClient(self.control) as client:
            return client.call(method, *params)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)
            self.process = None
        if self.address.startswith("/"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address)

    def end(self) -> None:
        """By force; nothing of it is left."""
        if self.process is not None:
            self.process.send_signal(18)  # SIGCONT
        self.kill()
        if self.memory is not None:
            remove_memory(self.memory)


@contextlib.contextmanager
def lent(folder: Path, number: int, *more: str) -> Iterator[list[Lender]]:
    """So many of them until the end of the block; `more` are words for each."""
    made: list[Lender] = []
    try:
        while len(made) < number:
            made.append(Lender(folder, f"lender{len(made)}", more=more))
        yield made
    finally:
        for lender in made:
            lender.end()


class Model:
    """What each page of the device is."""

    def __init__(self, server: Server, rng: random.Random, size: int = PAGES) -> None:
        self.server, self.rng, self.size = server, rng, size
        self.handle = server.connect()
        self.pages: dict[int, bytes] = {}

    def write(self, page: int) -> None:
        self.pages[page] = self.rng.randbytes(self.rng.choice([1000, 3000, 4096])).ljust(PAGE, b"x")
        self.handle.pwrite(self.pages[page], page * PAGE)

    def fill(self) -> None:
        for page in range(self.size):
            self.write(page)

    def check(self, n: int | None = None) -> None:
        """Every page, or n of them, as written."""
        pages = list(self.pages)
        for page in pages if n is None else self.rng.sample(pages, min(n, len(pages))):
            assert self.handle.pread(PAGE, page * PAGE) == self.pages[page], page

    def churn(self, n: int) -> None:
        for _ in range(n):
            if self.rng.random() < 0.4:
                self.write(self.rng.randrange(self.size))
            else:
                self.check(1)


def live(server: Server) -> int:
    """How many donors answer."""
    return sum(peer["state"] == "up" for peer in server.rpc("peers"))


def stats(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.rpc("stats")
    return found
