"""The session: every state against every thing that can happen, and a model in lockstep."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.session import (
    DONE,
    PAUSED,
    TRANSITIONS,
    Did,
    RepeatedRequestError,
    Session,
    SessionMisuseError,
    State,
    TooManyCallsError,
    UnknownAnswerError,
)
from cluster.wire import (
    NEED_DATA,
    Notification,
    Request,
    Response,
    TruncatedFrameError,
    WireError,
    encode,
)


def in_state(state: State) -> Session:
    """A session brought there by its own doing, with request 5 of the peer owed."""
    session = Session()
    session.receive(encode(Request(5, "ping", [])))
    assert isinstance(session.next_event(), Request)
    if state is State.PEER_DONE:
        session.receive(b"")
        assert session.next_event() is DONE
    elif state is State.BROKEN:
        session.receive(b"\xc1")
        with pytest.raises(WireError):
            session.next_event()
    elif state is State.CLOSED:
        session.close()
    assert session.state is state
    return session


DO = {
    Did.SENT_CALL: lambda session: session.call("ping"),
    Did.SENT_NOTIFICATION: lambda session: session.notify("bye"),
    Did.SENT_ANSWER: lambda session: session.respond(5, None),
    Did.GOT_MESSAGE: lambda session: session.receive(encode(Notification("bye", []))),
    Did.GOT_END: lambda session: session.receive(b""),
    Did.PEER_ERROR: lambda session: session.receive(b"\xc1"),
    Did.CLOSE: lambda session: session.close(),
}


@pytest.mark.parametrize(("state", "did"), list(itertools.product(State, Did)))
def test_every_state_against_everything(state: State, did: Did) -> None:
    session = in_state(state)
    after = TRANSITIONS[state].get(did)
    if after is None:
        with pytest.raises(SessionMisuseError):
            DO[did](session)
        assert session.state is state
        return
    DO[did](session)
    if did is Did.PEER_ERROR:
        with pytest.raises(WireError):
            session.next_event()
    elif did in (Did.GOT_MESSAGE, Did.GOT_END):
        session.next_event()
    assert session.state is after


def test_call_and_answer() -> None:
    here, there = Session(), Session()
    msgid, data = here.call("stats", 1, "two")
    there.receive(data)
    assert there.next_event() == Request(msgid, "stats", [1, "two"])
    here.receive(there.respond(msgid, {"loads": 3}))
    assert here.next_event() == Response(msgid, None, {"loads": 3})
    assert not here.awaited
    assert not there.owed
    assert here.next_event() is NEED_DATA


def test_answer_to_nothing_breaks_the_connection() -> None:
    session = Session()
    session.receive(encode(Response(3, None, 1)))
    for _ in range(2):
        with pytest.raises(UnknownAnswerError):
            session.next_event()
    assert session.state is State.BROKEN


def test_number_used_twice_breaks_the_connection() -> None:
    session = in_state(State.OPEN)
    session.receive(encode(Request(5, "ping", [])))
    with pytest.raises(RepeatedRequestError):
        session.next_event()


def test_number_may_come_again_once_answered() -> None:
    session = in_state(State.OPEN)
    session.respond(5, None)
    session.receive(encode(Request(5, "ping", [])))
    assert session.next_event() == Request(5, "ping", [])


def test_end_inside_a_message() -> None:
    session = Session()
    session.receive(encode(Request(5, "ping", []))[:-1])
    session.receive(b"")
    with pytest.raises(TruncatedFrameError, match="8 bytes"):
        session.next_event()


def test_requests_before_the_end_are_seen() -> None:
    session = Session(max_owed=1)
    session.receive(encode(Request(1, "a", [])) + encode(Request(2, "b", [])))
    session.receive(b"")
    assert session.next_event() == Request(1, "a", [])
    assert session.next_event() is PAUSED
    session.refuse(1, "no")
    assert session.next_event() == Request(2, "b", [])
    session.respond(2, None)
    assert session.next_event() is DONE


def test_calls_are_bounded_also_when_forgotten() -> None:
    session = Session(max_calls=2)
    first, _ = session.call("a")
    second, _ = session.call("b")
    with pytest.raises(TooManyCallsError):
        session.call("c")
    session.forget(first)
    with pytest.raises(TooManyCallsError):
        session.call("c")
    session.receive(encode(Response(first, None, "late")))
    assert session.next_event() is NEED_DATA
    third, _ = session.call("c")
    assert third not in (first, second)


class TwoEnds(RuleBasedStateMachine):
    """Two sessions joined by two byte streams, beside two plain dicts of open calls."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = [Session(max_calls=3, max_owed=2), Session(max_calls=3, max_owed=2)]
        self.wires = [bytearray(), bytearray()]  # towards end 0, towards end 1
        self.calls: list[dict[int, str]] = [{}, {}]  # by the caller: what was asked
        self.forgotten: list[set[int]] = [set(), set()]
        self.owed: list[dict[int, str]] = [{}, {}]  # by who has to answer

    @rule(end=st.integers(0, 1), method=st.sampled_from(["a", "b", "c"]))
    def call(self, end: int, method: str) -> None:
        if len(self.calls[end]) + len(self.forgotten[end]) == 3:
            with pytest.raises(TooManyCallsError):
                self.ends[end].call(method)
            return
        msgid, data = self.ends[end].call(method)
        assert msgid not in self.calls[end]
        self.calls[end][msgid] = method
        self.wires[1 - end] += data

    @rule(end=st.integers(0, 1))
    def notify(self, end: int) -> None:
        self.wires[1 - end] += self.ends[end].notify("told")

    @precondition(lambda self: any(self.calls))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        end = data.draw(st.sampled_from([e for e in (0, 1) if self.calls[e]]))
        msgid = data.draw(st.sampled_from(sorted(self.calls[end])))
        self.ends[end].forget(msgid)
        self.forgotten[end].add(msgid)
        del self.calls[end][msgid]

    @rule(end=st.integers(0, 1), size=st.integers(1, 30))
    def deliver(self, end: int, size: int) -> None:
        piece = bytes(self.wires[end][:size])
        if piece:
            del self.wires[end][:size]
            self.ends[end].receive(piece)
        while True:
            match self.ends[end].next_event():
                case Request(msgid, method):
                    self.owed[end][msgid] = method
                case Response(msgid, error, result):
                    assert self.calls[end].pop(msgid) == (error or result)
                case Notification():
                    pass
                case event:
                    assert event is (PAUSED if len(self.owed[end]) == 2 else NEED_DATA)
                    break

    @precondition(lambda self: any(self.owed))
    @rule(data=st.data(), well=st.booleans())
    def answer(self, data: st.DataObject, well: bool) -> None:
        end = data.draw(st.sampled_from([e for e in (0, 1) if self.owed[e]]))
        msgid = data.draw(st.sampled_from(sorted(self.owed[end])))
        method = self.owed[end].pop(msgid)
        answer = self.ends[end].respond if well else self.ends[end].refuse
        self.wires[1 - end] += answer(msgid, method)
        # A forgotten call leaves the books when its answer is read; the model lets
        # it go here, and the bound below is checked against the sum.

    @invariant()
    def books_agree(self) -> None:
        for end in (0, 1):
            assert self.ends[end].awaited == self.calls[end].keys()
            assert self.ends[end].owed == self.owed[end].keys()
            self.forgotten[end] &= self.ends[end]._abandoned


TestTwoEnds = TwoEnds.TestCase
