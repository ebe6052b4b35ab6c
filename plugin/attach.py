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

from cluster import lifeline
from cluster.lifeline import mender_pid
from plugin import nbdnetlink, servestate, statepage, tlsfiles
from plugin.dialer import Generations, Target, dial, explain
from plugin.instance import NBD_PORT, Instance, parse_export
from plugin.nbdnetlink import Family, Timeouts
from plugin.relays import Relays
from plugin.statepage import StatePage
from zcache_core import process
from zcache_core.errors import AttachError, ConfigError, InUseError

MENDER = Path(__file__).resolve().parent / "mender.py"
PYTHON = "/usr/bin/python3"
# systemd's last round of SIGTERM and SIGKILL at shutdown spares whose name begins so.
MENDER_NAME = "@zcache-attach"
SECTOR_BYTES = 512
READY_S = 30.0
END_S = 5.0
GONE_S = 10.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What to attach: an NBD URI, on which device (None: any free one), with which timeouts.

    tls: folder or file with our certificates, None for what the URI says, or the default one.
    tls_name: what the server's certificate is for, None for the URI's host.
    """

    uri: str
    index: int | None
    timeouts: Timeouts
    plain: bool = False
    tls: str | None = None
    tls_name: str | None = None


@dataclass(frozen=True)
class Attached:
    """What is attached under a name.  mender_pid: 0 when nobody mends it."""

    index: int
    mender_pid: int

    @property
    def device(self) -> str:
        return f"/dev/nbd{self.index}"


def parse_uri(uri: str, plain: bool = False, tls_name: str | None = None) -> Target:
    """The Target of nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=PATH.

    nbds:// and nbds+unix:// are the same with TLS.  A host's name is looked up here, once.
    Raises ConfigError, AttachError.
    """
    parts = urllib.parse.urlsplit(uri)
    scheme, unix, _ = parts.scheme.partition("+unix")
    if scheme not in ("nbd", "nbds") or not (parts.hostname or unix):
        raise ConfigError(
            f"{uri} is no address of an NBD server; write nbd://HOST:PORT/, nbds://HOST:PORT/ with "
            f"TLS, or nbd+unix:///?socket=PATH"
        )
    tls = ""
    if scheme == "nbds":
        tls = tls_name or query(uri, "tls-hostname") or parts.hostname or ""
        if not tls:
            raise ConfigError(f"{uri} names no host; write --tls-name, the name in its certificate")
    elif tls_name or query(uri, "tls-hostname"):
        raise ConfigError(f"{uri} is without TLS; write nbds:// instead of nbd://")
    device = urllib.parse.unquote(parts.path.removeprefix("/"))
    if not plain and parse_export(device).generation is not None:
        raise ConfigError(f"leave the generation out of {uri}; every connection gets its own")
    if unix:
        socket_path = query(uri, "socket")
        if not socket_path or parts.netloc:
            raise ConfigError(f"{uri} names no socket; write nbd+unix:///?socket=/run/zcache.sock")
        return Target(os.path.abspath(socket_path), device=device, plain=plain, tls=tls)
    try:
        port = parts.port or NBD_PORT
    except ValueError as error:
        raise ConfigError(f"{uri} has no possible port; write one from 1 to 65535") from error
    return Target("", _address_of(parts.hostname or "", port), port, device, plain, tls)


def query(uri: str, name: str) -> str:
    """A word after the question mark; "" without it."""
    return urllib.parse.parse_qs(urllib.parse.urlsplit(uri).query).get(name, [""])[0]


def make_relays(wish: Wish, target: Target) -> Relays | None:
    """For TLS, what it takes; None without.  Raises ConfigError."""
    folder = wish.tls or query(wish.uri, "tls-certificates")
    if not target.tls:
        if folder:
            raise ConfigError(f"{wish.uri} is without TLS; write nbds:// instead of nbd://")
        return None
    if not folder and not os.path.isdir(tlsfiles.DEFAULT_FOLDER):
        raise ConfigError(
            f"{wish.uri} needs certificates; name their folder: --tls FOLDER ({tlsfiles.HOW})"
        )
    return Relays(tlsfiles.message(os.path.abspath(folder or tlsfiles.DEFAULT_FOLDER)))


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
    return lifeline.backend(instance.attach)


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


def attach(instance: Instance, wish: Wish, say: Say) -> Attached:
    """Attach, or adopt what was attached.  Raises AttachError, ConfigError, InUseError."""
    target = parse_uri(wish.uri, wish.plain, wish.tls_name)
    refuse_second(instance, target)
    relays = make_relays(wish, target)
    fd, found = _lock(instance)
    if fd is None:
        found = _already(instance, wish, found)
        say(f"{found.device} is attached already, helper {found.mender_pid}")
        return found
    try:
        if (found := look(instance)) is None:
            return _connect(instance, wish, target, relays, fd, say)
        say(f"{found.device} is attached, but nobody mends its connection")
        return _adopt(instance, wish, target, relays, found.index, fd, say)
    finally:
        if relays is not None:
            relays.close()  # the helper has them
        os.close(fd)  # the helper has it too
        servestate.tell_attached(instance, wish.uri)


def refuse_second(instance: Instance, target: Target) -> None:
    """InUseError when that device of that server is attached under another name.

    The second link would fence the first, which stays up and fails every request.
    """
    for path in sorted(instance.attach.parent.glob("*.attach")):
        if path == instance.attach:
            continue
        state, name = statepage.read(path), path.name.removesuffix(".attach")
        with contextlib.suppress(ConfigError, AttachError, KeyError):
            other = parse_uri(state["uri"], bool(state.get("plain")), state.get("tls_name"))
            same = (other.unix, other.host, other.port, other.device) == (
                target.unix, target.host, target.port, target.device,
            )  # fmt: skip
            if same and nbdnetlink.indexes_of(backend(Instance(name))):
                raise InUseError(
                    f"{state['uri']} is attached already, as {name} on {state.get('device')}; "
                    f"detach that first, or take another of the server's devices"
                )


def _lock(instance: Instance) -> tuple[int | None, Attached | None]:
    """The page's descriptor, locked; None when a helper runs, and what it mends.

    Somebody else may hold it: another `attach` that has just begun, or a helper that was
    killed but has not ended yet.  Raises InUseError.
    """
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(BlockingIOError):
            return statepage.lock(instance.attach), None
        if (found := look(instance)) and found.mender_pid:
            return None, found
        if time.monotonic() > deadline:
            raise InUseError(f"another program is attaching {instance.name}; wait for it")
        time.sleep(0.1)


def _already(instance: Instance, wish: Wish, found: Attached | None) -> Attached:
    """A helper runs: that is what was wanted, unless it is of another server."""
    assert found is not None
    state = statepage.read(instance.attach)
    if state.get("uri") != wish.uri or wish.index not in (None, found.index):
        raise InUseError(
            f"{instance.name} is attached already, {found.device} to {state.get('uri')}; run "
            f"'zcache detach --name {instance.name}' first, or choose another --name"
        )
    return found


def _connect(
    instance: Instance, wish: Wish, target: Target, relays: Relays | None, fd: int, say: Say
) -> Attached:
    generations = Generations(int(statepage.read(instance.attach).get("generation", 0)))
    numbers = nbdnetlink.family()
    try:
        link = dial(target, generations, relays)
    except (AttachError, OSError) as error:
        raise explain(error, target) from error
    if relays is not None:
        relays.keep()
    with link.sock:
        page = StatePage.create(fd, _values(wish, target, generations))
        index = nbdnetlink.connect(link, wish.index, wish.timeouts, backend(instance))
        page.update(device=f"/dev/nbd{index}")
        try:
            size_bytes, last = link.size_bytes, generations.last
            limit_s = wish.timeouts.request_s
            start = Start(instance, target, index, size_bytes, last, numbers, limit_s, relays)
            pid = start_mender(start, fd, link.sock)
        except BaseException:
            nbdnetlink.disconnect(index)
            raise
    how = f", TLS with {target.tls}" if target.tls else ""
    say(
        f"/dev/nbd{index} is attached to {wish.uri} ({link.size_bytes >> 20} MiB{how}), "
        f"helper {pid}"
    )
    return Attached(index, pid)


def _adopt(
    instance: Instance,
    wish: Wish,
    target: Target,
    relays: Relays | None,
    index: int,
    fd: int,
    say: Say,
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
    StatePage.create(fd, _values(wish, target, generations) | {"device": f"/dev/nbd{index}"})
    numbers = nbdnetlink.family()
    last, limit_s = generations.last, wish.timeouts.request_s
    start = Start(instance, target, index, size_bytes, last, numbers, limit_s, relays)
    pid = start_mender(start, fd, None)
    say(f"/dev/nbd{index} has a new helper, {pid}")
    return Attached(index, pid)


def _values(wish: Wish, target: Target, generations: Generations) -> dict[str, Any]:
    return {
        "uri": wish.uri,
        "address": target.host,
        "plain": wish.plain,
        "tls": wish.tls,
        "tls_name": wish.tls_name,
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
    timeout_s: int
    relays: Relays | None = None


def mender_words(
    start: Start, page_fd: int, sock: socket.socket | None, certificates: str = ""
) -> list[str]:
    """The helper's command line.  Everything in it is a finished number, path or message."""
    target, numbers = start.target, start.numbers
    device = numbers.family, start.index, backend(start.instance)
    swift = nbdnetlink.can_be_swift(start.index, os.uname().release)
    options = {
        "index": start.index,
        "unix": target.unix,
        "host": target.host,
        "port": target.port,
        "device": target.device,
        "plain": "yes" if target.plain else "",
        "tls": target.tls,
        "certificates": certificates,
        "relays": ",".join(f"{pid}:{line.fileno()}" for pid, line in told(start)),
        "generation": start.generation,
        "size": start.size_bytes,
        "group": numbers.group,
        "template": nbdnetlink.reconfigure_template(*device, start.timeout_s).hex(),
        "careful": nbdnetlink.timeout_message(*device, start.timeout_s).hex(),
        "swift": nbdnetlink.timeout_message(*device, 0).hex() if swift else "",
        "timeout": start.timeout_s,
        "page": page_fd,
        "sock": sock.fileno() if sock is not None else "",
    }
    # -I -S: neither the user's folders nor installed packages; it needs none.
    return [MENDER_NAME, "-I", "-S", str(MENDER), *(f"{k}={v}" for k, v in options.items())]


