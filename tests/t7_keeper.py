"""The keeper of the node process, with small programs in its place."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from plugin import keeper
from plugin.keeper import Keeper
from plugin.spawn import Program
from tests.plugin_helpers import wait_for


def shell(script: str, fds: dict[int, int] | None = None, **env: str) -> Program:
    return Program(["/bin/sh", "-c", script], {**os.environ, **env}, fds or {})


def test_program_gets_words_environment_and_descriptors(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        script = 'echo "$0 $1 $WORD"; echo three >&3'
        program = Program(
            ["/bin/sh", "-c", script, "zero", "one two"], {"WORD": "väl"},
            {1: out.fileno(), 3: out.fileno()},
        )  # fmt: skip
        for _ in range(2):
            _, status = os.waitpid(program.spawn(), 0)
            assert status == 0
    assert (tmp_path / "out").read_text() == "zero one two väl\nthree\n" * 2


def test_program_starts_clean(tmp_path: Path) -> None:
    """No blocked signals, ordinary scheduling, no other descriptors, whatever we have."""
    script = (
        "import os,signal;"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []), os.sched_getscheduler(0),"
        "      signal.getsignal(signal.SIGTERM),"
        "      sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
    )
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "other", "wb") as other:
        os.set_inheritable(other.fileno(), True)
        program = Program([sys.executable, "-c", script], os.environ, {1: out.fileno()})
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            os.waitpid(program.spawn(), 0)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    assert (tmp_path / "out").read_text() == "set() 0 0 [0, 1, 2]\n"


def test_missing_program() -> None:
    with pytest.raises(FileNotFoundError):
        Program(["/nonexistent/python"], {}, {}).spawn()


def test_restarts_with_growing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(keeper, "BACKOFF_MAX_S", 0.04)
    said: list[str] = []
    kept = Keeper("the child", shell(f"echo x >> {tmp_path}/lives; exit 3"), said.append)
    kept.start()
    wait_for("six lives", lambda: lives(tmp_path) >= 6)
    kept.stop()
    assert [line.partition("(")[0] for line in said] == ["zcache: the child ended "] * 2
    assert "exit code 3" in said[0]
    assert "starting it again in 0.0 s" in said[1]
    after = lives(tmp_path)
    assert keepers() == []
    assert lives(tmp_path) == after


def test_stop_ends_a_child_that_does_not_want_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "STOP_S", 0.2)
    script = f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.05; done"
    kept = Keeper("the child", shell(script), print)
    kept.start()
    pid = int(wait_for("the child", lambda: pid_of(tmp_path)))
    kept.stop()
    assert not Path(f"/proc/{pid}").exists()


def test_stop_at_once() -> None:
    for _ in range(20):
        kept = Keeper("the child", shell("exec sleep 60"), print)
        kept.start()
        kept.stop()
        assert keepers() == []


def keepers() -> list[threading.Thread]:
    """Threads of keepers that still run."""
    return [thread for thread in threading.enumerate() if thread.name == "zcache-keeper"]


def lives(folder: Path) -> int:
    path = folder / "lives"
    return path.read_text().count("x") if path.exists() else 0


def pid_of(folder: Path) -> str:
    path = folder / "pid"
    return path.read_text() if path.exists() else ""
