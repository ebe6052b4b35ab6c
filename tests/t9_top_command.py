"""`zcache top` and `zcache health` as commands: in a real terminal, into a pipe, from elsewhere."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plugin import cli, top, topview
from plugin.reach import reach
from tests.plugin_helpers import ROOT, Server, environment, swap_like, wait_for
from tests.tmux_helpers import Tmux
from tests.top_helpers import FakeServer
from zcache_core.errors import ControlError

PAGE = 4096
PICTURES = os.environ.get("ZCACHE_PICTURES")  # where to put pictures for the documents


def words(server: Server, *more: str) -> list[str]:
    return [sys.executable, "-m", "plugin.cli", "top", "--control", str(server.control), *more]


def env(folder: Path) -> dict[str, str]:
    return environment(folder) | {"PYTHONPATH": str(ROOT)}


def fill(handle: Any, first: int, pages: int) -> None:
    for page in range(first, first + pages):
        handle.pwrite((b"page %4d " % page * 410)[:PAGE], page * PAGE)


@pytest.fixture
def server(tmp_path: Path) -> Any:
    disk = tmp_path / "disk"
    with Server(tmp_path, "size=16M", "pool=4M", f"disk={disk}", "disk_size=40M") as running:
        yield running


def test_in_a_terminal(server: Server, tmp_path: Path) -> None:
    handle = server.connect()
    fill(handle, 0, 200)
    with Tmux(tmp_path, words(server, "--interval", "0.2"), 120, 40, env(tmp_path)) as terminal:
        terminal.wait_for("zcache", f"server {server.pid}", "health ", "200 pages", "q quit",
                          "from below")  # fmt: skip
        assert "\x1b[" in terminal.colours()
        fill(handle, 200, 100)
        terminal.wait_for("300 pages")
        for width, height, there in ((80, 24, "pages/s"), (60, 10, "device"), (30, 4, "health"),
                                     (200, 50, "from below")):  # fmt: skip
            terminal.resize(width, height)
            assert len(terminal.wait_for(there, "q quit").rstrip("\n").splitlines()) <= height
        terminal.keys("c")
        terminal.wait_for("read_requests", "sorted by table")
        terminal.keys("s")
        terminal.wait_for("buddied_count", "sorted by name")
        terminal.keys("c", "p")
        terminal.wait_for("PAUSED")
        fill(handle, 300, 100)
        terminal.keys("e")
        terminal.keys("-l", "high=70 low=60")
        terminal.keys("Enter")
        terminal.wait_for("set high=70 low=60 on this server?")
        terminal.keys("y")
        terminal.wait_for("high 70, low 60", "300 pages")
        terminal.keys("p")
        terminal.wait_for("from 70 % to 60 %", "400 pages")
        terminal.keys("q")
        after = terminal.wait_for("ended: 0")
    assert "health" not in after  # the screen of before is back
    assert server.rpc("config")["high"] == 70


def test_it_outlives_the_node_process(server: Server, tmp_path: Path) -> None:
    with Tmux(tmp_path, words(server, "--interval", "0.1"), 100, 30, env(tmp_path)) as terminal:
        terminal.wait_for("health ")
        os.kill(server.node_pid, signal.SIGSTOP)
        terminal.wait_for("no answer:")
        os.kill(server.node_pid, signal.SIGKILL)
        terminal.wait_for("health ")
        terminal.keys("C-c")
        terminal.wait_for("ended: 0")


def test_ended_by_a_signal_it_gives_the_terminal_back(server: Server, tmp_path: Path) -> None:
    with Tmux(tmp_path, words(server), 100, 30, env(tmp_path)) as terminal:
        terminal.wait_for("health ")
        shell = terminal.pid()
        (child,) = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        terminal.wait_for("ended: 0")
        assert "health" not in terminal.screen()
        terminal.keys("typed")
        terminal.wait_for("typed")  # keys are echoed again


def test_as_text_when_not_a_terminal(server: Server, tmp_path: Path) -> None:
    handle = server.connect()
    fill(handle, 0, 50)
    once = words(server, "--once", "--interval", "0.1")
    done = subprocess.run(
        once, env=env(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "50 pages" in done.stdout
    assert "q quit" not in done.stdout
    assert done.stdout.count("\nRAM ") == 1
    with subprocess.Popen(
        words(server, "--interval", "0.1"), env=env(tmp_path), cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    ) as going:  # fmt: skip
        assert going.stdout is not None
        seen: list[str] = []
        reading = threading.Thread(target=lambda: seen.extend(going.stdout or ()))
        reading.start()
        wait_for("the third look", lambda: sum(s.startswith("health") for s in seen) >= 3)
        going.send_signal(signal.SIGINT)
        assert going.wait(30) == 0
        reading.join()


def test_from_another_machine(tmp_path: Path) -> None:
    """Over the web address: looking, and a clear no to changes."""
    with Server(tmp_path, "size=16M", "pool=4M", "metrics=127.0.0.1:0") as server:
        fill(server.connect(), 0, 60)
        where = "http://" + wait_for("metrics", lambda: server.rpc("config")["metrics"])
        command = [
            sys.executable,
            "-m",
            "plugin.cli",
            "top",
            "--interval",
            "0.2",
            "--control",
            where,
        ]
        with Tmux(tmp_path, command, 100, 30, env(tmp_path)) as terminal:
            terminal.wait_for("60 pages", where)
            fill(server.connect(), 60, 10)
            terminal.wait_for("70 pages")
            terminal.keys("d")
            terminal.wait_for("move every page")
            terminal.keys("y")
            terminal.wait_for("drain is not possible over http")
            terminal.keys("q")
            terminal.wait_for("ended: 0")
        with pytest.raises(ControlError, match="is that what metrics= of a server says"):
            reach(where + "/metrics")("ping")
        with pytest.raises(ControlError, match="no answer from"):
            reach("http://127.0.0.1:1")("stats")


def test_top_of_nobody_and_wrong_words(tmp_path: Path) -> None:
    for more, code, said in (
        (["--control", str(tmp_path / "no.ctl")], 6, "nobody serves the control socket"),
        (["--interval", "0"], 3, "write seconds"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "plugin.cli", "top", *more],
            env=env(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (code, "")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_health_has_exit_codes(server: Server, tmp_path: Path) -> None:
    def run(*more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "plugin.cli", "health", *more],
            env=env(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout

    control = ["--control", str(server.control)]
    now = server.rpc("health")["status"]  # degraded where the server may not lock its memory
    code, out = run(*control)
    assert code == {"ok": 0, "degraded": 1}[now]
    assert out.startswith(f"health  {now}\n")
    server.rpc("drain", True)
    code, out = run(*control)
    assert (code, "zcache drain --off" in out) == (1, True)
    code, out = run(*control, "--json")
    assert (code, '"status": "degraded"' in out) == (1, True)
    assert run("--control", str(tmp_path / "no.ctl"))[0] == 6
    server.rpc("drain", False)


@pytest.mark.parametrize(("stats", "code"), [({}, 0), ({"draining": 1}, 1), ({"lost_pages": 1}, 2)])
def test_health_codes(
    stats: dict[str, int],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("plugin.reach.reach", lambda control: FakeServer(**stats))
    assert cli.main(["health", "--control", "x"]) == code
    assert capsys.readouterr().out.startswith("health  ")


@pytest.mark.skipif(not PICTURES, reason="ZCACHE_PICTURES=docs/img makes the documents' pictures")
def test_picture_for_the_documents(server: Server) -> None:
    def look() -> None:
        time.sleep(0.4)
        live.look()

    call = reach(str(server.control))
    live = top.Top(call, "/run/zcache/zcache.ctl", 2.0)
    swap_like(server.connect(), look)
    call.close()
    live.view.answers["health"].update(status="ok", reasons=[])
    console = Console(record=True, width=118, height=30, file=io.StringIO())
    for line in topview.frame(live.view, 118, 30, "12:00:00"):
        console.print(line, no_wrap=True)
    drawn = re.sub(
        r"@font-face \{.*?\}", "", console.export_svg(title="zcache top"), flags=re.DOTALL
    )
    (ROOT / str(PICTURES) / "top.svg").write_text(drawn.replace("Fira Code,", "") + "\n")
