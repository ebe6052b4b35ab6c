"""`zcache node` as a process: lends, is killed and finds all again, is drained, is asked."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import lending
from cluster.link import BlockingClient
from cluster.peeraddress import PeerAddress
from cluster.peerwire import Code, LinkState, pack
from plugin.fitness import CAPABILITIES, has_capability
from tests.donor_helpers import LENT_BYTES, linked, make_pages, make_sealed, wait_until
from tests.plugin_helpers import ROOT, WAIT_S, environment
from zcache_core import memfile
from zcache_core.errors import MemoryFileError
from zcache_core.memfile import exists

COMMAND = [str(ROOT / ".venv/bin/zcache")]


class Node:
    """One `zcache node`, on a Unix socket; started again with the same words."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.address = folder, PeerAddress.read("peers", str(folder / "peer"))
        self.control = folder / "node.ctl"
        self.words = ["node", "--listen", str(folder / "peer"), "--donate", "16M", *words]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *self.words],
            env=environment(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "lends 16777216 bytes on" in line, self.process.stderr

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)

    def locked_kib(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmLck:")[2].split()[0])

    def end(self) -> str:
        """SIGTERM; what it said."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=WAIT_S)[1]
        assert self.process.returncode == 0, said
        return said

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words],
            env=environment(self.folder),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )

    def stats(self) -> dict[str, Any]:
        with BlockingClient(self.control) as client:
            stats: dict[str, Any] = client.call("stats")
            return stats


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    made = Node(tmp_path, "--memory", "lent", "--quota", "8M")
    yield made
    made.kill()
    if (shmid := memfile.find("lent")) is not None:
        memfile.remove(shmid)


@pytest.mark.timeout(180)
def test_killed_and_drained(node: Node, rng: random.Random) -> None:
    """kill -9, and again: every page is found; a drain empties it while its owner goes on."""

    async def test() -> None:
        async with linked(node.address) as link:
            pages, epoch = make_pages(rng, 100), link.epoch
            sealed = [make_sealed(rng, page) for page in pages]
            assert await link.put(pack(pages), b"".join(sealed)) == bytes(100)
            for _ in range(2):
                node.kill()
                await wait_until("down", lambda: link.state is not LinkState.UP)
                await asyncio.to_thread(node.start)
                await wait_until("up again", lambda: link.state is LinkState.UP)
                assert link.epoch == epoch, "it has not come back empty"
                assert (await link.get(pack(pages)))[1] == b"".join(sealed)

            said = await asyncio.to_thread(node.run, "status", "--control", str(node.control))
            assert "zcache node" in said.stdout
            assert "owner: 100 pages in" in said.stdout
            told = await asyncio.to_thread(
                node.run, "status", "--json", "--control", str(node.control)
            )
            status = json.loads(told.stdout)
            assert status["stats"]["foreign_pers_pages"] == 100
            assert status["config"]["quota"] == 8 << 20
            assert link.offer.room_bytes < 8 << 20
            if has_capability(CAPABILITIES["CAP_IPC_LOCK"][0]):
                assert node.locked_kib() > 0, "what it needs to answer is not swapped out"

            drops: set[asyncio.Task[int]] = set()
            link.on_recall = lambda _, records, __: drops.add(
                asyncio.ensure_future(link.drop(records))
            )
            drained = await asyncio.to_thread(node.run, "node", "drain")
            assert drained.returncode == 0, drained.stderr
            assert "The node holds nothing, and takes nothing" in drained.stdout
            codes = await link.put(pack(pages[:1]), sealed[0])
            assert list(codes) == [Code.LEAVING]
            off = await asyncio.to_thread(node.run, "node", "drain", "--off")
            assert "Draining is off; 0 pages are here." in off.stdout
            assert await link.put(pack(pages[:1]), sealed[0]) == b"\0"
            assert await link.drop(pack(pages[:1])) == 1

    asyncio.run(test())
    assert node.stats()["foreign_drops"] == 101
    assert node.stats()["punch_failures"] == 0, "what is lent is not locked by mlock"
    assert node.end() == ""
    assert not exists("lent"), "it held nothing, so nothing stays"
    assert not node.control.exists()
    assert not (node.folder / "peer").exists()


def test_ended_in_order_it_keeps_what_it_holds(node: Node, rng: random.Random) -> None:
    pages = make_pages(rng, 10)
    sealed = b"".join(make_sealed(rng, page) for page in pages)

    async def put() -> None:
        async with linked(node.address) as link:
            assert await link.put(pack(pages), sealed) == bytes(10)

    async def get() -> None:
        async with linked(node.address) as link:
            assert (await link.get(pack(pages)))[1] == sealed

    asyncio.run(put())
    node.end()
    assert exists("lent")
    node.start()
    asyncio.run(get())
    other = node.run(
        "node", "--listen", "127.0.0.1:0", "--donate", "16M", "--memory", "lent",
        "--control", str(node.folder / "other.ctl"),
    )  # fmt: skip
    assert other.returncode == 5
    assert "belongs to a running server" in other.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--donate", "16M"], 3, "needs --listen and --donate"),
        (["--listen", "127.0.0.1:0", "--donate", "1M"], 4, "lend 16777216 or more"),
        (["--listen", "127.0.0.1:0", "--donate", "99%"], 3, "no RAM of its own"),
        (["--listen", "0.0.0.0:0", "--donate", "16M"], 3, "it needs certificates"),
        (["--listen", "nowhere", "--donate", "16M"], 3, "is no address"),
        (["--listen", "127.0.0.1:0", "--donate", "16M", "--tls", "/"], 3, "cluster-add NAME"),
        (["--listen", "127.0.0.1:0", "--donate", "16M", "--abandon", "0"], 3, "number of hours"),
        (["--listen", "127.0.0.1:0", "--donate", "16M", "--metrics", "x"], 3, "--metrics=9469"),
    ],
)
def test_refusals(words: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "node", *words],
        env=environment(tmp_path), capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_start_that_fails_keeps_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short of memory at its restart, say: what it held is there for the next one."""

    class Failing:
        def __init__(self, memory: memfile.MemoryFile) -> None: ...
        def start(self) -> None:
            raise MemoryFileError("there is not enough memory for the tables; lend less")

        def owners(self) -> list[Any]:
            return []

        def stop(self) -> None: ...

    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    lending.open_memory("kept", LENT_BYTES).close()
    at = PeerAddress.read("listen", str(tmp_path / "peer"))
    lender = lending.Lender(lending.LendOptions(at, LENT_BYTES, "rack", "kept"))
    monkeypatch.setattr(lending, "Donation", Failing)
    try:
        with pytest.raises(MemoryFileError):
            asyncio.run(lender.start())
        lender.stop()
        assert exists("kept")
    finally:
        if exists("kept"):
            lending.open_memory("kept", LENT_BYTES).destroy()


def readme_commands() -> list[str]:
    """What the README tells a person to type to lend RAM, in its order."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## Lend RAM to other machines")[2].partition("\n## ")[0]
    lines = re.findall(r"^ {4}(\S.*)$", section, re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def test_the_readme_from_certificates_to_drain(tmp_path: Path) -> None:
    """Its commands run, with this test's places: a CA, one file copied, TLS, status, drain."""

    def led_here(command: str) -> list[str]:
        command = command.replace("10.0.0.7:7900", "127.0.0.1:0").replace("4G", "16M")
        command = command.replace("/run/zcache", str(tmp_path))
        command = command.replace("/etc/zcache/tls", str(joined))
        words = command.removeprefix("zcache ").split()
        if words[0] == "cluster-init":
            words.append(str(tmp_path / "ca"))
        if words[0] == "cluster-add":
            words += ["--folder", str(tmp_path / "ca")]
        return [*COMMAND, *words]

    def run(command: str) -> str:
        done = subprocess.run(
            led_here(command),
            env=environment(tmp_path), capture_output=True, text=True, timeout=WAIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    joined = tmp_path / "joined"
    joined.mkdir()
    lend, status, drain, init, add = readme_commands()
    assert "next: zcache cluster-add NAME" in run(init)
    assert "copy" in run(add)
    (tmp_path / "ca" / "rack-7" / "node.pem").rename(joined / "node.pem")
    process = subprocess.Popen(
        led_here(lend), env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert "rack-7 lends" in process.stdout.readline()
        assert "rack-7" in run(status)
        assert "holds nothing" in run(drain)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
