"""A supervised server for tests: real processes under a name and in a folder of the test's own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd

from cluster.link import BlockingClient
from plugin import servestate
from plugin.instance import Instance
from plugin.servestate import State
from tests.plugin_helpers import ROOT, environment, processes, wait_for
from zcache_core import memfile

COMMAND_S = 60


class Served:
    """The instance `name`; whatever runs of it is ended by `clean`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.instance = Instance(name)  # in the runtime folder that the test has set
        self._handles: list[Any] = []

    def zcache(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`zcache COMMAND --name NAME ...`."""
        command = [sys.executable, "-m", "plugin.cli", words[0], "--name", self.name, *words[1:]]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(self.folder), capture_output=True, text=True,
            timeout=COMMAND_S,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stderr + self.log()
        return done

    def serve(self, *words: str) -> State:
        """Start in the background; the state then."""
        self.zcache("serve", "--detach", *words)
        return self.state()

    def state(self) -> State:
        found = servestate.read(self.instance)
        assert found is not None, "there is no state file"
        return found

    def serving(self, other_than: int = 0) -> State:
        """The state once a server with another number serves."""
        return wait_for("a serving server", lambda: self._serving(other_than))  # type: ignore[no-any-return]

    def _serving(self, other_than: int) -> State | None:
        found = servestate.read(self.instance)
        ok = found is not None and found.phase == servestate.SERVING
        return found if found and ok and found.server_pid not in (0, other_than) else None

    def connect(self, export: str = "") -> Any:
        """A new libnbd connection, closed by `clean`."""
        handle = nbd.NBD()
        handle.set_export_name(export)
        handle.connect_unix(str(self.instance.socket))
        self._handles.append(handle)
        return handle

    def disconnect(self) -> None:
        while self._handles:
            with contextlib.suppress(nbd.Error):
                self._handles.pop().shutdown()

    def rpc(self, method: str, *params: Any) -> Any:
        with BlockingClient(self.instance.control) as client:
            return client.call(method, *params)

    def log(self) -> str:
        path = self.instance.serve.with_suffix(".log")
        return path.read_text() if path.exists() else ""

    def processes(self) -> dict[int, str]:
        """What runs of it now: number -> supervisor, server or node."""
        found = {}
        for pid, words in processes():
            kind = self._kind(words)
            if kind and not is_zombie(pid):
                found[pid] = kind
        return found

    def _kind(self, words: list[str]) -> str:
        if "plugin.supervisor" in words and self.name in words:
            return "supervisor"
        if f"memory={self.name}" in words:
            return "server"
        if "cluster.node" in words and str(self.instance.control) in words:
            return "node"
        return ""

    def pids(self, kind: str) -> list[int]:
        return [pid for pid, its in self.processes().items() if its == kind]

    def clean(self) -> None:
        """End all of it by force, and remove the memory file."""
        self.disconnect()
        for kind in ("supervisor", "server", "node"):
            for pid in self.pids(kind):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_for("the end of all of it", lambda: not self.processes())
        shmid = memfile.find(self.name)
        if shmid is not None:
            wait_for(
                "the end of the mapping", lambda: shmid in [r.shmid for r in memfile.leftovers()]
            )
            memfile.remove(shmid)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone (or only waits to be reaped)."""
    os.kill(pid, signal.SIGKILL)
    wait_for(f"the end of process {pid}", lambda: is_zombie(pid))


@contextlib.contextmanager
def served(folder: Path, name: str) -> Iterator[Served]:
    it = Served(folder, name)
    try:
        yield it
    finally:
        it.clean()
