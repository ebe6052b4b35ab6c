"""What two nodes say to each other: methods, shapes, limits.  No sockets, no clocks here.

    owner -> donor   hello put get drop reconcile stats ping bye  requests
    donor -> owner   recall offer                                 notifications

The owner's pages travel in batches, as two byte strings: records of 16 bytes, and the
sealed bytes of all pages behind one another.  So a batch of 32 pages costs the decoder
two objects, and neither side makes one for a page.

    record    version u64 | page u32 | length_codec u16 | device u8 | 0      little-endian
    sealed    SEAL_BYTES of seal, then the ciphertext: length_codec says how long

    put   [records, payload]   -> [offer, codes]              a code for each page
    get   [records]            -> [offer, codes, payload]     payload of those with code OK
    drop  [records]            -> [offer, dropped]            what is not there is dropped already
    reconcile [cursor]         -> [offer, next cursor or nil, records]   what the donor holds
    bye   [owner, epoch]       -> [offer, dropped]            that epoch is over: all its pages
    recall    [records, ms]       take these back within so many milliseconds, please
    offer     [offer]             it has changed

Every result begins with the donor's offer: [bytes it takes from you now, bytes it holds for
you, health].  Lost drops do not leak: after a reconnect the owner walks through what the
donor holds (reconcile) and drops what it does not know.  So only the owner ever
decides that a page is dead, and the donor has no state between two calls.

Bound: PEER_LIMITS for a message, BATCH_PAGES and RECORDS_MOST for a call.  What is not of
these shapes is BadParamsError (a request: answered with an error) or BadAnswerError
(an answer: the connection is closed).

docs/protocol.md has all of it with golden bytes.  What it is not: the control
socket's protocol, which shares the framing only.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeGuard

from cluster.wire import Limits, WireError
from zcache_core.errors import ZcacheError

PROTOCOL: Final = 1
SEAL_BYTES: Final = 24  # as crypt.pxd: what a sealed blob is longer than its plain one
PAGE_BYTES: Final = 4096
RECORD_BYTES: Final = 16
BATCH_PAGES: Final = 128  # of put and get: half a MiB at most, 0.5 ms of a 10 Gbit/s wire
RECORDS_MOST: Final = 4096  # of drop, reconcile, recall: 64 KiB
NAME_BYTES: Final = 48  # of an owner or donor
DEVICES_MOST: Final = 8
DEVICE_NAME_BYTES: Final = 16
CALLS_MOST: Final = 16  # unanswered on one connection
RECALL_MS_MOST: Final = 3_600_000

PEER_LIMITS: Final = Limits(
    frame_bytes=BATCH_PAGES * (PAGE_BYTES + SEAL_BYTES + RECORD_BYTES) + 1024,
    depth=4,
    items=64,
)

RECORD: Final = struct.Struct("<QIHBB")
VERSION_MAX: Final = 2**52 - 1
WORD_MAX: Final = 2**64 - 1
METHODS: Final = ("hello", "put", "get", "drop", "reconcile", "stats", "ping", "bye")


class BadParamsError(ZcacheError):
    """{}"""


class BadAnswerError(WireError):
    """the donor's answer to {} is none ({}); close the connection"""


class Code(enum.IntEnum):
    """What became of one page of a batch; one byte on the wire."""

    OK = 0
    ABSENT = 1  # get: not there, or another version is
    FULL = 2  # put: no room in RAM, or over the owner's quota
    DAMAGED = 3  # get: not the bytes that were put; the page has been dropped
    LEAVING = 4  # put: the donor takes nothing new now (memory pressure, drain)


class Health(enum.IntEnum):
    """How a donor is."""

    OK = 0
    SHORT = 1  # its machine is short of memory: it takes nothing new
    DRAINING = 2  # it is being emptied: it takes nothing new and recalls everything


HEALTH: Final = {int(health): health for health in Health}


class Offer(NamedTuple):
    """What a donor would take from this owner now, what it holds for it, and how it is."""

    room_bytes: int
    held_bytes: int
    health: Health


class Page(NamedTuple):
    """One record: which page in which version, and how long it is."""

    device: int
    page: int
    version: int
    length_codec: int


