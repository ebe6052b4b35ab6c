"""The kernel's NBD client, over generic netlink (family `nbd`).

    connect(link, ...)          NBD_CMD_CONNECT      socket -> /dev/nbdN
    was_taken(sock)             whether the kernel really took a socket
    reconfigure_template(...)   NBD_CMD_RECONFIGURE  as bytes; the last four are the socket
    timeout_message(...)        NBD_CMD_RECONFIGURE  as bytes: another request timeout
    disconnect(index)           NBD_CMD_DISCONNECT
    statuses()                  NBD_CMD_STATUS       index -> connected

Two timeouts make a device outlive its server.  After `timeout_s` the kernel sends a request again
that was on its way when the connection died (sooner where it `can_be_swift`); for `dead_timeout_s`
it keeps all requests when there is no connection, instead of failing them.

pyroute2, which makes the messages (`nbdmessage`), is imported when one is made: it costs 19 MB.
DISCONNECT is made without it (`genetlink`), because `zcache down` is called where memory is short.

What it is not: the resident helper, which gets the finished message and the numbers of family and
group, because pyroute2 would cost it 24 MiB of locked memory (measured: 34 MiB resident instead
of 10).

Source: linux/nbd-netlink.h, drivers/block/nbd.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plugin import genetlink
from plugin.dialer import Link
from zcache_core.errors import AttachError

if TYPE_CHECKING:
    from pyroute2.netlink.generic import GenericNetlinkSocket

    from plugin.nbdmessage import NbdMessage

CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD, STATUS = range(1, 6)
FAMILY, GROUP, VERSION = "nbd", "nbd_mc_group", 1
ATTR_INDEX = 1
BLOCK_BYTES = 4096
SYSFS = Path("/sys/block")
MODULE = Path("/sys/module/nbd")
MODPROBE, MODPROBE_S = ("modprobe", "nbd"), 30.0
FD_UNSET = 0x7FFFFFFF
# 5.8: a request of a replaced link is sent again when its timer rings, also with timeout 0.  6.14:
# a half-sent one (its sender was signalled while the send buffer was full) fails when it rings;
# 6.13, and what others have brought it back to, may too: such a kernel has this function.
SWIFT_FROM, SWIFT_BELOW = (5, 8), (6, 13)
KALLSYMS, FAILS_HALF_SENT = Path("/proc/kallsyms"), b"nbd_pending_cmd_work"


class Family(NamedTuple):
    """Numbers that the kernel gave the family and its multicast group at boot."""

    family: int
    group: int


class Timeouts(NamedTuple):
    """In whole seconds, as the kernel takes them."""

    request_s: int
    dead_s: int


@contextlib.contextmanager
def _kernel() -> Iterator[GenericNetlinkSocket]:
    """The family's socket; loads the module if need be.  Raises AttachError."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic import GenericNetlinkSocket

    from plugin.nbdmessage import NbdMessage

    load_module()
    with GenericNetlinkSocket() as sock:
        try:
            sock.bind(FAMILY, NbdMessage)
        except NetlinkError as error:
            raise AttachError(
                "the kernel's nbd module has no netlink interface here; boot a kernel of 4.12 or "
                "later, outside of a container"
            ) from error
        yield sock


def load_module() -> None:
    """Make sure that the kernel has nbd.  Raises AttachError."""
    if MODULE.exists():
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(MODPROBE, capture_output=True, timeout=MODPROBE_S, check=False)
    if not MODULE.exists():
        raise AttachError(
            "the kernel has no nbd module loaded, and 'modprobe nbd' does not find one; boot a "
            "kernel that has it (Debian's do), and be root"
        )


def family() -> Family:
    """The family's numbers.  Raises AttachError."""
    with _kernel() as sock:
        return Family(int(sock.prid), int(sock.mcast_groups[GROUP]))


def connect(link: Link, index: int | None, timeouts: Timeouts, backend: str) -> int:
    """Make a device of this connection; its index.  None: the first free one.

    backend: a text that stays readable in sysfs.  Raises AttachError.
    """
    attrs: list[tuple[str, Any]] = [] if index is None else [("NBD_ATTR_INDEX", index)]
    attrs += [
        ("NBD_ATTR_SIZE_BYTES", link.size_bytes),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", BLOCK_BYTES),
        ("NBD_ATTR_TIMEOUT", timeouts.request_s),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", timeouts.dead_s),
        ("NBD_ATTR_SERVER_FLAGS", link.flags),
        ("NBD_ATTR_BACKEND_IDENTIFIER", backend),
        _sockets(link.sock.fileno()),
    ]
    for answer in _ask(CONNECT, attrs):
        if (number := answer.get_attr("NBD_ATTR_INDEX")) is not None:
            return int(number)
    raise AttachError("the kernel did not say which device it made; look into /sys/block")


