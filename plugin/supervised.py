"""A server as its supervisor sees it: a number, a pidfd, and a line until it serves.

    spawn(command(instance, words)) -> Server     ours: its end is reaped here
    Server(pid, None)                             one that runs already

What it is not: a decision; that is `supervisor`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import unixsock
from cluster.peeraddress import PeerAddress
from plugin import liaison, servestate, tlsfiles
from plugin.instance import Instance
from plugin.spawn import Program
from zcache_core import memfile
from zcache_core.errors import ConfigError, MemoryFileError
from zcache_core.owner import start_ticks

ROOT = Path(__file__).resolve().parent.parent
LIAISON_FD = 3  # the server's number for its end of the socket pair
CONNECT_S = 1.0


class Server:
    """One server process: started by us, or found running (`line` is None then)."""

    def __init__(self, pid: int, line: socket.socket | None) -> None:
        self.pid, self.line, self.leads_group = pid, line, False
        self.ticks = start_ticks(pid)
        self.pidfd = os.pidfd_open(pid)
        self.began_s = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # an older version's has the supervisor's
            self.leads_group = os.getpgid(pid) == pid
        self.said = b""
        self.refused: tuple[int, str] | None = None

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def heard(self, fds: list[int] | None = None) -> list[str]:
        """Whole lines that came, [] when none; the line is closed at its end.

        `fds` gets the descriptors that came along, to be closed by the caller.
        """
        assert self.line is not None
        data, came = b"", list[int]()
        with contextlib.suppress(OSError):
            data, came, _, _ = socket.recv_fds(self.line, 8192, 4)
        for fd in came:
            if fds is None:
                os.close(fd)
            else:
                fds.append(fd)
        if not data:
            self.hang_up()
        *lines, self.said = (self.said + data).split(b"\n")
        words = [line.decode(errors="replace") for line in lines]
        for word in words:
            if word.startswith("refused "):
                code, _, sentence = word.removeprefix("refused ").partition(" ")
                self.refused = (int(code), sentence)
        return words

    def hang_up(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def reap(self, wait: bool = True) -> str:
        """How it ended, in a few words; after its pidfd is readable.

        `wait` False: it is forgotten, whether it has ended or not.
        """
        os.close(self.pidfd)
        self.hang_up()
        try:
            pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            if not pid:
                return "it has not ended yet"
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            return "how is not known: it was no child of this supervisor"
        return f"exit code {code}" if code >= 0 else f"signal {-code}"

    def end_children(self) -> None:
        """By force: those of a server that is gone (reaped, if it was ours).

        While one of them lives, nobody else gets the group's number; another process that has it
        tells that none does.
        """
        if self.leads_group and start_ticks(self.pid) in (0, self.ticks):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def living_owner(name: str) -> int | None:
    """The process that has the memory file `name`, None when nobody lives who has."""
    with contextlib.suppress(MemoryFileError):
        if (shmid := memfile.find(name)) is None:
            return None
        memory = memfile.MemoryFile.attach(shmid)
        try:
            pid, ticks = memory.owner_pid, memory.owner_start_ticks
        finally:
            memory.close()
        return pid if servestate.is_alive(pid, ticks) else None
    return None


def command(instance: Instance, words: Sequence[str]) -> list[str]:
    """The command line of the server of this instance; `words` are key=value."""
    nbdkit = shutil.which("nbdkit", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    return [
        nbdkit or "nbdkit", "-f", *listen_words(instance, words),
        "python", str(ROOT / "plugin/zcache_plugin.py"),
        *words, f"memory={instance.name}", f"control={instance.control}",
    ]  # fmt: skip


def listen_words(instance: Instance, words: Sequence[str]) -> list[str]:
    """nbdkit's options for where it listens.  Raises ConfigError for certificates that are none."""
    given = dict(word.partition("=")[::2] for word in words)
    if "nbd" not in given:
        return ["-U", str(instance.socket)]
    address = PeerAddress.read("nbd", given["nbd"])
    found = ["-i", address.host, "-p", str(address.port)]
    if folder := given.get("tls"):
        try:
            folder = str(tlsfiles.lay_out(folder, instance.tls))
        except ConfigError:
            if not instance.tls.exists():
                raise
            folder = str(instance.tls)  # those of the last start: a restart must not fail for it
        found += ["--tls=require", "--tls-verify-peer", f"--tls-certificates={folder}"]
    return found


def answers(instance: Instance, words: Sequence[str]) -> bool:
    """Whether somebody listens where this instance's server does."""
    given = dict(word.partition("=")[::2] for word in words)
    if "nbd" not in given:
        return unixsock.is_alive(instance.socket)
    address = PeerAddress.read("nbd", given["nbd"])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    try:
        socket.create_connection((host, address.port), CONNECT_S).close()
    except OSError:
        return False
    return True


def spawn(words: Sequence[str], standby: bool) -> Server:
    """A new server of our scheduling class.  Raises OSError."""
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", liaison.SUPERVISOR_FD: str(LIAISON_FD)}
    if standby:
        env[liaison.STANDBY] = "1"
    ours, its = socket.socketpair()
    try:
        # In a real-time class from its first instruction: on a machine that waits for its
        # swap an ordinary process starts late.  It leaves the class if realtime= says so.
        fds = {LIAISON_FD: its.fileno()}
        program = Program(words, env, fds, our_class=not standby, own_group=True)
        return Server(program.spawn(), ours)
    except OSError:
        ours.close()
        raise
    finally:
        its.close()
