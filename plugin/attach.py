"""Attaching: from a server's address to a connected /dev/nbdN with a helper that mends it.

    attach   lock the state page -> dial -> NBD_CMD_CONNECT -> start the helper -> it says ready
             (already connected, helper dead: the helper alone; the device is adopted)
    detach   device in use? refuse -> end the helper -> NBD_CMD_DISCONNECT -> remove the page

Any of them may be cut off anywhere and run again: what there is, is asked of the kernel (the
device carries our name in sysfs), not of a file.

What it is not: resident.  The helper is `mender`, a process of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin import nbdnetlink, servestate, statepage
from plugin.dialer import Generations, Target, dial, explain
from plugin.instance import Instance, parse_export
from plugin.nbdnetlink import Family, Timeouts
from plugin.statepage import StatePage
from zcache_core import process
from zcache_core.errors import AttachError, ConfigError, InUseError
from zcache_core.owner import start_ticks

MENDER = Path(__file__).resolve().parent / "mender.py"
PYTHON = "/usr/bin/python3"
# systemd's last round of SIGTERM and SIGKILL at shutdown spares whose name begins so.
MENDER_NAME = "@zcache-attach"
NBD_PORT = 10809
SECTOR_BYTES = 512
READY_S = 30.0
END_S = 5.0
GONE_S = 10.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What to attach: an NBD URI, on which device (None: any free one), with which timeouts."""

    uri: str
    index: int | None
    timeouts: Timeouts
    plain: bool = False


@dataclass(frozen=True)
class Attached:
    """What is attached under a name.  mender_pid: 0 when nobody mends it."""

    index: int
    mender_pid: int

    @property
    def device(self) -> str:
        return f"/dev/nbd{self.index}"


def parse_uri(uri: str, plain: bool = False) -> Target:
    """The Target of nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=PATH.

    A host's name is looked up here, once.  Raises ConfigError, AttachError.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("nbd", "nbd+unix") or not (
        parts.hostname or parts.scheme == "nbd+unix"
    ):
        raise ConfigError(
            f"{uri} is no address of an NBD server; write nbd://HOST:PORT/ or "
            f"nbd+unix:///?socket=PATH"
        )
    device = urllib.parse.unquote(parts.path.removeprefix("/"))
    if not plain and parse_export(device).generation is not None:
        raise ConfigError(f"leave the generation out of {uri}; every connection gets its own")
    if parts.scheme == "nbd+unix":
        socket_path = urllib.parse.parse_qs(parts.query).get("socket", [""])[0]
        if not socket_path or parts.netloc:
            raise ConfigError(f"{uri} names no socket; write nbd+unix:///?socket=/run/zcache.sock")
        return Target(os.path.abspath(socket_path), device=device, plain=plain)
    try:
        port = parts.port or NBD_PORT
    except ValueError as error:
        raise ConfigError(f"{uri} has no possible port; write one from 1 to 65535") from error
    return Target("", _address_of(parts.hostname or "", port), port, device, plain)


def _address_of(host: str, port: int) -> str:
    """The numeric address: the helper must not have to ask for it when there is no memory."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AttachError(f"there is no address of {host}: {error.strerror}") from error
    return str(found[0][4][0])


def parse_device(text: str | None) -> int | None:
    """/dev/nbd3, nbd3 or 3 as 3.  Raises ConfigError."""
    if text is None:
        return None
    number = text.removeprefix("/dev/").removeprefix("nbd")
    if not (number.isascii() and number.isdigit()):
        raise ConfigError(f"{text} is no network block device; write one like /dev/nbd0")
    return int(number)


def backend(instance: Instance) -> str:
    """The text by which the kernel's device is known as this instance's."""
    return f"zcache:{instance.attach.with_suffix('')}"


def look(instance: Instance) -> Attached | None:
    """What is attached under this name, as the kernel and the page say.  Raises AttachError."""
    indexes = nbdnetlink.indexes_of(backend(instance))
    if len(indexes) > 1:
        raise AttachError(
            f"several devices are attached as {instance.name}: "
            f"{', '.join(f'nbd{index}' for index in indexes)}; detach all but one by "
            f"'nbd-client -d /dev/nbdN'"
        )
    if not indexes:
        return None
    return Attached(indexes[0], mender_pid(statepage.read(instance.attach)))


