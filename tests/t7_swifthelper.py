"""Swift, in whole helpers: who tells the kernel what, in which order, and when not."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.plugin_helpers import ROOT, wait_for
from tests.t7_attach import Helper
from tests.t7_swift import Disk

# A mender as small as can be, whose spare is asked to be swift; then that one has its place.
SCRIPT = """
import os, signal, sys
from plugin.spare import Spare
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
class Swift:
    def begin(self):
        with open(sys.argv[1], "a") as file:
            file.write(f"{os.getpid()}\\n")
spare = Spare(Swift())
if spare.fork() is not None:
    spare = Spare(Swift())
    if spare.fork() is None:
        spare.be_swift()
        spare.dismiss()
    os._exit(0)
spare.be_swift()
spare.be_swift()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_is_the_spare_that_writes(tmp_path: Path) -> None:
    """The helper could wait for a lock whose holder waits for what only the helper can mend."""
    path = tmp_path / "said"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], cwd=ROOT)
    process.wait(20)
    wait_for("two spares", lambda: path.exists() and len(path.read_text().split()) == 3)
    first, again, heir = path.read_text().split()
    assert first == again != str(process.pid)
    assert heir not in (first, str(process.pid))


# A mender that ends while its spare is still asking, which takes a while.
ENDING = """
import os, signal, sys, time
from plugin import spare
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
path, spare.DISMISS_S = sys.argv[1], float(sys.argv[2])
def say(word):
    with open(path, "a") as file:
        file.write(f"{word}\\n")
class Swift:
    def begin(self):
        time.sleep(0.3)
        say("swift")
    def end(self):
        say("careful")
    def is_counting(self):
        return False
made = spare.Spare(Swift())
assert made.fork() is None
made.ask()
made.ask()
while (blind := made.hear()) is None:
    time.sleep(0.01)
assert blind and made.hear() is None
made.be_swift()
made.dismiss()
say("mender")
"""


@pytest.mark.parametrize(
    ("patience_s", "said"),
    [(60, ["swift", "mender"]), (0.01, ["mender", "swift", "careful"])],
)
def test_the_last_word_is_careful(tmp_path: Path, patience_s: float, said: list[str]) -> None:
    """The mender says it when its spare has ended; whose spare does not end has it said by that."""
    path = tmp_path / "said"
    words = [sys.executable, "-c", ENDING, str(path), str(patience_s)]
    assert subprocess.Popen(words, cwd=ROOT).wait(20) == 0
    wait_for("the last word", lambda: path.exists() and len(path.read_text().split()) >= len(said))
    assert path.read_text().split() == said


class Watched(Helper):
    """A Mender that looks after its link; the kernel's statistics are a file.

    told: what the kernel was told, "swift" by the spare, "0" by the mender; and "fork", when it
    made a spare.  spare: whose end of the line this is; its end is the spare's.
    """

    spare: socket.socket
    counting = b"1"

    def __init__(self, folder: Path) -> None:
        self.disk = Disk(folder / "stat")
        self.told: list[str] = []
        super().__init__(folder, adopted=False)

    def mender_with(self, *words: Any) -> Any:
        played: Any = self.kernel
        played.careful = lambda: self.told.append("careful")
        played.swift = lambda: self.told.append("0")
        made = super().mender_with(*words)
        made._stall = self.disk.stall(1)
        spare: Any = made._spare

        def fork() -> None:
            self.told.append("fork")
            spare.line, self.spare = socket.socketpair()

        fork()
        self.told.clear()

        def ask() -> None:
            with contextlib.suppress(OSError):
                self.spare.send(self.counting)

        spare.fork, spare.ask = fork, ask
        spare.be_swift = lambda: self.told.extend(["swift"] if spare.line is not None else [])
        return made

    def set(self, waiting: int) -> None:
        self.disk.waiting = waiting
        self.disk.write()

    def end(self) -> None:
        spare: Any = self.mender._spare
        spare.fork = lambda: None
        self.set(0)
        self.spare.close()  # so that nobody waits for its end
        super().end()
        self.spare.close()


