"""Swift: what the helper says to the kernel, when, and how it finds a server that hangs."""

from __future__ import annotations

import os
import random
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from plugin import nbdnetlink
from plugin.swift import RESEND_S, TICKS_MIN, TIMER_MS, Asker, Stall, Swift

CAREFUL, SWIFT = b"careful-" * 4, b"swift---" * 4


# ---- looking for a hang -----------------------------------------------------------


class Disk:
    """/sys/block/nbdN/stat as the kernel writes it: requests that ended, and how many wait."""

    def __init__(self, path: Path, fields: int = 17) -> None:
        self.path, self.fields = path, fields
        self.ended = {0: 0, 4: 0, 11: 0, 15: 0}
        self.waiting = 0
        self.write()
        self.fd = os.open(path, os.O_RDONLY)

    def stall(self, limit_s: float) -> Stall:
        return Stall(self.fd, limit_s)

    def write(self) -> None:
        words = [self.ended.get(at, 7 * at) for at in range(self.fields)]
        words[8] = self.waiting
        text = " ".join(f"{word:8}" for word in words) + "\n"
        with self.path.open("r+b" if self.path.exists() else "wb", buffering=0) as file:
            file.write(text.encode())  # at once, as in sysfs: never empty

    def end(self, at: int) -> None:
        self.ended[at] += 1


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "stat")


@pytest.mark.parametrize("limit_s", [2, 3, 10])
def test_a_hang_is_found_in_time_and_nothing_else_is(
    disk: Disk, limit_s: int, rng: random.Random
) -> None:
    """Links that are busy, idle and slow, in turns, until they hang.

    As long as something ends, or nothing waits, within any `limit_s`, none is ended.  A hang ends
    it after `limit_s` and two looks; later only where nothing has ended on this link yet.
    """
    stall = disk.stall(limit_s)
    limit_looks = int(limit_s / stall.tick_s)
    for turn in range(60):
        stall.begin()
        ended = False
        for _ in range(rng.randrange(6) if turn else 0):
            for _ in range(rng.randrange(1, limit_looks + 1)):  # slow
                disk.waiting = rng.choice([1, 128])
                disk.write()
                assert not stall.look()
            if rng.random() < 0.6:
                disk.end(rng.choice(list(disk.ended)))
                ended = True
            else:
                disk.waiting = 0
            disk.write()
            assert not stall.look()
        disk.waiting = 1  # it hangs, from just before the next look on
        disk.write()
        looks = 1
        while not stall.look():
            looks += 1
            assert looks < 200
        hung_s = (looks - 1) * stall.tick_s
        assert hung_s >= limit_s, "an alarm too early"
        assert hung_s <= limit_s + 2 * stall.tick_s + (0 if ended else RESEND_S)


