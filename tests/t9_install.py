"""Installed somewhere else it works, its units are sound, and the Debian package comes and goes.

The tree that is installed here has a prefix of its own; what runs from it gets nothing
from this folder or from .venv.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNITS = (
    "zcache-server@.service", "zcache@.service", "zcache-nbd@.service", "zcache-node.service",
)  # fmt: skip


def run(*command: str | Path, fail: bool = False, env: Mapping[str, str] | None = None) -> str:
    """What it printed, both streams; it must end well, or with `fail` badly."""
    clean = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **(env or {})}
    done = subprocess.run(
        command, cwd="/", env=clean, text=True, timeout=60, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode != 0) == fail, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zcache as `make install PREFIX=...` leaves it."""
    prefix = tmp_path_factory.mktemp("usr")
    run(ROOT / "deploy/install.sh", "install", env={"PREFIX": str(prefix)})
    return prefix


def test_installed_server_serves(prefix: Path, tmp_path: Path) -> None:
    """From the private folder alone: command, supervisor, nbdkit's plugin, node process."""
    zcache = prefix / "bin/zcache"
    assert re.fullmatch(r"zcache \d+\.\d+\.\d+.*\n", run(zcache, "version"))
    env = {"ZCACHE_RUNTIME_DIR": str(tmp_path)}
    config = tmp_path / "x.toml"
    config.write_text('size = "64M"\npool = "16M"\n[swap]\npriority = 5\n')
    try:
        run(zcache, "serve", "--name", "x", "--detach", "--config", config, env=env)
        told = json.loads(run(zcache, "status", "--json", "--control", tmp_path / "x.ctl", env=env))
        server = Path(f"/proc/{told['ping']['pid']}")
        modules = [line.split()[-1] for line in (server / "maps").read_text().splitlines()]
        ours = {path for path in modules if "zcache_core" in path or "msgpack" in path}
        assert ours
        assert all(path.startswith(str(prefix / "lib/zcache")) for path in ours), ours
    finally:
        run(zcache, "stop", "--name", "x", env=env)


def test_installed_node_lends(prefix: Path, tmp_path: Path) -> None:
    """Certificates and all, from the private folder alone."""
    zcache = prefix / "bin/zcache"
    env = {"PATH": os.environ["PATH"], "ZCACHE_RUNTIME_DIR": str(tmp_path)}
    run(zcache, "cluster-init", tmp_path / "ca")
    run(zcache, "cluster-add", "rack", "--folder", tmp_path / "ca")
    words = ("--listen", "127.0.0.1:0", "--donate", "16M", "--tls", str(tmp_path / "ca/rack"))
    with subprocess.Popen(
        [zcache, "node", *words], cwd="/", env=env, stdout=subprocess.PIPE, text=True
    ) as node:
        try:
            assert node.stdout is not None
            assert node.stdout.readline().startswith("zcache node: rack lends")
            modules = Path(f"/proc/{node.pid}/maps").read_text().split()
            ours = {path for path in modules if "zcache_core" in path or "cryptography" in path}
            assert ours
            assert all(path.startswith(str(prefix / "lib/zcache")) for path in ours), ours
        finally:
            node.terminate()
    assert node.returncode == 0


def test_installing_over_an_older_one_and_away(tmp_path: Path) -> None:
    """What an older version had is gone; uninstall leaves nothing but folders."""
    env = {"PREFIX": "/usr", "DESTDIR": str(tmp_path)}
    old = tmp_path / "usr/lib/zcache/plugin/old.py"
    old.parent.mkdir(parents=True)
    old.touch()
    run(ROOT / "deploy/install.sh", "install", env=env)
    assert not old.exists()
    text = (tmp_path / "usr/bin/zcache").read_text()
    assert '"/usr/lib/zcache"' in text
    assert str(tmp_path) not in text
    run(ROOT / "deploy/install.sh", "uninstall", env=env)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_a_relative_prefix_is_refused() -> None:
    assert "absolute" in run(
        ROOT / "deploy/install.sh", "install", fail=True, env={"PREFIX": "usr"}
    )


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="no systemd-analyze (Debian package systemd)"
)
def test_units_are_sound(prefix: Path) -> None:
    """systemd itself reads them: no unknown setting, no missing program."""
    folder = prefix / "lib/systemd/system"
    for unit in UNITS:
        said = run(
            "systemd-analyze", "verify", "--man=no", "--recursive-errors=no", folder / unit,
            env={"SYSTEMD_UNIT_PATH": f"{folder}:"},
        )  # fmt: skip
        assert "zcache" not in said, said


