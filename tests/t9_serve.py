"""A supervised server: started, killed in every way, adopted, stopped; its pages stay."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugin import serve, servestate, swapping
from plugin.fitness import CAPABILITIES, has_capability
from plugin.instance import Instance
from plugin.nbdnetlink import Timeouts
from tests.plugin_helpers import ROOT, environment, wait_for
from tests.serve_helpers import Served, kill, served
from zcache_core import memfile
from zcache_core.errors import ConfigError, InUseError

PAGE = 4096
MIB = 1 << 20
WORDS = ("size=16M", "pool=8M")


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    with served(tmp_path, f"t9-{os.getpid()}") as it:
        yield it


def pages(rng: random.Random) -> bytes:
    """Two MiB of every kind."""
    kinds = (rng.randbytes(PAGE), rng.randbytes(900) + bytes(PAGE - 900), b"8 bytes!" * 512)
    return b"".join(rng.choice(kinds)[:-4] + rng.randbytes(4) for _ in range(512))


def only_these(it: Served) -> dict[str, int]:
    """One supervisor, one server, one node, and nothing twice."""
    kinds = ("supervisor", "server", "node")
    wait_for("one of each", lambda: sorted(it.processes().values()) == sorted(kinds))
    return {kind: it.pids(kind)[0] for kind in kinds}


# ---- start and stop --------------------------------------------------------------------------


def test_from_start_to_stop(it: Served, rng: random.Random) -> None:
    state = it.serve(*WORDS)
    assert (state.phase, state.starts, state.words) == (servestate.SERVING, 1, list(WORDS))
    assert only_these(it) == {
        "supervisor": state.supervisor_pid,
        "server": state.server_pid,
        "node": it.rpc("ping")["pid"],
    }
    data = pages(rng)
    it.connect().pwrite(data, 0)
    again = it.zcache("serve", "--detach", *WORDS, check=False)
    assert again.returncode == 5
    assert "runs already; ask it with 'zcache status'" in again.stderr
    it.disconnect()
    assert "is stopped" in it.zcache("stop").stdout
    assert not it.processes()
    assert not memfile.exists(it.name), "its pages are not needed any more"
    assert [path.suffix for path in it.folder.iterdir()] == [".log"]
    assert "was not running" in it.zcache("stop").stdout


def test_stop_does_not_wait_for_clients(it: Served, rng: random.Random) -> None:
    """A kernel that swaps never closes its connection; what is in flight is answered."""
    state = it.serve(*WORDS)
    handle = it.connect()
    data = pages(rng)
    handle.pwrite(data, 0)
    it.zcache("stop", "--keep")
    assert not it.processes()
    assert "signal 9" not in it.log(), "it ended by itself"
    it.serve()  # the words are those of before, the pages too
    assert it.state().words == list(WORDS)
    assert it.state().server_pid != state.server_pid
    assert it.connect().pread(len(data), 0) == data


def test_refusals_are_one_sentence(it: Served, tmp_path: Path) -> None:
    for words, code, sentence in (
        (("size=16M", "siez=1"), 3, "there is no key siez"),
        (("memory=x", *WORDS), 3, "memory= follows from the name of a supervised server"),
        (("16M",), 3, "16M is no key=value; write it like size=8G"),
        ((*WORDS, "disk=/nonexistent/disk", "disk_size=64M"), 3, "/nonexistent/disk cannot be"),
        (("--config", "/nonexistent.toml"), 3, "/nonexistent.toml cannot be read"),
    ):
        done = it.zcache("serve", "--detach", *words, check=False)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert done.stderr.startswith("zcache: ")
        assert done.stderr.count("\n") == 1
        assert sentence in done.stderr
    assert not it.processes()
    assert not it.instance.serve.exists()
    assert not memfile.exists(it.name)


def test_configuration_file(it: Served, tmp_path: Path) -> None:
    path = tmp_path / "swap.toml"
    path.write_text('size = "16M"\npool = "8M"\ncodec = "zstd"\n[attach]\npriority = 3\n')
    state = it.serve("--config", str(path), "codec=none")
    assert state.words == ["size=16M", "pool=8M", "codec=none"]


def test_the_supervisor_is_fit_and_small(it: Served) -> None:
    """Locked, never killed, no core dumps; and asleep while pages are served."""
    pid = it.serve(*WORDS).supervisor_pid
    status = dict(row.split(":", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0])
    assert resident < 40 * 1024
    if has_capability(CAPABILITIES["CAP_IPC_LOCK"][0]):
        assert int(status["VmLck"].split()[0]) > 0
    if has_capability(CAPABILITIES["CAP_SYS_RESOURCE"][0]):
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n"
    for one in (pid, it.state().server_pid):
        limits = Path(f"/proc/{one}/limits").read_text().splitlines()
        assert next(row for row in limits if row.startswith("Max core")).split()[4] == "0"
    handle = it.connect()
    before = switches(pid)
    for page in range(500):
        handle.pwrite(b"x" * PAGE, page * PAGE)
    assert switches(pid) == before


def switches(pid: int) -> int:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if "ctxt_switches" in row)


# ---- kill -9 ---------------------------------------------------------------------------------


def test_killed_servers_are_replaced_and_nothing_is_lost(it: Served, rng: random.Random) -> None:
    server = it.serve(*WORDS).server_pid
    data = pages(rng)
    it.connect().pwrite(data, 0)
    for turn in range(3):
        kill(server)
        state = it.serving(other_than=server)
        server = state.server_pid
        handle = it.connect()
        assert handle.pread(len(data), 0) == data
        handle.pwrite(b"turn %d" % turn * 512, 4 * MIB + turn * PAGE)
        assert state.starts == turn + 2
    only_these(it)


def test_killed_supervisor_is_replaced_and_adopts(it: Served, rng: random.Random) -> None:
    first = it.serve(*WORDS)
    handle = it.connect()
    data = pages(rng)
    handle.pwrite(data, 0)
    kill(first.supervisor_pid)
    assert handle.pread(len(data), 0) == data, "the server goes on"
    second = it.serve()
    assert second.supervisor_pid != first.supervisor_pid
    assert second.server_pid == first.server_pid
    assert handle.pread(len(data), 0) == data, "and was not touched"
    only_these(it)
    kill(second.server_pid)  # no child of its supervisor
    third = it.serving(other_than=second.server_pid)
    assert third.supervisor_pid == second.supervisor_pid
    assert it.connect().pread(len(data), 0) == data


@pytest.mark.parametrize("order", [("supervisor", "server"), ("server", "node", "supervisor")])
def test_all_killed(it: Served, rng: random.Random, order: tuple[str, ...]) -> None:
    it.serve(*WORDS)
    data = pages(rng)
    it.connect().pwrite(data, 0)
    everybody = only_these(it)
    for kind in order:
        os.kill(everybody[kind], signal.SIGKILL)
    wait_for("the end of them", lambda: not set(it.processes()) & set(everybody.values()))
    it.serve()
    assert it.connect().pread(len(data), 0) == data
    only_these(it)


def test_a_node_that_does_not_end_is_no_obstacle(it: Served, rng: random.Random) -> None:
    """It may be swapped out to the device whose server was killed."""
    state = it.serve(*WORDS)
    node = only_these(it)["node"]
    os.kill(node, signal.SIGSTOP)
    try:
        kill(state.server_pid)
        it.serving(other_than=state.server_pid)
        wait_for("a node that answers", lambda: answers(it))
        assert it.rpc("ping")["pid"] != node
    finally:
        with contextlib.suppress(ProcessLookupError):  # ended by force already
            os.kill(node, signal.SIGCONT)
    only_these(it)
    assert it.rpc("ping")["pid"] != node, "the old one's end has not removed the new one's socket"

    node = only_these(it)["node"]
    os.kill(node, signal.SIGSTOP)
    kill(it.state().server_pid)
    wait_for("its end, by force", lambda: node not in it.processes())
    wait_for("a node that answers", lambda: answers(it))
    only_these(it)


def another_server(it: Served, old: int) -> bool:
    return bool(set(it.pids("server")) - {old})


def answers(it: Served) -> Any:
    try:
        return it.rpc("ping")
    except Exception:
        return None


def test_supervisor_killed_before_it_knows_its_server(it: Served, rng: random.Random) -> None:
    """At any moment of the start: one server at most, and the next supervisor finds it."""
    for _ in range(2):
        it.zcache("serve", "--detach", *WORDS)
        state = it.state()
        os.kill(state.server_pid, signal.SIGKILL)
        wait_for("a new server", functools.partial(another_server, it, state.server_pid))
        time.sleep(rng.random() * 0.3)
        kill(state.supervisor_pid)
        it.serve(*WORDS)
        only_these(it)
        assert it.connect().pread(PAGE, 0) == bytes(PAGE)
        it.disconnect()
        it.zcache("stop", "--keep")


def test_a_pool_that_is_a_part_of_ram_stays_as_large(it: Served) -> None:
    """RAM may have another size when the server dies; its memory file has not."""
    it.serve("size=16M", "pool=1%", "standby=no")
    state = it.state()
    (pool,) = (word for word in state.words if word.startswith("pool="))
    assert pool.removeprefix("pool=").isdigit()
    assert serve.with_fixed_pool(it.instance, ["size=16M", "pool=7%"]) == ["size=16M", pool]


def test_a_supervisor_takes_no_other_sizes(it: Served) -> None:
    """Its server would live, and the next one be refused."""
    it.serve("size=16M", "pool=8M", "standby=no")
    assert servestate.needed_by(it.instance.name) == "its supervisor"
    it.connect().pwrite(bytes(range(256)) * 16, 0)
    kill(it.state().supervisor_pid)
    with pytest.raises(ConfigError, match="made with size=16M"):
        serve.start(it.instance, ["size=32M", "pool=8M", "standby=no"])


# ---- several devices, and what is attached --------------------------------------------------


def test_it_does_not_stop_under_any_of_its_devices(
    it: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is attached under another name: the server knows it all the same."""
    blocks = tmp_path / "block"
    monkeypatch.setenv("ZCACHE_SYS_BLOCK", str(blocks))
    it.serve("devices=a:8M,b:8M", "pool=8M", "standby=no")
    (blocks / "nbd7").mkdir(parents=True)
    (blocks / "nbd7/size").write_text("16384\n")
    page = tmp_path / "second.attach"
    told = {"device": "/dev/nbd7", "uri": f"nbd+unix:///b?socket={it.instance.socket}"}
    page.write_text(json.dumps(told).ljust(4096))
    refused = it.zcache("stop", check=False)
    assert refused.returncode == 5
    assert "/dev/nbd7 is attached" in refused.stderr
    assert "zcache down --name second" in refused.stderr
    assert servestate.attached(it.instance) == [("/dev/nbd7", "second")]
    # by its address, too
    state = servestate.read(it.instance)
    assert state is not None
    words = [*state.words, "nbd=127.0.0.1:12345"]
    text = json.dumps({**dataclasses.asdict(state), "words": words})
    it_is = servestate._is_served
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(copy))
    other = Instance(it.instance.name)
    other.serve.write_text(text)
    for uri, is_ours in (
        ("nbd://127.0.0.1:12345/b", True),
        ("nbd://localhost:12345", True),
        ("nbd://127.0.0.1", False),
        ("nbd://10.0.0.1:12345", False),
    ):
        assert it_is({"uri": uri}, other, False) == is_ours, uri
    # on every address: any of this machine's own, also by a name; the page tells its number
    for listens, uri, address, is_ours in (
        ("0.0.0.0", "nbd://127.5.6.7:12345", "127.5.6.7", True),
        ("0.0.0.0", "nbd://this.host:12345", "127.5.6.7", True),
        ("0.0.0.0", "nbd://other.host:12345", "192.0.2.1", False),
        ("0.0.0.0", "nbd://127.5.6.7", "127.5.6.7", False),
        ("[::]", "nbd://[::1]:12345", "::1", True),
        ("this.host", "nbd://127.5.6.7:12345", "127.5.6.7", True),
        ("127.5.6.7", "nbd://this.host:12345", "127.5.6.7", True),
        ("127.5.6.8", "nbd://this.host:12345", "127.5.6.7", False),
    ):
        words = [*state.words, f"nbd={listens}:12345"]
        other.serve.write_text(json.dumps({**dataclasses.asdict(state), "words": words}))
        told_at = {"uri": uri, "address": address}
        assert it_is(told_at, other, False) == is_ours, (listens, uri)
    # another server's is no matter of this one
    page.write_text(json.dumps(told | {"uri": f"nbd+unix:///b?socket={tmp_path}/other.sock"}))
    assert servestate.attached(it.instance) == []
    it.zcache("stop")