def mender_pid(state: dict[str, Any]) -> int:
    """The helper's process, if the one that the page tells of is still it; else 0."""
    pid = int(state.get("pid", 0))
    return pid if pid and start_ticks(pid) == state.get("start_ticks") else 0


def attach(instance: Instance, wish: Wish, say: Say) -> Attached:
    """Attach, or adopt what was attached.  Raises AttachError, ConfigError, InUseError."""
    target = parse_uri(wish.uri, wish.plain)
    try:
        fd = statepage.lock(instance.attach)
    except BlockingIOError:
        return _already(instance, wish)
    try:
        found = look(instance)
        if found is None:
            return _connect(instance, wish, target, fd, say)
        say(f"{found.device} is attached, but nobody mends its connection")
        return _adopt(instance, wish, target, found.index, fd, say)
    finally:
        os.close(fd)  # the helper has it too
        servestate.tell_attached(instance)


def _already(instance: Instance, wish: Wish) -> Attached:
    """Somebody holds the page: a helper that runs, or another `attach` that has just begun."""
    deadline = time.monotonic() + READY_S
    while not (found := look(instance)) or not found.mender_pid:
        if time.monotonic() > deadline:
            raise InUseError(f"another program is attaching {instance.name}; wait for it")
        time.sleep(0.1)
    state = statepage.read(instance.attach)
    if state.get("uri") != wish.uri or wish.index not in (None, found.index):
        raise InUseError(
            f"{instance.name} is attached already, {found.device} to {state.get('uri')}; run "
            f"'zcache detach --name {instance.name}' first, or choose another --name"
        )
    return found


def _connect(instance: Instance, wish: Wish, target: Target, fd: int, say: Say) -> Attached:
    generations = Generations(int(statepage.read(instance.attach).get("generation", 0)))
    numbers = nbdnetlink.family()
    try:
        link = dial(target, generations)
    except (AttachError, OSError) as error:
        raise explain(error, target) from error
    with link.sock:
        page = StatePage.create(fd, _values(wish, generations))
        index = nbdnetlink.connect(link, wish.index, wish.timeouts, backend(instance))
        page.update(device=f"/dev/nbd{index}")
        try:
            start = Start(instance, target, index, link.size_bytes, generations.last, numbers)
            pid = start_mender(start, fd, link.sock)
        except BaseException:
            nbdnetlink.disconnect(index)
            raise
    say(f"/dev/nbd{index} is attached to {wish.uri} ({link.size_bytes >> 20} MiB), helper {pid}")
    return Attached(index, pid)


def _adopt(
    instance: Instance, wish: Wish, target: Target, index: int, fd: int, say: Say
) -> Attached:
    """A helper for a device that has lost its own."""
    if wish.index not in (None, index):
        raise InUseError(f"{instance.name} is attached to /dev/nbd{index} already; detach it first")
    state = statepage.read(instance.attach)
    if state.get("uri", wish.uri) != wish.uri:
        raise InUseError(
            f"/dev/nbd{index} was attached to {state['uri']}; attach it to that again, or detach "
            f"it first"
        )
    size_bytes = int((nbdnetlink.SYSFS / f"nbd{index}" / "size").read_text()) * SECTOR_BYTES
    generations = Generations(int(state.get("generation", 0)))
    StatePage.create(fd, _values(wish, generations) | {"device": f"/dev/nbd{index}"})
    start = Start(instance, target, index, size_bytes, generations.last, nbdnetlink.family())
    pid = start_mender(start, fd, None)
    say(f"/dev/nbd{index} has a new helper, {pid}")
    return Attached(index, pid)


def _values(wish: Wish, generations: Generations) -> dict[str, Any]:
    return {
        "uri": wish.uri,
        "plain": wish.plain,
        "timeout_s": wish.timeouts.request_s,
        "dead_timeout_s": wish.timeouts.dead_s,
        "generation": generations.last,
        "since": int(time.time()),
        "state": "starting",
    }


