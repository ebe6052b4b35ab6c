"""A network of the lab's own: an anonymous namespace with a tap device per guest.

    host ──────────── nothing in between ────────────
    namespace   lo   tap0 10.77.0.1/30 ── eth0 10.77.0.2 of guest 0
                     tap1 10.77.1.1/30 ── eth0 10.77.1.2 of guest 1
    servers run in here too, on the 10.77.N.1 addresses

The namespace has no name: a helper process makes it, we keep it open by its file descriptor, and
the kernel removes it with everything in it when the last process in it and that descriptor are
gone.  So nothing of it can be left over, not even after SIGKILL, and any number of labs run beside
each other with the same addresses.  What runs inside is found by asking which processes have this
namespace (`pids`), whoever started them: that is how a lab cleans up after servers that fork.

It does not route to the world, and it is no firewall.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .errors import LabError
from .fitness import tool

T = TypeVar("T")
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Tap:
    """One guest's link: the device's name, our end's address and the guest's."""

    name: str
    host: str
    guest: str
    netmask: str = "255.255.255.252"


class Network:
    """An anonymous network namespace; close() ends whatever still runs in it."""

    def __init__(self) -> None:
        script = "ip link set lo up && echo ready && read -r wait"
        maker = subprocess.Popen(
            [tool("unshare"), "--net", "/bin/sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert maker.stdout
        try:
            if maker.stdout.readline().strip() != b"ready":
                said = maker.communicate()[1].decode(errors="replace").strip()
                raise LabError(f"no network namespace could be made: {said}")
            self.fd = os.open(f"/proc/{maker.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            maker.communicate()
        self._inode = os.fstat(self.fd).st_ino
        self._taps = 0

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` in the namespace; it needs `fd` passed on.

        The program keeps the process id of what was started, and is killed with the thread that
        started it (PR_SET_PDEATHSIG), so that a killed test leaves nothing behind.
        """
        return [
            *(tool("setpriv"), "--pdeathsig", "KILL"),
            *(tool("nsenter"), f"--net=/proc/self/fd/{self.fd}", "--"),
            *argv,
        ]

    def run(self, argv: Sequence[str], limit_s: float = 10) -> str:
        """Run a command in the namespace to its end; its output.  Raises LabError."""
        done = subprocess.run(
            self.inside(argv),
            pass_fds=(self.fd,),
            capture_output=True,
            text=True,
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise LabError(f"{' '.join(argv)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in a thread that is inside the namespace (a socket made there stays)."""
        result: list[T] = []
        failure: list[BaseException] = []

        def body() -> None:
            try:
                if ctypes.CDLL(None, use_errno=True).setns(self.fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                result.append(function())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=body, name="swaplab-netns")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def answers(self, address: str, port: int) -> bool:
        """Does anybody accept a TCP connection there?"""

        def dial() -> bool:
            with socket.socket() as probe:
                probe.settimeout(1)
                return probe.connect_ex((address, port)) == 0

        return self.call(dial)

    def add_tap(self) -> Tap:
        """Another guest's device.  At most 256."""
        number, self._taps = self._taps, self._taps + 1
        assert number < 256
        tap = Tap(f"tap{number}", f"10.77.{number}.1", f"10.77.{number}.2")
        ip = tool("ip")
        self.run([ip, "tuntap", "add", "dev", tap.name, "mode", "tap"])
        self.run([ip, "addr", "add", f"{tap.host}/30", "dev", tap.name])
        self.run([ip, "link", "set", tap.name, "up"])
        return tap

    def cut(self, tap: Tap) -> None:
        """Take the link away: packets are lost, connections stay as they are."""
        self.run([tool("ip"), "link", "set", tap.name, "down"])

    def mend(self, tap: Tap) -> None:
        """Give the link back after `cut`."""
        self.run([tool("ip"), "link", "set", tap.name, "up"])

    def pids(self) -> list[int]:
        """Processes in the namespace, except ourselves."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if os.stat(entry / "ns" / "net").st_ino == self._inode:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        """Give the namespace up.  Whoever is still inside keeps it alive: see `pids`."""
        os.close(self.fd)
