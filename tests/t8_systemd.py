"""The units under a real systemd: boot, reload, kills, sleep and shutdown of a guest that swaps.

    boot -> swap is on -> hog -> kill -9 supervisor, kill -9 server, reload, suspend -> hog's audit
         -> a server of an ordinary user's, a lender -> hibernation puts swap away -> on again
         -> poweroff with pages out

systemd is the host's own, in a guest without anything else in its /etc.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.corpus import pages_file
from tests.swaplab import fitness, read_hog
from tests.swaplab.booted import Booted
from tests.swaplab.clock import Deadline, until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its guest"
)
ROOT = Path(__file__).parents[1]
SWAP, SERVER, FOREIGN = "zcache@swap0", "zcache-server@swap0", "zcache-nbd@vm"
CONTROL = "/run/zcache/swap0.ctl"
HOG_MIB = 200
NEEDED_CAPABILITIES = 1 << 14 | 1 << 23 | 1 << 24  # IPC_LOCK, SYS_NICE, SYS_RESOURCE


def certificate(folder: Path) -> Path:
    """node.pem of a new cluster's machine."""
    for words in (("cluster-init", folder), ("cluster-add", "vm", "--folder", folder)):
        subprocess.run(
            [sys.executable, "-m", "plugin.cli", *words], cwd=ROOT, check=True, capture_output=True
        )
    return folder / "vm/node.pem"


def files(tmp_path: Path) -> dict[str, str | Path]:
    """/etc of the guest."""
    return {
        "zcache/swap0.toml": 'size = "256M"\npool = "128M"\n',
        "zcache/vm.toml": 'size = "64M"\npool = "16M"\nnbd = "127.0.0.1:10809"\n',
        "zcache/tls/node.pem": certificate(tmp_path / "cluster"),
        "zcache/node.conf": "ARGS=--listen 127.0.0.1:7900 --donate 16M\n",
        "sysctl.d/50-swap.conf": "vm.min_free_kbytes=16384\nvm.watermark_boost_factor=0\n",
    }


def show(guest: Booted, unit: str, name: str) -> str:
    """A property of a unit."""
    return guest.ask(f"systemctl show -P {name} {unit}").strip()


def status(guest: Booted) -> Any:
    return json.loads(guest.ask(f"zcache status --json --control {CONTROL}"))


def served(guest: Booted) -> Any:
    """What the supervisor says of its server."""
    return json.loads(guest.ask("cat /run/zcache/swap0.serve").rstrip("\0"))


def server_pid(guest: Booted) -> int:
    return int(served(guest)["server_pid"])


def wait_for_standby(guest: Booted) -> None:
    until(
        lambda: served(guest)["standby_ready"],
        guest.deadline.nearer(60),
        "a server in reserve",
        0.2,
    )


def process(guest: Booted, pid: int | str) -> dict[str, str]:
    """/proc/PID/status."""
    lines = guest.ask(f"cat /proc/{pid}/status").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def swapped_kib(guest: Booted) -> int:
    """What is out on swap; -1 if there is none."""
    found = re.search(r"^/dev/nbd\S+\s+\w+\s+\d+\s+(\d+)", guest.ask("cat /proc/swaps"), re.M)
    return int(found[1]) if found else -1


def hog(guest: Booted, seconds: int, corpus: Path) -> int:
    """Runs beside what is asked, in a unit of its own, so that it ends like any other service."""
    return guest.begin(
        "systemd-run -q --unit=hog --collect "
        "-p StandardOutput=file:/share/hog.json -p StandardError=null "
        f"/share/hog --mib {HOG_MIB} --corpus /share/{corpus.name} "
        f"--sequential 2 --random {seconds} --audit 5"
    )


def wait_for_swapping(guest: Booted) -> None:
    until(lambda: swapped_kib(guest) > 20 << 10, guest.deadline.nearer(40), "20 MiB of swap", 0.1)


@pytest.mark.timeout(240)
def test_units_under_systemd(tmp_path: Path) -> None:
    corpus = pages_file(64)
    wanted = (("swap.target", f"{SWAP}.service"), ("multi-user.target", f"{FOREIGN}.service"))
    with Booted(tmp_path / "guest", files(tmp_path), wanted, Deadline(220)) as guest:
        os.link(corpus, guest.share / corpus.name)
        boots(guest)
        survives(guest, corpus)
        sleeps(guest)
        serves_others(guest)
        hibernation_puts_swap_away(guest)
        powers_off(guest, corpus)


