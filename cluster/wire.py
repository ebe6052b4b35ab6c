"""MessagePack-RPC messages as bytes, and bytes as messages.  No sockets here.

The specification has three messages, each one MessagePack array, sent one after
the other without any length in front:

    request        [0, msgid, method, [params...]]
    response       [1, msgid, error, result]        error is nil when it went well
    notification   [2, method, [params...]]

This is the only module that touches the msgpack package, so its options are
fixed once (a foreign byte reaches the decoder nowhere else).  msgpack 1.2.3 or
later is needed: before 1.2.1 an Unpacker used after an error could crash.

Bound: a decoder never holds more than `Limits.frame_bytes` + 1 bytes of one
message and never builds a container above `Limits.items`, so that what a peer
can make us allocate is fixed (an empty array costs it one byte and us 56: the
factor 56 on `frame_bytes` is the worst case).  The result does not depend on how
the bytes are cut: fed whole or byte by byte, the same messages and the same error
come out.

What it is not: it knows no msgid twice and answers nothing (`session.py` does).

Source: https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgpack

from zcache_core.errors import ZcacheError

REQUEST, RESPONSE, NOTIFICATION = 0, 1, 2
MSGID_MAX = 2**32 - 1
FLAT = frozenset({bytes, str, int, float, bool, type(None)})


class WireError(ZcacheError):
    """the peer sent {}; close the connection"""

    exit_code = 6


class MalformedFrameError(WireError):
    """the peer sent bytes that are not the MessagePack we accept ({}); close the connection"""


class OversizedFrameError(WireError):
    """the peer sent a message of more than {} bytes; close the connection, send smaller ones"""


class NotAMessageError(WireError):
    """the peer sent MessagePack that is no RPC message ({}); see docs/protocol.md"""


class TruncatedFrameError(WireError):
    """the peer closed the connection inside a message ({} bytes of it came)"""


class EncodeError(ZcacheError):
    """this message cannot be sent: {}"""

    exit_code = 6


@dataclass(frozen=True)
class Limits:
    """What one connection may cost.  Sizes in bytes, counts in elements."""

    frame_bytes: int = 256 * 1024  # a reply with every counter has about 4 KiB
    depth: int = 8  # containers inside each other, the message itself included
    items: int = 4096  # elements of one array, pairs of one map
    method_bytes: int = 64

    def __post_init__(self) -> None:
        assert self.frame_bytes >= 16
        assert self.depth >= 2
        assert self.items >= 4
        assert 0 < self.method_bytes <= self.frame_bytes


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Request:
    """Asks for `method`; the answer carries the same `msgid` (0 .. 2**32 - 1)."""

    msgid: int
    method: str
    params: list[Any]


@dataclass(frozen=True)
class Response:
    """Answers the request `msgid`: `error` is None, or `result` is."""

    msgid: int
    error: Any
    result: Any


@dataclass(frozen=True)
class Notification:
    """Tells something; nobody answers."""

    method: str
    params: list[Any]


Message = Request | Response | Notification


class NeedData:
    """The type of NEED_DATA: the decoder has no whole message."""

    def __repr__(self) -> str:
        return "NEED_DATA"


NEED_DATA = NeedData()


def encode(message: Message, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The message as bytes that a decoder with the same limits accepts.

    Raises EncodeError (our own mistake, never the peer's) when it would not.
    """
    if isinstance(message, Request):
        parts: list[Any] = [REQUEST, message.msgid, message.method, message.params]
    elif isinstance(message, Response):
        parts = [RESPONSE, message.msgid, message.error, message.result]
    else:
        parts = [NOTIFICATION, message.method, message.params]
    try:
        _message(parts, limits)
        data: bytes = msgpack.packb(parts, use_bin_type=True)
    except NotAMessageError as error_:
        raise EncodeError(error_.args[0]) from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error_:
        raise EncodeError(f"{type(error_).__name__}: {error_}") from error_
    if len(data) > limits.frame_bytes:
        raise EncodeError(f"it has {len(data)} bytes, the limit is {limits.frame_bytes}")
    return data


