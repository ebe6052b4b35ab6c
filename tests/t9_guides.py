"""Every command in the README's "Watch it" and in the guides runs, against a real server.

A command is a line that is indented by four spaces.  Those that need the kernel's nbd
module and a device of their own are run by the swap lab (t8_swaplab.py, t8_updown.py) in their own
words; here they are only recognised, so that a new one cannot slip in untested.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import health
from cluster.link import BlockingClient
from plugin import attach, tlsfiles
from plugin.dialer import Generations, dial
from plugin.relays import Relays
from plugin.statsfs import DEVICE
from tests.plugin_helpers import ROOT, Server, environment, segments, wait_for
from zcache_core.errors import ControlError

GUIDES = sorted((ROOT / "docs/guide").glob("*.md"))
IN_THE_LAB = (
    *("modprobe nbd", "nbd-client ", "mkswap ", "swapon ", "swapoff ", "sysctl "),
    *("zcache up ", "zcache down"),
)
PAGE = 4096


def commands(text: str) -> list[str]:
    """Without comments."""
    lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def watch_it() -> str:
    readme = (ROOT / "README.md").read_text()
    return readme[readme.index("## Watch it") : readme.index("## The server alone")]


PAGES = {"README.md": watch_it()} | {guide.name: guide.read_text() for guide in GUIDES}


class Place:
    """A folder to run commands in, beside a server, with names of the documents led there."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder, self.apart = server, folder, False
        self.metrics = wait_for("metrics", lambda: server.rpc("config")["metrics"])
        for name in (".venv", "deploy", "plugin", "cluster", "zcache_core"):
            (folder / name).symlink_to(ROOT / name)
        path = [str(ROOT / ".venv/bin"), str(ROOT / "build/unpacked/usr/bin"), os.environ["PATH"]]
        self.env = environment(folder) | {"PATH": ":".join(path), "PYTHONPATH": str(ROOT)}

    def led_here(self, command: str) -> str:
        """The command with this server's addresses, and an end for what would go on."""
        command = command.replace("/run/zcache/zcache.ctl", str(self.server.control))
        command = command.replace("127.0.0.1:9469", self.metrics)
        command = command.replace(" /mnt", " counters")
        if "--name guide" in command or self.apart:
            self.apart = "stop" not in command  # a server of the page's own
            if command == "zcache status":
                command += f" --control {self.own_control()}"
            return command.replace("size=8G pool=2G", "size=16M pool=4M")
        if re.match(r"\S*zcache (status|top|health|drain|set|record|stats-fs)", command):
            if "--control" not in command:
                command += f" --control {self.server.control}"
            if " top" in command:
                command += " --once --interval 0.1"
            if " record" in command:
                command += " --count 3 --interval 0.1"
        if command == "zcache estimate --all":
            command += " --pages 512"
        return command

    def own_control(self) -> Path:
        """The control socket of the server that `zcache serve` started, once it answers."""
        control = self.folder / "guide.ctl"

        def answers() -> bool:
            with contextlib.suppress(ControlError), BlockingClient(control) as client:
                return bool(client.call("ping"))
            return False

        wait_for("the node process after the upgrade", answers)
        return control

    def run(self, command: str) -> None:
        """It has to end well; this machine may be degraded (health), or not fit (check)."""
        done = subprocess.run(
            ["bash", "-c", self.led_here(command)],
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        fine = (0, 1) if re.search("zcache (health|check)", command) else (0,)
        assert done.returncode in fine, f"{command}: {done.returncode} {done.stdout} {done.stderr}"

    def mounted(self, command: str) -> subprocess.Popen[bytes]:
        """`zcache stats-fs`, in the background until it is unmounted."""
        folder = self.folder / "counters"
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen(
            ["bash", "-c", "exec " + self.led_here(command)], cwd=self.folder, env=self.env
        )
        wait_for("the mount", lambda: os.path.ismount(folder))
        return process


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    words = ("size=16M", "pool=4M", f"disk={tmp_path / 'disk'}", "disk_size=40M")
    with Server(tmp_path, *words, "metrics=127.0.0.1:0") as server:
        handle = server.connect()
        for page in range(50):
            handle.pwrite((b"page %4d " % page * 410)[:PAGE], page * PAGE)
        (tmp_path / "place").mkdir()
        yield Place(server, tmp_path / "place")


def may_mount() -> bool:
    return DEVICE.exists() and os.geteuid() == 0


def untold(name: str) -> str | None:
    """Why a command cannot be run here; None when it can."""
    program = name.split()[0]
    if program == "promtool" and not (ROOT / "build/unpacked/usr/bin/promtool").exists():
        return "no Prometheus in build/unpacked"
    if program == "curl" and shutil.which("curl") is None:
        return "curl is not installed"
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("vm.md", "rack.md")])
def test_every_command_runs(page: str, place: Place) -> None:
    mounted: list[subprocess.Popen[bytes]] = []
    (place.folder / "counters").mkdir()
    found = commands(PAGES[page])
    try:
        if page in ("failures.md",):
            place.run("zcache record hour.zrec")
        for command in found:
            if command.startswith(IN_THE_LAB) or untold(command):
                continue
            if "stats-fs" in command:
                if may_mount():
                    mounted.append(place.mounted(command))
            elif command == "mkdir counters":
                assert (place.folder / "counters").is_dir()
            elif not command.startswith(("grep -r . counters", "umount")) or mounted:
                place.run(command)
    finally:
        if place.apart:
            place.run("zcache stop --force --name guide")
        for process in mounted:
            if process.poll() is None and os.path.ismount(place.folder / "counters"):
                process.send_signal(signal.SIGINT)
            process.wait(30)
    assert found


