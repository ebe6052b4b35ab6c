"""`zcache stats-fs MOUNTPOINT`: the counters as files, for `grep . *` and old scripts.

    open -> one question to the node process (or the answer of up to FRESH_S ago) -> bytes
    read -> those bytes, so that a file never changes under its reader

Read-only, in the foreground, until Ctrl-C or `umount`.  A server that does not answer
makes files EIO, and they are well again when it answers.

The library is mfusepy: the maintained one of those that need nothing compiled (pyfuse3
comes only as source and wants libfuse's headers; fusepy and fuse-python rest).  It calls
Debian's libfuse3 through ctypes.

What it is not: fast.  One thread, a question a look.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import errno
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plugin import counterfiles
from zcache_core.errors import ConfigError, ControlError

FRESH_S = 0.1  # `grep . *` opens a hundred files: one question, and numbers of one moment
ENDED_BY_SIGNAL = 8  # what libfuse's loop returns then
DEVICE = Path("/dev/fuse")
FILE_BYTES_MAX = 31 * 21  # the buckets of a histogram, 20 digits each

Stats = Mapping[str, Any]


class CounterFiles:
    """Names, attributes and contents; no FUSE in it."""

    def __init__(self, ask: Callable[[], Stats]) -> None:
        self._ask = ask
        self._files = [*counterfiles.files(), *counterfiles.latency_files()]
        self._folders = {path.partition("/")[0] for path in self._files} | {"ramster"}
        self._stats: Stats = {}
        self._asked_s = -FRESH_S
        self._mounted = time.time()

    def names(self, path: str) -> list[str]:
        """Of a folder.  Raises OSError."""
        if path == "/":
            return sorted(self._folders)
        if path.strip("/") not in self._folders:
            raise OSError(errno.ENOENT, path)
        lead = path.strip("/") + "/"
        return [name.removeprefix(lead) for name in self._files if name.startswith(lead)]

    def attributes(self, path: str) -> dict[str, Any]:
        """As of stat(2).  Raises OSError."""
        if path == "/" or path.strip("/") in self._folders:
            mode, links, length = stat.S_IFDIR | 0o555, 2, 0
        elif path.strip("/") in self._files:
            # As long as it may get, for programs that read no further than this.
            mode, links, length = stat.S_IFREG | 0o444, 1, FILE_BYTES_MAX
        else:
            raise OSError(errno.ENOENT, path)
        when = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), int(self._mounted * 1e9))
        ids = {"st_uid": os.getuid(), "st_gid": os.getgid()}
        return {"st_mode": mode, "st_nlink": links, "st_size": length, **when, **ids}

    def content(self, path: str) -> bytes:
        """Of a file, now.  Raises OSError."""
        now_s = time.monotonic()
        if now_s - self._asked_s >= FRESH_S:
            try:
                self._stats, self._asked_s = self._ask(), now_s
            except ControlError:
                raise OSError(errno.EIO, path) from None
        try:
            return counterfiles.content(path.strip("/"), self._stats)
        except KeyError:
            raise OSError(errno.ENOENT, path) from None


def run(mountpoint: str, ask: Callable[[], Stats], say: Callable[[str], None]) -> int:
    """Mount and serve until it is unmounted; exit code 0.  Raises ConfigError."""
    check(mountpoint)
    ask()  # whoever does not answer at first is an error
    mfusepy = library()

    class Calls(mfusepy.Operations):  # type: ignore[name-defined,misc]
        """What the kernel asks, passed on."""

        use_ns = True

        def __init__(self) -> None:
            self._open: dict[int, bytes] = {}
            self._next = 1

        def init(self, path: str) -> None:
            say(f"Counters are files below {mountpoint}; Ctrl-C or umount ends it.")

        def getattr(self, path: str, fi: Any = None) -> dict[str, Any]:
            with _own_error(mfusepy):
                return tree.attributes(path)

        def readdir(self, path: str, fi: Any) -> list[str]:
            with _own_error(mfusepy):
                return [".", "..", *tree.names(path)]

        def open(self, path: str, fi: Any) -> int:
            if fi.flags & os.O_ACCMODE != os.O_RDONLY:
                raise mfusepy.FuseOSError(errno.EROFS)
            with _own_error(mfusepy):
                data = tree.content(path)
            fi.direct_io, fi.fh = 1, self._next  # read as the file is, not as long as stat says
            self._open[self._next] = data
            self._next += 1
            return 0

        def read(self, path: str, size: int, offset: int, fi: Any) -> bytes:
            return self._open[fi.fh][offset : offset + size]

        def release(self, path: str, fi: Any) -> int:
            self._open.pop(fi.fh, None)
            return 0

    tree = CounterFiles(ask)
    try:
        mfusepy.FUSE(
            Calls(), mountpoint, raw_fi=True, foreground=True, nothreads=True, ro=True,
            nosuid=True, nodev=True, noexec=True, fsname="zcache", subtype="zcache",
        )  # fmt: skip
    except RuntimeError as error:
        if error.args != (ENDED_BY_SIGNAL,):
            raise ConfigError(
                f"{mountpoint} cannot be mounted (libfuse says {error}); as another user than root "
                f"that needs the Debian package fuse3"
            ) from None
    return 0


@contextlib.contextmanager
def _own_error(mfusepy: Any) -> Any:
    """An OSError as the library wants it."""
    try:
        yield
    except OSError as error:
        raise mfusepy.FuseOSError(error.errno) from None


def check(mountpoint: str) -> None:
    """Refuse what cannot be mounted on, with a sentence.  Raises ConfigError."""
    if not DEVICE.exists():
        raise ConfigError(f"there is no {DEVICE} here; load it with 'modprobe fuse', as root")
    path = Path(mountpoint)
    try:
        if os.listdir(path):
            raise ConfigError(f"{path} is not empty; name an empty folder to mount on")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; make that folder first") from None
    except NotADirectoryError:
        raise ConfigError(f"{path} is no folder; name an empty folder to mount on") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); 'umount' it if an older one was killed "
            f"there, or name another folder"
        ) from None


def library() -> Any:
    """mfusepy over libfuse3.  Raises ConfigError."""
    found = os.environ.get("FUSE_LIBRARY_PATH") or ctypes.util.find_library("fuse3")
    if not found:
        raise ConfigError("libfuse3 is missing; install it with 'apt install fuse3'")
    os.environ["FUSE_LIBRARY_PATH"] = found  # it would prefer libfuse 2
    import mfusepy

    return mfusepy
