"""A real nbdkit with the real plugin, for tests: started, watched, and always cleaned up.

    with Server(tmp_path, "size=64M", "pool=16M") as server:
        server.connect().pwrite(...)         libnbd
        server.rpc("stats")                  the node process

At the end of the block the server is ended with SIGTERM if it still runs, and
nothing of it may be left: no process, no memory segment, no socket.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nbd

from bench.servers import is_listening
from cluster.link import BlockingClient
from zcache_core import memfile
from zcache_core.errors import ControlError

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "plugin" / "zcache_plugin.py"
WAIT_S = 30.0


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`; fails after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.01)
    return value


def environment(folder: Path) -> dict[str, str]:
    """For server and command: our interpreter, and a runtime folder of the test's own."""
    return {**os.environ, "ZCACHE_PYTHON": sys.executable, "ZCACHE_RUNTIME_DIR": str(folder)}


def run_nbdkit(folder: Path, *words: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """A start that is expected to end by itself: exit code, output, log."""
    command = ["nbdkit", "-f", *options, "python", str(PLUGIN), *words]
    done = subprocess.run(
        command, env=environment(folder), capture_output=True, text=True, timeout=WAIT_S
    )
    return done.returncode, done.stdout, done.stderr


class Server:
    """One nbdkit; `words` are key=value, `options` go to nbdkit itself.

    `network`: a namespace to run in (swaplab.network.Network).
    """

    def __init__(
        self, folder: Path, *words: str, options: tuple[str, ...] = (), network: Any = None
    ) -> None:
        self.folder = folder
        self.socket = folder / "nbd.sock"
        self.control = folder / "nbd.ctl"
        self._log_path = folder / "server.log"
        command = ["nbdkit", "-f", "-U", str(self.socket), *options, "python", str(PLUGIN), *words]
        self.process: subprocess.Popen[bytes]
        with open(self._log_path, "ab") as log:
            self.process = subprocess.Popen(
                network.inside(command) if network is not None else command,
                pass_fds=(network.fd,) if network is not None else (),
                env=environment(folder),
                stderr=log,
            )
        self.pid = self.process.pid
        self.node_pid = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        try:
            wait_for("the server's socket", self._is_up)
            self.node_pid = wait_for("the node process", self.ping)["pid"]
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self.process.poll() is None:
                self.end()
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        if error is None:
            wait_for("the end of the node process", lambda: not node_processes(self.pid))
            assert not segments(self.pid), "a memory file is left"
            assert not self.control.exists(), "the control socket is left"

    def _is_up(self) -> bool:
        assert self.process.poll() is None, f"the server ended: {self.log()}"
        return is_listening(self.socket, self.process.pid)

    def log(self) -> str:
        """What server and node have written so far."""
        return self._log_path.read_text()

    def connect(self) -> Any:
        """A new libnbd connection, closed with the server."""
        handle = nbd.NBD()
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        handle.set_full_info(True)
        handle.connect_unix(str(self.socket))
        self._handles.append(handle)
        return handle

    def disconnect(self) -> None:
        """Close all connections (nbdkit waits for open ones before it ends)."""
        while self._handles:
            with contextlib.suppress(nbd.Error):
                self._handles.pop().shutdown()

    def rpc(self, method: str, *params: Any) -> Any:
        """One call to the node process."""
        with BlockingClient(self.control) as client:
            return client.call(method, *params)

    def ping(self) -> Any:
        """The answer to ping, or None while nobody answers."""
        with contextlib.suppress(ControlError):
            return self.rpc("ping")
        return None

    def end(self, number: int = signal.SIGTERM) -> int:
        """Close connections, send the signal, wait; the exit code."""
        self.disconnect()
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def threads(self) -> list[Thread]:
        """All threads of the server process, but for those that end while they are looked at."""
        found = []
        for path in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append(Thread(path))
        return found


class Thread:
    """What /proc says about one thread.  Raises FileNotFoundError, ProcessLookupError: it ended."""

    def __init__(self, path: Path) -> None:
        self.tid = int(path.name)
        self.name = (path / "comm").read_text().strip()
        fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
        self.flags = int(fields[6])
        self.policy = os.sched_getscheduler(self.tid)
        self.syscall = (path / "syscall").read_text().split()[0]
        status = dict(row.split(":", 1) for row in (path / "status").read_text().splitlines())
        self.switches = int(status["voluntary_ctxt_switches"]) + int(
            status["nonvoluntary_ctxt_switches"]
        )


def node_processes(server_pid: int) -> list[int]:
    """Node processes started by that server, also orphaned ones."""
    return [pid for pid, words in processes() if is_node_of(words, server_pid)]


def is_node_of(words: list[str], server_pid: int) -> bool:
    return "cluster.node" in words and words[words.index("--server-pid") + 1] == str(server_pid)


def processes() -> Iterator[tuple[int, list[str]]]:
    """(pid, words of the command line) of every process that can be seen."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_bytes().decode(errors="replace").split("\0")


def segments(creator_pid: int) -> list[int]:
    """System V segments made by that process."""
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()]
    column = rows[0].index("cpid")
    return [int(row[rows[0].index("shmid")]) for row in rows[1:] if row[column] == str(creator_pid)]


def resident_bytes(pid: int) -> int:
    """Anonymous resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no RssAnon of {pid}")


def swap_like(handle: Any, between: Callable[[], object], rounds: int = 25) -> None:
    """Traffic for pictures: pages that compress to half, some the same word, read and dropped."""
    rng = random.Random(7)
    for round_ in range(rounds):
        for first in range(0, 3600, 120):
            if (first // 120 + round_) % 5 == 0:
                for page in range(first, first + 80 + 10 * (round_ % 5)):
                    noise = rng.randbytes(rng.randrange(300, 2400))
                    data = noise + bytes(4096 - len(noise)) if rng.random() < 0.9 else bytes(4096)
                    handle.pwrite(data, page * 4096)
                for page in range(first, first + 30 + 7 * (round_ % 4)):
                    handle.pread(4096, (page * 7 % 3600) * 4096)
                handle.trim(5 * 4096, first * 4096)
        between()


def remove_memory(name: str) -> None:
    """Remove the memory files of that name, when nobody has them any more."""
    for row in memfile.leftovers():
        if row.name == name:
            memfile.remove(row.shmid)
