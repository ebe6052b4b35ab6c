"""The helper's side of the TLS relays: one that carries the link, one in reserve.

    helper ── line ── relay 1 ── the link         relay.c tells what they say to each other
           └─ line ── relay 2    waits

    relays.secure(sock, name)     a TCP connection that is to speak TLS -> one that is plain
    relays.keep()                 the last one was handed to the kernel
    relays.fill()                 start what is missing

A relay is small, locked and never forks; when one is killed the link is dead, and the next is
dialled through the other.  The helper starts another one then, at leisure: it is on no page's way,
so it may wait for memory, which the living relay helps to find.

Bound: RELAYS processes, one link each.  It is part of the attach helper: little is imported.
Linux: unix(7), SCM_RIGHTS; posix_spawn(3), which copies no page tables.
"""

from __future__ import annotations

import array
import errno
import os
import select
import signal
import socket
from contextlib import suppress

from zcache_core.errors import AttachError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = os.path.join(os.path.dirname(os.path.realpath(__file__)), "zcache-relay")
# As the helper's own name: spared by systemd's last round of signals at shutdown.
PROGRAM_NAME = "@zcache-relay"
RELAYS = 2
LINE_FD = 3
ANSWER_S = 7.0  # above the relay's own HANDSHAKE_MS
REASON_S = 0.5  # why a link ended is said at once
MESSAGE_BYTES_MAX = (64 << 10) - 1  # relay.c
# X509_V_ERR_*, openssl/x509_vfy.h
MISMATCHES, OUT_OF_DATE, STRANGERS = (62, 63, 64), (9, 10), (2, 18, 19, 20, 21, 27)
# RFC 8446, 6.2: what is said of a certificate that is not accepted
NOT_ACCEPTED, REQUIRED = (42, 43, 44, 45, 46, 48), 116


class TlsError(AttachError):
    """{}"""

    def __str__(self) -> str:
        return str(self.args[0])


class Relay:
    """One process.  `line`: ours to it."""

    __slots__ = ("line", "pid")

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.pid, self.line = pid, line

    def begin(self, sock: socket.socket, its: socket.socket, name: str) -> str:
        """Hand a connection over; why it is not spoken TLS on, "" when it is.  Raises OSError."""
        rights = array.array("i", [sock.fileno(), its.fileno()])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        self.line.sendmsg([b"J" + name.encode() + b"\0"], ancillary)
        return self._answer()

    def _answer(self) -> str:
        """What it says to a job; what it says of earlier ones is passed over."""
        while True:
            data = self._hear(ANSWER_S)
            if data[:1] == b"+":
                return ""
            if data[:1] == b"!":
                return data[1:].decode(errors="replace")

    def reason(self) -> str:
        """Why its link has ended; "e" if it does not say."""
        try:
            data = self._hear(REASON_S)
        except OSError:
            return "e"
        return data[1:].decode(errors="replace") if data[:1] == b"-" else "e"

    def _hear(self, limit_s: float) -> bytes:
        if not select.select([self.line], [], [], limit_s)[0]:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        data = self.line.recv(256)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return data

    def is_dead(self) -> bool:
        watch = select.poll()
        watch.register(self.line, 0)
        return bool(watch.poll(0))