class LinkState(enum.Enum):
    """Of an owner's connection to one donor."""

    CONNECTING = enum.auto()  # never was up since the start, or is being dialled again
    UP = enum.auto()
    SUSPECT = enum.auto()  # connected, but an answer is overdue
    DOWN = enum.auto()  # tried and failed; tried again after a back-off


class PeerError(ZcacheError):
    """the donor {} did not answer ({})"""

    exit_code = 6


Recall = Callable[["Donor", bytes, float], None]  # donor, records, seconds left
Changed = Callable[["Donor"], None]


class Donor(Protocol):
    """One donor as its owner sees it: what peerlink gives and the simulation imitates.

    Batches are records and payload as above; at most BATCH_PAGES for put and get,
    RECORDS_MOST for drop.  Every call ends: with an answer, or with PeerError when the donor
    is away, slow, or has broken a rule; then nothing is known about the batch, and put and
    drop may simply be repeated, here or elsewhere.
    """

    name: str  # the donor's own, from hello; its address until then
    state: LinkState
    is_listed: bool  # it may be given new pages; what it has, it has either way
    epoch: int  # of the donor's memory file; another one: it has come back empty
    offer: Offer
    latency_us: float  # of an exchange with little in it, smoothed; 0.0: none yet
    on_recall: Recall | None
    on_state: Changed | None  # after every change of `state`; `epoch` is known when it is UP
    on_offer: Changed | None  # the donor told of another offer without being asked

    async def put(self, records: bytes, payload: bytes) -> bytes:
        """A Code for each page; all pages of the batch with OK are the donor's now."""

    async def get(self, records: bytes) -> tuple[bytes, bytes]:
        """Codes, and the sealed bytes of those with OK behind one another."""

    async def drop(self, records: bytes) -> int:
        """How many were there."""

    async def reconcile(self, cursor: int) -> tuple[int | None, bytes]:
        """The next cursor (None: that was all) and some of what is held; begin with 0."""

    async def ping(self) -> None:
        """Only measure, and fetch the offer."""


# ---- records ---------------------------------------------------------------------


def pack(pages: Iterable[Page]) -> bytes:
    """Records of these pages."""
    record = RECORD.pack  # (a list is half as long on its way as a generator)
    return b"".join(
        [record(version, page, length, device, 0) for device, page, version, length in pages]
    )


def unpack(records: bytes) -> list[Page]:
    """The pages of valid records."""
    return [
        Page(device, page, version, length_codec)
        for version, page, length_codec, device, _ in RECORD.iter_unpack(records)
    ]


def sealed_bytes(length_codec: int) -> int:
    """How many bytes of payload a page has."""
    return (length_codec >> 4) + 1 + SEAL_BYTES


def payload_bytes(records: bytes) -> int:
    """How many bytes the payload of valid records has."""
    lengths = memoryview(records).cast("H")[6::8].tolist()
    return sum(n >> 4 for n in lengths) + len(lengths) * (1 + SEAL_BYTES)


def pieces(records: bytes, codes: bytes, payload: bytes) -> Iterator[bytes | None]:
    """The sealed bytes of each page of a get's answer; None where its code is not OK."""
    at = 0
    lengths = memoryview(records).cast("H")[6::8].tolist()
    for length_codec, code in zip(lengths, codes, strict=True):
        if code:
            yield None
        else:
            end = at + sealed_bytes(length_codec)
            yield payload[at:end]
            at = end


def _fault_of_records(records: Any, most: int) -> str:
    """Why these are no records; "" when they are."""
    if not isinstance(records, bytes) or len(records) % RECORD_BYTES:
        return f"records are binary, {RECORD_BYTES} bytes each"
    if not records:
        return "there is no record"
    if len(records) > most * RECORD_BYTES:
        return f"there are more than {most} records"
    # every eighth byte at once: what must be zero of the version, and the last one
    if any(records[15::16]) or any(records[7::16]) or max(records[6::16]) >= 16:
        return "a record's version has more than 52 bits, or its last byte is not 0"
    return ""


def _records(records: Any, most: int) -> bytes:
    if fault := _fault_of_records(records, most):
        raise BadParamsError(fault)
    return bytes(records)


def _params(method: str, params: list[Any], n: int) -> None:
    if len(params) != n:
        raise BadParamsError(f"{method} takes {n} parameters, not {len(params)}")