def test_the_host_of_a_virtual_machine(tmp_path: Path) -> None:
    """Its server starts as it is written, but for the address and the sizes."""
    (command,) = [c for c in commands(PAGES["vm.md"]) if c.startswith("nbdkit")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for old, new in (("192.168.122.1", "127.0.0.1"), ("10809", str(port)), ("size=4G", "size=16M"),
                     ("pool=1G", "pool=4M"), ("/run/zcache", str(tmp_path))):  # fmt: skip
        assert old in command
        command = command.replace(old, new)
    process = subprocess.Popen(
        ["bash", "-c", "exec " + command], cwd=ROOT, env=environment(tmp_path)
    )
    try:
        uri = f"nbd://127.0.0.1:{port}"
        asked = ["nbdinfo", "--size", uri]

        def answers() -> bool:
            done = subprocess.run(asked, capture_output=True, check=False, timeout=30)
            return done.stdout == b"16777216\n"

        wait_for("the server", answers)
        wait_for("its control socket", (tmp_path / "vm.ctl").exists)
    finally:
        process.terminate()
        process.wait(30)
    wait_for("its end", lambda: not (tmp_path / "vm.ctl").exists())
    assert not segments(process.pid)


def test_the_host_of_a_virtual_machine_with_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates, server, and the guest's connection to it, as the guide has them."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {
        "192.168.122.1:10809": f"127.0.0.1:{port}", "192.168.122.1": "127.0.0.1",
        "cluster-init": f"cluster-init {tmp_path}/cluster",
        "cluster-add": f"cluster-add --folder {tmp_path}/cluster",
        "--name vm": f"--name vm-{os.getpid()}", "size=4G pool=1G": "size=16M pool=4M",
    }  # fmt: skip
    lines = []
    for line in commands(PAGES["vm.md"]):
        whose = "guest" if " attach " in line else "host"  # each has its own in /etc/zcache/tls
        line = line.replace("/etc/zcache/tls", f"{tmp_path}/cluster/{whose}")
        for old, new in told.items():
            line = line.replace(old, new)
        lines.append(line)
    host = [line for line in lines if re.match(r"zcache (cluster-|serve|stop)", line)]
    assert [line.split()[1] for line in host] == [
        "cluster-init", "cluster-add", "cluster-add", "serve", "stop",
    ]  # fmt: skip
    env = environment(tmp_path) | {"PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    try:
        for line in host[:-1]:
            done = subprocess.run(
                ["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, f"{line}: {done.stderr}"
        (line,) = [line for line in lines if line.startswith("zcache attach")]
        _, _, uri, _, folder = line.split()
        relays = Relays(tlsfiles.message(folder))
        link = dial(attach.parse_uri(uri), Generations(), relays)
        with link.sock:
            assert link.size_bytes == 16 << 20
        relays.close()
    finally:
        subprocess.run(["bash", "-c", host[-1]], env=env, check=True, timeout=60)


def test_a_rack(tmp_path: Path) -> None:
    """Every command in its order, but for addresses, folders and sizes; one peer lends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    control = tmp_path / "node.ctl"
    memory = f"lent-{os.getpid()}"
    env = environment(tmp_path) | {"PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    peers = ",".join(f"rack-{n}:7900" for n in (7, 8, 9))
    led = {
        "cluster-init": f"cluster-init {tmp_path / 'ca'}", "10.0.0.7:7900": f"127.0.0.1:{port}",
        "cluster-add rack-7": f"cluster-add rack-7 --folder {tmp_path / 'ca'}",
        "/etc/zcache/tls": str(tmp_path / "tls"), "4G --memory lent": f"24M --memory {memory}",
        "/run/zcache/node.ctl": str(control), "size=8G pool=2G": "size=16M pool=4M",
        peers: f"127.0.0.1:{port}",
    }  # fmt: skip
    lender: subprocess.Popen[bytes] | None = None

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout

    def there() -> bool:
        return "1 of 1 answer" in run(f"zcache status --control {tmp_path / 'guide.ctl'}")

    try:
        for command in commands(PAGES["rack.md"]):
            for old, new in led.items():
                command = command.replace(old, new)
            if "--listen" in command:
                (tmp_path / "tls").mkdir()
                shutil.copy(tmp_path / "ca/rack-7/node.pem", tmp_path / "tls/node.pem")
                words = f"exec {command} --control {control}"
                lender = subprocess.Popen(["bash", "-c", words], env=env, cwd=ROOT)
                wait_for("the node", control.exists)
            elif command == "zcache status":
                wait_for("the peer", there)
            elif "node drain" in command:
                run(f"{command} --control {control}")
            elif command == "zcache stop --name guide":
                run(command)
            else:
                assert run(command)
    finally:
        subprocess.run(["bash", "-c", "zcache stop --force --name guide"], env=env, timeout=100)
        if lender is not None:
            lender.terminate()
            lender.wait(30)
    assert lender is not None


def test_every_other_command_is_known() -> None:
    """What is not run here is one of those that the lab runs."""
    known = ("zcache ", ".venv/bin/zcache ", "curl ", "promtool ", "grep ", "mkdir ", "umount ",
             "python3 ", "nbdkit ", *IN_THE_LAB)  # fmt: skip
    for page, text in PAGES.items():
        for command in commands(text):
            assert command.startswith(known), f"{page}: {command}"


def test_every_rule_of_health_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["failures.md"], re.MULTILINE)
    assert sorted(rows) == sorted(rule.__name__ for rule in health.RULES)