def settings(unit: str) -> dict[str, str]:
    """Assignments of a unit file; what is given several times is one list."""
    text = (ROOT / "deploy/systemd" / unit).read_text()
    found: dict[str, str] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found[name] = f"{found[name]} {value}" if name in found else value
    return found


def test_units_keep_the_order_and_the_memory() -> None:
    """What swap's life hangs on, should somebody tidy up."""
    server, swap = settings(UNITS[0]), settings(UNITS[1])
    for unit in (server, swap):
        assert unit["OOMScoreAdjust"] == "-1000"
        assert unit["MemorySwapMax"] == unit["LimitCORE"] == "0"
        assert unit["LimitMEMLOCK"] == "infinity"
        assert unit["KillMode"] == "process"
        assert unit["DefaultDependencies"] == "no"
        assert {"shutdown.target", "umount.target"} <= set(unit["Conflicts"].split())
    # what starts after is stopped before
    assert "zcache-server@%i.service" in swap["After"].split()
    assert "swap.target" in swap["Before"].split()
    sleeps = {"systemd-hibernate.service", "systemd-hybrid-sleep.service"}
    assert sleeps <= set(swap["Conflicts"].split()) & set(swap["Before"].split())
    assert "Requires" not in swap
    assert "BindsTo" not in swap
    others = settings(UNITS[2])
    assert others["User"] == "zcache"
    assert "DynamicUser" not in others, "its memory file would go with a supervisor"
    assert others["KillMode"] == "process"
    assert others["AmbientCapabilities"] == others["CapabilityBoundingSet"]
    assert others["MemorySwapMax"] == others["LimitCORE"] == "0"
    assert server["RefuseManualStop"] == "yes"
    assert (server["Type"], server["NotifyAccess"]) == ("notify", "main")


def test_debian_package_comes_and_goes(tmp_path: Path) -> None:
    """dpkg installs it into a root of its own and removes it; under live swap it refuses."""
    name = run(ROOT / "deploy/deb.sh").split()[-1]
    package = ROOT / name
    depends = run("dpkg-deb", "-f", package, "Depends")
    assert {"nbdkit", "nbdkit-plugin-python"} <= set(re.findall(r"[a-z0-9.-]+", depends))
    root = tmp_path / "root"
    for folder in ("info", "updates", "triggers"):
        (root / "var/lib/dpkg" / folder).mkdir(parents=True)
    (root / "var/lib/dpkg/status").touch()
    dpkg = (
        "dpkg", f"--root={root}", f"--log={tmp_path}/log", "--force-not-root", "--force-depends",
        "--force-script-chrootless",
    )  # fmt: skip
    path = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    run(*dpkg, "-i", package, env=path)
    installed = root / "usr/lib/zcache"
    assert list(installed.glob("zcache_core/store*.so"))
    assert os.access(installed / "plugin/zcache-relay", os.X_OK)
    assert (root / "usr/lib/systemd/system/zcache@.service").exists()

    swaps, blocks = tmp_path / "swaps", tmp_path / "block"
    swaps.write_text("Filename\tType\tSize\tUsed\tPriority\n/dev/nbd3 partition\t8\t0\t100\n")
    (blocks / "nbd3").mkdir(parents=True)
    (blocks / "nbd3/backend").write_text("zcache:/run/zcache/zcache\n")
    live = {"ZCACHE_SWAPS": str(swaps), "ZCACHE_SYS_BLOCK": str(blocks)}
    assert "run 'zcache down' first" in run(*dpkg, "-r", "zcache", fail=True, env=path | live)
    assert installed.exists()
    (blocks / "nbd3/backend").write_text("somebody else\n")
    run(*dpkg, "-r", "zcache", env=path | live)
    assert not installed.exists()
    assert not (root / "usr/bin/zcache").exists()
