"""The node process of a server with peers is killed: another one goes on, ready beforehand.

That it needs no memory for it is proved in the lab (t8_peers).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lender_helpers import Lender, Model, live, stats
from tests.plugin_helpers import ROOT, WAIT_S, Server, node_processes, wait_for

WORDS = ("size=16M", "pool=1M")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    lenders = [Lender(tmp_path, f"d{i}") for i in range(2)]
    try:
        addresses = ",".join(lender.address for lender in lenders)
        with Server(tmp_path, *WORDS, f"peers={addresses}") as server:
            wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
            yield server
    finally:
        for lender in lenders:
            lender.end()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def players(server: Server) -> tuple[int, int, int]:
    """Origin, actor and understudy, once there are all three."""

    def look() -> tuple[int, int, int] | None:
        answer = server.ping()
        if answer is None:
            return None
        actor = answer["pid"]
        origin = parent(actor)
        found = Path(f"/proc/{origin}/task/{origin}/children").read_text().split()
        others = [int(pid) for pid in found if int(pid) != actor]
        return (origin, actor, others[0]) if others else None

    found: tuple[int, int, int] = wait_for("an actor and its understudy", look)
    return found


def status(pid: int) -> dict[str, str]:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (row.partition(":") for row in rows)}


@pytest.mark.timeout(200)
def test_each_killed_node_has_its_successor(server: Server, rng: random.Random) -> None:
    model = Model(server, rng, 1500)
    model.fill()
    assert stats(server)["pers_pages_remoted"] > 500
    origin = players(server)[0]
    for _ in range(4):
        now = players(server)
        assert now[0] == origin
        os.kill(now[1], signal.SIGKILL)
        model.check(30)
        assert players(server)[1] == now[2], "who was ready goes on"
        wait_for("the donors", lambda: live(server) == 2)
        model.churn(50)
    model.check()
    assert "the node process ended" not in server.log(), "nobody had to be started"
    assert stats(server)["remote_pers_pages_unsucc_get"] == 0
    assert len(node_processes(server.pid)) == 3


def test_what_waits_is_locked_and_does_nothing(server: Server) -> None:
    origin, actor, waits = players(server)
    for pid in (origin, waits):
        assert status(pid)["Threads"] == "1"
        assert status(pid)["VmSwap"].split()[0] == "0"
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        assert not any(link.startswith("socket:") for link in links)
    if int(status(waits)["VmLck"].split()[0]):  # where locking is permitted
        assert int(status(waits)["VmLck"].split()[0]) > int(status(waits)["RssAnon"].split()[0])
    # It shares no page with who made it: nothing of its own has to be copied when it goes on.
    mine = Path(f"/proc/{waits}/smaps_rollup").read_text()
    private = next(row for row in mine.splitlines() if row.startswith("Private_Dirty:"))
    assert int(private.split()[1]) > 0.9 * int(status(waits)["RssAnon"].split()[0])
    assert actor in node_processes(server.pid)


def files(pid: int) -> set[str]:
    """What it has mapped."""
    rows = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {row.split(maxsplit=5)[5] for row in rows if "/" in row}


def test_it_has_every_library_beforehand(tmp_path: Path) -> None:
    """Also of what is loaded only when a key asks for it."""
    at = tmp_path / "lent"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # no etcd
        words = [f"listen={at}", "donate=24M", "metrics=127.0.0.1:0"]
        words += [f"etcd=http://127.0.0.1:{silent.getsockname()[1]}"]
        with Server(tmp_path, *WORDS, *words) as server:
            wait_for("it lends", at.exists)
            wait_for("metrics", lambda: ":0" not in server.rpc("config")["metrics"])
            _, actor, waits = players(server)
            libraries = {name for name in files(actor) if ".so" in name}
            assert libraries <= files(waits)


@pytest.mark.parametrize("who", ["the understudy", "the origin"])
def test_another_one_is_made(server: Server, rng: random.Random, who: str) -> None:
    model = Model(server, rng, 1000)
    model.fill()
    origin, actor, waits = players(server)
    os.kill(waits if who == "the understudy" else origin, signal.SIGKILL)
    model.check(30)
    wait_for("others", lambda: not {origin, waits} <= set(players(server)))
    wait_for("the donors", lambda: live(server) == 2)
    model.check()
    if who == "the understudy":
        assert players(server)[:2] == (origin, actor)
    else:
        assert "the node process ended (signal 9)" in server.log()


ENDS = """
import os, signal, sys
from cluster.understudy import act
def play():
    with open(sys.argv[1], "ab") as file:
        file.write(b"x")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "fails":
        raise RuntimeError("on purpose")
    return 7
watched, other = os.pipe()
if sys.argv[3] == "over":
    os.close(other)
sys.exit(act(play, watched, False))
"""


@pytest.mark.parametrize(
    ("how", "over", "code", "plays"),
    [
        ("returns", "", 7, 1),
        ("fails", "", 1, 1),
        ("killed", "", 1, 5),
        ("killed", "over", 1, 1),
    ],
)
def test_how_it_ends(tmp_path: Path, how: str, over: str, code: int, plays: int) -> None:
    """By itself: that is the end.  Killed at once, again and again: as well, after five."""
    count = tmp_path / "count"
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(count), how, over],
        cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert len(count.read_bytes()) == plays
    assert ("on purpose" in done.stderr) == (how == "fails")