# ---- the helper -----------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What a helper is told, beside its descriptors."""

    instance: Instance
    target: Target
    index: int
    size_bytes: int
    generation: int
    numbers: Family


def mender_words(start: Start, page_fd: int, sock: socket.socket | None) -> list[str]:
    """The helper's command line.  Everything in it is a finished number, path or message."""
    target, numbers = start.target, start.numbers
    template = nbdnetlink.reconfigure_template(numbers.family, start.index, backend(start.instance))
    options = {
        "index": start.index,
        "unix": target.unix,
        "host": target.host,
        "port": target.port,
        "device": target.device,
        "plain": "yes" if target.plain else "",
        "generation": start.generation,
        "size": start.size_bytes,
        "family": numbers.family,
        "group": numbers.group,
        "template": template.hex(),
        "page": page_fd,
        "sock": sock.fileno() if sock is not None else "",
    }
    # -I -S: neither the user's folders nor installed packages; it needs none.
    return [MENDER_NAME, "-I", "-S", str(MENDER), *(f"{k}={v}" for k, v in options.items())]


def start_mender(start: Start, page_fd: int, sock: socket.socket | None) -> int:
    """Start the helper; its process, once it is ready for the worst.  Raises AttachError."""
    process.io_flusher()  # inherited; what it refuses, the helper will say
    read_fd, write_fd = os.pipe()
    fds = [page_fd, write_fd, *([sock.fileno()] if sock is not None else [])]
    try:
        child = subprocess.Popen(
            [*mender_words(start, page_fd, sock), f"ready={write_fd}"],
            executable=PYTHON,
            env={"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=fds,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(write_fd)
    with os.fdopen(read_fd, "rb") as ready:
        if select.select([ready], [], [], READY_S)[0] and ready.read(1):
            assert child.stderr is not None
            child.stderr.close()
            child.returncode = 0  # it is not ours to wait for
            return child.pid
    child.kill()
    said = child.communicate()[1].decode(errors="replace").strip().splitlines()
    raise AttachError(f"the helper did not start: {said[-1] if said else 'it said nothing'}")


# ---- detaching ------------------------------------------------------------------


def detach(instance: Instance, say: Say) -> None:
    """Take the device away, if there is one.  Raises AttachError, InUseError."""
    found = look(instance)
    if found is not None:
        refuse_if_in_use(found)
    end_mender(instance)
    if found is not None:
        nbdnetlink.disconnect(found.index)
        _wait_until(lambda: not nbdnetlink.is_connected(found.index), f"{found.device} to end")
        say(f"{found.device} is detached")
    else:
        say(f"nothing is attached as {instance.name}")
    instance.attach.unlink(missing_ok=True)
    servestate.tell_attached(instance)


def refuse_if_in_use(found: Attached) -> None:
    """InUseError when the device is swap, mounted, or otherwise held by somebody."""
    try:
        os.close(os.open(found.device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except FileNotFoundError:
        pass
    except OSError as error:
        if not is_busy(error):
            return  # it cannot be opened, so nobody has it as swap
        raise InUseError(
            f"{found.device} is in use; 'swapoff {found.device}' (or umount) first, or 'zcache "
            f"down', which does all of it"
        ) from error


def is_busy(error: OSError) -> bool:
    return error.errno == errno.EBUSY


def end_mender(instance: Instance) -> None:
    """The helper is told to go, and made to if it does not; the device stays as it is."""
    end = time.monotonic() + READY_S
    while pid := mender_pid(statepage.read(instance.attach)):  # a killed one's spare is the next
        if time.monotonic() > end:
            raise AttachError(f"the helper (process {pid}) does not end; try again")
        with contextlib.suppress(ProcessLookupError):
            _end(pid)


def _end(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], END_S)[0]:
                return
    finally:
        os.close(pidfd)


def _wait_until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + GONE_S
    while not ready():
        if time.monotonic() > deadline:
            raise AttachError(f"waited {GONE_S:.0f} s in vain for {what}")
        time.sleep(0.02)