def test_a_slow_server_is_not_a_hang(disk: Disk) -> None:
    """One answer in less than the limit is enough, whatever kind of request it was."""
    stall = disk.stall(3)
    disk.waiting = 128
    for turn in range(40):
        if turn % 4 == 0:
            disk.end((0, 4, 11, 15)[turn // 4 % 4])
        disk.write()
        assert not stall.look()


def test_who_slept_has_seen_one_look(disk: Disk) -> None:
    """Looks are counted, not seconds: a machine that stood still for an hour ends no link."""
    stall = disk.stall(3)
    disk.waiting = 1
    disk.write()
    for _ in range(TICKS_MIN):
        assert not stall.look()


def test_an_old_kernel_has_fewer_numbers_and_a_device_may_go(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "old", fields=11)
    disk.waiting = 1
    disk.write()
    stall = disk.stall(2)
    looks = 1
    while not stall.look():
        looks += 1
        assert looks < 20
    os.close(disk.fd)
    stall.begin()
    assert not any(stall.look() for _ in range(20))


def test_without_statistics_no_link_is_ended(disk: Disk) -> None:
    """Kernels up to 6.9 count what waits all the same, and nothing that ends."""
    stall = disk.stall(2)
    disk.waiting = 3
    disk.write()
    assert not any(stall.look() for _ in range(4))
    stall.blind = True
    assert not any(stall.look() for _ in range(40))
    stall.blind = False
    looks = 1
    while not stall.look():
        looks += 1
    assert looks > RESEND_S / stall.tick_s + TICKS_MIN, "it looks from now on"


def test_a_link_is_calm_while_it_answers(disk: Disk) -> None:
    """Before the helper waits for memory, the link must have answered since it began."""
    stall = disk.stall(2)
    assert stall.is_calm(), "nothing waits"
    disk.waiting = 2
    disk.write()
    assert not stall.is_calm()
    assert not stall.look()
    assert not stall.is_calm()
    disk.end(4)
    disk.write()
    assert stall.is_calm(), "at once"
    stall.look()
    assert stall.is_calm()
    stall.look()
    assert not stall.is_calm(), "nothing has ended since the last look"
    disk.waiting = 0
    disk.write()
    assert stall.is_calm()
    disk.waiting = 1
    disk.end(4)
    disk.write()
    stall.begin()
    assert not stall.is_calm(), "that was the last link's"


def test_what_waits_settles(disk: Disk) -> None:
    stall = disk.stall(2)
    assert stall.settles(0)
    disk.waiting = 2
    disk.write()
    assert not stall.settles(0)
    for ended, settled in ((1, False), (2, True)):
        begun, real = disk.ended[0], stall._read

        def read(want: int = begun + ended, real: Any = real) -> tuple[int, int]:
            found: tuple[int, int] = real()
            disk.ended[0] = want
            disk.write()
            return found

        stall._read = read  # type: ignore[method-assign]
        assert stall.settles(0.05) == settled, "as many have to end as were waiting"
        stall._read = real  # type: ignore[method-assign]


# ---- what the kernel is told --------------------------------------------------------


class Answering(Asker):
    """Says what it was asked, and answers what it is told to."""

    def __init__(self, asked: list[bytes], error: int = 0) -> None:
        self.asked, self.error = asked, error

    def ask(self, message: bytes) -> None:
        self.asked.append(message)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


def queue(folder: Path, iostats: str = "1\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "io_timeout").write_text("30000\n")
    (folder / "iostats").write_text(iostats)
    return folder


def swift_with(folder: Path, kernel: Asker) -> Swift:
    return Swift(str(folder), kernel, SWIFT, CAREFUL)


def test_the_timer_is_set_after_the_timeout(tmp_path: Path) -> None:
    """The other way round the kernel would make it 30 s again."""
    timer = queue(tmp_path / "queue") / "io_timeout"

    class Kernel(Answering):
        def ask(self, message: bytes) -> None:
            super().ask(message)
            timer.write_text("30000\n")

    asked: list[bytes] = []
    swift_with(timer.parent, Kernel(asked)).begin()
    assert asked == [SWIFT]
    assert timer.read_bytes().startswith(TIMER_MS)


def test_without_statistics_the_kernel_goes_on_looking_itself(tmp_path: Path) -> None:
    """iostats=0: nothing is counted, and no hang could be seen."""
    asked: list[bytes] = []
    swift_with(queue(tmp_path / "queue", iostats="0\n"), Answering(asked)).begin()
    assert asked == []


def test_a_kernel_that_refuses_is_left_as_it_was(tmp_path: Path) -> None:
    folder = queue(tmp_path / "queue")
    asked: list[bytes] = []
    swift_with(folder, Answering(asked, 22)).begin()
    assert asked == [SWIFT]
    assert (folder / "io_timeout").read_text() == "30000\n"
    made = swift_with(folder, Answering(asked))
    os.close(made._timer)
    made._timer = os.open("/dev/full", os.O_WRONLY)
    made.begin()
    assert asked == [SWIFT, SWIFT, CAREFUL]


def test_only_kernels_that_are_known_to_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdnetlink, "SYSFS", tmp_path)
    monkeypatch.setattr(nbdnetlink, "KALLSYMS", tmp_path / "none")
    (tmp_path / "nbd0").mkdir()
    queue(tmp_path / "nbd0/queue")
    for release in ("5.8.0", "5.10.0-28-amd64", "6.1.176", "6.12.1-rc1"):
        assert nbdnetlink.can_be_swift(0, release), release
    for release in ("4.19.0", "5.7.19", "6.13.0", "7.0", "strange"):
        assert not nbdnetlink.can_be_swift(0, release), release
    symbols = tmp_path / "kallsyms"
    monkeypatch.setattr(nbdnetlink, "KALLSYMS", symbols)
    assert nbdnetlink.can_be_swift(0, "6.1.0"), "nothing to read: by its number alone"
    symbols.write_text("0 t nbd_xmit_timeout\t[nbd]\n")
    assert nbdnetlink.can_be_swift(0, "6.1.0")
    symbols.write_text("0 t nbd_xmit_timeout\t[nbd]\n0 t nbd_pending_cmd_work\t[nbd]\n")
    assert not nbdnetlink.can_be_swift(0, "6.1.0"), "brought back"
    symbols.unlink()
    (tmp_path / "nbd0/queue/io_timeout").unlink()
    assert not nbdnetlink.can_be_swift(0, "6.1.0")


def test_the_message_that_sets_the_timeout() -> None:
    """Golden bytes, little-endian: the timeout is the last attribute."""
    for seconds in (0, 3):
        found = nbdnetlink.timeout_message(26, 3, "zcache:x", seconds)
        assert found[:8] == len(found).to_bytes(4, "little") + b"\x1a\0\x05\0"
        assert found[16:20] == b"\3\1\0\0"  # RECONFIGURE, version 1
        assert found[44:] == b"\x0c\0\4\0" + struct.pack("<Q", seconds)


def test_an_answer_that_was_left_for_somebody_else_is_passed_over() -> None:
    """The socket of a helper that was killed before it read it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asker = Asker.__new__(Asker)
    asker._sequence, asker._sock = 0, ours

    def answer(sequence: int, error: int) -> bytes:
        return struct.pack("=IHHIIi", 36, 2, 0, sequence, 0, error).ljust(36, b"\0")

    with ours, its:
        asked = (os.getpid() << 12 ^ 1) & 0xFFFFFFFF
        its.send(answer(1, -22))
        its.send(answer(asked, 0))
        asker.ask(b"m" * 20)
        sent = its.recv(100)
        assert sent == b"m" * 8 + struct.pack("=I", asked) + b"m" * 8