def test_a_server_that_hangs_is_left_and_dialled_again(tmp_path: Path) -> None:
    """Requests wait and none is answered: the kernel's link is shut down, by the helper."""
    helper = Watched(tmp_path)
    try:
        wait_for("the first link", helper.kernel.lives)
        takes, generation = helper.kernel.takes, helper.generations.last
        helper.set(3)
        wait_for("another link", lambda: helper.kernel.takes > takes)
        helper.set(0)
        assert helper.page.values["stuck"] >= 1
        assert helper.generations.last > generation
        wait_for("it to live", helper.kernel.lives)
        wait_for("swift again", lambda: helper.told[-1] == "swift")
        assert helper.told.count("careful") == helper.page.values["stuck"], "once for each death"
    finally:
        helper.end()


def test_switched_off_statistics_end_no_link_and_make_the_kernel_look(tmp_path: Path) -> None:
    """Once; and on again the helper looks."""
    helper = Watched(tmp_path)
    try:
        wait_for("swift", lambda: helper.told == ["swift"])
        takes = helper.kernel.takes
        helper.counting = b"0"
        helper.set(3)
        wait_for("careful", lambda: helper.told == ["swift", "0", "careful"])
        stall: Any = helper.mender._stall
        looks: list[bool] = []
        look = stall.look

        def counted() -> bool:
            looks.append(look())
            return looks[-1]

        stall.look = counted
        wait_for("looks", lambda: len(looks) > 12)
        assert helper.told == ["swift", "0", "careful"]
        assert helper.kernel.takes == takes
        assert "stuck" not in helper.page.values
        helper.set(0)
        helper.counting = b"1"
        wait_for("swift again", lambda: helper.told[-1] == "swift")
    finally:
        helper.end()


def test_without_a_spare_the_kernel_ends_no_new_link(tmp_path: Path) -> None:
    """What the last link left has a short timer: so the timeout is 0 before any spare is there,
    which is made only when the link has answered."""
    helper = Watched(tmp_path)
    try:
        wait_for("swift", lambda: helper.told == ["swift"])
        helper.set(3)
        helper.kill_server()
        wait_for("it to see that", lambda: helper.told[-1] == "careful")
        helper.spare.close()
        helper.start_server()
        wait_for("timeout 0", lambda: helper.told[-1] == "0")
        assert helper.told == ["swift", "careful", "0"], "no fork: nothing has been answered yet"
        helper.disk.end(4)
        helper.set(3)
        wait_for("a spare", lambda: helper.told[-2:] == ["fork", "swift"])
    finally:
        helper.end()


def test_nothing_is_made_on_a_link_that_hangs(tmp_path: Path) -> None:
    """A fork there would wait for memory, which nobody gives, and nobody would end the link."""
    helper = Watched(tmp_path)
    try:
        wait_for("swift", lambda: helper.told == ["swift"])
        takes = helper.kernel.takes
        helper.set(3)
        looked: Any = helper.mender._stall
        wait_for("a look in vain", lambda: not looked.is_calm())
        helper.spare.close()
        wait_for("another link", lambda: helper.kernel.takes > takes)
        assert "fork" not in helper.told
        helper.set(0)
        wait_for("a spare", lambda: "fork" in helper.told)
    finally:
        helper.end()


@pytest.mark.parametrize("answers", [True, False])
def test_who_ends_leaves_no_short_timer_with_a_timeout(tmp_path: Path, answers: bool) -> None:
    """Careful, when what waits is answered; else the ring of its timer would end the link, which
    nobody mends any more."""
    helper = Watched(tmp_path)
    wait_for("swift", lambda: helper.told == ["swift"])
    stall: Any = helper.mender._stall

    def settles(within_s: float) -> bool:
        helper.told.append("settle")
        return answers

    stall.settles = settles
    helper.end()
    helper.told.clear()
    helper.mender._swift = True  # as on a link that lives
    helper.mender.close()
    assert helper.told == ["0", "settle", *(["careful"] if answers else [])]
