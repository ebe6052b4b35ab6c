"""Attach a server to a guest with our own helper, and swap onto it by `zcache up`.

    attach_ours(guest, uri)     zcache attach URI --device /dev/nbd0
    zcache_in(guest, "up", ...) any command of ours in the guest, from the host's tree
    kill_mender(guest)          kill -9 of the attach helper

The guest runs the very tree under test: its root file system is the host's.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from .guest import Guest, Job
from .servers import REPOSITORY
from .swap import DEVICE

COMMAND_LIMIT_S = 60
STATE = "/run/zcache/{name}.attach"


def command(guest: Guest, *words: str) -> list[str]:
    """argv of `zcache WORDS` in the guest."""
    for folder in (REPOSITORY, Path(sys.prefix)):
        guest.bring(folder)
    return [sys.executable, "-m", "plugin.cli", *words]


def start_zcache(guest: Guest, *words: str, env: dict[str, str] | None = None) -> Job:
    """Start `zcache WORDS` in the guest."""
    environment = [f"{k}={v}" for k, v in {"PYTHONPATH": str(REPOSITORY), **(env or {})}.items()]
    return guest.start(["/usr/bin/env", *environment, *command(guest, *words)])


def zcache_in(guest: Guest, *words: str, env: dict[str, str] | None = None, expect: int = 0) -> str:
    """Run `zcache WORDS` in the guest; what it said.  Its exit code has to be `expect`."""
    job = start_zcache(guest, *words, env=env)
    code = job.wait(COMMAND_LIMIT_S).code
    said = job.stdout() + job.stderr()
    if code < 0 <= expect:  # a signal, and it may have been the kernel's
        said += "\n".join(str(line) for line in guest.log[-30:])
    assert code == expect, f"zcache {' '.join(words)}: exit {code}: {said}"
    return said


def attach_ours(guest: Guest, uri: str, *options: str, device: str = DEVICE) -> None:
    """Connect `device` with our helper."""
    zcache_in(guest, "attach", uri, "--device", device, *options)


def detach_ours(guest: Guest, name: str = "zcache") -> None:
    zcache_in(guest, "detach", "--name", name)


def state(guest: Guest, name: str = "zcache") -> dict[str, Any]:
    """What the helper's state page says."""
    found: dict[str, Any] = json.loads(guest.read(STATE.format(name=name)))
    return found


def kill_in(guest: Guest, pid: int, number: int = 9) -> None:
    """A signal to a process of the guest, by PID 1: a new process may need memory first."""
    guest.link.ask("signal", str(pid), str(number))


def kill_mender(guest: Guest, name: str = "zcache", spare_too: bool = False) -> int:
    """kill -9 of the helper, or of it and its spare; which process the helper was.

    The spare is stopped first: else it goes on, and has one of its own before it is killed.
    """
    found = state(guest, name)
    if spare_too:
        kill_in(guest, int(found["spare_pid"]), signal.SIGSTOP)
    kill_in(guest, int(found["pid"]))
    if spare_too:
        kill_in(guest, int(found["spare_pid"]))
    return int(found["pid"])
