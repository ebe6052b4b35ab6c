"""The words between the harness and PID 1 of the guest (guest/agent.c), without any I/O.

    "7 run hog - /mnt/hog --mib 64\\n"   to the guest:   number, verb, words
    "7 ok 123\\n"                        its answer:     number, ok or error, words
    "! exit hog 123 0 user_ms=9 ...\\n"  said by itself: !, what, words

Words are separated by one space; bytes that are not plain printable ASCII, and %, are written %XX.
An empty word cannot be sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_to_bytes


def escape(word: str) -> str:
    assert word, "an empty word cannot be sent"
    return "".join(
        chr(byte) if 32 < byte < 127 and byte != ord("%") else f"%{byte:02X}"
        for byte in word.encode()
    )


def unescape(word: str) -> str:
    return unquote_to_bytes(word).decode(errors="replace")


def encode(number: int, *words: str) -> bytes:
    return (" ".join([str(number), *map(escape, words)]) + "\n").encode()


@dataclass(frozen=True)
class Answer:
    """What the guest said to command `number`."""

    number: int
    good: bool
    text: str


@dataclass(frozen=True)
class Event:
    """What the guest said by itself."""

    kind: str
    words: tuple[str, ...]


def decode(line: str) -> Answer | Event:
    """Raises ValueError for a line that is neither."""
    first, _, rest = line.partition(" ")
    words = [unescape(word) for word in rest.split(" ")]
    if first == "!":
        return Event(words[0], tuple(words[1:]))
    if words[0] not in ("ok", "error"):
        raise ValueError(f"not a line of the agent: {line!r}")
    return Answer(int(first), words[0] == "ok", " ".join(words[1:]))