class Decoder:
    """Bytes in with `receive`, messages out with `next_message`.

    After a WireError the stream has no known place to go on, so every later call
    raises the same error again.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._waiting = bytearray()  # received, not yet given to the unpacker
        self._unpacker = _unpacker(limits)
        self._fed = 0  # bytes given to the unpacker
        self._start = 0  # where in those the current message starts
        self._error: WireError | None = None

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take in bytes of the stream; the caller bounds how many at once."""
        # The unpacker gets at once what it may have: a batch of pages is copied once less.
        room = self._limits.frame_bytes + 1 - (self._fed - self._start)
        if self._waiting or len(data) > room or self._error is not None:
            self._waiting += data
        else:
            self._unpacker.feed(data)
            self._fed += len(data)

    @property
    def partial_bytes(self) -> int:
        """How many bytes of an unfinished message are held."""
        return self._fed - self._start + len(self._waiting)

    def next_message(self) -> Message | NeedData:
        """The next whole message, or NEED_DATA.  Raises WireError."""
        if self._error is not None:
            raise self._error
        try:
            return self._next()
        except WireError as error:
            self._error = error
            self._waiting.clear()
            raise

    def _next(self) -> Message | NeedData:
        frame_bytes = self._limits.frame_bytes
        while True:
            try:
                value = self._unpacker.unpack()
            except msgpack.OutOfData:
                held = self._fed - self._start
                if held > frame_bytes:
                    raise OversizedFrameError(frame_bytes) from None
                # One byte past the limit at most, whatever the caller's pieces are:
                # so the first thing wrong with a message is always the one reported.
                piece = self._waiting[: frame_bytes + 1 - held]
                if not piece:
                    return NEED_DATA
                self._unpacker.feed(piece)
                self._fed += len(piece)
                del self._waiting[: len(piece)]
            except (ValueError, msgpack.UnpackException) as error:
                raise MalformedFrameError(_why(error)) from None
            else:
                end = self._unpacker.tell()
                size, self._start = end - self._start, end
                if size > frame_bytes:
                    raise OversizedFrameError(frame_bytes)
                return _message(value, self._limits)


def _unpacker(limits: Limits) -> Any:
    return msgpack.Unpacker(
        raw=False,
        use_list=True,
        strict_map_key=True,
        unicode_errors="strict",
        ext_hook=_no_extensions,
        # Twice a frame and a byte: the rest of one message and what follows it.
        max_buffer_size=2 * limits.frame_bytes + 2,
        max_str_len=limits.frame_bytes,
        max_bin_len=limits.frame_bytes,
        max_array_len=limits.items,
        max_map_len=limits.items,
        max_ext_len=0,
    )


def _no_extensions(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


def _message(value: Any, limits: Limits) -> Message:
    """The decoded value as a message, its shape and depth checked."""
    if not isinstance(value, list) or not value:
        raise NotAMessageError("not an array")
    _check_shape(value, limits)
    match value:
        case [0, msgid, method, params] if _is_int(value[0]):
            return Request(_msgid(msgid), _method(method, limits), _params(params))
        case [1, msgid, error, result] if _is_int(value[0]):
            if error is not None and result is not None:
                raise NotAMessageError("a response with both an error and a result")
            return Response(_msgid(msgid), error, result)
        case [2, method, params] if _is_int(value[0]):
            return Notification(_method(method, limits), _params(params))
    raise NotAMessageError(f"an array of {len(value)} that starts with {value[0]!r:.20}")


def _is_int(value: Any) -> bool:
    return type(value) is int  # True == 1, and 1.0 == 1: neither is a message type


def _msgid(value: Any) -> int:
    if not _is_int(value) or not 0 <= value <= MSGID_MAX:
        raise NotAMessageError("a msgid that is no unsigned 32-bit number")
    return int(value)


def _method(value: Any, limits: Limits) -> str:
    if not isinstance(value, str) or not value:
        raise NotAMessageError("a method name that is no text")
    if len(value.encode()) > limits.method_bytes:
        raise NotAMessageError(f"a method name of more than {limits.method_bytes} bytes")
    return value


def _params(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise NotAMessageError("parameters that are no array")
    return value


def _check_shape(value: Sequence[Any], limits: Limits) -> None:
    """Bound depth and lengths, level by level: a deep value cannot exhaust the stack."""
    level: list[Any] = [value]
    for _ in range(limits.depth):
        below: list[Any] = []
        for item in level:
            if len(item) > limits.items:
                raise NotAMessageError(f"a container of more than {limits.items} elements")
            inner = item.values() if isinstance(item, dict) else item
            # most are flat, and looking their type up is half of what isinstance costs
            below += [
                child
                for child in inner
                if type(child) not in FLAT and isinstance(child, (list, tuple, dict))
            ]
        if not below:
            return
        level = below
    raise NotAMessageError(f"containers nested deeper than {limits.depth}")
