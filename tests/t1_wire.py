"""Bytes of MessagePack-RPC: golden bytes, limits, and the same result however they are cut."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.wire import (
    DEFAULT_LIMITS,
    NEED_DATA,
    Decoder,
    EncodeError,
    Limits,
    MalformedFrameError,
    Message,
    NotAMessageError,
    Notification,
    OversizedFrameError,
    Request,
    Response,
    WireError,
    encode,
)

SMALL = Limits(frame_bytes=64, depth=4, items=8, method_bytes=12)

# What other MessagePack-RPC programs send and expect, byte for byte.
GOLDEN = [
    (Request(0, "ping", []), "94 00 00 a4 70696e67 90"),
    (Request(2**32 - 1, "set", ["codec", "lz4"]),
     "94 00 ceffffffff a3 736574 92 a5636f646563 a36c7a34"),
    (Response(7, None, {"pid": 300}), "94 01 07 c0 81 a3706964 cd012c"),
    (Response(128, {"code": "x"}, None), "94 01 cc80 81 a4636f6465 a178 c0"),
    (Notification("bye", [True, b"\x00\xff"]), "93 02 a3 627965 92 c3 c40200ff"),
]  # fmt: skip


def decode_all(data: bytes, sizes: list[int], limits: Limits = DEFAULT_LIMITS) -> list[Any]:
    """Messages and then, if it came, the error's type and text; cut into `sizes`."""
    decoder = Decoder(limits)
    found: list[Any] = []
    position = 0
    for size in [*sizes, len(data)]:
        decoder.receive(data[position : position + size])
        position += size
        try:
            while (message := decoder.next_message()) is not NEED_DATA:
                found.append(message)
        except WireError as error:
            found.append((type(error), str(error)))
            break
    return found


@pytest.mark.parametrize(("message", "hex_bytes"), GOLDEN)
def test_golden_bytes(message: Message, hex_bytes: str) -> None:
    data = bytes.fromhex(hex_bytes)
    assert encode(message) == data
    assert decode_all(data, []) == [message]


# One reason to refuse each: the bytes, the error, and words of its sentence.
REFUSED = [
    ("c1", MalformedFrameError, "FormatError"),
    ("94 00 00 a2 fffe 90", MalformedFrameError, "utf-8"),
    ("94 00 00 a1 61 91 d60000000000", MalformedFrameError, "max_ext_len"),
    ("94 00 00 a1 61 91 c70005", MalformedFrameError, "extension type 5"),
    ("94 00 00 a1 61 91 81 01 02", MalformedFrameError, "map key"),
    ("94 00 00 a1 61 dc0009", MalformedFrameError, "max_array_len"),
    ("94 00 00 a1 61 91 de0009", MalformedFrameError, "max_map_len"),
    ("07", NotAMessageError, "not an array"),
    ("90", NotAMessageError, "not an array"),
    ("a161", NotAMessageError, "not an array"),
    ("94 03 00 a161 90", NotAMessageError, "starts with 3"),
    ("94 c2 00 a161 90", NotAMessageError, "starts with False"),
    ("93 00 00 a161", NotAMessageError, "array of 3"),
    ("94 00 ff a161 90", NotAMessageError, "msgid"),
    ("94 00 cf0000000100000000 a161 90", NotAMessageError, "msgid"),
    ("94 00 c3 a161 90", NotAMessageError, "msgid"),
    ("94 00 00 05 90", NotAMessageError, "method"),
    ("94 00 00 a0 90", NotAMessageError, "method"),
    ("94 00 00 ad 61616161616161616161616161 90", NotAMessageError, "method"),
    ("94 00 00 a161 80", NotAMessageError, "parameters"),
    ("94 01 00 01 02", NotAMessageError, "both"),
    ("94 00 00 a161 91 91 91 91 90", NotAMessageError, "nested"),
    ("94 00 00 a161 91" + "81a161" * 4 + "90", NotAMessageError, "nested"),
    ("94 00 00 a161 91 c43d" + "00" * 61, OversizedFrameError, "64 bytes"),
    ("94 00 00 a161 91 c6ffffffff" + "00" * 64, OversizedFrameError, "64 bytes"),
    ("94 00 00 a161 91 dbffffffff" + "61" * 64, OversizedFrameError, "64 bytes"),
]