def reconfigure_template(family: int, index: int, backend: str, timeout_s: int) -> bytes:
    """NBD_CMD_RECONFIGURE of one socket: put its number, native order, into the last 4 bytes.

    The sequence number (bytes 8 to 12) is free as well.  With the request timeout in it, a socket
    that is taken always shows that (`was_taken`).
    """
    attrs = [*_reconfigured(index, backend, timeout_s), _sockets(FD_UNSET)]
    data = _finished(RECONFIGURE, family, attrs)
    assert data.endswith(struct.pack("=I", FD_UNSET))
    return data


def timeout_message(family: int, index: int, backend: str, timeout_s: int) -> bytes:
    """NBD_CMD_RECONFIGURE of the request timeout alone.  The sequence number is free."""
    return _finished(RECONFIGURE, family, _reconfigured(index, backend, timeout_s))


def _reconfigured(index: int, backend: str, timeout_s: int) -> list[tuple[str, Any]]:
    return [
        ("NBD_ATTR_INDEX", index),
        ("NBD_ATTR_BACKEND_IDENTIFIER", backend),
        ("NBD_ATTR_TIMEOUT", timeout_s),
    ]


def _finished(command: int, family: int, attrs: list[tuple[str, Any]]) -> bytes:
    from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST

    message = _message(command, attrs)
    message["header"]["type"] = family
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK
    message.encode()
    return bytes(message.data)


def can_be_swift(index: int, release: str) -> bool:
    """Whether a kernel of this release, as `uname -r` says it, can do what `swift` needs."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    queue = SYSFS / f"nbd{index}" / "queue"
    if not SWIFT_FROM <= numbers < SWIFT_BELOW:
        return False
    if not all((queue / name).exists() for name in ("io_timeout", "iostats")):
        return False
    with contextlib.suppress(OSError), KALLSYMS.open("rb") as symbols:
        return not any(FAILS_HALF_SENT in line for line in symbols)
    return True


def disconnect(index: int) -> None:
    """End the device's connection.  Raises AttachError."""
    try:
        genetlink.call(FAMILY, DISCONNECT, VERSION, genetlink.attribute(ATTR_INDEX, index))
    except OSError as error:
        raise AttachError(_sentence(DISCONNECT, error.errno or 0)) from error


def statuses() -> dict[int, bool]:
    """Every device of the kernel's, and whether it is connected.  Raises AttachError."""
    found: dict[int, bool] = {}
    for answer in _ask(STATUS, []):
        devices = answer.get_attr("NBD_ATTR_DEVICE_LIST")
        for item in devices.get_attrs("NBD_DEVICE_ITEM") if devices is not None else ():
            index = int(item.get_attr("NBD_DEVICE_INDEX"))
            found[index] = bool(item.get_attr("NBD_DEVICE_CONNECTED"))
    return found


def was_taken(sock: socket.socket) -> bool:
    """Whether the kernel took this socket: it then has the request timeout as its send timeout.

    NBD_CMD_RECONFIGURE succeeds also when no connection was dead and nothing was taken.
    """
    seconds, micros = struct.unpack(
        "@ll", sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
    )
    return bool(seconds or micros)


def backend_of(index: int) -> str:
    """The text that `connect` gave to a connected device, else nothing."""
    try:
        return (SYSFS / f"nbd{index}" / "backend").read_text().rstrip("\n")
    except OSError:
        return ""


def indexes_of(backend: str) -> list[int]:
    """Connected devices with this text."""
    numbers = (path.name.removeprefix("nbd") for path in SYSFS.glob("nbd*"))
    return sorted(int(n) for n in numbers if n.isdigit() and backend_of(int(n)) == backend)


def is_connected(index: int) -> bool:
    """Whether the device has a connection, living or awaited."""
    return (SYSFS / f"nbd{index}" / "pid").exists()


def _sockets(fd: int) -> tuple[str, Any]:
    item = ("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", fd)]})
    return ("NBD_ATTR_SOCKETS", {"attrs": [item]})


def _message(command: int, attrs: list[tuple[str, Any]]) -> NbdMessage:
    from plugin.nbdmessage import NbdMessage

    message = NbdMessage()
    message["cmd"], message["version"] = command, VERSION
    message["attrs"] = attrs
    return message


def _ask(command: int, attrs: list[tuple[str, Any]]) -> tuple[Any, ...]:
    from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
    from pyroute2.netlink.exceptions import NetlinkError

    with _kernel() as sock:
        try:
            return tuple(
                sock.nlm_request(
                    _message(command, attrs),
                    msg_type=sock.prid,
                    msg_flags=NLM_F_REQUEST | NLM_F_ACK,
                )
            )
        except NetlinkError as error:
            raise AttachError(_sentence(command, int(error.code))) from error


def _sentence(command: int, code: int) -> str:
    what = {CONNECT: "connect", DISCONNECT: "disconnect"}.get(command, "look at")
    if code == errno.EPERM:
        return f"the kernel does not let this user {what} a network block device; be root"
    if code == errno.EBUSY and command == CONNECT:
        return (
            "this device is in use by another connection; name another one with --device, or none"
        )
    if code in (errno.ENODEV, errno.EINVAL) and command == CONNECT:
        return "the kernel has no such device; name another one with --device, or none"
    return f"the kernel does not {what} the network block device: {os.strerror(code)}"
