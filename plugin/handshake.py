"""The client's half of the NBD handshake, without any I/O: bytes in, bytes out.

    GREETING --18 bytes--> [TLS --ACK--> wrapped by the caller -->] GO --INFO...--ACK--> DONE
                                                                     `--error--> RefusedError

    shake = Handshake("swap0@1700000000000000")
    while not shake.done:
        sock.sendall(shake.receive(sock.recv(BYTES)))
    shake.size_bytes, shake.flags

Fixed newstyle and NBD_OPT_GO only: what the kernel's client needs to be told (size and
transmission flags), and an end that is exact, so that not one byte of the transmission phase
is taken from it.  No structured replies: the kernel does not know them.

Bound: MESSAGE_BYTES_MAX a message; whatever is not the protocol is a ProtocolError, at once.

It is part of the attach helper, which must stay small: nothing but `struct` is imported.

Source: the NBD project, doc/proto.md.
"""

from __future__ import annotations

import struct

from zcache_core.errors import AttachError

GREETING = struct.Struct(">8s8sH")
OPTION = struct.Struct(">8sII")
REPLY = struct.Struct(">QIII")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
HELLO, OPTIONS_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_STARTTLS, OPT_GO = 5, 7
REP_ACK, REP_INFO, REP_ERROR = 1, 3, 1 << 31
NBD_INFO_EXPORT, NBD_INFO_BLOCK_SIZE = 0, 3
UNKNOWN_EXPORT = REP_ERROR | 6
NO_TLS = "the NBD server offers no TLS; start it with tls=FOLDER, or attach nbd://, without"
MESSAGE_BYTES_MAX = 64 << 10
NAME_BYTES_MAX = 4096  # of an export, as the protocol says
REFUSALS = {
    1: "does not know this request",
    2: "does not permit it",
    3: "found the request malformed",
    4: "cannot do it on its platform",
    5: "wants TLS; attach nbds:// instead of nbd://, with --tls FOLDER",
    6: "has no export of this name, or does not open it",
    7: "is shutting down",
    8: "wants a client that knows its block sizes",
    9: "found the request too big",
}


class ProtocolError(AttachError):
    """{}"""


class RefusedError(AttachError):
    """The server said no; `code` is NBD_REP_ERR_*."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class Handshake:
    """One handshake; feed it with `receive`.

    export: name, at most 4096 bytes of UTF-8.  tls: ask for TLS first; when `wants_tls` is
    set, wrap the connection, then send what `after_tls` returns; `in_tls` from then on.
    Afterwards: size_bytes, flags (NBD_FLAG_* of the transmission phase), and the block sizes
    in bytes (minimum, preferred, maximum), or zeros when the server does not say.
    """

    __slots__ = ("_data", "_export", "_option", "_tls", "block_bytes", "done", "flags", "in_tls",
                 "size_bytes", "wants_tls")  # fmt: skip

    def __init__(self, export: str, tls: bool = False) -> None:
        self._export = export.encode()
        if len(self._export) > NAME_BYTES_MAX:
            raise ProtocolError(f"an export's name has at most {NAME_BYTES_MAX} bytes")
        self._tls = tls
        self._data = b""
        self._option = 0  # the one that waits for its answer; 0: the greeting is awaited
        self.done = self.wants_tls = self.in_tls = False
        self.size_bytes = self.flags = 0
        self.block_bytes = (0, 0, 0)

    def receive(self, data: bytes) -> bytes:
        """Take what came (not empty); what has to be sent now.

        Raises ProtocolError, RefusedError.
        """
        self._data += data
        answer = b""
        while not self._at_rest() and (step := self._step()) is not None:
            answer += step
        if self._at_rest() and self._data:
            raise ProtocolError("the NBD server says more than it was asked")
        return answer

    def _at_rest(self) -> bool:
        return self.done or self.wants_tls

    def after_tls(self) -> bytes:
        """The connection is wrapped: what has to be sent now."""
        assert self.wants_tls
        self.wants_tls, self.in_tls = False, True
        return self._go()

    def _step(self) -> bytes | None:
        """One message, if it is all there: the answer to it; None when more is needed."""
        if not self._option:
            return self._greeting()
        if len(self._data) < REPLY.size:
            return None
        magic, option, kind, length = REPLY.unpack_from(self._data)
        if magic != REPLY_MAGIC or option != self._option or length > MESSAGE_BYTES_MAX:
            raise ProtocolError("what answers there is no NBD server, or it is confused")
        end = REPLY.size + length
        if len(self._data) < end:
            return None
        payload, self._data = self._data[REPLY.size : end], self._data[end:]
        self._reply(kind, payload)
        return b""

    def _greeting(self) -> bytes | None:
        if len(self._data) < GREETING.size:
            if not HELLO.startswith(self._data[:8]):
                raise ProtocolError("what answers there is no NBD server")
            return None
        hello, magic, flags = GREETING.unpack_from(self._data)
        self._data = self._data[GREETING.size :]
        if hello != HELLO:
            raise ProtocolError("what answers there is no NBD server")
        if magic != OPTIONS_MAGIC or not flags & FIXED_NEWSTYLE:
            raise ProtocolError("the NBD server is too old: it has no fixed newstyle handshake")
        begin = struct.pack(">I", flags & (FIXED_NEWSTYLE | NO_ZEROES))
        if self._tls:
            self._option = OPT_STARTTLS
            return begin + OPTION.pack(OPTIONS_MAGIC, OPT_STARTTLS, 0)
        return begin + self._go()

    def _go(self) -> bytes:
        self._option = OPT_GO
        name = self._export
        wish = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, NBD_INFO_BLOCK_SIZE)
        return OPTION.pack(OPTIONS_MAGIC, OPT_GO, len(wish)) + wish

    def _reply(self, kind: int, payload: bytes) -> None:
        if kind & REP_ERROR and self._option == OPT_STARTTLS:
            raise RefusedError(NO_TLS, kind)
        if kind & REP_ERROR:
            why = REFUSALS.get(kind & ~REP_ERROR, f"says no (error {kind & ~REP_ERROR})")
            said = payload.decode(errors="replace").strip()
            raise RefusedError(f"the NBD server {why}" + (f": {said}" if said else ""), kind)
        if kind == REP_ACK:
            if self._option == OPT_STARTTLS:
                self.wants_tls = True
            elif not self.size_bytes:
                raise ProtocolError("the NBD server does not say how large its export is")
            else:
                self.done = True
        elif kind == REP_INFO and self._option == OPT_GO and len(payload) >= 2:
            self._info(payload)
        else:
            raise ProtocolError(f"the NBD server gives an answer ({kind}) that was not asked for")

    def _info(self, payload: bytes) -> None:
        kind = int.from_bytes(payload[:2], "big")
        if kind == NBD_INFO_EXPORT and len(payload) == INFO_EXPORT.size:
            _, self.size_bytes, self.flags = INFO_EXPORT.unpack(payload)
        elif kind == NBD_INFO_BLOCK_SIZE and len(payload) == INFO_BLOCK_SIZE.size:
            _, *sizes = INFO_BLOCK_SIZE.unpack(payload)
            self.block_bytes = (sizes[0], sizes[1], sizes[2])
        elif kind in (NBD_INFO_EXPORT, NBD_INFO_BLOCK_SIZE):
            raise ProtocolError("the NBD server describes its export with too few bytes")
