"""The server as a process: how it starts, what it is made of, how it ends and is ended."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import nbd
import pytest

from bench.servers import is_listening
from plugin.config import KEYS
from plugin.fitness import CAPABILITIES, has_capability
from tests.plugin_helpers import (
    PLUGIN,
    ROOT,
    Server,
    environment,
    node_processes,
    run_nbdkit,
    segments,
    wait_for,
)
from zcache_core import memfile
from zcache_core.counters import COUNTERS, HISTOGRAMS

PAGE = 4096
PF_MEMALLOC_NOIO = 0x00080000  # include/linux/sched.h
SYS_WAITID = "247"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, "size=16M", "pool=4M") as server:
        yield server


# ---- starting --------------------------------------------------------------------------------


def test_dump_plugin(tmp_path: Path) -> None:
    code, out, log = run_nbdkit(tmp_path, options=("--dump-plugin",))
    assert (code, log) == (0, "")
    fields = dict(line.split("=", 1) for line in out.splitlines())
    assert fields["zcache_allocators"] == "zbud z3fold zsmalloc"
    assert fields["zcache_codecs"] == "lz4 zstd none"
    assert fields["zcache_memory_format"].isdigit()
    assert fields["zcache_version"]
    assert {f"zcache_key_{key.name}" for key in KEYS} <= fields.keys()


REFUSED = [
    ((), "size is missing; write size=8G"),
    (("size=1000000",), "write size=976K"),
    (("size=8G", "siez=8G"), "did you mean size=?"),
    (("size=8G", "allocator=slub"), "there is no allocator slub; write allocator=zbud"),
    (("size=8G", "peers=10.0.0.1:7900"), "so it needs certificates; write tls=FOLDER"),
    (("size=8G", "disk=/dev/null", "disk_size=1G"), "neither a file nor a block device"),
    (("size=8G", "disk=/nonexistent/d", "disk_size=1G"), "cannot be opened (No such file"),
    (("size=8G", "codec=brotli"), "there is no codec brotli"),
    (("size=8G", "control=/nonexistent/z.ctl"), "make it, or write another control=PATH"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "advice"), REFUSED)
def test_bad_configuration_is_one_sentence(
    tmp_path: Path, words: tuple[str, ...], advice: str
) -> None:
    options = ("-U", str(tmp_path / "x.sock"))
    code, out, log = run_nbdkit(tmp_path, *words, options=options)
    assert code != 0
    assert out == ""
    assert log.count("\n") == 1
    assert advice in log
    assert "Traceback" not in log
    assert not (tmp_path / "x.sock").exists()


def test_core_that_is_not_built(tmp_path: Path) -> None:
    for part in ("zcache_core", "cluster", "plugin"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so"))
    command = ["nbdkit", "-f", "-U", "-", "python", str(tmp_path / "plugin/zcache_plugin.py")]
    done = subprocess.run([*command, "size=1M"], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "run 'make setup'" in done.stderr
    assert "Traceback" not in done.stderr


def test_sockets_in_use_are_refused(server: Server, tmp_path: Path) -> None:
    words = ("size=1M", "pool=1M")
    code, _, log = run_nbdkit(tmp_path, *words, options=("-U", str(server.socket)))
    assert code != 0
    assert f"{server.socket} is in use by a running server" in log
    assert "another -U PATH for the NBD socket" in log
    other = ("-U", str(tmp_path / "other.sock"))
    code, _, log = run_nbdkit(tmp_path, *words, f"control={server.control}", options=other)
    assert code != 0
    assert f"{server.control} is in use by a running server" in log
    assert "another control=PATH" in log
    assert server.ping()
    assert server.connect().pread(PAGE, 0) == bytes(PAGE)


def test_warns_once_that_the_pool_can_fill(server: Server, tmp_path: Path) -> None:
    assert server.log().count("writes are refused (ENOSPC)") == 1
    assert server.log().count("not fit for swapping") <= 1
    health = server.rpc("health")
    assert health["status"] == "degraded"
    assert any("The pool can fill" in reason["what"] for reason in health["reasons"])


def test_no_warning_when_the_pool_is_large_enough(tmp_path: Path) -> None:
    with Server(tmp_path, "size=1M", "pool=1M") as server:
        assert "ENOSPC" not in server.log()
        reasons = server.rpc("health")["reasons"]
        assert not any("can fill" in reason["what"] for reason in reasons)


def test_tcp_and_its_control_socket(tmp_path: Path) -> None:
    # An address of this process's own: nobody else takes the port between here and nbdkit.
    address = (
        f"127.{os.getpid() >> 16 & 0x3F | 0x40}.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}"
    )
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    command = ["nbdkit", "-f", "-p", str(port), "-i", address, "python", str(PLUGIN)]
    process = subprocess.Popen([*command, "size=1M", "pool=1M"], env=environment(tmp_path))
    try:
        wait_for("the control socket", (tmp_path / f"tcp-{port}.ctl").exists)
        handle = nbd.NBD()
        handle.connect_tcp(address, str(port))
        handle.pwrite(b"x" * 100, 5)
        assert handle.pread(100, 5) == b"x" * 100
        # Another machine swaps, so real-time priority would only cost (realtime=auto).
        assert os.sched_getscheduler(process.pid) == os.SCHED_OTHER
        handle.shutdown()
    finally:
        process.terminate()
        process.wait(30)
    wait_for("the end of the node", lambda: not (tmp_path / f"tcp-{port}.ctl").exists())


def test_in_the_background(tmp_path: Path) -> None:
    """Without -f nbdkit forks before after_fork: locks, threads and node belong to the child."""
    sock, pidfile = tmp_path / "nbd.sock", tmp_path / "pid"
    command = ["nbdkit", "-U", str(sock), "-P", str(pidfile), "python", str(PLUGIN)]
    subprocess.run(
        [*command, "size=1M", "pool=1M"], env=environment(tmp_path), check=True, timeout=30
    )
    pid = int(wait_for("the pid file", lambda: pidfile.exists() and pidfile.read_text()))
    try:
        wait_for("the node process", (tmp_path / "nbd.ctl").exists)
        handle = nbd.NBD()
        handle.connect_unix(str(sock))
        handle.pwrite(b"x" * PAGE, 0)
        assert handle.pread(PAGE, 0) == b"x" * PAGE
        handle.shutdown()
        assert has_capability(CAPABILITIES["CAP_IPC_LOCK"][0]) == (locked_bytes(pid) > 0)
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for("the end", lambda: has_ended(pid))
    wait_for("the end of the node process", lambda: not node_processes(pid))
    assert not segments(pid)


def test_captive_run(tmp_path: Path) -> None:
    command = ["nbdkit", "-U", "-", "python", str(PLUGIN), "size=1M", "pool=1M"]
    done = subprocess.run(
        [*command, "--run", 'nbdinfo --size "$uri"'],
        env=environment(tmp_path), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.stdout == f"{1 << 20}\n", done.stderr


# ---- what it is made of ----------------------------------------------------------------------


@pytest.mark.parametrize(("options", "threads_each"), [((), 1), (("-t", "16"), 16)])
def test_serving_threads_are_fit_for_swap(
    tmp_path: Path, options: tuple[str, ...], threads_each: int
) -> None:
    """All that share the GIL in one scheduling class; no I/O for their own memory."""
    with Server(tmp_path, "size=1M", "pool=1M", options=options) as server:
        before = {thread.tid for thread in server.threads()}
        for _ in range(3):
            server.connect().pwrite(b"x" * PAGE, 0)

        def workers() -> bool:  # the last of a connection's may start after its first answer
            return len({thread.tid for thread in server.threads()} - before) >= 3 * threads_each

        wait_for("the connections' threads", workers)
        assert_fit_for_swap(server)


def assert_fit_for_swap(server: Server) -> None:
    everybody = server.threads()
    # The core's own threads run no Python: they give way, and are lent priority by locks.
    # But the crew is waited for by those that serve, so it is one of them.
    own = [t for t in everybody if t.name.startswith("zc-") and t.name != "zc-crew"]
    assert {thread.policy for thread in own} == {os.SCHED_OTHER}
    threads = [thread for thread in everybody if thread not in own]
    assert len({thread.policy for thread in threads}) == 1
    if has_capability(CAPABILITIES["CAP_SYS_NICE"][0]):
        assert threads[0].policy == os.SCHED_FIFO
    noio = {bool(thread.flags & PF_MEMALLOC_NOIO) for thread in everybody}
    assert noio == {has_capability(CAPABILITIES["CAP_SYS_RESOURCE"][0])}
    if has_capability(CAPABILITIES["CAP_SYS_RESOURCE"][0]):
        assert Path(f"/proc/{server.pid}/oom_score_adj").read_text() == "-1000\n"
    # The node process sheds it all.
    assert os.sched_getscheduler(server.node_pid) == os.SCHED_OTHER
    assert Path(f"/proc/{server.node_pid}/oom_score_adj").read_text() == "0\n"


def test_without_realtime(tmp_path: Path) -> None:
    with Server(tmp_path, "size=1M", "pool=1M", "realtime=no") as server:
        assert {thread.policy for thread in server.threads()} == {os.SCHED_OTHER}


def test_locked_memory_is_shown(server: Server) -> None:
    server.connect()

    def told() -> bool:  # the connection's thread may still be taking its memory
        return bool(server.rpc("stats")["server_locked_bytes"] == locked_bytes(server.pid))

    wait_for("the kernel's own number", told)
    if has_capability(CAPABILITIES["CAP_IPC_LOCK"][0]):
        assert server.rpc("stats")["server_locked_bytes"] > 0


def test_no_python_loop_in_the_server(server: Server) -> None:
    """While others poll the RPC, the threads that can run Python are not woken once."""
    server.connect().pwrite(b"x" * PAGE, 0)
    keepers = wait_for(
        "the thread that waits for the node",
        lambda: [thread.tid for thread in server.threads() if thread.syscall == SYS_WAITID],
    )
    assert len(keepers) == 1

    def switches() -> dict[int, int]:
        python = {server.pid, *keepers}
        return {thread.tid: thread.switches for thread in server.threads() if thread.tid in python}

    def at_rest() -> bool:  # the thread that has just accepted a connection goes back to sleep
        before = switches()
        time.sleep(0.1)
        return switches() == before

    wait_for("threads at rest", at_rest)
    before = switches()
    for _ in range(200):
        server.rpc("stats")
    assert switches() == before


# ---- the RPC ---------------------------------------------------------------------------------


def test_generic_messagepack_rpc_client(server: Server) -> None:
    """Nothing of ours: a socket, the msgpack package, and the specification."""
    server.connect().pwrite(b"page" * 1024, 8 * PAGE)
    unpacker = msgpack.Unpacker()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(server.control))

        def ask(msgid: int, method: str, *params: object) -> tuple[Any, Any]:
            sock.sendall(msgpack.packb([0, msgid, method, params]))
            while True:
                for kind, answered, error, result in unpacker:
                    assert (kind, answered) == (1, msgid)
                    return error, result
                unpacker.feed(sock.recv(65536))

        error, ping = ask(1, "ping")
        assert error is None
        assert ping["server_pid"] == server.pid
        assert ping["pid"] == server.node_pid
        assert ping["version"]
        assert ping["uptime_seconds"] >= 0
        _, stats = ask(2, "stats")
        assert stats.pop("histograms").keys() == {histogram.name for histogram in HISTOGRAMS}
        assert stats.keys() == {counter.name for counter in COUNTERS}
        assert all(isinstance(value, int) for value in stats.values())
        assert stats["logical_bytes"] == stats["succ_stores"] * PAGE == PAGE
        _, config = ask(4000000000, "config")
        assert (config["size"], config["pool"]) == (16 << 20, 4 << 20)
        assert config["control"] == str(server.control)
        _, health = ask(3, "health")
        assert health["status"] in ("ok", "degraded", "critical")
        error, result = ask(4, "reboot")
        assert result is None
        assert error["code"] == "unknown_method"
        methods = "config, devices, drain, drain_lent, health, owners, peers, ping, set, stats"
        assert methods in error["message"]
        error, _ = ask(5, "ping", 1)
        assert error["code"] == "bad_params"
        sock.sendall(msgpack.packb([2, "hello", []]))  # a notification is nothing to answer
        assert ask(6, "ping")[0] is None


def test_control_socket_is_the_owners(server: Server) -> None:
    assert server.control.stat().st_mode & 0o777 == 0o600


# ---- the log ---------------------------------------------------------------------------------


def test_a_flood_of_failures_is_thinned_out_and_waits_for_nobody(tmp_path: Path) -> None:
    """The reader of the log stands still, as if swapped out to us: pages are served."""
    with Server(tmp_path, "size=4M", "pool=1M") as server:
        handle = server.connect()
        noise = os.urandom(PAGE)
        handle.pwrite(noise, 0)

        def refused(times: int) -> int:
            count = 0
            while count < times:
                for page in range(1024):
                    with contextlib.suppress(nbd.Error):
                        handle.pwrite(noise, page * PAGE)
                        continue
                    count += 1
            return count

        refused(500)
        wait_for("the log", lambda: "No space left on device" in server.log())
        os.kill(server.node_pid, signal.SIGSTOP)
        try:
            refused(3000)  # of about 100 bytes each: the pipe holds 4096
            assert handle.pread(PAGE, 0) == noise
        finally:
            os.kill(server.node_pid, signal.SIGCONT)
        assert server.ping()
        server.end()
        assert server.log().count("No space left on device") < 100
        wait_for("the sum", lambda: "more lines like one above were left out" in server.log())


# ---- ends ------------------------------------------------------------------------------------


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    with Server(tmp_path, "size=16M", "pool=4M") as server:
        server.connect().pwrite(b"x" * PAGE, 0)
        assert len(segments(server.pid)) == 1
        assert server.end() == 0
        assert not server.socket.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["server.log"]


def test_killed_node_is_started_again(server: Server) -> None:
    handle = server.connect()
    handle.pwrite(b"kept" * 1024, 0)
    for _ in range(2):
        old = server.ping()["pid"]
        os.kill(old, signal.SIGKILL)
        assert handle.pread(PAGE, 0) == b"kept" * 1024
        wait_for("another node process", functools.partial(answers_other_than, server, old))
    assert server.rpc("stats")["loads"] >= 2
    assert len(node_processes(server.pid)) == 1
    assert server.log().count("the node process ended (signal 9)") == 2


def test_server_serves_without_any_node(tmp_path: Path) -> None:
    """No interpreter for the node: said once in a while, pages are served all the same."""
    broken = tmp_path / "python"
    command = ["nbdkit", "-f", "-U", str(tmp_path / "s"), "python", str(PLUGIN), "size=1M"]
    env = environment(tmp_path) | {"ZCACHE_PYTHON": str(broken)}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([*command, "pool=1M"], env=env, stderr=log)
    try:
        wait_for("the socket", lambda: is_listening(tmp_path / "s"))
        handle = nbd.NBD()
        handle.connect_unix(str(tmp_path / "s"))
        handle.pwrite(b"x" * PAGE, 0)
        assert handle.pread(PAGE, 0) == b"x" * PAGE
        wait_for("the log line", lambda: "No such file" in (tmp_path / "log").read_text())
        handle.shutdown()
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_killed_server_leaves_no_orphan(tmp_path: Path) -> None:
    with Server(tmp_path, "size=16M", "pool=4M") as server:
        server.connect().pwrite(b"x" * PAGE, 0)
        server.process.kill()
        server.process.wait()
        wait_for("the end of the node process", lambda: not node_processes(server.pid))
        wait_for("the end of the memory file", lambda: not segments(server.pid))
        assert not server.control.exists()
    with Server(tmp_path, "size=16M", "pool=4M") as server:  # its stale socket is no obstacle
        assert server.connect().pread(PAGE, 0) == bytes(PAGE)


def test_named_memory_file_outlives_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    words = ("size=16M", "pool=4M", f"memory=t7-{os.getpid()}")
    try:
        with Server(tmp_path, *words) as server:
            (shmid,) = segments(server.pid)
            server.connect().pwrite(b"survivor" * 512, 7 * PAGE)
            code, _, log = run_nbdkit(tmp_path, *words, options=("-U", str(tmp_path / "x.sock")))
            assert code != 0
            assert "belongs to a running server" in log
            server.process.kill()
            server.process.wait()
            wait_for("the end of the node process", lambda: not node_processes(server.pid))
            other = ("size=32M", *words[1:])
            code, _, log = run_nbdkit(tmp_path, *other, options=("-U", str(tmp_path / "y.sock")))
            assert code != 0
            assert "was made with size=16M" in log
            with Server(tmp_path, *words) as successor:
                assert successor.connect().pread(PAGE, 7 * PAGE) == b"survivor" * 512
                assert successor.end() == 0
            memfile.remove(shmid)
    finally:
        for row in memfile.leftovers():
            if row.name == words[2].partition("=")[2]:
                memfile.remove(row.shmid)


def test_connections_come_and_go(server: Server) -> None:
    """Opened and closed under load by several clients: the others notice nothing."""
    errors: list[object] = []

    def visitor(number: int) -> None:
        try:
            for turn in range(10):
                handle = nbd.NBD()
                handle.connect_unix(str(server.socket))
                data = bytes([number, turn]) * 2048
                handle.pwrite(data, number * PAGE)
                if handle.pread(PAGE, number * PAGE) != data:
                    errors.append((number, turn))
                if turn % 2:
                    handle.shutdown()  # the other half just vanishes
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=visitor, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    wait_for("the end of closed connections' threads", lambda: len(server.threads()) < 16)


def answers_other_than(server: Server, pid: int) -> bool:
    ping = server.ping()
    return bool(ping) and ping["pid"] != pid


def locked_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmLck of {pid}")


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
