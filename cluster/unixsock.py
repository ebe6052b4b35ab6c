"""Listening on a Unix socket path that belongs to us alone.

    path free          bind
    path stale         a socket nobody listens on (its server was killed): remove, bind
    path alive         refuse: another server answers there
    path not a socket  refuse: never remove what we did not make

The looking and the binding happen under a lock on the folder, so that of two
servers that start at once one wins and the other is told.  The socket's mode is
set before it gets its name: there is no moment when others may connect.

What it is not: protection from somebody who may write to the folder anyway.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from zcache_core.errors import ConfigError, InUseError

PATH_BYTES_MAX = 107  # sun_path holds 108 with the final zero (unix(7))
CONNECT_S = 1.0  # a living server's backlog takes us at once; a full one says EAGAIN
LOCK_S = 2.0  # others hold the folder's lock for the microseconds of one bind


def is_alive(path: str | Path) -> bool:
    """Whether a process listens at `path`; False when nothing is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return False
        except OSError as error:
            # EAGAIN and a timeout: the backlog is full, so somebody owns it.
            # EACCES: somebody else's.  EPROTOTYPE: alive, of another socket type.
            return error.errno not in (errno.ENOTSOCK,)
        return True


def claim(path: str | Path, purpose: str, key: str, dead: bool = False) -> None:
    """Make `path` free to bind, or refuse with a sentence about `purpose`.

    `key` is what the user can write differently ("control=PATH", "-U PATH").  `dead`: whose socket
    it is has ended, that is known; then a connection tells nothing (a child that the dead one was
    about to start has its listening socket, too, until it is another program).
    Removes a stale socket.  Raises ConfigError and InUseError.
    """
    path = Path(path)
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ConfigError(
            f"the path of {purpose} has {len(os.fsencode(path))} bytes, a Unix socket takes "
            f"{PATH_BYTES_MAX}; write a shorter {key}"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"the folder {path.parent} of {purpose} does not exist; make it, or write another {key}"
        )
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is no socket; write another {key} for {purpose}")
    if not dead and is_alive(path):
        raise InUseError(
            f"{path} is in use by a running server; stop that one first, or write another {key} "
            f"for {purpose}"
        )
    path.unlink(missing_ok=True)


def listen(path: str | Path, purpose: str, key: str, backlog: int) -> socket.socket:
    """A listening socket at `path`, mode 0600, non-blocking.  Errors as for `claim`."""
    path = Path(path)
    if not path.parent.is_dir():
        claim(path, purpose, key)
    with _folder_lock(path.parent):
        claim(path, purpose, key)
        sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            os.fchmod(sock.fileno(), 0o600)  # bind gives the path this mode (less the umask)
            sock.bind(str(path))
            sock.listen(backlog)
        except OSError as error:
            sock.close()
            raise ConfigError(
                f"{purpose} cannot listen at {path} ({os.strerror(error.errno or 0)}); "
                f"write another {key}"
            ) from error
    return sock


def remove(path: str | Path, inode: int) -> None:
    """Remove the socket we made at `path`, unless a successor's is there by now."""
    with contextlib.suppress(OSError):
        if os.lstat(path).st_ino == inode:
            os.unlink(path)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Exclusive among us in this folder, waited for at most LOCK_S."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InUseError(
                        f"another program holds a lock on the folder {folder}; use a folder of "
                        f"your own"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)
