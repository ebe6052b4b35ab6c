"""The words between nodes: golden bytes, and anything else that a peer may send."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import peerwire
from cluster.peerwire import (
    BATCH_PAGES,
    DEVICES_MOST,
    PEER_LIMITS,
    RECORDS_MOST,
    BadAnswerError,
    BadParamsError,
    Code,
    Health,
    Hello,
    Offer,
    Page,
    Welcome,
)
from cluster.session import DONE, PAUSED, Session
from cluster.wire import NEED_DATA, Notification, Request, Response, WireError, encode

PAGE = Page(device=1, page=0x1234, version=0x56789A, length_codec=2 << 4 | 1)
RECORD = bytes.fromhex("9a785600000000003412000021000100")
SEALED = bytes(range(27))  # 24 of seal, 3 of ciphertext
OFFER = Offer(4096, 27, Health.OK)

GOLDEN: list[tuple[Any, str]] = [
    (
        Request(0, "hello", Hello("a/swap", 7, ("",), turn=9).params()),
        "94 00 00 a5 68656c6c6f 91 85 a8 70726f746f636f6c 01 a5 6f776e6572 a6 612f73776170"
        "a5 65706f6368 07 a7 64657669636573 91 a0 a4 7475726e 09",
    ),
    (
        Response(0, None, Welcome("b", 9, OFFER).result()),
        "94 01 00 c0 92 93 cd1000 1b 00 83 a8 70726f746f636f6c 01 a5 646f6e6f72 a1 62"
        "a5 65706f6368 09",
    ),
    (
        Request(1, "put", [RECORD, SEALED]),
        f"94 00 01 a3 707574 92 c410 {RECORD.hex()} c41b {SEALED.hex()}",
    ),
    (Response(1, None, [OFFER, bytes([Code.OK])]), "94 01 01 c0 92 93 cd1000 1b 00 c401 00"),
    (Request(2, "get", [RECORD]), f"94 00 02 a3 676574 91 c410 {RECORD.hex()}"),
    (
        Response(2, None, [OFFER, bytes([Code.OK]), SEALED]),
        f"94 01 02 c0 93 93 cd1000 1b 00 c401 00 c41b {SEALED.hex()}",
    ),
    (Request(3, "drop", [RECORD]), f"94 00 03 a4 64726f70 91 c410 {RECORD.hex()}"),
    (Response(3, None, [OFFER, 1]), "94 01 03 c0 92 93 cd1000 1b 00 01"),
    (Request(4, "reconcile", [0]), "94 00 04 a9 7265636f6e63696c65 91 00"),
    (
        Response(4, None, [OFFER, None, RECORD]),
        f"94 01 04 c0 93 93 cd1000 1b 00 c0 c410 {RECORD.hex()}",
    ),
    (Request(5, "ping", []), "94 00 05 a4 70696e67 90"),
    (Response(5, None, [OFFER]), "94 01 05 c0 91 93 cd1000 1b 00"),
    (Request(6, "bye", ["a/swap", 7]), "94 00 06 a3 627965 92 a6 612f73776170 07"),
    (Response(6, None, [OFFER, 1]), "94 01 06 c0 92 93 cd1000 1b 00 01"),
    (
        Notification("recall", [RECORD, 10_000]),
        f"93 02 a6 726563616c6c 92 c410 {RECORD.hex()} cd2710",
    ),
    (Notification("offer", [OFFER]), "93 02 a5 6f66666572 91 93 cd1000 1b 00"),
]


@pytest.mark.parametrize(("message", "golden"), GOLDEN)
def test_golden_bytes(message: Any, golden: str) -> None:
    assert encode(message, PEER_LIMITS) == bytes.fromhex(golden)


def test_what_the_golden_messages_mean() -> None:
    assert peerwire.pack([PAGE]) == RECORD
    assert peerwire.unpack(RECORD) == [PAGE]
    assert peerwire.payload_bytes(RECORD) == len(SEALED) == peerwire.sealed_bytes(PAGE.length_codec)
    hello = Hello("a/swap", 7, ("",), turn=9)
    before = {key: value for key, value in hello.params()[0].items() if key != "turn"}
    assert peerwire.hello([before]).turn == 0, "not said"
    assert peerwire.hello(hello.params()) == hello
    offer = [4096, 27, 0]
    welcome = Welcome("b", 9, OFFER)
    assert peerwire.welcome([offer, welcome.result()[1]]) == welcome
    assert peerwire.put([RECORD, SEALED]) == (RECORD, SEALED)
    assert peerwire.put_answer([offer, b"\0"], 1) == (OFFER, b"\0")
    assert peerwire.get([RECORD]) == RECORD
    assert peerwire.get_answer([offer, b"\0", SEALED], RECORD) == (OFFER, b"\0", SEALED)
    assert peerwire.get_answer([offer, b"\1", b""], RECORD) == (OFFER, b"\1", b"")
    assert peerwire.drop([RECORD]) == RECORD
    assert peerwire.drop_answer([offer, 1]) == (OFFER, 1)
    assert peerwire.reconcile([5]) == 5
    assert peerwire.reconcile_answer([offer, None, RECORD]) == (OFFER, None, RECORD)
    assert peerwire.reconcile_answer([offer, 9, b""]) == (OFFER, 9, b"")
    assert peerwire.ping_answer([offer]) == OFFER
    assert peerwire.bye(["a/swap", 7]) == ("a/swap", 7)
    assert peerwire.bye_answer([offer, 1]) == (OFFER, 1)
    assert peerwire.recall([RECORD, 1500]) == (RECORD, 1.5)
    assert peerwire.offer_notice([offer]) == OFFER
    assert list(peerwire.pieces(RECORD * 2, b"\0\1", SEALED)) == [SEALED, None]


def test_health_of_a_later_version_is_short() -> None:
    assert peerwire.offer([1, 2, 99]).health is Health.SHORT


def test_largest_batches_fit_a_frame() -> None:
    largest = peerwire.pack([Page(0, 0, 0, 4095 << 4)] * BATCH_PAGES)
    payload = bytes(peerwire.payload_bytes(largest))
    assert peerwire.put([largest, payload])
    encode(Request(2**32 - 1, "put", [largest, payload]), PEER_LIMITS)
    word = 2**64 - 1
    offer = Offer(word, word, Health.OK)
    encode(Response(2**32 - 1, None, [offer, bytes(BATCH_PAGES), payload]), PEER_LIMITS)
    many = RECORD * RECORDS_MOST
    encode(Response(2**32 - 1, None, [offer, word, many]), PEER_LIMITS)
    assert peerwire.drop([many]) == many
    hello = Hello("n" * 48, word, ("d" * 16,) * DEVICES_MOST)
    assert peerwire.hello(hello.params()) == hello


HELLO = Hello("a", 7).params()[0]
WRONG_REQUESTS: list[tuple[Callable[[list[Any]], Any], list[Any]]] = [
    (peerwire.hello, []),
    (peerwire.hello, [HELLO, 1]),
    (peerwire.hello, [1]),
    (peerwire.hello, [{**HELLO, "protocol": "1"}]),
    (peerwire.hello, [{**HELLO, "owner": ""}]),
    (peerwire.hello, [{**HELLO, "owner": "n" * 49}]),
    (peerwire.hello, [{**HELLO, "owner": "two\nlines"}]),
    (peerwire.hello, [{**HELLO, "epoch": 0}]),
    (peerwire.hello, [{**HELLO, "epoch": True}]),
    (peerwire.hello, [{**HELLO, "epoch": -1}]),
    (peerwire.hello, [{**HELLO, "turn": -1}]),
    (peerwire.hello, [{**HELLO, "turn": None}]),
    (peerwire.hello, [{**HELLO, "devices": []}]),
    (peerwire.hello, [{**HELLO, "devices": ["d"] * 9}]),
    (peerwire.hello, [{**HELLO, "devices": ["d" * 17]}]),
    (peerwire.get, []),
    (peerwire.get, ["text"]),
    (peerwire.get, [b""]),
    (peerwire.get, [RECORD[:-1]]),
    (peerwire.get, [RECORD * (BATCH_PAGES + 1)]),
    (peerwire.get, [RECORD[:-1] + b"\1"]),
    (peerwire.get, [RECORD[:6] + b"\x10" + RECORD[7:]]),
    (peerwire.get, [RECORD[:7] + b"\1" + RECORD[8:]]),
    (peerwire.put, [RECORD]),
    (peerwire.put, [RECORD, SEALED[:-1]]),
    (peerwire.put, [RECORD, "x" * 27]),
    (peerwire.drop, [RECORD * (RECORDS_MOST + 1)]),
    (peerwire.reconcile, [-1]),
    (peerwire.reconcile, [2**64]),
    (peerwire.reconcile, [None]),
    (peerwire.bye, []),
    (peerwire.bye, ["a"]),
    (peerwire.bye, ["a", 7, 1]),
    (peerwire.bye, ["", 7]),
    (peerwire.bye, [b"a", 7]),
    (peerwire.bye, ["n" * 49, 7]),
    (peerwire.bye, ["a", 0]),
    (peerwire.bye, ["a", True]),
    (peerwire.bye, ["a", 2**64]),
]


@pytest.mark.parametrize(("read", "params"), WRONG_REQUESTS)
def test_wrong_requests(read: Callable[[list[Any]], Any], params: list[Any]) -> None:
    with pytest.raises(BadParamsError):
        read(params)


# ---- whatever else may come ---------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=20)
    | st.binary(max_size=64)
    | st.floats(allow_nan=False)
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
REQUESTS: list[Callable[[list[Any]], Any]] = [
    peerwire.hello,
    peerwire.put,
    peerwire.get,
    peerwire.drop,
    peerwire.reconcile,
    peerwire.bye,
]
ANSWERS: list[Callable[[Any], Any]] = [
    peerwire.welcome,
    lambda result: peerwire.put_answer(result, 1),
    lambda result: peerwire.get_answer(result, RECORD),
    peerwire.drop_answer,
    peerwire.reconcile_answer,
    peerwire.ping_answer,
    peerwire.stats_answer,
    peerwire.bye_answer,
    peerwire.offer,
]


def never_but(allowed: type[Exception], read: Callable[[Any], Any], value: Any) -> None:
    """Read it; any other exception than the allowed one is a failure."""
    with contextlib.suppress(allowed):
        read(value)


@given(params=st.lists(ANYTHING, max_size=4))
@settings(max_examples=200)
def test_any_params(params: list[Any]) -> None:
    for read in REQUESTS:
        never_but(BadParamsError, read, params)
    for tell in (peerwire.recall, peerwire.offer_notice):
        never_but(BadAnswerError, tell, params)


@given(result=ANYTHING, parts=st.lists(ANYTHING, max_size=3))
@settings(max_examples=200)
def test_any_answer(result: Any, parts: list[Any]) -> None:
    for read in ANSWERS:
        never_but(BadAnswerError, read, result)
        never_but(BadAnswerError, read, [list(OFFER), *parts])


def talk(data: bytes, cut: Callable[[bytes], list[bytes]]) -> list[Any]:
    """What a session makes of these bytes: messages as donor or owner reads them, or an error."""
    session = Session(PEER_LIMITS)
    for msgid in range(3):  # calls of ours, so that answers may come
        session.call("ping")
        assert msgid in session.awaited
    found: list[Any] = []
    try:
        for piece in cut(data):
            session.receive(piece)
            while (event := session.next_event()) not in (NEED_DATA, PAUSED, DONE):
                found.append(event)
                if isinstance(event, Request):
                    for read in REQUESTS:
                        never_but(BadParamsError, read, event.params)
                    session.respond(event.msgid, None)
            assert session.partial_bytes <= PEER_LIMITS.frame_bytes + len(piece)
    except WireError as error:
        found.append(str(error))
    return found


def stream(data: st.DataObject) -> bytes:
    """Golden messages with bytes of them changed, left out, repeated, or anything put between."""
    parts = []
    for message, _ in data.draw(st.lists(st.sampled_from(GOLDEN), min_size=1, max_size=6)):
        raw = bytearray(encode(message, PEER_LIMITS))
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(0, len(raw) - 1))
            raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
            if not raw:
                raw = bytearray(b"\xc0")
        parts.append(bytes(raw))
    return b"".join(parts)


def whole(data: bytes) -> list[bytes]:
    return [data]


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


@given(data=st.data())
@settings(max_examples=150)
def test_session_whole_and_byte_by_byte(data: st.DataObject) -> None:
    raw = stream(data)
    assert talk(raw, whole) == talk(raw, byte_by_byte)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@given(data=st.data())
@settings(max_examples=200_000)
def test_session_for_long(data: st.DataObject) -> None:
    raw = stream(data)
    assert talk(raw, whole) == talk(raw, byte_by_byte)
