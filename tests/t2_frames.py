"""The compiled frames beside the wire: what they accept means the same there, to the byte."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import frames, peerwire
from cluster.peerwire import (
    BATCH_PAGES,
    PEER_LIMITS,
    Offer,
    Page,
    pack,
    payload_bytes,
    sealed_bytes,
)
from cluster.sheaf import sheaves_of
from cluster.wire import (
    NEED_DATA,
    Decoder,
    Limits,
    Message,
    NeedData,
    Request,
    Response,
    WireError,
    encode,
)

MORE, ODD = 0, -1
EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, 2**32 - 1]
msgids = st.sampled_from(EDGES) | st.integers(0, 2**32 - 1)
words = st.sampled_from([*EDGES, 2**32, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
pages = st.builds(
    Page,
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 255, 2**52 - 1]) | st.integers(0, 2**52 - 1),
    st.integers(0, 400) | st.sampled_from([0xFFFF, 0xFFF0]),
)
batches = st.lists(pages, min_size=1, max_size=20).map(pack)


def payload_of(records: bytes) -> bytes:
    n = payload_bytes(records)
    return random.Random(n).randbytes(n)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    records = draw(batches)
    params: list[Any] = [records]
    method = draw(st.sampled_from(["get", "put"]))
    if method == "put":
        params.append(payload_of(records))
    return encode(Request(draw(msgids), method, params), PEER_LIMITS)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    codes = draw(st.binary(min_size=1, max_size=140))
    payload = draw(st.binary(max_size=300))
    offer = [draw(words), draw(words), draw(st.integers(0, 4))]
    return encode(Response(draw(msgids), None, [offer, codes, payload]), PEER_LIMITS)


@st.composite
def spoiled(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A frame with some bytes changed, cut out or put in, mostly where the numbers stand."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(data), 60)))
        how = draw(st.integers(0, 3))
        if how == 0 and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif how == 1 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == 2:
            data[at:at] = draw(st.binary(min_size=1, max_size=4))
        else:
            del data[at : at + draw(st.integers(1, 3))]
    return bytes(data)


def first(data: bytes) -> Message | NeedData | WireError:
    """What the wire makes of these bytes."""
    decoder = Decoder(PEER_LIMITS)
    try:
        decoder.receive(data)
        return decoder.next_message()
    except WireError as error:
        return error


def as_asked(data: bytes) -> Any:
    """What `frames.asked` should say, by wire and peerwire."""
    message = first(data)
    if not isinstance(message, Request) or message.method not in ("get", "put"):
        return None
    whole = encode(message, PEER_LIMITS)
    try:
        if message.method == "get":
            records, payload = peerwire.get(message.params), None
        else:
            records, payload = peerwire.put(message.params)
    except peerwire.BadParamsError:
        return None
    if not data.startswith(whole):
        return None  # not in the shortest form
    return len(whole), message.msgid, message.method, records, payload


def as_answer(data: bytes) -> Any:
    message = first(data)
    if not isinstance(message, Response) or message.error is not None:
        return None
    try:
        offer, codes, payload = peerwire._answer("get", message.result, 3)
    except WireError:
        return None
    whole = encode(message, PEER_LIMITS)
    plain = isinstance(codes, bytes) and isinstance(payload, bytes)
    if not data.startswith(whole) or not plain or not 1 <= len(codes) <= BATCH_PAGES:
        return None
    if message.result[0][2] > 2:
        return None  # a health that we do not know
    return len(whole), message.msgid, tuple(map(int, offer)), codes, payload


def check(said: Any, expected: Any, data: bytes) -> None:
    if isinstance(said, tuple) or expected is not None:
        assert said == expected
    if said == MORE:
        assert first(data) is NEED_DATA


@settings(max_examples=200)
@given(requests(), st.binary(max_size=20))
def test_requests_of_our_own(data: bytes, behind: bytes) -> None:
    said = frames.asked(data + behind)
    assert said == as_asked(data)
    assert isinstance(said, tuple)
    for cut in {*range(min(len(data), 40)), len(data) // 2, len(data) - 1}:
        assert frames.asked(data[:cut]) == MORE
    if said[2] == "get":
        assert frames.get_bytes(said[1], said[3]) == data
    else:
        assert frames.put_bytes(said[1], said[3], said[4] or b"") == data


@settings(max_examples=200)
@given(answers(), st.binary(max_size=20))
def test_answers_of_our_own(data: bytes, behind: bytes) -> None:
    said = frames.answer(data + behind)
    check(said, as_answer(data), data)
    if isinstance(said, tuple):
        _, msgid, offer, codes, payload = said
        assert frames.answer_bytes(msgid, offer, codes, payload) == data
        put = encode(Response(msgid, None, [list(offer), codes]), PEER_LIMITS)
        assert frames.answer_bytes(msgid, offer, codes) == put
        assert frames.put_answer(put + behind) == (len(put), msgid, offer, codes)
        for cut in range(len(put)):
            assert frames.put_answer(put[:cut]) == MORE
        for cut in {*range(min(len(data), 40)), len(data) // 2, len(data) - 1}:
            assert frames.answer(data[:cut]) == MORE


@settings(max_examples=400)
@given(spoiled(requests()))
def test_spoiled_requests(data: bytes) -> None:
    check(frames.asked(data), as_asked(data), data)


@st.composite
def put_answers(draw: st.DrawFn) -> bytes:
    codes = draw(st.binary(min_size=1, max_size=140))
    offer = [draw(words), draw(words), draw(st.integers(0, 4))]
    return encode(Response(draw(msgids), None, [offer, codes]), PEER_LIMITS)


def as_put_answer(data: bytes) -> Any:
    message = first(data)
    if not isinstance(message, Response) or message.error is not None:
        return None
    try:
        offer, codes = peerwire._answer("put", message.result, 2)
    except WireError:
        return None
    whole = encode(message, PEER_LIMITS)
    if not data.startswith(whole) or not isinstance(codes, bytes):
        return None
    if message.result[0][2] > 2 or not 1 <= len(codes) <= BATCH_PAGES:
        return None
    return len(whole), message.msgid, tuple(map(int, offer)), codes


@settings(max_examples=400)
@given(put_answers() | spoiled(put_answers()))
def test_spoiled_answers_to_puts(data: bytes) -> None:
    check(frames.put_answer(data), as_put_answer(data), data)


@settings(max_examples=400)
@given(spoiled(answers()))
def test_spoiled_answers(data: bytes) -> None:
    check(frames.answer(data), as_answer(data), data)


@settings(max_examples=200)
@given(st.binary(max_size=80))
def test_noise(data: bytes) -> None:
    check(frames.asked(data), as_asked(data), data)
    check(frames.answer(data), as_answer(data), data)


def test_a_put_is_made_as_pack_makes_it(rng: random.Random) -> None:
    for n in (1, 2, 64, 300):
        made = [
            Page(0, rng.randrange(2**32), rng.randrange(2**52), rng.randrange(2**16))
            for _ in range(n)
        ]
        parts = [(*page[1:], rng.randbytes(sealed_bytes(page.length_codec))) for page in made]
        assert frames.put_of(parts) == (pack(made), b"".join(part[3] for part in parts))
        page, version, length_codec, sealed = parts[-1]
        for wrong in (sealed[:-1], sealed + b"x", b""):
            with pytest.raises(ValueError, match="sealed bytes"):
                frames.put_of([*parts[:-1], (page, version, length_codec, wrong)])
        others: tuple[Any, ...] = (bytearray(sealed), memoryview(sealed), None)
        for other in others:
            with pytest.raises(TypeError, match="bytes"):
                frames.put_of([*parts[:-1], (page, version, length_codec, other)])


def test_a_sheaf_is_what_it_was_made_of(rng: random.Random) -> None:
    parts = []
    for page in rng.sample(range(2**32), 3 * BATCH_PAGES // 2):
        length_codec = rng.randrange(2**16)
        sealed = rng.randbytes(sealed_bytes(length_codec))
        parts.append((page, rng.randrange(2**52), length_codec, sealed))
    made = sheaves_of(parts)
    assert [len(sheaf) for sheaf in made] == [BATCH_PAGES, BATCH_PAGES // 2]
    assert [part for sheaf in made for part in sheaf] == parts
    assert made[0].keys | made[1].keys == {part[:2] for part in parts}
    assert not made[0].keys & made[1].keys
    places = sorted(rng.sample(range(BATCH_PAGES), 20))
    assert list(made[0].some(places)) == [parts[i] for i in places]
    assert made[0].some(range(BATCH_PAGES)) is made[0]


def test_the_largest_and_one_more(rng: random.Random) -> None:
    for n, fits in ((BATCH_PAGES, True), (BATCH_PAGES + 1, False)):
        records = pack(Page(7, i, 2**52 - 1, 0xFFFF) for i in range(n))
        for method in ("get", "put"):
            params = [records, payload_of(records)][: 1 + (method == "put")]
            limits = Limits(1 << 20, 4, 64)
            data = encode(Request(2**32 - 1, method, params), limits)
            said = frames.asked(data)
            assert isinstance(said, tuple) == fits
            assert fits or frames.asked(data[:40]) == ODD, "before it has come"
    offer = Offer(2**64 - 1, 2**64 - 1, peerwire.Health.DRAINING)
    codes, payload = bytes(BATCH_PAGES), rng.randbytes(BATCH_PAGES * (4096 + 24))
    data = encode(Response(2**32 - 1, None, [list(offer), codes, payload]), PEER_LIMITS)
    assert frames.answer_bytes(2**32 - 1, offer, codes, payload) == data
    assert frames.answer(data) == (len(data), 2**32 - 1, tuple(map(int, offer)), codes, payload)
