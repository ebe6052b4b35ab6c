"""The command `zcache`, as a person and as a script would use it, against a real server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import zcache_core
from plugin import cli, fitness, fitswap, sampling, show, swaparea
from tests.plugin_helpers import ROOT, Server, environment, node_processes, segments, wait_for
from zcache_core import memfile
from zcache_core.counters import COUNTERS
from zcache_core.errors import AttachError, ControlError

PAGE = 4096


def zcache(folder: Path, *words: str) -> tuple[int, str, str]:
    """Run the command: exit code, output, error output."""
    done = subprocess.run(
        [sys.executable, "-m", "plugin.cli", *words],
        cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Servers of other tests or people do not count."""
    everybody = cli.running_controls

    def ours(*program: str) -> list[str]:
        return [path for path in everybody(*program) if path.startswith(str(tmp_path))]

    monkeypatch.setattr(cli, "running_controls", ours)


def test_version(tmp_path: Path) -> None:
    assert zcache(tmp_path, "version") == (0, f"zcache {zcache_core.__version__}\n", "")


def test_usage(tmp_path: Path) -> None:
    code, out, _ = zcache(tmp_path, "--help")
    assert code == 0
    for words in ("status", "check", "version", "exit codes:", "no server answered"):
        assert words in out
    assert zcache(tmp_path)[0] == 2
    assert zcache(tmp_path, "statsu")[0] == 2


def test_status_for_people_and_for_scripts(tmp_path: Path) -> None:
    with Server(tmp_path, "size=16M", "pool=4M") as server:
        handle = server.connect()
        for page in range(100):
            handle.pwrite((b"page %4d " % page * 410)[:PAGE], page * PAGE)
        code, out, err = zcache(tmp_path, "status", "--control", str(server.control))
        assert (code, err) == (0, "")
        for words in (
            f"server {server.pid}", "degraded", "The pool can fill", "400.0 KiB of pages",
            "ratio", "[#", "took", "put ", "of 4.0 MiB", "zbud, lz4", "100 compressed", "locked",
        ):  # fmt: skip
            assert words in out, words
        assert "\x1b" not in out
        code, out, _ = zcache(tmp_path, "status", "--json", "--control", str(server.control))
        assert code == 0
        answer = json.loads(out)
        assert answer["stats"]["pers_zpages"] == 100
        names = {counter.name for counter in COUNTERS} | {"histograms"}
        assert answer["stats"].keys() == names
        assert answer["stats"]["histograms"]["pool_wait"] == {
            "unit": "microseconds", "count": 0, "sum": 0, "buckets": []
        }  # fmt: skip
        assert answer["config"]["pool"] == 4 << 20
        assert answer["health"]["status"] == "degraded"
        assert answer["ping"]["server_pid"] == server.pid
        assert answer["control"] == str(server.control)


def test_status_in_colour_on_a_terminal(tmp_path: Path) -> None:
    with Server(tmp_path, "size=16M", "pool=4M") as server:
        ours, its = pty.openpty()
        command = [sys.executable, "-m", "plugin.cli", "status", "--control", str(server.control)]
        env = environment(tmp_path) | {"TERM": "xterm-256color", "COLUMNS": "120"}
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=its, timeout=60)
        os.close(its)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: read to the end
            while piece := os.read(ours, 65536):
                shown += piece
        os.close(ours)
    assert done.returncode == 0
    assert b"\x1b[" in shown
    assert b"degraded" in shown


def test_the_only_server_is_found(
    tmp_path: Path, only_ours: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ControlError, match="no zcache server is running"):
        cli.the_only_control()
    assert cli.main(["status"]) == 6
    assert "no zcache server is running" in capsys.readouterr().err
    with Server(tmp_path, "size=1M", "pool=1M") as server:
        assert cli.the_only_control() == str(server.control)
        assert cli.main(["status"]) == 0
        assert f"server {server.pid}" in capsys.readouterr().out
        second = tmp_path / "second"
        second.mkdir()
        with Server(second, "size=1M", "pool=1M") as other:
            assert cli.main(["status"]) == 6
            message = capsys.readouterr().err
            assert f"--control {server.control} or --control {other.control}" in message


def test_status_of_nobody(tmp_path: Path) -> None:
    code, out, err = zcache(tmp_path, "status", "--control", str(tmp_path / "x.ctl"))
    assert (code, out) == (6, "")
    assert "nobody serves the control socket" in err
    assert err.count("\n") == 1


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    with Server(tmp_path, "size=1M", "pool=1M") as server:
        command = [sys.executable, "-m", "plugin.cli", "status", "--control", str(server.control)]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            command, cwd=ROOT, env=environment(tmp_path), stdout=writer,
            stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
        os.close(writer)
    assert done.returncode == cli.BROKEN_PIPE
    assert done.stderr == b""


def test_check_tells_what_to_do(tmp_path: Path) -> None:
    code, out, err = zcache(tmp_path, "check")
    assert err == ""
    assert code == (cli.UNFIT if "todo:" in out else 0)
    for subject in (
        "nbdkit", "compiled core", "kernel nbd", "nbd-client", "swapon", "memory lock",
        "capabilities", "pressure (PSI)", "reclaim settings", "nbd netlink", "disk space",
        "other swap",
    ):  # fmt: skip
        assert f"\n{subject} " in f"\n{out}"
    lines = out.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "  todo: " in line:
            assert "-> " in following


