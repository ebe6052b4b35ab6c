"""Peers in every face: status, top, metrics, /api/state, health, recording, doctor."""

from __future__ import annotations

import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lender_helpers import Lender, lent
from tests.plugin_helpers import ROOT, Server, environment, wait_for
from tests.tmux_helpers import Tmux

PAGE = 4096


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[list[Lender]]:
    with lent(tmp_path, 3, "--metrics", "127.0.0.1:0") as made:
        yield made


@pytest.fixture
def server(tmp_path: Path, peers: list[Lender]) -> Iterator[Server]:
    addresses = ",".join(lender.address for lender in peers)
    words = ("size=16M", "pool=2M", f"peers={addresses}", "metrics=127.0.0.1:0")
    with Server(tmp_path, *words) as running:
        wait_for("peers", lambda: states(running) == ["up"] * 3)
        yield running


def states(server: Server) -> list[str]:
    return [peer["state"] for peer in server.rpc("peers")]


def zcache(server: Server, folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "plugin.cli", *words], cwd=ROOT, env=environment(folder),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def lines_of(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


@pytest.mark.timeout(200)
def test_a_peer_that_is_killed_is_seen_in_every_face(
    server: Server, peers: list[Lender], tmp_path: Path, rng: random.Random
) -> None:
    handle = server.connect()
    for page in range(1500):
        handle.pwrite(rng.randbytes(3000).ljust(PAGE, b"x"), page * PAGE)
    wait_for("pages at peers", lambda: server.rpc("stats")["pers_pages_remoted"] > 500)
    for page in range(300):
        handle.pread(PAGE, page * PAGE)
    asked = ("--control", str(server.control))
    record = ("record", str(tmp_path / "r"), "--interval", "0.2", *asked)
    zcache(server, tmp_path, *record, "--count", "3")

    told = zcache(server, tmp_path, "status", *asked)
    assert "3 of 3 answer" in told
    for lender in peers:
        assert lines_of(told, lender.address, "up, answers in", "copies")
    for words in ("get, peer ", "to peers ", "peer asked "):
        assert words in told, told
    seen = zcache(server, tmp_path, "top", "--once", "--interval", "0.2", *asked)
    assert lines_of(seen, "peers", "3 of 3 answer")
    assert lines_of(seen, "2 copies of a page, no copy is missing")
    assert lines_of(seen, "get, peer")

    gone = peers[1]
    gone.kill()
    wait_for("it is known", lambda: states(server).count("up") == 2)
    for page in range(300, 600):
        handle.pread(PAGE, page * PAGE)  # each still has a copy elsewhere
    zcache(server, tmp_path, *record, "--count", "3")
    told = zcache(server, tmp_path, "status", *asked)
    assert "2 of 3 answer" in told
    assert lines_of(told, gone.address)
    assert not lines_of(told, gone.address, ": up")
    seen = zcache(server, tmp_path, "top", "--once", "--interval", "0.2", *asked)
    assert lines_of(seen, "peers", "2 of 3 answer")
    assert seen.index(gone.address) < seen.index(peers[0].address), "trouble first"
    assert "1 of 3 peers do not answer" in zcache(server, tmp_path, "health", *asked)
    where = server.rpc("config")["metrics"]
    with urllib.request.urlopen(f"http://{where}/metrics", timeout=20) as answer:
        scraped = answer.read().decode()
    assert f'zcache_peer_up{{peer="{gone.address}"}} 0.0' in scraped
    assert f'zcache_peer_up{{peer="{peers[0].address}"}} 1.0' in scraped
    assert "zcache_get_peer_duration_seconds_count" in scraped
    over_http = zcache(
        server, tmp_path, "top", "--once", "--interval", "0.2", "--control", f"http://{where}"
    )
    assert lines_of(over_http, gone.address)
    told = zcache(server, tmp_path, "doctor", str(tmp_path / "r"))
    assert lines_of(told, "peer", gone.address, "was away 1 times")
    assert lines_of(told, "get, peer: half below")


@pytest.mark.timeout(200)
def test_both_sides_in_a_terminal(server: Server, peers: list[Lender], tmp_path: Path) -> None:
    """`zcache top` of the owner and of a lender, while another lender is killed and one drained."""
    handle, rng = server.connect(), random.Random(1)
    for page in range(1000):
        handle.pwrite(rng.randbytes(3000).ljust(PAGE, b"x"), page * PAGE)
    wait_for("pages at peers", lambda: server.rpc("stats")["pers_pages_remoted"] > 200)

    def top(control: Path, width: int, height: int) -> Tmux:
        words = [sys.executable, "-m", "plugin.cli", "top", "--interval", "0.3"]
        env = environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
        return Tmux(tmp_path, [*words, "--control", str(control)], width, height, env)

    lender, gone = peers[0], peers[2]
    with top(server.control, 110, 50) as owners, top(lender.control, 100, 24) as lenders:
        owners.wait_for("3 of 3 answer", "no copy is missing", "lender0 at", "to peers")
        lenders.wait_for("lent ", "1 owner, on", "asked back", "room for", "heard of", "q quit")
        assert "e change" not in lenders.screen()
        gone.kill()
        owners.wait_for("2 of 3 answer", "1 of 3 peers do not answer")
        lenders.keys("d")
        lenders.wait_for("ask the owners to take every page back?")
        lenders.keys("y")
        lenders.wait_for("health degraded: it is being drained", "room for 0 B")
        owners.wait_for("draining, answers in")
        for terminal in (owners, lenders):
            terminal.keys("q")
            terminal.wait_for("ended: 0")


def test_a_node_that_lends_in_status_health_and_record(peers: list[Lender], tmp_path: Path) -> None:
    """It has no swap device: nothing to record."""

    control = str(peers[0].control)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "plugin.cli", words[0], "--control", control, *words[1:]],
            cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=100,
        )  # fmt: skip

    assert "lends" in run("status").stdout
    assert run("health").stdout == "health  ok\n"
    assert "nobody has been here yet" in run("top", "--once", "--interval", "0.1").stdout
    where = "http://" + wait_for("metrics", lambda: peers[0].rpc("config")["metrics"])
    assert "lender0, process" in run("status", "--control", where).stdout
    with urllib.request.urlopen(f"{where}/metrics", timeout=20) as answer:
        scraped = answer.read().decode()
    assert "zcache_foreign_owners 0.0" in scraped
    assert "zcache_node_start_time_seconds" in scraped
    assert "zcache_server_start_time_seconds" not in scraped
    done = run("record", str(tmp_path / "x"))
    assert done.returncode == 6, done.stderr
    assert "zcache status" in done.stderr
    assert "Traceback" not in done.stderr