def told(start: Start) -> list[tuple[int, socket.socket]]:
    """The relays that run already."""
    return start.relays.told() if start.relays is not None else []


def certificates_fd(start: Start) -> list[int]:
    """What the relays are told, in a file without a name: a key is on no command line."""
    if start.relays is None:
        return []
    fd = os.memfd_create("zcache-certificates")
    os.write(fd, start.relays.certificates)
    return [fd]


def start_mender(start: Start, page_fd: int, sock: socket.socket | None) -> int:
    """Start the helper; its process, once it is ready for the worst.  Raises AttachError."""
    process.io_flusher()  # inherited; what it refuses, the helper will say
    read_fd, write_fd = os.pipe()
    secrets = certificates_fd(start)
    fds = [page_fd, write_fd, *([sock.fileno()] if sock is not None else []), *secrets]
    fds += [line.fileno() for _, line in told(start)]
    words = mender_words(start, page_fd, sock, "".join(map(str, secrets)))
    try:
        child = subprocess.Popen(
            [*words, f"ready={write_fd}"],
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
        for fd in (write_fd, *secrets):
            os.close(fd)
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
    fd = _locked_without_helper(instance)
    try:
        if found := look(instance):  # another one, if somebody has attached meanwhile
            refuse_if_in_use(found)
            index = found.index
            nbdnetlink.disconnect(index)
            _wait_until(lambda: not nbdnetlink.is_connected(index), f"{found.device} to end")
            say(f"{found.device} is detached")
        else:
            say(f"nothing is attached as {instance.name}")
        uri = str(statepage.read(instance.attach).get("uri", ""))
        instance.attach.unlink(missing_ok=True)
    finally:
        os.close(fd)
    servestate.tell_attached(instance, uri)


def _locked_without_helper(instance: Instance) -> int:
    """The page's descriptor, locked: nobody attaches now.  Raises AttachError, InUseError."""
    while True:
        end_mender(instance)
        fd, _ = _lock(instance)
        if fd is not None:
            return fd


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
        if found := look(instance):  # and the next may be another `attach`'s, and swap by now
            refuse_if_in_use(found)
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