def test_check_of_an_unfit_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(fitness, "has_capability", lambda bit: False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    found = {look: look() for look in fitness.LOOKS}
    for look in (
        fitness.nbdkit_present, fitness.nbd_client_present, fitness.lockable_memory,
        fitness.capabilities,
    ):  # fmt: skip
        assert found[look].level == fitness.TODO
        assert found[look].do
    assert "apt install nbdkit" in found[fitness.nbdkit_present].do


def test_root_is_not_told_to_be_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A root that lacks a capability is one in a container: other advice than for a user."""
    monkeypatch.setattr(fitness, "has_capability", lambda bit: bit != 24)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = fitness.capabilities()
    assert found.what == "without CAP_SYS_RESOURCE (the OOM exemption and PR_SET_IO_FLUSHER)"
    assert "as root" not in found.do
    assert "root lacks CAP_SYS_RESOURCE" in found.do
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert fitness.capabilities().do == "run the server as root, or grant CAP_SYS_RESOURCE"


def test_another_python_in_nbdkit(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 0, "version=1.32.5\npython_version=3.99.1\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/usr/bin/nbdkit")
    found = fitness.nbdkit_present()
    assert found.level == fitness.TODO
    assert "embeds Python 3.99.1" in found.what


@pytest.mark.parametrize(
    ("swaps", "zswap", "level", "says"),
    [
        ("", "N", fitness.OK, "none"),
        ("/dev/sda2 partition 8 0 -2", "N", fitness.OK, "/dev/sda2, after zcache"),
        ("/dev/zram0 partition 8 0 200", "N", fitness.NOTE, "--priority 201"),
        ("/dev/nbd0 partition 8 0 100", "N", fitness.OK, "none"),
        ("", "Y", fitness.NOTE, "compressed twice"),
    ],
)
def test_other_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: str, zswap: str, level: str, says: str
) -> None:
    (tmp_path / "swaps").write_text(f"Filename Type Size Used Priority\n{swaps}\n".rstrip() + "\n")
    (tmp_path / "zswap").write_text(f"{zswap}\n")
    monkeypatch.setattr(swaparea, "SWAPS", tmp_path / "swaps")
    monkeypatch.setattr(fitswap, "ZSWAP", tmp_path / "zswap")
    found = fitswap.other_swap()
    assert found.level == level
    assert says in found.what + found.do


def test_netlink_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked only where the module is there; what the kernel says is told."""
    monkeypatch.setattr(fitswap, "MODULE", tmp_path / "nbd")
    assert fitswap.netlink_family().level == fitness.NOTE
    (tmp_path / "nbd").mkdir()

    def refuse() -> NoReturn:
        raise AttachError("no interface")

    monkeypatch.setattr("plugin.nbdnetlink.family", refuse)
    found = fitswap.netlink_family()
    assert (found.level, found.what) == (fitness.TODO, "no interface")
    assert found.do


@pytest.mark.parametrize("by_name", [False, True])
def test_leftovers_of_killed_servers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    by_name: bool,
) -> None:
    name = f"t9-{os.getpid()}"
    named = [name] if by_name else []
    everybodys = memfile.leftovers  # another run's, between two of its servers, is not ours to end
    monkeypatch.setattr(
        memfile, "leftovers", lambda: [row for row in everybodys() if row.name == name]
    )
    with Server(tmp_path, "size=16M", "pool=4M", f"memory={name}") as server:
        (shmid,) = segments(server.pid)
        server.connect().pwrite(b"x" * PAGE, 0)
        _, out, _ = zcache(tmp_path, "check")
        assert name not in out  # in use
        server.process.kill()
        server.process.wait()
        wait_for("the end of the node process", lambda: not node_processes(server.pid))
        try:
            _, out, _ = zcache(tmp_path, "check")
            assert f"memory file {name} (segment {shmid}" in out
            assert "--remove-leftovers" in out
            with monkeypatch.context() as patch:
                patch.setattr("plugin.servestate.attached_device", lambda instance: "/dev/nbd7")
                cli.main(["check", "--remove-leftovers", name])
            assert "is needed by /dev/nbd7" in capsys.readouterr().out
            cli.main(["check", "--remove-leftovers", f"{name}-another"])
            out = capsys.readouterr().out
            assert f"{name}-another is none" in out
            assert segments(server.pid) == [shmid], "only what was named is removed"
            cli.main(["check", "--remove-leftovers", *named])
            out = capsys.readouterr().out
            assert f"memory file {name} (segment {shmid}) removed" in out
            assert not segments(server.pid)
        finally:
            if segments(server.pid):
                memfile.remove(shmid)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (show.size(0), "0 B"),
        (show.size(1023), "1023 B"),
        (show.size(1536), "1.5 KiB"),
        (show.size(5 << 30), "5.0 GiB"),
        (show.size(3 << 50), "3072.0 TiB"),
        (show.count(1234567), "1,234,567"),
        (show.duration(0), "0 s"),
        (show.duration(61), "1 min 1 s"),
        (show.duration(93784), "1 d 2 h"),
        (show.bar(0, 4), "[....]"),
        (show.bar(0.001, 4), "[#...]"),
        (show.bar(0.5, 4), "[##..]"),
        (show.bar(2, 4), "[####]"),
        (show.ratio(1, 0), "-"),
        (show.percent(1, 4), "25 %"),
    ],
)
def test_units(shown: str, text: str) -> None:
    assert shown == text


def test_ctrl_c_in_a_long_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`estimate` reads and changes nothing: it ends with a word, not with a traceback."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "drop_privileges", interrupted)
    assert cli.main(["estimate", "--all"]) == 130
    assert capsys.readouterr().err.endswith("zcache: interrupted\n")


def test_what_the_system_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, said = zcache(tmp_path, "cluster-init", str(tmp_path / "file/ca"))
    assert code
    assert said.count("\n") == 1
    assert "Not a directory" in said