def _is_word(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= WORD_MAX


def _is_name(value: Any, most: int = NAME_BYTES) -> TypeGuard[str]:
    return isinstance(value, str) and len(value.encode()) <= most and value.isprintable()


# ---- requests ----------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """Who an owner is.  `epoch` is its memory file's: pages of another one are dropped.

    `turn` grows from connection to connection of one epoch, also from one node process to the
    next: a donor hears no connection any more once there is one of a later turn.  0: not said.
    """

    owner: str
    epoch: int
    devices: tuple[str, ...] = ("",)
    protocol: int = PROTOCOL
    turn: int = 0

    def params(self) -> list[Any]:
        return [
            {
                "protocol": self.protocol,
                "owner": self.owner,
                "epoch": self.epoch,
                "devices": list(self.devices),
                "turn": self.turn,
            }
        ]


def hello_protocol(params: list[Any]) -> int:
    """The version that the owner speaks, before anything else is looked at."""
    _params("hello", params, 1)
    version = params[0].get("protocol") if isinstance(params[0], dict) else None
    if not _is_word(version):
        raise BadParamsError("hello takes a map that has the protocol's number")
    return version


def hello(params: list[Any]) -> Hello:
    """A request `hello` of our protocol.  Keys that we do not know are ignored."""
    protocol, said = hello_protocol(params), params[0]
    owner, epoch, devices = said.get("owner"), said.get("epoch"), said.get("devices")
    turn = said.get("turn", 0)
    _require_whose("hello", owner, epoch)
    if not isinstance(devices, list) or not 1 <= len(devices) <= DEVICES_MOST:
        raise BadParamsError(f"hello: devices is an array of 1 to {DEVICES_MOST} names")
    if not all(_is_name(name, DEVICE_NAME_BYTES) for name in devices):
        raise BadParamsError(f"hello: a device's name has at most {DEVICE_NAME_BYTES} bytes")
    if not _is_word(turn):
        raise BadParamsError("hello: turn is a number from 0 to 2^64 - 1")
    return Hello(owner, epoch, tuple(devices), protocol, turn)


def put(params: list[Any]) -> tuple[bytes, bytes]:
    """A request `put`: records and payload, that fit each other."""
    _params("put", params, 2)
    records = _records(params[0], BATCH_PAGES)
    if not isinstance(params[1], bytes) or len(params[1]) != payload_bytes(records):
        raise BadParamsError("put: the payload is not as long as the records say")
    return records, params[1]


def get(params: list[Any]) -> bytes:
    """A request `get`."""
    _params("get", params, 1)
    return _records(params[0], BATCH_PAGES)


def drop(params: list[Any]) -> bytes:
    """A request `drop`."""
    _params("drop", params, 1)
    return _records(params[0], RECORDS_MOST)


def reconcile(params: list[Any]) -> int:
    """A request `reconcile`: the cursor."""
    _params("reconcile", params, 1)
    if not _is_word(params[0]):
        raise BadParamsError("reconcile takes the cursor of the last answer, or 0")
    return int(params[0])


def bye(params: list[Any]) -> tuple[str, int]:
    """A request `bye`: whose epoch is over, and which.  It says so itself: it needs no hello."""
    _params("bye", params, 2)
    owner, epoch = params
    _require_whose("bye", owner, epoch)
    return owner, epoch


def _require_whose(method: str, owner: Any, epoch: Any) -> None:
    if not _is_name(owner) or not owner:
        raise BadParamsError(f"{method}: owner is a name of 1 to {NAME_BYTES} bytes")
    if not _is_word(epoch) or epoch == 0:
        raise BadParamsError(f"{method}: epoch is a number from 1 to 2^64 - 1")


# ---- answers and notifications, as the owner reads them --------------------------------


def offer(value: Any) -> Offer:
    """Raises BadAnswerError.  A health that we do not know is SHORT: nothing is put there."""
    if not (isinstance(value, list) and len(value) == 3 and all(map(_is_word, value))):
        raise BadAnswerError("a call", "its offer is not three numbers")
    room, held, health = value
    return Offer(room, held, HEALTH.get(health, Health.SHORT))


@dataclass(frozen=True)
class Welcome:
    """A donor's answer to hello."""

    donor: str
    epoch: int
    offer: Offer
    protocol: int = PROTOCOL

    def result(self) -> list[Any]:
        about = {"protocol": self.protocol, "donor": self.donor, "epoch": self.epoch}
        return [list(self.offer), about]


def welcome(result: Any) -> Welcome:
    """The answer to hello."""
    first, about = _answer("hello", result, 2)
    if not isinstance(about, dict):
        raise BadAnswerError("hello", "no map")
    donor, epoch, protocol = about.get("donor"), about.get("epoch"), about.get("protocol")
    if protocol != PROTOCOL:
        raise BadAnswerError("hello", f"its protocol is {protocol!r:.20}, ours {PROTOCOL}")
    if not _is_name(donor) or not donor or not _is_word(epoch):
        raise BadAnswerError("hello", "no name or no epoch")
    return Welcome(donor, epoch, first)


def put_answer(result: Any, n: int) -> tuple[Offer, bytes]:
    """The answer to a put of n pages: a code for each."""
    first, codes = _answer("put", result, 2)
    return first, _codes("put", codes, n)


def get_answer(result: Any, records: bytes) -> tuple[Offer, bytes, bytes]:
    """The answer to a get: codes, and the payload of those with OK."""
    first, codes, payload = _answer("get", result, 3)
    codes = _codes("get", codes, len(records) // RECORD_BYTES)
    lengths = memoryview(records).cast("H")[6::8].tolist()
    wanted = sum(sealed_bytes(n) for n, code in zip(lengths, codes, strict=True) if not code)
    if not isinstance(payload, bytes) or len(payload) != wanted:
        raise BadAnswerError("get", "the payload is not as long as the records say")
    return first, codes, payload


def drop_answer(result: Any) -> tuple[Offer, int]:
    """The answer to a drop: how many were there."""
    first, dropped = _answer("drop", result, 2)
    if not _is_word(dropped):
        raise BadAnswerError("drop", "no number")
    return first, dropped


def reconcile_answer(result: Any) -> tuple[Offer, int | None, bytes]:
    """The answer to a reconcile: the next cursor (None: that was all) and records."""
    first, cursor, records = _answer("reconcile", result, 3)
    if cursor is not None and not _is_word(cursor):
        raise BadAnswerError("reconcile", "the cursor is no number")
    if records != b"" and (fault := _fault_of_records(records, RECORDS_MOST)):
        raise BadAnswerError("reconcile", fault)
    return first, cursor, records


def bye_answer(result: Any) -> tuple[Offer, int]:
    """The answer to a bye: how many pages were there."""
    first, dropped = _answer("bye", result, 2)
    if not _is_word(dropped):
        raise BadAnswerError("bye", "no number")
    return first, dropped


def ping_answer(result: Any) -> Offer:
    """The answer to a ping."""
    return _answer("ping", result, 1)[0]  # type: ignore[no-any-return]


def stats_answer(result: Any) -> tuple[Offer, dict[str, int]]:
    """The answer to stats: numbers by name."""
    first, numbers = _answer("stats", result, 2)
    if not isinstance(numbers, dict) or not all(map(_is_word, numbers.values())):
        raise BadAnswerError("stats", "no map of numbers")
    return first, numbers


def recall(params: list[Any]) -> tuple[bytes, float]:
    """A notification `recall`: records, and the seconds until they should be gone."""
    if len(params) != 2 or type(params[1]) is not int or not 0 < params[1] <= RECALL_MS_MOST:
        raise BadAnswerError("a recall", "no records and milliseconds")
    if fault := _fault_of_records(params[0], RECORDS_MOST):
        raise BadAnswerError("a recall", fault)
    return params[0], params[1] / 1000


def offer_notice(params: list[Any]) -> Offer:
    """A notification `offer`."""
    if len(params) != 1:
        raise BadAnswerError("an offer", "not one parameter")
    return offer(params[0])


def _answer(method: str, result: Any, n: int) -> list[Any]:
    """The parts of a result, the first one read as the offer."""
    if not isinstance(result, list) or len(result) != n:
        raise BadAnswerError(method, f"not an array of {n}")
    return [offer(result[0]), *result[1:]]


def _codes(method: str, codes: Any, n: int) -> bytes:
    if not isinstance(codes, bytes) or len(codes) != n:
        raise BadAnswerError(method, "not one code for each page")
    return codes
