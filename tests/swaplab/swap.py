"""Attach a server to a guest and swap onto it, with the stock tools.

    nbd-client -swap ADDRESS PORT /dev/nbd0     (or -unix SOCKET)
    mkswap /dev/nbd0
    swapon --discard -p 10 /dev/nbd0

and all of it back.  `serve_inside` is for the machine that swaps onto its own memory: the server
runs in the guest, listening on a Unix socket.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .clock import until
from .errors import CommandFailedError
from .fitness import tool
from .guest import Guest, Job
from .host_server import HostServer
from .servers import REPOSITORY, SMALL_STACK_BYTES, Place, Recipe, ServerCommand, unix_place

DEVICE, OTHER_DEVICE = "/dev/nbd0", "/dev/nbd1"
INSIDE_FOLDER = "/run"
SELF_SERVING_SYSCTL = {"vm.watermark_boost_factor": "0", "vm.min_free_kbytes": "16384"}
"""What a guest of 256 MiB needs to serve its own swap without deadlock: boosted watermarks make
reclaim chase memory that only more swapping could free, and the reserve has to be larger than what
the socket and the server take while reclaim runs.  Without either, runs hang (KERNEL notes)."""


class InsideServer:
    """A server that runs as a program of the guest."""

    def __init__(self, guest: Guest, command: ServerCommand, place: Place, job: Job) -> None:
        self.guest = guest
        self.command = command
        self.place = place
        self.job = job

    def stats(self, limit_s: float = 60) -> dict[str, int]:
        """The server's own numbers, asked by a program in the guest."""
        if self.command.read_stats is None:
            return {}
        argv = ["/bin/sh", "-c", f'cd {REPOSITORY} && exec "$@"', "sh", *self.command.stats_argv]
        return self.command.read_stats(self.guest.call(argv, limit_s))

    def status(self) -> dict[str, str]:
        """/proc/PID/status of the server: VmLck, VmRSS, ..."""
        text = self.guest.read(f"/proc/{self.guest.read(self.place.pidfile).strip()}/status")
        lines = (line.partition(":") for line in text.splitlines())
        return {name: value.strip() for name, _, value in lines}


def serve_inside(
    guest: Guest,
    recipe: Recipe,
    options: str = f"stack={SMALL_STACK_BYTES}",
    limit_s: float = 60,
) -> InsideServer:
    """Start a server in the guest; returns once it listens.  options: see guest/agent.c."""
    place = unix_place(INSIDE_FOLDER)
    command = recipe(place)
    for folder in (REPOSITORY, Path(sys.prefix)):
        guest.bring(folder)
    environment = [f"{key}={value}" for key, value in command.env.items()]
    job = guest.start(["/usr/bin/env", *environment, *command.argv], "server", options)

    def listening() -> bool:
        if job.done():
            raise CommandFailedError(f"{command.name} did not start:\n{job.stderr()[-2000:]}")
        try:
            return bool(guest.read(place.pidfile).strip())
        except CommandFailedError:
            return False

    until(listening, guest.deadline.nearer(limit_s), f"{command.name} to listen in the guest")
    return InsideServer(guest, command, place, job)


def attach(
    guest: Guest,
    server: HostServer | InsideServer,
    device: str = DEVICE,
    extra: Sequence[str] = (),
) -> None:
    """Connect the device to the server with nbd-client.  extra: e.g. ("-C", "2")."""
    if isinstance(server, HostServer):
        target = [server.address, str(server.port)]
    else:
        target = ["-unix", f"{server.place.folder}/nbd.sock"]
    guest.call([tool("nbd-client"), *target, device, "-swap", *extra])


def swap_on(guest: Guest, device: str = DEVICE, priority: int = 10, discard: bool = True) -> None:
    """mkswap and swapon."""
    guest.call([tool("mkswap"), device])
    words = ["--discard"] if discard else []
    guest.call([tool("swapon"), *words, "-p", str(priority), device])


def swap_off(guest: Guest, device: str = DEVICE, limit_s: float = 60) -> None:
    """swapoff: every page that is still out comes back, or this fails."""
    guest.call([tool("swapoff"), device], limit_s)


def detach(guest: Guest, device: str = DEVICE) -> None:
    guest.call([tool("nbd-client"), "-d", device])