def boots(guest: Booted) -> None:
    """Swap is on before ordinary services; the processes have what they need and no more."""
    assert swapped_kib(guest) >= 0
    assert json.loads(guest.ask(f"zcache status --json --control {CONTROL}"))
    own = process(guest, server_pid(guest))
    assert int(own["VmLck"].split()[0]) > 0
    assert int(own["CapEff"], 16) == NEEDED_CAPABILITIES
    pid = server_pid(guest)
    assert guest.ask(f"cat /proc/{pid}/oom_score_adj").strip() == "-1000"
    assert re.search(r"core file size +0 +0 ", guest.ask(f"cat /proc/{pid}/limits"))
    assert show(guest, SERVER, "MemorySwapMax") == "0"
    config = guest.ask(f"zcache status --json --control {CONTROL}")
    assert json.loads(config)["config"]["commit"] == "all", "it swaps onto itself"


def survives(guest: Booted, corpus: Path) -> None:
    """A hog's pages are right after ends of the supervisor and of the server, and a reload."""
    hog_started = hog(guest, 30, corpus)
    guest.finish(hog_started)
    wait_for_swapping(guest)
    server, supervisor = server_pid(guest), show(guest, SERVER, "MainPID")
    guest.ask(f"kill -9 {supervisor}")
    until(
        lambda: str(served(guest)["supervisor_pid"]) != supervisor,
        guest.deadline.nearer(30), "another supervisor", 0.2,
    )  # fmt: skip
    assert server_pid(guest) == server, "it has been adopted"
    wait_for_standby(guest)

    guest.ask(f"kill -9 {server}")
    until(lambda: server_pid(guest) != server, guest.deadline.nearer(20), "another server", 0.2)
    server = server_pid(guest)
    wait_for_standby(guest)
    guest.ask(f"systemctl reload {SERVER}")
    assert server_pid(guest) != server
    guest.ask(f"systemctl stop {SERVER}", code=4)  # RefuseManualStop=
    assert swapped_kib(guest) >= 0

    guest.ask("while systemctl -q is-active hog; do busybox usleep 100000; done", limit_s=90)
    report = read_hog((guest.share / "hog.json").read_text())
    assert report.bad == 0
    assert report.lost_page == -1
    assert not re.search(r"I/O error|Write-error|Read-error", guest.said())


def sleeps(guest: Booted) -> None:
    """Suspend with pages out.  Nobody may wait for one just then: such a task cannot be frozen."""
    assert swapped_kib(guest) > 0
    asleep = guest.begin("systemctl start systemd-suspend.service")
    until(lambda: "PM: suspend entry" in guest.said(), guest.deadline.nearer(20), "sleep")
    guest.wake()
    guest.finish(asleep)
    assert "PM: suspend exit" in guest.said()
    assert swapped_kib(guest) > 0


def serves_others(guest: Booted) -> None:
    """zcache-nbd@: an ordinary user's server, with memory locked; zcache-node: a lender."""
    guest.ask(f"systemctl is-active {FOREIGN}")
    control = "/run/zcache-vm/vm.ctl"
    told = json.loads(guest.ask(f"zcache status --json --control {control}"))
    own = process(guest, told["ping"]["server_pid"])
    passwd = guest.ask("getent passwd zcache || grep ^zcache: /etc/passwd").split(":")
    assert own["Uid"].split()[0] == passwd[2] != "0"
    assert int(own["CapEff"], 16) == NEEDED_CAPABILITIES
    assert int(own["VmLck"].split()[0]) > 0
    guest.ask("systemctl start zcache-node")
    assert "lends" in guest.ask("busybox sleep 2; systemctl is-active zcache-node && echo lends")
    guest.ask(f"systemctl stop {FOREIGN} zcache-node")


def hibernation_puts_swap_away(guest: Booted) -> None:
    """Before it, whether or not this kernel can hibernate (it cannot)."""
    guest.ask("systemctl start systemd-hibernate.service || :")
    assert swapped_kib(guest) == -1
    assert show(guest, SWAP, "ActiveState") == "inactive"
    guest.ask(f"systemctl start {SWAP}")
    assert swapped_kib(guest) >= 0


def powers_off(guest: Booted, corpus: Path) -> None:
    """With pages out: services end, swap comes back, the server ends, in that order."""
    guest.finish(hog(guest, 600, corpus))
    wait_for_swapping(guest)
    before = len(guest.said())
    guest.begin("systemctl --no-block poweroff")
    assert guest.wait_off(60) == 0
    said = guest.said()[before:]
    order = (
        "dev-nbd0.swap: Deactivated", "nbd0: NBD_DISCONNECT", f"{SERVER}.service: Deactivated",
        f"{SWAP}.service: Deactivated", "reboot: System halted",
    )  # fmt: skip
    places = [said.index(words) for words in order]
    assert places == sorted(places)
    assert not re.search(r"I/O error|Write-error|Read-error", said)
