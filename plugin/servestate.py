"""NAME.serve: the supervisor's lock, and what it supervises, as JSON for whoever asks.

    flock   held for the supervisor's life; the kernel drops it when it is gone
    text    one JSON object and zeros after it, 16 KiB in all

The file lies in a tmpfs, whose pages may be swapped out like any other, also to the
device whose server just died.  So it is read and written through a mapping that the
supervisor keeps, and its memory is locked.  The same goes for NAME.mem, which a
successor of a killed server reads: `Kept` holds such a file in memory.

A reader takes no lock: what it reads half written does not parse, and it looks again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import time
import urllib.parse
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from plugin.instance import NBD_PORT, Instance
from zcache_core.errors import ConfigError, InUseError
from zcache_core.owner import start_ticks

FILE_BYTES = 16384
LOOK = signal.SIGUSR2  # to the supervisor: look whether this machine has its device attached
TURN_S = 15.0  # of a lone standby
READ_TRIES = 20
READ_PAUSE_S = 0.005

STARTING, SERVING, WAITING, UPGRADING, STOPPING, STOPPED = (
    "starting", "serving", "waiting", "upgrading", "stopping", "stopped",
)  # fmt: skip


@dataclass
class State:
    """What NAME.serve tells.  `phase` is one of the words above.

    A process is its number and its start in clock ticks since boot; 0 is none.
    `starts` counts servers started or adopted, `upgrades` those that took over from a
    living one, `takeovers` a standby's after a death; `upgrade_error` is why the last
    `zcache upgrade` was not done.
    """

    supervisor_pid: int = 0
    supervisor_ticks: int = 0
    server_pid: int = 0
    server_ticks: int = 0
    phase: str = STARTING
    words: list[str] = field(default_factory=list)  # key=value, as they were given
    options: dict[str, str] = field(default_factory=dict)  # of `zcache serve` itself
    root: str = ""  # where the code lies
    version: str = ""
    starts: int = 0
    upgrades_asked: int = 0
    upgrades: int = 0
    upgrade_error: str = ""
    takeovers: int = 0  # of them, by a standby after a server's death
    standby_pid: int = 0
    standby_ticks: int = 0
    standby_ready: bool = False
    looks: bool = False  # it knows the signal LOOK
    error: str = ""  # why the last server ended

    @property
    def is_supervised(self) -> bool:
        """Whether the supervisor lives."""
        return is_alive(self.supervisor_pid, self.supervisor_ticks)

    @property
    def has_standby(self) -> bool:
        """Whether its standby lives."""
        return is_alive(self.standby_pid, self.standby_ticks)

    @property
    def has_server(self) -> bool:
        """Whether its server lives."""
        return is_alive(self.server_pid, self.server_ticks)


def is_alive(pid: int, ticks: int) -> bool:
    """Whether the process (number, start) is there and has not ended."""
    if pid <= 0 or ticks <= 0 or start_ticks(pid) != ticks:
        return False
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rsplit(")", 1)[1].split()[0] not in "ZX"


def read(instance: Instance) -> State | None:
    """What the last supervisor of this name wrote; None when there is nothing to read."""
    known = {f.name for f in fields(State)}
    for _ in range(READ_TRIES):
        try:
            text = instance.serve.read_bytes().rstrip(b"\0")
        except OSError:
            return None
        if not text:
            return None
        with contextlib.suppress(ValueError, TypeError):
            found = json.loads(text)
            return State(**{name: found[name] for name in found if name in known})
        time.sleep(READ_PAUSE_S)
    return None


def needed_by(name: str) -> str:
    """Who waits for the next server of the memory file of that name; "" if nobody does."""
    try:
        instance = Instance(name)
    except ConfigError:  # of a server without a supervisor, which may be called otherwise
        return ""
    if device := attached_device(instance):
        return device
    state = read(instance)
    return "its supervisor" if state is not None and state.is_supervised else ""


def attached_device(instance: Instance) -> str | None:
    """A device of the kernel's that this instance serves, as far as can be known; None if none."""
    return next((device for device, _ in attached(instance)), None)


def attached(instance: Instance) -> list[tuple[str, str]]:
    """(device, the name it is attached under) of all that this instance serves.

    Of several devices of one server each is attached under a name of its own.
    """
    found = []
    pages = [instance.attach, *sorted(instance.attach.parent.glob("*.attach"))]
    for page in dict.fromkeys(pages):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            told = json.loads(page.read_bytes().rstrip(b"\0 "))
            if not _is_served(told, instance, page == instance.attach):
                continue
            devices = [str(one) for one in told.get("devices") or [told["device"]]]
            name = page.name.removesuffix(".attach")
            found += [(one, name) for one in devices if _is_connected(one.removeprefix("/dev/"))]
    return found


def _is_served(told: dict[str, Any], instance: Instance, own_name: bool) -> bool:
    """Whether what a page tells of is attached to this instance's socket."""
    if "uri" not in told:
        return own_name
    parts = urllib.parse.urlsplit(str(told["uri"]))
    path = urllib.parse.parse_qs(parts.query).get("socket", [""])[0]
    if path:
        return os.path.realpath(path) == os.path.realpath(instance.socket)
    found = str(told.get("address") or parts.hostname)
    return _listens_at(instance, str(parts.hostname), found, parts.port or NBD_PORT)


