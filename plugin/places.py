"""Where this server listens: read from nbdkit's own command line.

    -U /run/zcache.sock       control socket /run/zcache.ctl, beside it
    -p 10809, or nothing      RUNTIME/tcp-10809.ctl
    -U -, -s, --vsock, ...    RUNTIME/nbd-PID.ctl

nbdkit does not tell a plugin where it listens, and binds after the plugin's last
say before the fork; so the words are read from /proc/self/cmdline with the same
rules (getopt, stop at the first word that is no option).  An option this table
does not know yet only costs the early check and the pretty name.

Source: nbdkit 1.32 server/options.h.
"""

from __future__ import annotations

import getopt
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zcache_core.owner import runtime_dir

SHORT_OPTIONS = "46D:e:fg:i:nop:P:rst:u:U:vV"
LONG_OPTIONS = [
    "ipv4-only", "ipv6-only", "debug=", "dump-config", "dump-plugin", "exit-with-parent",
    "export=", "export-name=", "exportname=", "filter=", "foreground", "no-fork", "group=",
    "help", "ip-addr=", "ipaddr=", "log=", "long-options", "mask-handshake=", "new-style",
    "newstyle", "no-sr", "old-style", "oldstyle", "pid-file=", "pidfile=", "port=", "read-only",
    "readonly", "run=", "selinux-label=", "short-options", "single", "stdin", "swap",
    "threads=", "tls=", "tls-certificates=", "tls-psk=", "tls-verify-peer", "unix=", "user=",
    "verbose", "version", "vsock",
]  # fmt: skip
NBD_PORT = "10809"


class Listening(NamedTuple):
    """What nbdkit was told: an absolute Unix path, or a TCP port, or neither; and -v."""

    unix: str | None
    tcp_port: str | None
    verbose: bool = False


def own_command_line() -> list[str]:
    """The words after the program's name."""
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")[1:-1]
    return [os.fsdecode(word) for word in words]


def listening(words: Sequence[str], env: Mapping[str, str]) -> Listening:
    """Where a server with these words and this environment listens."""
    try:
        options, _ = getopt.getopt(list(words), SHORT_OPTIONS, LONG_OPTIONS)
    except getopt.GetoptError:
        return Listening(None, None)
    given = dict(options)
    verbose = "-v" in given or "--verbose" in given
    unix = given.get("-U", given.get("--unix"))
    if unix is not None:
        return Listening(None if unix == "-" else os.path.abspath(unix), None, verbose)
    # systemd hands sockets over; then neither -U nor -p is given.
    elsewhere = given.keys() & {"-s", "--single", "--stdin", "--vsock", "--run"}
    if elsewhere or "LISTEN_FDS" in env:
        return Listening(None, None, verbose)
    return Listening(None, given.get("-p", given.get("--port", NBD_PORT)), verbose)


def threads_chosen(words: Sequence[str]) -> bool:
    """Whether nbdkit was told how many threads a connection has (-t)."""
    try:
        options, _ = getopt.getopt(list(words), SHORT_OPTIONS, LONG_OPTIONS)
    except getopt.GetoptError:
        return False
    return bool(dict(options).keys() & {"-t", "--threads"})


def control_path(where: Listening, pid: int) -> str:
    """The default of control=."""
    if where.unix is not None:
        return where.unix.removesuffix(".sock") + ".ctl"
    if where.tcp_port is not None and where.tcp_port.isalnum():
        return str(runtime_dir() / f"tcp-{where.tcp_port}.ctl")
    return str(runtime_dir() / f"nbd-{pid}.ctl")
