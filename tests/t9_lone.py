"""The supervisor is killed: the standby waits on alone, succeeds the server, and is adopted.

Real processes; who is left behind is counted after each.  In a machine without memory it is proved
in the lab (t8_survival_inside).
"""

from __future__ import annotations

import fcntl
import functools
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import nbd
import pytest

from cluster import unixsock
from plugin import lone, servestate
from plugin.instance import Instance
from plugin.leave import LEAVE
from plugin.liaison import GO, Liaison
from plugin.lone import Vigil
from plugin.servestate import ServeLock, State
from plugin.supervised import living_owner
from tests.plugin_helpers import wait_for
from tests.serve_helpers import Served, is_zombie, kill, served
from zcache_core.errors import InUseError
from zcache_core.memfile import MemoryFile

PAGE = 4096
WORDS = ("size=16M", "pool=8M", "commit=all", "standby=yes")
DATA = b"12345678" * 512


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("ZCACHE_SYS_BLOCK", str(tmp_path))
    with served(tmp_path, f"t9-lo-{os.getpid()}") as it:
        yield it


def ready(it: Served) -> State:
    """The state once somebody serves, somebody waits, and there is what both are forked from."""

    def look() -> State | None:
        state = servestate.read(it.instance)
        if state is None or state.phase != servestate.SERVING or not state.standby_ready:
            return None
        found = it.pids("server")
        return state if state.standby_pid in found and len(found) == 3 else None

    return cast(State, wait_for("server, standby and origin", look))


def begin(it: Served) -> State:
    it.serve(*WORDS)
    it.connect().pwrite(DATA, 0)
    return ready(it)


def answer(it: Served) -> bytes | None:
    """The page, by whom it may be; None when nobody answers."""
    try:
        handle = nbd.NBD()
        handle.connect_unix(str(it.instance.socket))
        return bytes(handle.pread(PAGE, 0))
    except nbd.Error:
        return None


def succeeded(it: Served, heir: int) -> None:
    """It serves, without a supervisor."""
    wait_for("the standby to serve", lambda: living_owner(it.name) == heir)
    assert wait_for("an answer", lambda: answer(it)) == DATA
    state = wait_for("it to say so", lambda: (s := it.state()).server_pid == heir and s)
    assert (state.has_server, state.standby_pid, state.is_supervised) == (True, 0, False)


def nothing_is_left(it: Served, folder: Path) -> None:
    it.disconnect()
    it.zcache("stop")
    wait_for("the end of all", lambda: not it.processes())
    assert sorted(path.suffix for path in folder.glob(f"{it.name}.*")) == [".log"]


def test_it_outlives_its_supervisor_and_is_adopted(it: Served, tmp_path: Path) -> None:
    """The origin goes; the next supervisor has one of its own, and the same standby."""
    state = begin(it)
    kill(state.supervisor_pid)
    pair = {state.server_pid, state.standby_pid}
    wait_for("the origin's end", lambda: set(it.pids("server")) == pair)
    time.sleep(1.5 * lone.LOOK_S)  # it would end now, if it did
    assert set(it.pids("server")) == pair
    it.serve()
    now = ready(it)
    assert {now.server_pid, now.standby_pid} == pair
    kill(now.server_pid)
    after = it.serving(other_than=now.server_pid)
    assert (after.server_pid, after.takeovers) == (state.standby_pid, 1)
    assert it.connect().pread(PAGE, 0) == DATA
    assert ready(it).standby_pid not in pair
    nothing_is_left(it, tmp_path)


def test_it_succeeds_by_itself(it: Served, tmp_path: Path, rng: random.Random) -> None:
    """Supervisor and server are killed, the server at once or at random after it."""
    state = begin(it)
    for pause_s in (0.0, rng.random() * 0.05, rng.random()):
        os.kill(state.supervisor_pid, signal.SIGKILL)
        time.sleep(pause_s)
        os.kill(state.server_pid, signal.SIGKILL)
        succeeded(it, state.standby_pid)
        time.sleep(0.1)
        it.serve()
        now = ready(it)
        assert now.server_pid == state.standby_pid
        assert now.supervisor_pid != state.supervisor_pid
        state = now
    nothing_is_left(it, tmp_path)


