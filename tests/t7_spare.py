"""The helper's spare: it inherits what was told last, and only from a mender that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin_helpers import ROOT, wait_for

# A mender as small as can be: it makes a spare, tells it what it is asked to, and writes to a
# file who it is, what it has, and whether its spare lives.
SCRIPT = """
import os, select, signal, socket, sys, time
from plugin.spare import Spare
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda number, frame: say("in good order") or sys.exit(0))
path, tells, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def say(word):
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {word}\\n")
spare, kept = Spare(), []
found = spare.fork()
if found is not None:
    text = found.sock.recv(100).decode() if found.sock else "nothing"
    for pid, line in found.relays or []:
        text += f" {pid} {line.recv(100).decode()}"
    say(f"inherited {found.generation} {text}")
    spare = Spare()
    found = spare.fork()
    say("again" if found is None else "inherited twice")
    spare.dismiss()
    if how == "kill":
        sys.exit(0)
    os.kill(os.getpid(), signal.SIGTERM)
    say("not reached")
say(f"spare {spare.pid}")
for number in range(1, tells + 1):
    ours, its = socket.socketpair()
    ours.send(f"socket{number}".encode())
    kept.append(ours)
    relays = []
    for pid in range(number, number + number % 3):  # none, one, two
        line, far = socket.socketpair()
        line.send(f"relay{pid}".encode())
        kept.append(line)
        relays.append((pid, far))
    spare.tell(its, 1000 + number, relays)
    its.close()
    for _, far in relays:
        far.close()
if how == "dismiss":
    spare.dismiss()
    sys.exit(0)
if how == "lose":  # it is killed while we do not look
    os.kill(spare.pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{spare.pid}"):
        time.sleep(0.01)
    ours, its = socket.socketpair()
    spare.tell(its, 2000, [])
    say(f"has {spare.line} {spare.pid}")
    spare.dismiss()
    sys.exit(0)
if how in ("ask", "answered"):
    os.kill(spare.pid, signal.SIGSTOP if how == "ask" else signal.SIGCONT)
    spare.ask()
    if how == "answered":
        select.select([spare.line], [], [])
    else:
        os.fork() or (time.sleep(0.3), os.kill(spare.pid, signal.SIGCONT), os._exit(0))
if how in ("kill", "order", "ask", "answered"):
    os.kill(os.getpid(), signal.SIGKILL)
while spare.line is not None:
    if not spare.line.getblocking():
        try:
            if spare.line.recv(10) == b"":
                say("spare died")
                sys.exit(0)
        except BlockingIOError:
            time.sleep(0.01)
        except ConnectionResetError:  # with what we sent still unread
            say("spare died")
            sys.exit(0)
"""


def run(path: Path, tells: int, how: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(path), str(tells), how], cwd=ROOT)


def said(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("tells", [0, 1, 5, 200])
def test_a_killed_mender_leaves_its_last_socket_to_its_spare(tmp_path: Path, tells: int) -> None:
    """And the relays that go with it: none, one, or two."""
    path = tmp_path / "said"
    assert run(path, tells, "kill").wait(20) == -signal.SIGKILL
    wait_for("the heir and its own spare", lambda: len(said(path)) == 3)
    spare_pid = said(path)[0].split()[2]
    expected = f"inherited {1000 + tells} socket{tells}" if tells else "inherited 0 nothing"
    expected += "".join(f" {pid} relay{pid}" for pid in range(tells, tells + tells % 3))
    assert said(path)[1] == f"{spare_pid} {expected}"
    assert said(path)[2] == f"{spare_pid} again"


@pytest.mark.parametrize("how", ["ask", "answered"])
def test_a_mender_that_is_killed_with_a_question_open_has_an_heir(tmp_path: Path, how: str) -> None:
    """The spare finds nobody to answer, or learns that its answer was never read."""
    path = tmp_path / "said"
    assert run(path, 5, how).wait(20) == -signal.SIGKILL
    wait_for("the heir", lambda: len(said(path)) >= 2)
    spare_pid = said(path)[0].split()[2]
    assert said(path)[1].startswith(f"{spare_pid} inherited 1005 socket5")


def test_a_mender_that_ends_in_order_takes_its_spare_along(tmp_path: Path) -> None:
    path = tmp_path / "said"
    assert run(path, 3, "dismiss").wait(20) == 0
    spare_pid = int(said(path)[0].split()[2])
    wait_for("the spare to end", lambda: not Path(f"/proc/{spare_pid}").exists())
    assert len(said(path)) == 1


def test_a_dead_spare_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "said"
    process = run(path, 1, "wait")
    wait_for("the spare", lambda: said(path))
    os.kill(int(said(path)[0].split()[2]), signal.SIGKILL)
    assert process.wait(20) == 0
    assert said(path)[1].endswith("spare died")


def test_a_spare_that_is_told_to_end_just_ends(tmp_path: Path) -> None:
    """What a mender does in good order, with the kernel and the relays, is not the spare's."""
    path = tmp_path / "said"
    process = run(path, 1, "wait")
    wait_for("the spare", lambda: said(path))
    os.kill(int(said(path)[0].split()[2]), signal.SIGTERM)
    assert process.wait(20) == 0
    assert len(said(path)) == 2
    assert said(path)[1].endswith("spare died")


def test_an_heir_that_is_told_to_end_does_so_in_good_order(tmp_path: Path) -> None:
    path = tmp_path / "said"
    assert run(path, 1, "order").wait(20) == -signal.SIGKILL
    wait_for("the heir's last word", lambda: len(said(path)) == 4)
    heir = said(path)[0].split()[2]
    assert said(path)[3] == f"{heir} in good order"


def test_a_spare_that_died_unseen_takes_nobody_with_it(tmp_path: Path) -> None:
    path = tmp_path / "said"
    assert run(path, 1, "lose").wait(20) == 0
    assert said(path)[-1].endswith("has None 0")
