"""A server on the host, inside the lab's network.

    start -> (pid file appears and the port answers) -> serving -> stop | kill
                                                                      `-> start again (restart)

Its output goes to a file, so that it can never block on us.  Whoever tests crashes calls `kill`
and `start`; the place, and with it the address that the guest has connected to, stays the same.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .clock import Deadline, until
from .errors import CommandFailedError
from .network import Network
from .servers import REPOSITORY, Place, ServerCommand

START_LIMIT_S = 30
ASK_AGAIN_S = 0.2
STOP_LIMIT_S = 1
"""After SIGTERM nbdkit waits for its connections, and one to a guest that is gone never ends."""


@dataclass(frozen=True)
class Usage:
    """What a server process (without its children) has used so far."""

    cpu_s: float
    resident_bytes: int
    peak_bytes: int


class HostServer:
    """A running server.  Made by `Lab.serve`."""

    def __init__(
        self, network: Network, command: ServerCommand, place: Place, address: str, port: int
    ) -> None:
        self.command = command
        self.place = place
        self.address = address
        self.port = port
        self.starts = 0
        self._network = network
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(place.folder) / "server.log"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Everything the server has said, over all its starts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self, deadline: Deadline) -> None:
        """Start it, and wait until it answers.  Raises CommandFailedError with what it said."""
        assert not self.running()
        Path(self.place.pidfile).unlink(missing_ok=True)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._network.inside(self.command.argv),
                pass_fds=(self._network.fd,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, **self.command.env},
                start_new_session=True,
            )
        self.starts += 1

        def answering() -> bool:
            if not self.running():
                raise CommandFailedError(
                    f"{self.command.name} did not start:\n{self.log()[-2000:]}"
                )
            return Path(self.place.pidfile).exists() and self._network.answers(
                self.address, self.port
            )

        until(answering, deadline.nearer(START_LIMIT_S), f"{self.command.name} to answer")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the server process a signal (SIGKILL, SIGSTOP, ...); SIGKILL is also waited for."""
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """End it: asked first, after `limit_s` killed.  Harmless when it does not run."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        pidfd = os.pidfd_open(self._process.pid)
        try:
            if not select.select([pidfd], [], [], limit_s)[0]:
                self._process.kill()
        finally:
            os.close(pidfd)
        self._process.wait()

    def stats(self, limit_s: float = 20) -> dict[str, int]:
        """The server's own numbers; empty if it has none to give.  Raises LabError.

        A server answers its device before its node process has the control socket: who asks
        right after a start is told that nobody serves it, and asks again.
        """
        if self.command.read_stats is None:
            return {}
        late = Deadline(limit_s)
        while True:
            try:
                return self._stats_now(max(1.0, late.left_s()))
            except CommandFailedError:
                if late.passed() or not self.running():
                    raise
            time.sleep(ASK_AGAIN_S)

    def _stats_now(self, limit_s: float) -> dict[str, int]:
        assert self.command.read_stats is not None
        done = subprocess.run(
            self._network.inside(self.command.stats_argv),
            pass_fds=(self._network.fd,),
            capture_output=True,
            text=True,
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
            cwd=REPOSITORY,
        )
        if done.returncode:
            raise CommandFailedError(f"{' '.join(self.command.stats_argv)}: {done.stderr.strip()}")
        return self.command.read_stats(done.stdout)

    def usage(self) -> Usage:
        """CPU and memory of the server process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
        )
        return Usage(
            cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
            resident_bytes=int(status["VmRSS"].split()[0]) << 10,
            peak_bytes=int(status["VmHWM"].split()[0]) << 10,
        )
