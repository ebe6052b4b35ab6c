"""An instance: one supervised server under a name, and where its files are.

    RUNTIME/NAME.sock      the NBD socket
    RUNTIME/NAME.ctl       the control socket (the node process)
    RUNTIME/NAME.mem       the memory file's lock: the server's for its life (owner.py)
    RUNTIME/NAME.serve     the supervisor's lock; its text says whom it supervises
    RUNTIME/NAME.lone      where the standby can be reached without a supervisor (lone.py)
    RUNTIME/NAME.attach    the attach helper's lock; its text says what is attached
    RUNTIME/NAME.tls/      nbd= with tls=: the certificates as nbdkit reads them

RUNTIME is `owner.runtime_dir()`.  Nothing is opened here, so asking for a path costs
nothing and leaves nothing.

Exports of its server, as an NBD client names them:

    ""   "@GEN"   "DEVICE"   "DEVICE@GEN"

Without a device the first one is meant.  Opening generation GEN (1 to 2^64 - 1) ends
every older one of that device before the first answer, and a lower one than the last
is refused; without a generation nothing is ended.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zcache_core.errors import ConfigError
from zcache_core.owner import lock_path, runtime_dir

DEFAULT_NAME = "zcache"
# A subset of what a memory file may be called, and of what systemd takes for an instance.
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
DEVICE_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,15}"
GENERATION_MAX = (1 << 64) - 1
NBD_PORT = 10809  # where an address says none
SOCKET_BYTES_MAX = 107  # sun_path holds 108 with the final zero (unix(7))


@dataclass(frozen=True)
class Instance:
    """The files of the instance `name`.  Raises ConfigError for a name that is none."""

    name: str = DEFAULT_NAME

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME_PATTERN, self.name, re.ASCII):
            raise ConfigError(
                f"{self.name!r} is no name of a server; write up to 40 letters, digits, dots, "
                f"dashes and underscores, a letter or digit first, like --name swap0"
            )
        if len(os.fsencode(self.socket)) > SOCKET_BYTES_MAX:
            raise ConfigError(
                f"the socket's path {self.socket} is longer than {SOCKET_BYTES_MAX} bytes; write "
                f"a shorter --name, or set ZCACHE_RUNTIME_DIR to a folder with a shorter path"
            )

    @property
    def socket(self) -> Path:
        """Where the server answers NBD."""
        return self._path("sock")

    @property
    def control(self) -> Path:
        """Where its node process answers RPC."""
        return self._path("ctl")

    @property
    def memory_lock(self) -> Path:
        """Whose the memory file is."""
        return lock_path(self.name)

    @property
    def serve(self) -> Path:
        """The supervisor's lock and state."""
        return self._path("serve")

    @property
    def lone(self) -> Path:
        """Where the standby listens for the next supervisor."""
        return self._path("lone")

    @property
    def attach(self) -> Path:
        """The attach helper's lock and state."""
        return self._path("attach")

    @property
    def tls(self) -> Path:
        """The certificates of its NBD connections."""
        return self._path("tls")

    def _path(self, ending: str) -> Path:
        return runtime_dir() / f"{self.name}.{ending}"


class Export(NamedTuple):
    """What an export name means: a device ("" for the first), a generation or None."""

    device: str
    generation: int | None

    def __str__(self) -> str:
        return self.device if self.generation is None else f"{self.device}@{self.generation}"


def parse_export(name: str) -> Export:
    """The Export of this name.  Raises ConfigError."""
    match = re.fullmatch(rf"({DEVICE_PATTERN})?(?:@([0-9]{{1,20}}))?", name, re.ASCII)
    if match is None:
        raise ConfigError(
            f"there is no export {name!r}; ask for DEVICE, DEVICE@GENERATION, @GENERATION or the "
            f"empty name"
        )
    device, digits = match.groups()
    generation = int(digits) if digits is not None else None
    if generation is not None and not 0 < generation <= GENERATION_MAX:
        raise ConfigError(f"{digits} is no generation; use a number from 1 to 2^64 - 1")
    return Export(device or "", generation)
