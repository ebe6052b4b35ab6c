"""One RPC conversation as a state machine.  No sockets, no clocks, no threads.

Both ends are equal: each may call, answer and notify.  Bytes that arrive go in
with `receive` (b"" at end of stream); `next_event` hands out what they mean;
`call`, `notify`, `respond` and `refuse` return the bytes to send.

    receive -> [ decoder ] -> next_event: Request | Response | Notification
                                          NEED_DATA  feed me
                                          PAUSED     answer something first
                                          DONE       the peer sends no more

Connection states and what moves them are the table below; anything that is not
in it is refused.  Each msgid has a life of its own beside it:

    ours     call -> awaited -> answered          forget: awaited -> abandoned -> dropped
    theirs   request -> owed -> respond or refuse

Bound: at most `max_calls` of our calls are awaited or abandoned, and at most
`max_owed` requests of the peer are unanswered.  The first is refused with
TooManyCallsError; at the second the session reads no further (PAUSED), so a peer
that floods us waits in its own socket buffer.

Habit learned from h11: the protocol is testable whole because it does no I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Final

from cluster.wire import (
    DEFAULT_LIMITS,
    NEED_DATA,
    Decoder,
    Limits,
    Message,
    NeedData,
    Notification,
    Request,
    Response,
    TruncatedFrameError,
    WireError,
    encode,
)
from zcache_core.errors import ZcacheError

OTHERS_MSGID: Final = (
    2**31
)  # from here on: compiled code that asks on the same connection (courier)


class State(enum.Enum):
    """Of the connection."""

    __hash__ = object.__hash__  # Enum's own is Python code, and is asked ten times a call
    OPEN = enum.auto()
    PEER_DONE = enum.auto()  # the peer has closed its side; owed answers may still go
    BROKEN = enum.auto()  # the peer broke a rule; only closing is left
    CLOSED = enum.auto()


class Did(enum.Enum):
    """What can happen to a connection."""

    __hash__ = object.__hash__
    SENT_CALL = enum.auto()
    SENT_NOTIFICATION = enum.auto()
    SENT_ANSWER = enum.auto()
    GOT_MESSAGE = enum.auto()
    GOT_END = enum.auto()
    PEER_ERROR = enum.auto()
    CLOSE = enum.auto()


TRANSITIONS: Final[dict[State, dict[Did, State]]] = {
    State.OPEN: {
        Did.SENT_CALL: State.OPEN,
        Did.SENT_NOTIFICATION: State.OPEN,
        Did.SENT_ANSWER: State.OPEN,
        Did.GOT_MESSAGE: State.OPEN,
        Did.GOT_END: State.PEER_DONE,
        Did.PEER_ERROR: State.BROKEN,
        Did.CLOSE: State.CLOSED,
    },
    State.PEER_DONE: {
        Did.SENT_ANSWER: State.PEER_DONE,
        Did.SENT_NOTIFICATION: State.PEER_DONE,
        Did.CLOSE: State.CLOSED,
    },
    State.BROKEN: {Did.CLOSE: State.CLOSED},
    State.CLOSED: {Did.CLOSE: State.CLOSED},
}


class Paused:
    """The type of PAUSED: as many requests are unanswered as there may be."""

    def __repr__(self) -> str:
        return "PAUSED"


class Done:
    """The type of DONE: the peer sends nothing more."""

    def __repr__(self) -> str:
        return "DONE"


PAUSED: Final = Paused()
DONE: Final = Done()


class UnknownAnswerError(WireError):
    """the peer answered request {}, which is not open; close the connection"""


class RepeatedRequestError(WireError):
    """the peer used request number {} again before it was answered; close the connection"""


class SessionMisuseError(ZcacheError):
    """{} is not possible when the connection is {}"""


class TooManyCallsError(ZcacheError):
    """{} calls are unanswered on this connection; wait for one of them"""

    exit_code = 6


class Session:
    """State of one connection; `limits` bound a message, the counts what is open."""

    def __init__(
        self, limits: Limits = DEFAULT_LIMITS, max_calls: int = 16, max_owed: int = 16
    ) -> None:
        assert max_calls > 0
        assert max_owed > 0
        self._limits, self._max_calls, self._max_owed = limits, max_calls, max_owed
        self._decoder = Decoder(limits)
        self._state = State.OPEN
        self._ended = False  # the peer's end of stream is in, behind what is undecoded
        self._next_msgid = 0
        self._awaited: set[int] = set()
        self._abandoned: set[int] = set()
        self._owed: set[int] = set()
        # an answer to who else asks
        self.settled_elsewhere: Callable[[Response], bool] | None = None

    @property
    def state(self) -> State:
        return self._state

    @property
    def awaited(self) -> frozenset[int]:
        """Numbers of our calls that wait for an answer."""
        return frozenset(self._awaited)

    @property
    def owed(self) -> frozenset[int]:
        """Numbers of the peer's requests that wait for ours."""
        return frozenset(self._owed)

    @property
    def partial_bytes(self) -> int:
        """Bytes received that make no whole message yet."""
        return self._decoder.partial_bytes

    # ---- what we send ------------------------------------------------------------

    def call(self, method: str, *params: Any) -> tuple[int, bytes]:
        """A new request: its number, and the bytes to send."""
        self._require(Did.SENT_CALL)
        if len(self._awaited) + len(self._abandoned) >= self._max_calls:
            raise TooManyCallsError(self._max_calls)
        msgid = self._free_msgid()
        data = encode(Request(msgid, method, list(params)), self._limits)
        self._awaited.add(msgid)
        self._move(Did.SENT_CALL)
        return msgid, data

    def notify(self, method: str, *params: Any) -> bytes:
        """The bytes of a notification."""
        self._require(Did.SENT_NOTIFICATION)
        data = encode(Notification(method, list(params)), self._limits)
        self._move(Did.SENT_NOTIFICATION)
        return data

    def respond(self, msgid: int, result: Any) -> bytes:
        """The bytes that answer the peer's request `msgid`."""
        return self._answer(Response(msgid, None, result))

    def refuse(self, msgid: int, error: Any) -> bytes:
        """The bytes that answer the peer's request `msgid` with an error (not None)."""
        assert error is not None
        return self._answer(Response(msgid, error, None))

    def forget(self, msgid: int) -> None:
        """Nobody waits for our call `msgid` any more; its late answer will be dropped."""
        if msgid in self._awaited:
            self._awaited.remove(msgid)
            self._abandoned.add(msgid)

    def close(self) -> None:
        """The connection is closed, by us."""
        self._move(Did.CLOSE)

    # ---- what the peer sent --------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take in what was read from the connection; b"" is its end."""
        if self._state is not State.OPEN or self._ended:
            raise SessionMisuseError("receiving", self._state.name.lower().replace("_", " "))
        if data:
            self._decoder.receive(data)
        else:
            self._ended = True

    def next_event(self) -> Message | NeedData | Paused | Done:
        """What the received bytes mean, one thing at a time.

        Raises WireError when the peer broke a rule (again at every later call).
        """
        while self._state is State.OPEN:
            if len(self._owed) >= self._max_owed:
                return PAUSED
            try:
                message = self._decoder.next_message()
                if isinstance(message, NeedData):
                    if not self._ended:
                        return NEED_DATA
                    if self._decoder.partial_bytes:
                        raise TruncatedFrameError(self._decoder.partial_bytes)
                    self._move(Did.GOT_END)
                    return DONE
                if self._take(message):
                    return message
            except WireError as error:
                self._error = error
                self._move(Did.PEER_ERROR)
                raise
        if self._state is State.BROKEN:
            raise self._error
        return DONE

    def _take(self, message: Message) -> bool:
        """Enter a message into the books; False when nobody wants it any more."""
        match message:
            case Request(msgid):
                if msgid in self._owed:
                    raise RepeatedRequestError(msgid)
                self._owed.add(msgid)
            case Response(msgid):
                if msgid in self._abandoned:
                    self._abandoned.remove(msgid)
                    return False
                elsewhere = self.settled_elsewhere if msgid >= OTHERS_MSGID else None
                if elsewhere is not None and elsewhere(message):
                    return False
                if msgid not in self._awaited:
                    raise UnknownAnswerError(msgid)
                self._awaited.remove(msgid)
        self._move(Did.GOT_MESSAGE)
        return True

    # ---- inside --------------------------------------------------------------------

    def _answer(self, response: Response) -> bytes:
        self._require(Did.SENT_ANSWER)
        if response.msgid not in self._owed:
            raise SessionMisuseError(f"answering request {response.msgid}", "not asking for it")
        data = encode(response, self._limits)
        self._owed.remove(response.msgid)
        self._move(Did.SENT_ANSWER)
        return data

    def _free_msgid(self) -> int:
        while self._next_msgid in self._awaited or self._next_msgid in self._abandoned:
            self._next_msgid = (self._next_msgid + 1) % OTHERS_MSGID
        msgid, self._next_msgid = self._next_msgid, (self._next_msgid + 1) % OTHERS_MSGID
        return msgid

    def _require(self, did: Did) -> None:
        if did not in TRANSITIONS[self._state]:
            raise SessionMisuseError(
                did.name.lower().replace("_", " "), self._state.name.lower().replace("_", " ")
            )

    def _move(self, did: Did) -> None:
        self._require(did)
        self._state = TRANSITIONS[self._state][did]