LOOPBACK = {"localhost", "127.0.0.1", "::1"}
WILDCARDS = {"", "0.0.0.0", "::"}


def _listens_at(instance: Instance, name: str, address: str, port: int) -> bool:
    """Whether a program of this machine that dialled `name`, in numbers `address`, found this one.

    A server on every address, or on a name, is found at any address that is this machine's own:
    better a `stop` that asks for --force than one that takes swap away.
    """
    state = read(instance)
    given = dict(word.partition("=")[::2] for word in state.words) if state is not None else {}
    host, _, own_port = given.get("nbd", "").rpartition(":")
    host = host.strip("[]")
    if not own_port.isdigit() or int(own_port) != port:
        return False
    if {name, address} & {host, *LOOPBACK}:
        return True
    return (host in WILDCARDS or not _family(host)) and _is_own(address)


def _family(host: str) -> int:
    """Of an address in numbers; 0 for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return family
    return 0


def _is_own(address: str) -> bool:
    """Whether this machine has this address, in numbers; no name is asked for."""
    if not (family := _family(address)):
        return False
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as one:
        one.bind((address, 0))
        return True
    return False


def _is_connected(name: str) -> bool:
    block = Path(os.environ.get("ZCACHE_SYS_BLOCK", "/sys/block")) / name
    return (block / "pid").exists() or bool(int((block / "size").read_text()))


def tell_attached(instance: Instance, uri: str = "") -> None:
    """A device was attached or detached: its server's supervisor, if there is one, is to look.

    uri: of the server, where that is another instance's.
    """
    words = urllib.parse.parse_qs(urllib.parse.urlsplit(uri).query)
    path = Path(words.get("socket", [""])[0])
    if path.parent == instance.socket.parent and path.suffix == ".sock":
        with contextlib.suppress(ConfigError):
            instance = Instance(path.stem)
    state = read(instance)
    if state is not None and state.looks and state.is_supervised:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(state.supervisor_pid, LOOK)


class Kept:
    """A file held in memory through a mapping (with mlockall in force), if it is there."""

    def __init__(self, path: Path) -> None:
        self._map: mmap.mmap | None = None
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
            self._map[:1]  # touched, so that it is there to be locked

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


class HeldState:
    """The state's file, mapped and held in memory as Kept does: for a lone standby (lone.py)."""

    def __init__(self, fd: int) -> None:
        self._map: mmap.mmap | None = None
        if os.fstat(fd).st_size >= FILE_BYTES:  # else no supervisor has written it yet
            self._map = mmap.mmap(fd, FILE_BYTES)
            for at in range(0, FILE_BYTES, mmap.PAGESIZE):
                self._map[at]

    @property
    def is_stopping(self) -> bool:
        """Whether the supervisor was told to end, and the server with it."""
        return self._values().get("phase") in (STOPPING, STOPPED)

    def tell_heir(self, pid: int) -> None:
        """By who has the lock: this one serves, and nobody waits behind it."""
        if self._map is None or not (values := self._values()):
            return
        values |= {"server_pid": pid, "server_ticks": start_ticks(pid)}
        values |= {"standby_pid": 0, "standby_ticks": 0, "standby_ready": False}
        text = json.dumps(values).encode()
        if len(text) <= FILE_BYTES:
            self._map[:] = text.ljust(FILE_BYTES, b"\0")

    def _values(self) -> dict[str, Any]:
        if self._map is not None:
            with contextlib.suppress(ValueError):
                found = json.loads(self._map[:].rstrip(b"\0"))
                return found if isinstance(found, dict) else {}
        return {}

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


class ServeLock:
    """The held lock; writes the state.  Survives exec when it is given on by number."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self.fd = path, fd
        os.ftruncate(fd, FILE_BYTES)
        self._map = mmap.mmap(fd, FILE_BYTES)

    @classmethod
    def acquire(cls, instance: Instance) -> ServeLock:
        """Take the lock, or raise InUseError: at once if a supervisor lives who has it.

        A lone standby has it for its turn, after which it can be adopted (lone.py).
        """
        until_s = time.monotonic() + TURN_S
        while True:
            fd = os.open(
                instance.serve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                state = read(instance)
                if time.monotonic() < until_s and not (state and state.is_supervised):
                    time.sleep(READ_PAUSE_S)
                    continue
                raise InUseError(
                    f"the server {instance.name} runs already; ask it with 'zcache status', or "
                    f"start another one with --name"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                # the last holder may have removed the file between our open and our lock
                if os.stat(instance.serve).st_ino == os.fstat(fd).st_ino:
                    return cls(instance.serve, fd)
            os.close(fd)

    def write(self, state: State) -> None:
        """Put the state where others read it.  No system call."""
        text = json.dumps(asdict(state)).encode()
        assert len(text) <= FILE_BYTES, "the words are longer than a command line may be"
        self._map[:] = text.ljust(FILE_BYTES, b"\0")

    def release(self, forget: bool) -> None:
        """An orderly end.  The file's words are those of the next start without any."""
        if forget:
            self._path.unlink(missing_ok=True)
        self._map.close()
        os.close(self.fd)
