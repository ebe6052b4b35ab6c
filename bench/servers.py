"""The systems that are measured side by side: nbdkit each time, with one plugin or another.

    null          answers at once, keeps nothing: the price of socket, nbdkit and client alone
    memory        nbdkit's uncompressed RAM disk, in C
    memory-zstd   nbdkit's compressed one: zstd over 32 KiB blocks under a lock
    zcache        this project

Each listens on a Unix socket in a folder of its own, with the same size.  A server's CPU
time is read from its process clock, so threads that ended are counted too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "plugin" / "zcache_plugin.py"
START_LIMIT_S = 30.0
END_LIMIT_S = 20.0
POLL_S = 0.01
THREADS = 1
"""nbdkit's workers of a connection for the other servers: what zcache chooses by itself (see
docs/performance.md), and what is fastest for theirs too at depth 1."""


class ServerError(Exception):
    """A measured server did not start or did not live."""


@dataclass(frozen=True)
class Recipe:
    """How to start one: words for nbdkit after its own options."""

    name: str
    words: tuple[str, ...]
    threads: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


def null(size: str, threads: int | None = None, name: str = "null") -> Recipe:
    return Recipe(name, ("null", f"size={size}"), threads)


def memory(size: str, threads: int | None = None, name: str = "memory") -> Recipe:
    return Recipe(name, ("memory", f"size={size}"), threads)


def memory_zstd(size: str, threads: int | None = None, name: str = "memory-zstd") -> Recipe:
    return Recipe(name, ("memory", f"size={size}", "allocator=zstd"), threads)


def zcache(
    size: str, pool: str, *words: str, threads: int | None = None, name: str = "zcache"
) -> Recipe:
    arguments = ("python", str(PLUGIN), f"size={size}", f"pool={pool}", *words)
    return Recipe(name, arguments, threads, {"ZCACHE_PYTHON": sys.executable})


@contextmanager
def on_cores(
    running: Sequence[Server], cores: set[int], client_cores: set[int] | None = None
) -> Iterator[None]:
    """Servers, and the clients started meanwhile, on these cores only; on all again afterwards."""
    everywhere = os.sched_getaffinity(0)
    try:
        for server in running:
            server.pin(cores)
        os.sched_setaffinity(0, client_cores or cores)
        yield
    finally:
        os.sched_setaffinity(0, everywhere)
        for server in running:
            server.pin(everywhere)


def is_listening(path: Path, pid: int | str = "self") -> bool:
    """Whether a Unix socket at `path` takes connections; nobody is asked.

    The file is there earlier, from bind(2) on.  Linux: /proc/net/unix, SO_ACCEPTCON; it names the
    sockets of one network namespace, that of process `pid`.
    """
    text = Path(f"/proc/{pid}/net/unix").read_text()
    rows = [row.split(maxsplit=7) for row in text.splitlines()]
    return any(row[3] == "00010000" and row[7:] == [str(path)] for row in rows)


class Server:
    """A running server: `with Server(recipe, folder) as server: ... server.socket`."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.name = recipe.name
        folder = Path(tempfile.mkdtemp(prefix=f"{recipe.name}-", dir=folder))
        self.socket = folder / "nbd.sock"
        self.control = folder / "nbd.ctl"
        self._log_path = folder / "server.log"
        threads = [] if recipe.threads is None else ["-t", str(recipe.threads)]
        command = ["nbdkit", "-f", "-U", str(self.socket), *threads, *recipe.words]
        environment = {**os.environ, "ZCACHE_RUNTIME_DIR": str(folder), **recipe.environment}
        with open(self._log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while not is_listening(self.socket):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"{self.name} did not start: {self.log()}")
                time.sleep(POLL_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def pin(self, cores: set[int]) -> None:
        """All of its threads, and those that they will make."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)

    def cpu_s(self) -> float:
        """User and system time of all threads so far (man clock_getcpuclockid)."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory_bytes(self) -> dict[str, int]:
        """Of /proc/PID/status: VmRSS, RssAnon, RssFile, RssShmem, VmLck, VmHWM."""
        wanted = {"VmRSS", "RssAnon", "RssFile", "RssShmem", "VmLck", "VmHWM"}
        rows = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        pairs = (row.split(":", 1) for row in rows)
        return {name: int(value.split()[0]) * 1024 for name, value in pairs if name in wanted}
