"""The NBD handshake without I/O: golden bytes, refusals, nonsense; and with nbdkit."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin.dialer import CLIMB_US_MAX, Generations, Target, dial, explain
from plugin.handshake import (
    MESSAGE_BYTES_MAX,
    OPT_GO,
    OPT_STARTTLS,
    Handshake,
    ProtocolError,
    RefusedError,
)
from tests.plugin_helpers import wait_for
from zcache_core.errors import AttachError

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"
SIZE_BYTES, FLAGS = 8 << 30, 0b1101101


def reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload


EXPORT = reply(OPT_GO, 3, struct.pack(">HQH", 0, SIZE_BYTES, FLAGS))
BLOCKS = reply(OPT_GO, 3, struct.pack(">HIII", 3, 1, 4096, 32 << 20))
NAME = reply(OPT_GO, 3, b"\0\1whatever")  # an information that nobody asked for is passed over
WHOLE = GREETING + EXPORT + BLOCKS + NAME + reply(OPT_GO, 1)


def fed(data: bytes, sizes: Iterator[int], export: str = "swap0@17") -> tuple[Handshake, bytes]:
    """A handshake after these bytes in pieces of these sizes, and what it said."""
    shake, said, at = Handshake(export), b"", 0
    while at < len(data):
        size = next(sizes)
        said += shake.receive(data[at : at + size])
        at += size
    return shake, said


GOLDEN = bytes.fromhex(
    "00000003"  # fixed newstyle, no zeroes
    "49484156454f5054 00000007 00000010"  # IHAVEOPT, GO, 16 bytes
    "00000008 7377617030403137 0001 0003"  # the name, one wish: block sizes
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 19, 1000])
def test_whole_and_byte_by_byte_end_the_same(size: int) -> None:
    shake, said = fed(WHOLE, iter(lambda: size, 0))
    assert said == GOLDEN
    assert shake.done
    assert (shake.size_bytes, shake.flags) == (SIZE_BYTES, FLAGS)
    assert shake.block_bytes == (1, 4096, 32 << 20)


def test_tls_is_asked_for_before_anything_else() -> None:
    shake = Handshake("", tls=True)
    assert shake.receive(GREETING)[4:] == b"IHAVEOPT" + struct.pack(">II", OPT_STARTTLS, 0)
    assert shake.receive(reply(OPT_STARTTLS, 1)) == b""
    assert shake.wants_tls
    assert not shake.done
    assert shake.after_tls().startswith(b"IHAVEOPT" + struct.pack(">I", OPT_GO))
    shake.receive(EXPORT + reply(OPT_GO, 1))
    assert shake.done


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"HTTP/1.1 400", "no NBD server"),
        (b"SSH-", "no NBD server"),
        (b"NBDMAGIC" + b"\0\0\x42\x02\x81\x86\x12\x53" + b"\0\0", "too old"),
        (GREETING[:16] + b"\0\0", "too old"),
        (GREETING + b"\0" * 20, "confused"),
        (GREETING + reply(OPT_STARTTLS, 1), "confused"),
        (GREETING + reply(OPT_GO, 1), "how large"),
        (GREETING + reply(OPT_GO, 2), "not asked for"),
        (GREETING + EXPORT + reply(OPT_GO, 1) + b"x", "more than it was asked"),
        (GREETING + reply(OPT_GO, 3, b"\0\0\0"), "too few bytes"),
        (GREETING + struct.pack(">QIII", 0x3E889045565A9, 7, 3, MESSAGE_BYTES_MAX + 1), "confused"),
    ],
)
def test_what_is_not_the_protocol_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        fed(data, iter(lambda: len(data), 0))


@pytest.mark.parametrize(
    ("code", "said"),
    [(1, "does not know"), (5, "wants TLS"), (6, "no export of this name"), (99, "error 99")],
)
def test_a_refusal_says_why(code: int, said: str) -> None:
    with pytest.raises(RefusedError, match=f"{said}.*: because") as caught:
        fed(GREETING + reply(OPT_GO, 1 << 31 | code, b"because"), iter(lambda: 5, 0))
    assert caught.value.code == 1 << 31 | code
    assert caught.value.exit_code == 7


@given(st.binary(max_size=200), st.integers(0, len(WHOLE)), st.randoms(use_true_random=False))
def test_nonsense_never_breaks_it(noise: bytes, at: int, rng: random.Random) -> None:
    """Ends with the right answer, a ProtocolError, a RefusedError, or waits for more."""
    shake = Handshake("x")
    data = WHOLE[:at] + noise
    try:
        for byte in range(0, len(data), 5):
            shake.receive(data[byte : byte + 5])
    except (ProtocolError, RefusedError):
        return
    assert not shake.done or data.startswith(WHOLE)


# ---- generations ----------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["next", "refused", "taken", "new"]), max_size=60), st.integers(0, 60)
)
def test_generations_only_rise_and_fit_64_bits(steps: list[str], climb: int) -> None:
    generations = Generations()
    for _ in range(climb):
        generations.refused()
        generations.next()
    highest = generations.last
    for step in steps:
        if step == "new":
            generations = Generations(generations.last)
        elif step == "next":
            found = generations.next()
            assert highest < found < 1 << 63
            highest = found
        else:
            getattr(generations, step)()


def test_a_server_that_is_ahead_is_caught_up_with() -> None:
    """Its generations were given out with a clock that was ten years ahead."""
    generations = Generations()
    ahead = generations.next() + 10 * 366 * 86_400 * 1_000_000
    tries = 0
    while generations.next() <= ahead:
        generations.refused()
        tries += 1
    assert tries < 60
    generations.taken()
    before = generations.last
    assert generations.next() == before + 1


def test_a_server_that_refuses_for_ever_does_not_use_them_up() -> None:
    generations = Generations()
    first = generations.next()
    for _ in range(100_000):
        generations.refused()
        generations.next()
    assert generations.last < first + 2 * CLIMB_US_MAX < 1 << 63


# ---- with a real server ---------------------------------------------------------


@pytest.fixture
def nbdkit(tmp_path: Path) -> Iterator[Path]:
    """nbdkit's own RAM disk on a Unix socket."""
    path = tmp_path / "nbd.sock"
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), "memory", "64M"])
    try:
        wait_for("nbdkit's socket", path.exists)
        yield path
    finally:
        process.terminate()
        process.wait(20)


def test_a_real_server_answers_a_request_after_it(nbdkit: Path) -> None:
    generations = Generations()
    link = dial(Target(str(nbdkit)), generations)
    with link.sock:
        assert link.size_bytes == 64 << 20
        assert link.flags & 1  # NBD_FLAG_HAS_FLAGS
        link.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 42, 4096, 512))
        answer = link.sock.recv(16 + 512, socket.MSG_WAITALL)
        assert struct.unpack_from(">IIQ", answer) == (0x67446698, 0, 42)
        assert answer[16:] == bytes(512)
    assert generations.last > 1_600_000_000_000_000


def test_who_does_not_answer_is_named(tmp_path: Path) -> None:
    target = Target(str(tmp_path / "nobody.sock"))
    with pytest.raises(FileNotFoundError) as caught:
        dial(target, None)
    assert "no NBD server answers at " in str(explain(caught.value, target))
    assert isinstance(explain(OSError(113, os.strerror(113)), target), AttachError)