def test_a_supervisor_that_comes_at_that_moment(
    it: Served, tmp_path: Path, rng: random.Random
) -> None:
    """It waits for who takes his turn, or tells him to; there is one owner and one standby."""
    state = begin(it)
    for _ in range(3):
        kill(state.supervisor_pid)
        late_s = rng.random() * 0.6  # a supervisor needs about 0.3 s to have the lock
        killer = threading.Timer(late_s, os.kill, (state.server_pid, signal.SIGKILL))
        killer.start()
        it.serve()
        killer.join()
        wait_for("the dead server's end", functools.partial(is_zombie, state.server_pid))
        now = ready(it)
        assert now.server_pid == state.standby_pid, f"killed after {late_s:.3f} s"
        assert answer(it) == DATA
        state = now
    nothing_is_left(it, tmp_path)


def test_a_supervisor_that_finds_the_server_dead(it: Served, tmp_path: Path) -> None:
    """It has the lock before the standby has: it tells it to go on."""
    state = begin(it)
    kill(state.supervisor_pid)
    wait_for("the origin's end", lambda: len(it.pids("server")) == 2)
    os.kill(state.standby_pid, signal.SIGSTOP)
    kill(state.server_pid)
    starter = threading.Thread(target=it.serve)
    starter.start()
    wait_for("a supervisor", lambda: has_lock(it))
    os.kill(state.standby_pid, signal.SIGCONT)
    starter.join()
    now = ready(it)
    assert (now.server_pid, now.takeovers) == (state.standby_pid, 1)
    assert answer(it) == DATA
    nothing_is_left(it, tmp_path)


