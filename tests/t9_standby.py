"""A second server waits, loaded and locked; when the first dies it goes on, and a third waits.

In a machine without memory that is proved in the lab (t8_survival_inside).  Here: who waits, what
it has and has not, that nobody is left behind, and that nothing is lost however fast one kill
follows the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from cluster import unixsock
from plugin import servestate
from plugin.fitness import CAPABILITIES, has_capability
from plugin.servestate import State
from plugin.supervisor import Supervisor
from tests.plugin_helpers import wait_for
from tests.serve_helpers import Served, is_zombie, kill, served
from zcache_core.errors import InUseError

PAGE = 4096
WORDS = ("size=16M", "pool=8M", "commit=all")


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("ZCACHE_SYS_BLOCK", str(tmp_path))
    with served(tmp_path, f"t9-by-{os.getpid()}") as it:
        yield it


def ready(it: Served) -> State:
    """The state once somebody serves and somebody waits."""

    def look() -> State | None:
        state = servestate.read(it.instance)
        good = state and state.phase == servestate.SERVING and state.standby_ready
        return state if good else None

    found: State = wait_for("a server and a standby", look)
    return found


def origin(state: State) -> int:
    """The process that the standby was forked from."""
    return int(Path(f"/proc/{state.standby_pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def status(pid: int) -> dict[str, str]:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (row.partition(":") for row in rows)}


def test_each_killed_server_has_its_successor(it: Served, rng: random.Random) -> None:
    """Five times, the last three without waiting for the next standby."""
    it.serve(*WORDS, "standby=yes")
    data = rng.randbytes(2 * PAGE) + bytes(PAGE) + b"12345678" * 512
    it.connect().pwrite(data, 0)
    first = ready(it)
    for turn in range(5):
        state = ready(it) if turn < 2 else it.state()
        waits, server = state.standby_pid, state.server_pid
        kill(server)
        now = it.serving(other_than=server)
        if turn < 2:
            assert now.server_pid == waits
            assert (now.takeovers, now.starts) == (turn + 1, turn + 2)
        handle = it.connect()
        assert handle.pread(len(data), 0) == data
        handle.pwrite(rng.randbytes(PAGE), (10 + turn) * PAGE)
    last = ready(it)
    assert last.supervisor_pid == first.supervisor_pid
    assert locked_kb(last.server_pid) == 0, "the kernel takes nothing back from a locked mapping"
    assert last.takeovers == 5, "each was a standby, also those that were forked in a hurry"
    assert last.upgrades == 0
    it.disconnect()
    it.zcache("stop")
    wait_for("the end of all", lambda: not it.processes())


def test_who_dies_before_it_serves_has_a_successor_too(it: Served) -> None:
    """Killed between its turn and its first answer: the next one is forked at once."""
    it.serve(*WORDS, "standby=yes")
    state = ready(it)
    heir = state.standby_pid
    os.kill(state.server_pid, signal.SIGKILL)
    while it.state().server_pid != heir:
        pass
    kill(heir)
    assert it.serving(other_than=heir).takeovers == 2
    assert ready(it).upgrades == 0


def test_the_socket_of_a_dead_server_may_still_answer(tmp_path: Path) -> None:
    """A child that it was starting has it, too: one in four runs of kills met a refusal."""
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))
        held.listen()
        with pytest.raises(InUseError, match="in use by a running server"):
            unixsock.claim(path, "the NBD socket", "-U PATH")
        unixsock.claim(path, "the NBD socket", "-U PATH", dead=True)
        assert not path.exists()


def test_what_waits_is_locked_and_has_no_page(it: Served) -> None:
    """All of its program in memory, and its own; the memory file mapped, and not to be written."""
    it.serve(*WORDS, "standby=yes")
    state = ready(it)
    for pid in (state.standby_pid, origin(state)):
        maps = Path(f"/proc/{pid}/maps").read_text()
        rights = [row.split()[1] for row in maps.splitlines() if "SYSV" in row]
        assert rights == (["r--s"] if pid == state.standby_pid else [])
        assert "codec.cpython" in maps, "the core is loaded"
        if has_capability(CAPABILITIES["CAP_IPC_LOCK"][0]):
            resident = mapped = 0
            for row in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                words = row.split()
                if "-" in words[0]:
                    is_file = len(words) > 5 and words[5][0] == "/" and words[1][:4:3] == "rp"
                elif is_file and words[0] in ("Size:", "Rss:"):
                    mapped += int(words[1]) * (words[0] == "Size:")
                    resident += int(words[1]) * (words[0] == "Rss:")
            assert resident > 0.98 * mapped, "pages beyond a file's end are none"
            assert int(status(pid)["VmLck"].split()[0]) > resident
        assert status(pid)["VmSwap"].split()[0] == "0"
    assert int(status(state.standby_pid)["Threads"]) == 1
    assert to_be_copied_kb(state.standby_pid) < 64, "what it shares, it would have to copy"


def locked_kb(pid: int) -> int:
    """Of the memory file, in this process."""
    rows = Path(f"/proc/{pid}/smaps").read_text().partition("SYSV")[2].splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Locked:"))


def to_be_copied_kb(pid: int) -> int:
    """Memory of its own to write that another process has too: the first write copies it."""
    found, writable = 0, False
    for row in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = row.split()
        if "-" in words[0]:
            writable = words[1][1] == "w" and words[1][3] == "p"
        elif writable and words[0] == "Shared_Dirty:":
            found += int(words[1])
    return found


@pytest.mark.parametrize("who", ["standby", "origin", "both"])
def test_a_killed_standby_is_replaced(it: Served, who: str) -> None:
    """The server does not notice."""
    it.serve(*WORDS, "standby=yes")
    state = ready(it)
    handle = it.connect()
    handle.pwrite(b"x" * PAGE, 0)
    gone = {"standby": [state.standby_pid], "origin": [origin(state)]}
    pids = gone[who] if who in gone else gone["origin"] + gone["standby"]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for("their end", lambda: all(is_zombie(pid) for pid in pids))
    if who == "origin":  # what was forked from it is as good as before
        kill(state.server_pid)
        assert it.serving(other_than=state.server_pid).server_pid == state.standby_pid
        assert it.connect().pread(PAGE, 0) == b"x" * PAGE
    now = wait_for("another one", lambda: (s := ready(it)).standby_pid not in pids and s)
    assert handle.pread(PAGE, 0) == b"x" * PAGE if who != "origin" else True
    kill(now.server_pid)
    assert it.serving(other_than=now.server_pid).server_pid == now.standby_pid


def test_upgraded_with_its_standby(it: Served) -> None:
    """Both are of the new version afterwards, and of the old ones nobody is left."""
    it.serve(*WORDS, "standby=yes")
    state = ready(it)
    old = {state.server_pid, state.standby_pid, origin(state)}
    it.connect().pwrite(b"x" * PAGE, 0)
    it.zcache("upgrade")
    now = ready(it)
    assert (now.upgrades, now.takeovers) == (1, 0)
    assert it.connect().pread(PAGE, 0) == b"x" * PAGE
    wait_for("the end of the old ones", lambda: all(is_zombie(pid) for pid in old))
    assert sorted(it.processes().values()) == ["node", "server", "server", "server", "supervisor"]
    assert set(it.pids("server")) == {now.server_pid, now.standby_pid, origin(now)}


def test_auto_is_while_a_device_is_attached(it: Served, tmp_path: Path) -> None:
    """What `zcache attach` and `detach` tell the supervisor: look."""
    it.serve(*WORDS)
    time.sleep(0.5)  # were one wanted, it would be there
    assert it.state().standby_pid == 0
    (tmp_path / "nbd7").mkdir()
    (tmp_path / "nbd7" / "pid").write_text("1\n")
    it.instance.attach.write_text(json.dumps({"device": "/dev/nbd7"}))
    servestate.tell_attached(it.instance)
    ready(it)
    it.instance.attach.unlink()
    servestate.tell_attached(it.instance)
    wait_for("its end", lambda: len(it.pids("server")) == 1 and not it.state().standby_pid)
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "nbd7" / "pid").unlink()


def test_no_is_none(it: Served) -> None:
    it.serve(*WORDS, "standby=no")
    time.sleep(0.5)
    assert len(it.pids("server")) == 1
    kill(it.state().server_pid)
    assert it.serving().takeovers == 0


def test_who_is_ended_by_one_event_is_not_heard_for_the_next() -> None:
    """Both were readable at the same look; the number of the second may be somebody else's now."""
    done: list[str] = []
    pipes = [os.pipe() for _ in range(3)]
    watched: dict[int, Callable[[], None]] = {}

    def first() -> None:
        done.append("first")
        watched.clear()

    watched.update({pipes[1][0]: first, pipes[2][0]: lambda: done.append("second")})
    for _, end in pipes[1:]:
        os.write(end, b"x")
    watch = SimpleNamespace(
        _wake=pipes[0][0], _server=None, _on_signal=None, _on_end=None,
        _standby=SimpleNamespace(calls=lambda: dict(watched)), _patience_ms=lambda: 0,
    )  # fmt: skip
    for _ in range(2):
        Supervisor._wait(cast(Supervisor, watch))
    for ends in pipes:
        for end in ends:
            os.close(end)
    assert done == ["first"]
