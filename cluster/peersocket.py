"""Who is on the other side of a socket between nodes.

    folder of certificates -> rules (for laneport)
    plain connection -> user_of        TLS -> name_of

With certificates both sides show theirs; who has none that the CA signed is turned away in the
handshake, before a byte of ours.  A node's certificate has its name, not its address, because
addresses change; who is who is asked of the name.

What it is not: connections (`laneport`), or TLS itself (`tls`).
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any

from cluster.peeraddress import NODE, bad_certificates, certificates_in
from cluster.tls import TlsRules

NO_INODE = "0"  # in /proc/net/tcp: no process has the socket any more, and its user reads as root


def rules(folder: str | Path, server: bool) -> TlsRules:
    """TLS 1.3 with the folder's node.pem, asked of the other side too.  Raises ConfigError."""
    authority = certificates_in(folder)[-1]
    try:
        return TlsRules(os.fsencode(Path(folder) / NODE), authority.encode(), server)
    except ValueError as error:
        raise bad_certificates(folder, error) from None


def user_of(sock: Any) -> int | None:
    """The user whose process has the other end, on this machine; None when it cannot be told.

    For a plain connection: the kernel says it, so it can be believed (unix(7), proc(5)).
    """
    if sock.family == socket.AF_UNIX:
        told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", told)[1])
    try:
        ends = _in_proc(sock.family, sock.getpeername()), _in_proc(sock.family, sock.getsockname())
        table = "tcp6" if sock.family == socket.AF_INET6 else "tcp"
        with open(f"/proc/self/net/{table}", encoding="ascii") as file:
            for line in file:
                words = line.split()
                if (words[1], words[2]) == ends and words[9] != NO_INODE:
                    return int(words[7])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _in_proc(family: int, address: Any) -> str:
    """An address as /proc/net/tcp writes it: 32-bit words as they lie in memory, and the port."""
    packed = socket.inet_pton(family, address[0].partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


def name_of(peer: dict[str, Any] | None) -> str:
    """The common name in a peer's certificate (ssl's getpeercert); "" without one."""
    for row in (peer or {}).get("subject", ()):
        for key, value in row:
            if key == "commonName":
                return str(value)
    return ""