@pytest.mark.parametrize(("hex_bytes", "kind", "words"), REFUSED)
def test_refused_bytes(hex_bytes: str, kind: type[WireError], words: str) -> None:
    data = bytes.fromhex(hex_bytes)
    whole = decode_all(data + b"\x90", [], SMALL)
    assert len(whole) == 1
    assert whole[0][0] is kind
    assert words in whole[0][1]
    assert decode_all(data + b"\x90", [1] * len(data), SMALL) == whole


def test_nesting_cannot_exhaust_the_stack() -> None:
    found = decode_all(b"\x91" * 100_000, [])
    assert found[0][0] is MalformedFrameError


def test_frame_of_exactly_the_limit_passes() -> None:
    message = Request(0, "a", [b"\0" * 56])
    data = encode(message, SMALL)
    assert len(data) == SMALL.frame_bytes
    assert decode_all(data * 3, [], SMALL) == [message] * 3
    with pytest.raises(EncodeError, match="65 bytes"):
        encode(Request(0, "a", [b"\0" * 57]), SMALL)


def test_messages_before_a_broken_one_arrive() -> None:
    good = Request(1, "ping", [])
    found = decode_all(encode(good) * 2 + b"\xc1" + encode(good), [])
    assert found[:2] == [good, good]
    assert len(found) == 3


def test_error_stays() -> None:
    decoder = Decoder()
    decoder.receive(b"\xc1")
    with pytest.raises(MalformedFrameError):
        decoder.next_message()
    decoder.receive(encode(Request(1, "ping", [])))
    with pytest.raises(MalformedFrameError):
        decoder.next_message()


@pytest.mark.parametrize(
    "message",
    [
        Request(-1, "a", []),
        Request(2**32, "a", []),
        Request(0, "", []),
        Request(0, "m" * 65, []),
        Request(0, "a", [object()]),
        Request(0, "a", [2**64]),
        Request(0, "a", [[[[[[[[]]]]]]]]),
        Request(0, "a", [list(range(4097))]),
        Response(0, "error", "result"),
        Notification("a", [b"\0" * 300_000]),
    ],
)
def test_own_mistakes_are_not_the_peers(message: Message) -> None:
    with pytest.raises(EncodeError):
        encode(message)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
).filter(lambda value: _depth(value) <= 5)
MSGIDS = st.integers(0, 2**32 - 1)
METHODS = st.text(min_size=1, max_size=12)
PARAMS = st.lists(VALUES, max_size=3)
MESSAGES = (
    st.builds(Request, MSGIDS, METHODS, PARAMS)
    | st.builds(Response, MSGIDS, st.none(), VALUES)
    | st.builds(Response, MSGIDS, VALUES, st.none())
    | st.builds(Notification, METHODS, PARAMS)
)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


@given(st.lists(MESSAGES, max_size=4), st.lists(st.integers(1, 40), max_size=20))
def test_messages_survive_any_cut(messages: list[Message], sizes: list[int]) -> None:
    assert decode_all(b"".join(map(encode, messages)), sizes) == messages


# Broken messages that are almost right: valid ones, spoiled, or plain noise.
NOISE = st.binary(max_size=200)
SPOILED = st.builds(
    lambda messages, at, byte: (
        (data := bytearray(b"".join(map(encode, messages)) or b"\x94")).__setitem__(
            at % len(data), byte
        )
        or bytes(data)
    ),
    st.lists(MESSAGES, max_size=3),
    st.integers(0, 10_000),
    st.integers(0, 255),
)
ANYTHING = st.builds(msgpack.packb, VALUES)


@given(st.lists(NOISE | SPOILED | ANYTHING, max_size=3).map(b"".join))
@example(b"\x94\x00\x00\xa1a\x91\xc7\x00\x05")
def test_whole_then_byte_by_byte(data: bytes) -> None:
    """Any bytes at all: a WireError or messages, and never a difference from cutting."""
    whole = decode_all(data, [], SMALL)
    assert decode_all(data, [1] * len(data), SMALL) == whole
    assert decode_all(data, [3] * len(data), SMALL) == whole


@given(st.lists(NOISE, max_size=20))
def test_memory_is_bounded(pieces: list[bytes]) -> None:
    decoder = Decoder(SMALL)
    for piece in pieces:
        decoder.receive(piece)
        try:
            while decoder.next_message() is not NEED_DATA:
                pass
        except WireError:
            return
        assert decoder.partial_bytes <= SMALL.frame_bytes