class Relays:
    """certificates: what each is told first (`tlsfiles.message`).  found: those that run already.

    busy: whose link the kernel has.
    """

    def __init__(
        self, certificates: bytes, found: list[tuple[int, socket.socket]] | None = None
    ) -> None:
        assert len(certificates) <= MESSAGE_BYTES_MAX
        self.certificates = certificates
        self._all: list[Relay] = []
        self._busy: Relay | None = None
        self._last: Relay | None = None
        self.take_over(found or [])

    def __iter__(self) -> Iterator[Relay]:
        return iter(self._all)

    def take_over(self, found: list[tuple[int, socket.socket]]) -> None:
        """These, and no others; the first one has the link."""
        for relay in self._all:
            relay.line.close()
        self._all = [Relay(pid, line) for pid, line in found]
        self._busy = self._all[0] if self._all else None

    def told(self) -> list[tuple[int, socket.socket]]:
        """For `take_over` elsewhere."""
        both = sorted(self._all, key=lambda relay: relay is not self._busy)
        return [(relay.pid, relay.line) for relay in both]

    @property
    def missing(self) -> bool:
        return len(self._all) < RELAYS

    def fill(self) -> None:
        """Start what is missing; none if none can be started now."""
        while self.missing:
            try:
                self._all.append(self._start())
            except OSError:
                return

    def _start(self) -> Relay:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        nothing = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]
        try:
            ours.send(self.certificates)
            pid = os.posix_spawn(
                PROGRAM, [PROGRAM_NAME], {},
                file_actions=[*nothing, (os.POSIX_SPAWN_DUP2, its.fileno(), LINE_FD)],
                setsid=True, setsigmask=(),
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            its.close()
        return Relay(pid, ours)

    def secure(self, sock: socket.socket, name: str, where: object) -> socket.socket:
        """A plain connection in place of this one, which goes on in TLS; name: the server's.

        `sock` is closed.  Raises TlsError, OSError.
        """
        self.bury()
        if not self._all:
            self.fill()
        idle = [relay for relay in self._all if relay is not self._busy] or self._all
        if not idle:
            raise TlsError(f"{PROGRAM} cannot be started; run 'make setup', or reinstall zcache")
        self._last = relay = idle[0]
        ours, its = socket.socketpair()
        with sock, its:
            try:
                said = relay.begin(sock, its, name)
            except TimeoutError:
                ours.close()
                self._kill(relay)  # it is stuck
                raise
            except BaseException:
                ours.close()
                raise
        if said:
            ours.close()
            raise TlsError(sentence(said, where, name))
        return ours

    def keep(self) -> None:
        """The connection made last is the kernel's now."""
        self._busy = self._last

    def why_ended(self, where: object, name: str) -> TlsError:
        """The connection made last ended before the server said anything."""
        assert self._last is not None
        said = self._last.reason()
        return TlsError(sentence("e" if said[:1] in "sk" else said, where, name))

    def bury(self) -> None:
        """Forget those that have ended.  (SIGCHLD is ignored: nobody waits.)"""
        for relay in [relay for relay in self._all if relay.is_dead()]:
            self._forget(relay)

    def _forget(self, relay: Relay) -> None:
        relay.line.close()
        self._all.remove(relay)
        if relay is self._busy:
            self._busy = None

    def _kill(self, relay: Relay) -> None:
        with suppress(OSError):
            os.kill(relay.pid, signal.SIGKILL)
        self._forget(relay)

    def close(self) -> None:
        """Our lines; one that carries a link goes on until that ends."""
        for relay in self._all:
            relay.line.close()
        self._all, self._busy = [], None


def sentence(said: str, where: object, name: str) -> str:
    """What a relay says, for people (relay.c: REASON)."""
    kind, text = said[:1], said[1:]
    number = int(text.partition(" ")[0]) if kind in "vas" and text[:1].isdigit() else 0
    at = f"the server at {where}"
    if kind == "v" and number in MISMATCHES:
        return (
            f"{at} shows a certificate that is not {name}'s; attach by the name in it, or give "
            f"that name by --tls-name"
        )
    if kind == "v" and number in OUT_OF_DATE:
        return (
            f"the certificate of {at} is out of date ({text.partition(' ')[2]}); make a new one by "
            f"'zcache cluster-add', or set the clocks right"
        )
    if kind == "v" and number in STRANGERS:
        return f"{at} shows a certificate that our CA has not signed; both must be of one cluster"
    if kind == "v":
        return f"the certificate of {at} is not accepted: {text.partition(' ')[2]}"
    if kind == "a" and number == REQUIRED:
        return f"{at} wants a certificate of this machine; give a folder with node.pem by --tls"
    if kind == "a" and number in NOT_ACCEPTED:
        return (
            f"{at} does not accept this machine's certificate; it must be of the same cluster, and "
            f"not out of date"
        )
    if kind == "a":
        return f"{at} breaks TLS off (alert {number}); it must offer TLS 1.3"
    if kind == "s":
        return f"{at} cannot be spoken to: {os.strerror(number)}"
    if kind == "t":
        return f"{at} does not answer in TLS; look after it, or attach again later"
    if kind == "x":
        return f"TLS with {at} fails: {text}"
    return (
        f"{at} hangs up in TLS; it may not accept this machine's certificate, which must be there "
        f"(node.pem), of the same cluster, and not out of date"
    )