def test_up_again_with_the_same_words(it: Served) -> None:
    """Keys that are lists come back from the server as they were meant."""
    words = ("devices=a:8M,b:8M", "pool=8M")
    it.serve(*words, "standby=no")
    wait_for("the node", lambda: it.pids("node"))
    limits = Timeouts(3, 60)
    same = swapping.Plan(it.instance, words, 100, None, limits)
    assert swapping.refuse_other_settings(same)["pool"] == 8 << 20
    other = swapping.Plan(it.instance, ("devices=a:8M,c:8M",), 100, None, limits)
    with pytest.raises(InUseError, match="runs with devices="):
        swapping.refuse_other_settings(other)
    assert "size" not in swapping.default_words(["devices=a:8M,b:8M"])[-1]


def test_a_relative_path_is_the_callers(it: Served, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    state = it.serve(*WORDS, f"disk={os.path.relpath(disk, ROOT)}", "disk_size=20M")
    assert f"disk={disk}" in state.words
    assert disk.exists()


WITHOUT_NBDKIT = """
import os, sys
from plugin import supervisor
def spawn(*words, **options):
    raise FileNotFoundError(2, "No such file or directory")
supervisor.spawn = spawn
told, tell = os.pipe()
code = supervisor.main(
    ["--name", sys.argv[1], "--realtime", "no", "--tell-fd", str(tell), "size=16M", "pool=4M"]
)
print(code, os.read(told, 500).decode())
"""


def test_a_first_server_that_cannot_be_started_is_an_answer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NBDKIT, f"no{os.getpid()}"],
        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "2 2 no server can be started (No such file or directory)\n\n"
