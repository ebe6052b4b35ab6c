"""`make run`'s script: serves, tells how to use it, stops cleanly, and not by accident."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("size=64M", "pool=64M")

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv/bin/python").exists(), reason="the script runs what `make setup` made"
)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts run.sh with sockets and a list of swap areas in a folder of the test."""
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename\tType\tSize\n")
    running = []

    def run(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [ROOT / "deploy/run.sh", *words],
            env={**os.environ, "ZCACHE_RUNTIME_DIR": str(tmp_path), "ZCACHE_SWAPS": str(swaps)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield run
    swaps.write_text("")
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        assert process.stdout
        process.stdout.close()


def told(process: subprocess.Popen[str], until: str) -> str:
    """What it prints up to the line that contains `until`."""
    lines = ""
    assert process.stdout
    for line in process.stdout:
        lines += line
        if until in line:
            return lines
    pytest.fail(f"ended without {until!r}:\n{lines}")


def test_it_serves_and_tells_how(start: Start, tmp_path: Path) -> None:
    server = start(*SIZES)
    text = told(server, "Ctrl-C stops")
    for word in ("nbd-client -unix", "mkswap", "swapon --discard", "swapoff", "zcache status"):
        assert word in text
    status = subprocess.run(
        [
            sys.executable,
            "-m",
            "plugin.cli",
            "status",
            "--json",
            f"--control={tmp_path}/zcache.ctl",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(status.stdout)["config"]["size"] == 64 << 20
    server.send_signal(signal.SIGINT)
    assert "zcache: stopped." in told(server, "stopped")
    assert server.wait(30) == 0
    assert not (tmp_path / "zcache.sock").exists()


def test_a_second_server_is_refused(start: Start) -> None:
    told(start(*SIZES), "Ctrl-C stops")
    second = start(*SIZES)
    assert "already answers" in told(second, "zcache:")
    assert second.wait(30) == 1


def test_the_socket_of_a_killed_server_is_no_obstacle(start: Start, tmp_path: Path) -> None:
    first = start(*SIZES)
    told(first, "Ctrl-C stops")
    server = server_of(first)
    os.kill(server, signal.SIGKILL)
    assert "ended by itself" in told(first, "ended")
    assert first.wait(30) == 128 + signal.SIGKILL
    # The script has taken the socket away; one that it could not lies there like this.
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "zcache.sock"))
    stale.close()
    told(start(*SIZES), "Ctrl-C stops")


def test_a_wrong_key_is_told_and_ends_it(start: Start) -> None:
    process = start(*SIZES, "poool=1G")
    assert "there is no key poool" in told(process, "poool")
    assert process.wait(30) != 0


def test_the_first_ctrl_c_under_live_swap_only_warns(start: Start, tmp_path: Path) -> None:
    process = start(*SIZES)
    told(process, "Ctrl-C stops")
    (tmp_path / "swaps").write_text("Filename\tType\n/dev/nbd0  partition  65532  0  100\n")
    process.send_signal(signal.SIGINT)
    assert "run swapoff first" in told(process, "Ctrl-C again")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    told(process, "stopped")
    assert process.wait(30) == 0


def server_of(script: subprocess.Popen[str]) -> int:
    """Process number of the nbdkit that a run.sh started."""
    for child in Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split():
        if "nbdkit" in Path(f"/proc/{child}/comm").read_text():
            return int(child)
    raise AssertionError("run.sh has no nbdkit")
