"""HOST:PORT: read from what a person writes, and listened on.

    9469             this machine only: 127.0.0.1:9469
    0.0.0.0:9469     every network that the machine is in
    [::1]:9469       IPv6 stands in brackets
    127.0.0.1:0      any free port; `bound_address` tells which

A module of its own, because the server process needs it and shall load no event loop.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket

from zcache_core.errors import ConfigError, InUseError

BACKLOG = 64


def read_address(key: str, text: str) -> str:
    """'9469' -> '127.0.0.1:9469'; 'HOST:PORT' and '[IPV6]:PORT' stay.  Raises ConfigError."""
    match = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[\w.-]+):)?(\d{1,5})", text.strip(), re.ASCII)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(
            f"{key}={text} is no address; write {key}=9469 for this machine only, or "
            f"{key}=0.0.0.0:9469 for every network it is in"
        )
    return f"{match[1] or '127.0.0.1'}:{int(match[2])}"


def listen(key: str, address: str) -> socket.socket:
    """A listening socket at HOST:PORT; port 0 is any free one.  ConfigError, InUseError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).version == 6:
            family = socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, int(port)))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        why = error.strerror or os.strerror(error.errno or 0)
        kind = InUseError if error.errno == errno.EADDRINUSE else ConfigError
        raise kind(
            f"{key}={address} cannot be listened on ({why}); write another address"
        ) from None
    return sock


def bound_address(sock: socket.socket) -> str:
    """HOST:PORT of a socket that was bound, with the port that it got."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"
