"""One request to a generic netlink family, with nothing but a socket.

    call(family, command, ...)   name -> number (CTRL_CMD_GETFAMILY) -> the request -> 0, or OSError

    +----------------+---------------+------------+
    | nlmsghdr 16    | genlmsghdr 4  | attributes |     native byte order, attributes aligned to 4
    +----------------+---------------+------------+

What it is not: for whoever wants an answer, or has more to say than a few numbers; that is
pyroute2's.  Source: linux/netlink.h, linux/genetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

NETLINK_GENERIC, CTRL, GETFAMILY, CTRL_VERSION = 16, 16, 3, 1
ATTR_FAMILY_ID, ATTR_FAMILY_NAME = 1, 2
REQUEST_AND_ACK = 0x1 | 0x4
NLMSG_ERROR = 2
HEAD, GENERIC, ATTR = struct.Struct("=IHHII"), struct.Struct("=BBH"), struct.Struct("=HH")
ANSWER_BYTES = 32768
ANSWER_S = 10.0


def attribute(number: int, value: int | bytes) -> bytes:
    """A 32-bit number, or bytes as they are."""
    data = struct.pack("=I", value) if isinstance(value, int) else value
    return (ATTR.pack(ATTR.size + len(data), number) + data).ljust(_aligned(4 + len(data)), b"\0")


def call(family: str, command: int, version: int, attributes: bytes) -> None:
    """Have the kernel do it.  Raises OSError: ENOENT also when there is no such family."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as sock:
        sock.settimeout(ANSWER_S)
        sock.bind((0, 0))
        name = attribute(ATTR_FAMILY_NAME, family.encode() + b"\0")
        found = dict(_attributes(_ask(sock, CTRL, GETFAMILY, CTRL_VERSION, name)))
        (number,) = struct.unpack("=H", found[ATTR_FAMILY_ID][:2])
        _ask(sock, number, command, version, attributes)


def _ask(sock: socket.socket, kind: int, command: int, version: int, attributes: bytes) -> bytes:
    """The attributes of the answer, if there is one beside the acknowledgement."""
    body = GENERIC.pack(command, version, 0) + attributes
    sock.send(HEAD.pack(HEAD.size + len(body), kind, REQUEST_AND_ACK, command, 0) + body)
    answer = b""
    while True:
        data = sock.recv(ANSWER_BYTES)
        while len(data) >= HEAD.size:
            length, its_kind, _, sequence, _ = HEAD.unpack_from(data)
            if length < HEAD.size or length > len(data):
                raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
            message, data = data[HEAD.size : length], data[_aligned(length) :]
            if sequence != command:
                continue
            if its_kind != NLMSG_ERROR:
                answer = message[GENERIC.size :]
                continue
            (code,) = struct.unpack_from("=i", message)
            if code:
                raise OSError(-code, os.strerror(-code))
            return answer


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= ATTR.size:
        length, number = ATTR.unpack_from(data)
        if length < ATTR.size:
            return
        yield number, data[ATTR.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) // 4 * 4