def has_lock(it: Served) -> bool:
    """Whether somebody supervises."""
    with open(it.instance.serve, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_one_supervisor_after_the_other_dies(it: Served, tmp_path: Path) -> None:
    """Adopted and left again, it is what it was."""
    state = begin(it)
    for _ in range(2):
        kill(it.state().supervisor_pid)
        it.serve()
        assert it.state().standby_pid == state.standby_pid
    now = it.state()
    kill(now.supervisor_pid)
    kill(now.server_pid)
    succeeded(it, state.standby_pid)
    nothing_is_left(it, tmp_path)


def test_stop_without_a_supervisor(it: Served, tmp_path: Path) -> None:
    """Nobody succeeds a server that is stopped."""
    kill(begin(it).supervisor_pid)
    nothing_is_left(it, tmp_path)
    assert living_owner(it.name) is None


def test_a_server_that_ends_in_good_order_is_not_succeeded(it: Served) -> None:
    state = begin(it)
    kill(state.supervisor_pid)
    it.disconnect()
    os.kill(state.server_pid, signal.SIGTERM)
    wait_for("the end of all", lambda: not it.processes())


def test_a_server_whose_supervisor_died_in_an_upgrade_is(it: Served, tmp_path: Path) -> None:
    """It was told to make room, and who was to tell the next one is dead."""
    state = begin(it)
    kill(state.supervisor_pid)
    os.kill(state.server_pid, LEAVE)
    succeeded(it, state.standby_pid)
    nothing_is_left(it, tmp_path)


def test_one_with_other_words_is_replaced(it: Served, tmp_path: Path) -> None:
    """Not before there is another."""
    state = begin(it)
    kill(state.supervisor_pid)
    it.serve(*WORDS, "codec=none")
    now = wait_for("another", lambda: (s := ready(it)).standby_pid != state.standby_pid and s)
    assert now.server_pid == state.server_pid
    assert is_zombie(state.standby_pid)
    nothing_is_left(it, tmp_path)


def test_one_that_is_not_wanted_any_more_ends(it: Served, tmp_path: Path) -> None:
    state = begin(it)
    kill(state.supervisor_pid)
    it.serve(*WORDS[:-1], "standby=no")
    wait_for("its end", lambda: it.pids("server") == [state.server_pid])
    nothing_is_left(it, tmp_path)


def test_one_that_does_not_answer_is_ended(it: Served) -> None:
    state = begin(it)
    kill(state.supervisor_pid)
    wait_for("the origin's end", lambda: len(it.pids("server")) == 2)
    os.kill(state.standby_pid, signal.SIGSTOP)
    it.serve()
    now = ready(it)
    assert now.server_pid == state.server_pid
    assert now.standby_pid != state.standby_pid
    assert is_zombie(state.standby_pid)


# ---- the watch alone ------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Instance, MemoryFile]]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(lone, "UNCALLED_S", 0.1)
    monkeypatch.setattr(lone, "LOOK_S", 0.05)
    instance = Instance(f"t9-vi-{os.getpid()}")
    memory = MemoryFile.create(instance.name, 1 << 20, 1 << 20)
    yield instance, memory
    memory.destroy()


def test_one_that_no_supervisor_knows_ends(alone: tuple[Instance, MemoryFile]) -> None:
    """Forked in the moment of its supervisor's death, say: the next one has another."""
    instance, memory = alone
    lock = ServeLock.acquire(instance)
    vigil = Vigil(instance, memory)
    with pytest.raises(InUseError, match="another standby"):
        vigil.wait()
    vigil.close()
    lock.release(forget=False)


def test_its_turn_is_without_a_supervisor(
    alone: tuple[Instance, MemoryFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is dead: while a supervisor lives it decides; none begins before the turn ends."""
    monkeypatch.setattr(lone, "_pidfd_of", lambda pid, ticks: -1)
    turn_s = servestate.TURN_S
    monkeypatch.setattr(servestate, "TURN_S", 0.1)
    instance, memory = alone
    vigil = Vigil(instance, memory)
    lock = ServeLock.acquire(instance)
    with pytest.raises(InUseError, match="another standby"):
        vigil.wait()
    lock.release(forget=False)
    assert vigil.wait() is None
    with pytest.raises(InUseError, match="runs already"):
        ServeLock.acquire(instance)
    monkeypatch.setattr(servestate, "TURN_S", turn_s)
    threading.Timer(0.3, vigil.close).start()
    ServeLock.acquire(instance).release(forget=False)  # it waits for the end of the turn


def test_the_lock_is_that_of_the_file_that_has_the_name(
    alone: tuple[Instance, MemoryFile],
) -> None:
    """The file was removed and made anew by a supervisor that lives: it decides."""
    instance, memory = alone
    vigil = Vigil(instance, memory)
    instance.serve.unlink()
    lock = ServeLock.acquire(instance)
    with pytest.raises(InUseError, match="another standby"):
        vigil.wait()
    lock.release(forget=False)
    vigil.close()


@pytest.mark.parametrize("phase", [servestate.STOPPING, servestate.STOPPED, "removed"])
def test_nobody_succeeds_what_was_stopped(
    alone: tuple[Instance, MemoryFile], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Forked just then, and not known to who stopped it: it ends, and leaves nothing."""
    monkeypatch.setattr(lone, "_pidfd_of", lambda pid, ticks: -1)
    instance, memory = alone
    lock = ServeLock.acquire(instance)
    lock.write(State(phase=servestate.SERVING))
    vigil = Vigil(instance, memory)
    if phase != "removed":
        lock.write(State(phase=phase))
    lock.release(forget=phase == "removed")
    with pytest.raises(InUseError, match="stopped" if phase == "removed" else "told to end"):
        vigil.wait()
    vigil.close()
    assert instance.serve.exists() == (phase != "removed")


def test_who_calls_has_its_line(alone: tuple[Instance, MemoryFile]) -> None:
    """And nobody listens any more when it is its turn."""
    instance, memory = alone
    vigil = Vigil(instance, memory)
    found = lone.call(instance.lone)
    assert found is not None
    assert found[0] == os.getpid()
    line = vigil.wait()
    assert line is not None
    with line, found[1] as ours:
        line.sendall(b"waiting\n")
        assert ours.recv(100) == b"waiting\n"
    vigil.hang_up()
    assert lone.call(instance.lone) is None
    assert not unixsock.is_alive(instance.lone)
    vigil.close()


class Noted:
    """A vigil that nobody calls, and whose server is dead."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def wait(self) -> None:
        self.done.append("wait")

    def hang_up(self) -> None:
        self.done.append("hang up")

    def close(self) -> None:
        self.done.append("close")


@pytest.mark.parametrize("is_told", [True, False])
def test_its_turn(is_told: bool) -> None:
    """Nobody can call from then on; the lock is held until it serves."""
    ours, its = socket.socketpair()
    standby, vigil = Liaison(its, True), Noted()
    if is_told:
        ours.sendall(GO)
    ours.shutdown(socket.SHUT_WR)
    standby.wait_turn(vigil)
    assert vigil.done == ([] if is_told else ["wait"]) + ["hang up"]
    standby.serving()
    assert vigil.done[-2:] == ["hang up", "close"]
    ours.close()
